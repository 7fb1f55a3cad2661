"""The user's cache: where it lies, and how files are put into it whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/lrcompile/NAME`, by default under `~/.cache`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "lrcompile" / name


@contextmanager
def put_whole(path: Path) -> Iterator[Path]:
    """A file to write, in the folder of `path`, that takes its place when the block ends without an error.

    The folder is made if need be.

    Raises:
        OSError: the disk is full or cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
