"""Outputs appear whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import panel
import pytest
import torch
from torch import fx, nn

from lrcompile.emit import verify
from lrcompile.emit.onnx import save
from lrcompile.emit.verify import VerifiedOnnx
from lrcompile.emit.write import _EMITTERS, MARK, Emitted, check_writable, emit
from lrcompile.errors import InputError, VerificationError
from lrcompile.frontend.trace import Traced, trace
from lrcompile.writing import check_file, install, write_text

SUFFIXES = (".onnx", ".pt2", "")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 400)
        self.outer = nn.Linear(400, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.outer(torch.relu(self.inner(x)))}


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace(panel.randomise(Small()), (torch.randn(2, 8),))


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def put(path: Path) -> None:
    """An output of an earlier compile."""
    if path.suffix:
        path.write_text("old")
        return
    path.mkdir()
    (path / "model.py").write_text(MARK + ', old."""')
    (path / "weights.safetensors").write_text("old")


def test_weights_of_a_file_of_their_own_go_with_the_model_that_used_them(
    tmp_path: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    with monkeypatch.context() as small:
        small.setattr("lrcompile.emit.onnx.save", partial(save, external_data_bytes=100))
        emit(path, traced.graph.gm, traced)
    assert data.is_file()
    emit(path, traced.graph.gm, traced)
    assert set(listing(tmp_path)) == {"m.onnx"}
    data.write_text("somebody else's")
    emit(path, traced.graph.gm, traced)
    assert data.read_text() == "somebody else's"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_emits_verified_and_replaces_what_it_wrote(tmp_path: Path, traced: Traced, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    put(path)
    emitted = emit(path, traced.graph.gm, traced)
    assert list(emitted.verification) == [f"{suffix[1:] or 'folder'}_vs_torch"]
    assert all(error is not None and error < 1e-6 for error in emitted.verification.values())
    assert emitted.notes == ()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    first = listing(tmp_path)
    assert not any(content in (b"old", f'{MARK}, old."""'.encode()) for content in first.values())
    emit(path, traced.graph.gm, traced)
    assert listing(tmp_path) == first


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("out.tflite", r"unknown suffix '.tflite'; expected .onnx, .pt2, or a folder"),
        ("missing/out.onnx", r"there is no folder .*missing; make it with mkdir -p"),
        ("file/out.onnx", "file is a file, not a folder"),
        ("folder.onnx", "exists and is not a file"),
        ("file", "is a file where a folder is expected"),
        ("strangers", r"holds files that lrcompile did not write \(data.csv\)"),
        ("project", r"holds files that lrcompile did not write \(model.py\)"),
        ("x" * 300 + ".onnx", "File name too long"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    for folder, file in (("strangers", "data.csv"), ("project", "model.py")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("import torch")
    before = listing(tmp_path)
    with pytest.raises(InputError, match=problem):
        check_writable(tmp_path / name)
    assert listing(tmp_path) == before


def test_paths_that_can_be_written(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.pt2", "folder", "folder.v2/"):
        check_writable(f"{tmp_path}/{name}")
    check_file(tmp_path / "report.json")
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / "empty")
    put(tmp_path / "ours")
    (tmp_path / "ours" / "__pycache__").mkdir()
    check_writable(tmp_path / "ours")
    with pytest.raises(InputError, match="it is a folder"):
        check_file(tmp_path / "ours")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="no permission to write in"):
        check_writable(tmp_path / "a.onnx")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_leaves_no_trace(
    tmp_path: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch, suffix: str, error: BaseException
) -> None:
    def fail(path: Path, gm: fx.GraphModule, traced: Traced) -> tuple[Emitted, Sequence[Path]]:
        path.with_name("partial").write_text("partial")
        raise error

    monkeypatch.setitem(_EMITTERS, suffix or "folder", fail)
    put(tmp_path / f"out{suffix}")
    before = listing(tmp_path)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        emit(tmp_path / f"out{suffix}", traced.graph.gm, traced)
    assert listing(tmp_path) == before
    if expected is InputError:
        assert f"out{suffix} needs about 1 MB; make room or write elsewhere" in str(caught.value)


def test_what_fails_verification_is_not_written(
    tmp_path: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "onnx_error", lambda *args, **kwargs: VerifiedOnnx(0.5))
    with pytest.raises(
        VerificationError, match=r"relative error 5\.00e-01, at most 1e-03 expected; nothing is written"
    ):
        emit(tmp_path / "out.onnx", traced.graph.gm, traced)
    assert listing(tmp_path) == {}


def test_many_files_move_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    names = ("a", "b", "c")
    for name in names:
        (staging / name).write_text(f"new {name}")
        if name != "b":
            (tmp_path / name).write_text(f"old {name}")
    before, replace, calls = listing(tmp_path), os.replace, 0

    def failing(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for stop in range(1, 6):  # noqa: B007, read by failing
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            install([(staging / name, tmp_path / name) for name in names], staging)
        for kept in staging.iterdir():
            if kept.is_dir():
                kept.rmdir()  # empty
        assert listing(tmp_path) == before
    stop = 0
    install([(staging / name, tmp_path / name) for name in names], staging)
    assert [(tmp_path / name).read_text() for name in names] == ["new a", "new b", "new c"]


def test_a_folder_of_the_name_that_what_was_there_is_kept_by(tmp_path: Path, traced: Traced) -> None:
    for _ in range(2):
        emit(tmp_path / "old", traced.graph.gm, traced)
        assert (tmp_path / "old" / "model.py").read_text().startswith(MARK)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "é\n")
    write_text(path, "ü\n")
    assert listing(tmp_path) == {"plan.json": "ü\n".encode()}
    link = tmp_path / "link"
    link.symlink_to(path)
    write_text(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    write_text("/dev/null", "nothing")


FULL = """
import resource, sys
from test_emit_write import Small
from lrcompile.emit.write import emit
from lrcompile.writing import write_text
from lrcompile.errors import InputError
from lrcompile.frontend.trace import trace
import torch

traced = trace(Small().eval(), (torch.randn(2, 8),))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for name in ("out.onnx", "out.pt2", "out"):
    try:
        emit(name, traced.graph.gm, traced)
    except InputError as error:
        print(error)
try:
    write_text("out.json", "x" * 6000)
except InputError as error:
    print(error)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        put(tmp_path / f"out{suffix}")
    before = listing(tmp_path)
    root = Path(__file__).parents[1]
    path = ":".join(str(root / name) for name in (".", "passes", "tests"))
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = ran.stdout.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        f"no space left on the file system of {tmp_path}: {name} needs about 1 MB"
        for name in ("out.onnx", "out.pt2", "out", "out.json")
    ], ran.stderr
    assert listing(tmp_path) == before
