"""Fixtures of several files of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from lrcompile.cache import cache_folder

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("all", settings.get_profile("tests"), max_examples=250)  # `make test-all`
settings.load_profile("tests")
KEPT = ("data", "models")  # what was fetched and trained, which tests read


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own in place of the user's: what older code left there would hide faults."""
    place = tmp_path_factory.mktemp("cache")
    (place / "lrcompile").mkdir()
    for real in map(cache_folder, KEPT):
        if real.is_dir():
            (place / "lrcompile" / real.name).symlink_to(real.absolute())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        yield
