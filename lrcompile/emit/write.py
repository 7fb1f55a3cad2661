"""Writes what was compiled where the user wants it: checked first, verified, and in place only when complete."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError, VerificationError
from lrcompile.frontend.export import OpenAxes
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import weight_bytes

MARK = '"""Written by lrcompile'
"""The first words of every `model.py` that lrcompile writes: a folder with one may be replaced."""

OPSETS = range(18, 24)
_FOLDER_FILES = frozenset(("model.py", "weights.safetensors", "__pycache__"))
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LIMITS = {torch.float16: 5e-2, torch.bfloat16: 2e-1}
_LIMIT = 1e-3
_WIDENED_LIMIT = 5e-2  # half-precision weights that were folded together in another order, then widened


@dataclass(frozen=True)
class Emitted:
    """What was written: the relative error of the file against the compiled model, and what the user should know.

    `refined` are the figures of what was made of an ONNX file before it was put in place.
    """

    verification: Mapping[str, float | None]
    notes: tuple[str, ...] = field(default=())
    refined: Mapping[str, Any] | None = None


Refine = Callable[[Path], tuple[Mapping[str, Any], Sequence[str]]]
"""Replaces a complete and verified ONNX file by another, or leaves it; returns figures and notes."""


def emit(path: str | Path, gm: fx.GraphModule, traced: Traced, refine: Refine | None = None) -> Emitted:
    """Writes a compiled graph as `.onnx`, `.pt2` or a folder, verified against the graph itself.

    The output appears when it is complete and verified; until then, and after any failure, what was at the path
    stays as it was. ONNX weights of more than 2 GB go to `<path>.data`. `refine` has the last word on an ONNX file.

    Raises:
        InputError: the path cannot be written, the disk is full, or the graph cannot be expressed in the format, or
            there is something to refine and no ONNX, or one of more than 2 GB.
        VerificationError: what was emitted does not compute what the graph computes.
    """
    check_writable(path)
    if refine is not None:
        check_onnx(path)
    kind, path = _kind(path), _real(Path(path))
    stale = _data_file(path) if kind == ".onnx" else None
    with _staging(path, weight_bytes(gm)) as folder:
        emitted, written = _EMITTERS[kind](folder / path.name, gm, traced)
        if refine is not None:
            if len(written) > 1:
                raise InputError("--quantize takes models of up to 2 GB of weights; compile this one without it")
            refined, notes = refine(written[0])
            emitted = replace(emitted, refined=refined, notes=(*emitted.notes, *notes))
        _install([(file, path.with_name(file.name)) for file in written], folder)
    if stale is not None and stale.name not in {file.name for file in written}:
        stale.unlink(missing_ok=True)
    return emitted


def check_onnx(path: str | Path | None) -> None:
    """Refuses, where a model is to be quantised, to write anything but ONNX.

    Raises:
        InputError: the path does not end in `.onnx`.
    """
    if path is None or _kind(path) != ".onnx":
        got = "no output" if path is None else f"{path}"
        raise InputError(f"--quantize int8 writes ONNX, got {got}; give --out with a name that ends in .onnx")


def check_opset(opset: int | None, gm: fx.GraphModule) -> int | None:
    """The version of ONNX operators asked for.

    Raises:
        InputError: torch does not write it, or it has no operators in the type of the graph.
    """
    if opset is None:
        return None
    if opset not in OPSETS:
        raise InputError(f"--opset {opset} cannot be written; expected {OPSETS[0]} to {OPSETS[-1]}, or nothing for 20")
    from lrcompile.emit.onnx import opset_of

    return opset_of(gm, opset)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all; a device or a pipe is written to directly.

    Raises:
        InputError: the path cannot be written or the disk is full.
    """
    check_writable(path, text=True)
    if is_device(path):
        Path(path).write_text(text, encoding="utf-8")
        return
    path = _real(Path(path))
    data = text.encode()
    with _staging(path, len(data)) as folder:
        staged = folder / path.name
        staged.write_bytes(data)
        _install([(staged, path)], folder)


@contextmanager
def placed_whole(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of `path` when the block ends without an error.

    Raises:
        InputError: the path cannot be written or the disk is full.
    """
    path = _real(Path(path))
    with _staging(path, 0) as folder:
        yield folder / path.name
        _install([(folder / path.name, path)], folder)


def check_plans_folder(path: Path) -> None:
    """Checks before the work that a folder of numbered plans can be written: a new one, or one that holds only such.

    Raises:
        InputError: it cannot be; the message says what to do.
    """
    real = _real(path)
    if not real.is_dir():
        check_writable(path, text=True)
        if real.exists():
            raise InputError(f"cannot write {path}: it is a file where a folder is expected; give another path")
        return
    try:
        strangers = sorted(file.name for file in real.iterdir() if not re.fullmatch(r"\d+\.json", file.name))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another path") from error
    if strangers:
        raise InputError(
            f"cannot write {path}: the folder holds {strangers[0]}, which is no numbered plan; give a new folder"
        )
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write in {real.parent}; give another path")


def is_device(path: str | Path) -> bool:
    """Whether a path is neither a file nor a folder, but something else that can be written to, as /dev/stdout."""
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: str | Path, *, text: bool = False) -> None:
    """Checks before the work that its result can be written.

    `text` means a file of any suffix. A path that ends with "/" or has no suffix is a folder; one that exists is
    replaced only if lrcompile wrote it.

    Raises:
        InputError: it cannot be; the message says what to do.
    """
    try:
        if text and is_device(path):
            if not os.access(path, os.W_OK):
                raise InputError(f"cannot write {path}: no permission; give another path")
            return
        real = _real(Path(path))
        if not real.parent.exists():
            raise InputError(f"cannot write {path}: there is no folder {real.parent}; make it with mkdir -p")
        if not real.parent.is_dir():
            raise InputError(f"cannot write {path}: {real.parent} is a file, not a folder; give another path")
        if not os.access(real.parent, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {path}: no permission to write in {real.parent}; give another path")
        if text:
            if real.is_dir():
                raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
        elif _kind(path) == "folder":
            _check_folder(path, real)
        elif real.exists() and not real.is_file():
            raise InputError(f"cannot write {path}: it exists and is not a file; give another path")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another path") from error


def _kind(path: str | Path) -> str:
    suffix = "" if str(path).endswith("/") else Path(path).suffix
    if suffix in (".onnx", ".pt2"):
        return suffix
    if suffix and not Path(path).is_dir():
        raise InputError(
            f"cannot write {path}: unknown suffix {suffix!r}; expected .onnx, .pt2, or a folder, which is a name "
            "without a suffix or one that ends with /"
        )
    return "folder"


def _check_folder(path: str | Path, real: Path) -> None:
    if not real.exists():
        return
    if not real.is_dir():
        raise InputError(f"cannot write {path}: it is a file where a folder is expected; give another path")
    names = sorted(entry.name for entry in real.iterdir())
    strangers = [name for name in names if name not in _FOLDER_FILES]
    if not strangers and names and not _is_ours(real / "model.py"):
        strangers = names
    if strangers:
        raise InputError(
            f"cannot write {path}: the folder exists and holds files that lrcompile did not write "
            f"({', '.join(strangers[:3])}{', …' if len(strangers) > 3 else ''}); give the name of a new folder"
        )


def _is_ours(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(len(MARK)) == MARK
    except (OSError, UnicodeDecodeError):
        return False


def _real(path: Path) -> Path:
    """The path with links followed, so that what a link points to is replaced and not the link."""
    return Path(os.path.realpath(path))


def _data_file(path: Path) -> Path | None:
    """The weights beside an ONNX file that lrcompile wrote: nothing reads them once that file is replaced."""
    data = path.with_name(path.name + ".data")
    if not (path.is_file() and data.is_file()):
        return None
    import onnx

    try:
        old = onnx.load(path, load_external_data=False)
    except Exception:  # not ONNX: whatever it is, its neighbour is none of ours
        return None
    used = {
        entry.value for tensor in old.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return data if old.producer_name == "lrcompile" and data.name in used else None


@contextmanager
def _staging(path: Path, size_bytes: int) -> Iterator[Path]:
    """A folder beside the path, on the same file system, that is gone afterwards whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", dir=path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno in _FULL:
            raise InputError(
                f"no space left on the file system of {path.parent}: {path.name} needs about "
                f"{math.ceil(size_bytes / 1e6)} MB; make room or write elsewhere"
            ) from error
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another path") from error


def _install(moves: Sequence[tuple[Path, Path]], folder: Path) -> None:
    """Moves what is complete to where it goes: all of it, or on any failure none, with what was there put back."""
    if len(moves) == 1 and not moves[0][1].is_dir():
        os.replace(*moves[0])  # atomic
        return
    old = Path(tempfile.mkdtemp(dir=folder))  # of a name that none of the new ones has
    begun: list[tuple[Path, Path]] = []
    try:
        for new, final in moves:
            begun.append((new, final))
            if final.exists():
                os.replace(final, old / final.name)
            os.replace(new, final)
    except BaseException:
        for new, final in reversed(begun):
            if not new.exists() and final.exists():
                os.replace(final, new)
            if (old / final.name).exists():
                os.replace(old / final.name, final)
        raise


def _emit_onnx(path: Path, gm: fx.GraphModule, traced: Traced) -> tuple[Emitted, Sequence[Path]]:
    from lrcompile.emit.onnx import check_ranks, lower, save
    from lrcompile.emit.verify import onnx_error

    lowered = lower(
        gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, open_axes=traced.open_axes,
        opset=traced.opset,
    )  # fmt: skip
    check_ranks(lowered.model, traced)
    written = save(lowered.model, path)
    limit = _limit(gm)
    checked = onnx_error(
        path, gm, traced.flat, lowered.input_names, **other_sizes(traced, lowered.open_axes), limit=limit
    )
    _check_error("ONNX model", checked.error, limit if checked.note is None else _WIDENED_LIMIT)
    notes = lowered.notes if checked.note is None else (*lowered.notes, checked.note)
    return Emitted({"onnx_vs_torch": checked.error}, notes), written


def _emit_pt2(path: Path, gm: fx.GraphModule, traced: Traced) -> tuple[Emitted, Sequence[Path]]:
    from lrcompile.emit.onnx import fixed_sizes
    from lrcompile.emit.pt2 import load_pt2, save_pt2, to_pt2

    program, kept = to_pt2(gm, traced.args, traced.kwargs, traced.open_axes)
    save_pt2(program, path)
    error = _module_error("archive", load_pt2(path), gm, traced, kept)
    return Emitted({"pt2_vs_torch": error}, tuple(fixed_sizes(traced.input_names, traced.open_axes, kept))), (path,)


def _emit_folder(path: Path, gm: fx.GraphModule, traced: Traced) -> tuple[Emitted, Sequence[Path]]:
    from lrcompile.emit.folder import load_folder, write_folder

    write_folder(path, gm, traced)
    error = _module_error("folder", load_folder(path), gm, traced, traced.open_axes)
    return Emitted({"folder_vs_torch": error}), (path,)


_EMITTERS: dict[str, Callable[[Path, fx.GraphModule, Traced], tuple[Emitted, Sequence[Path]]]] = {
    ".onnx": _emit_onnx,
    ".pt2": _emit_pt2,
    "folder": _emit_folder,
}


def _module_error(what: str, module: nn.Module, gm: fx.GraphModule, traced: Traced, kept: OpenAxes) -> float:
    """The error of a module that takes the model's inputs, against the graph."""
    from lrcompile.emit.verify import emitted_error

    spec = pytree.tree_structure((traced.args, traced.kwargs))

    def emitted(flat: Sequence[Any]) -> Sequence[Any]:
        args, kwargs = pytree.tree_unflatten(flat, spec)
        return pytree.tree_leaves(module(*args, **kwargs))

    limit = _limit(gm)
    error = emitted_error(emitted, gm, traced.flat, **other_sizes(traced, kept), limit=limit)
    _check_error(what, error, limit)
    return error


def other_sizes(traced: Traced, kept: OpenAxes) -> dict[str, Any]:
    """What to check besides the example, by the axes that what was emitted leaves open."""
    open_batch = replace(traced, open_axes=kept).dynamic_batch
    return {"dynamic_batch": open_batch, "others": traced.others if kept == traced.open_axes else ()}


def _limit(gm: fx.GraphModule) -> float:
    """The largest relative error that rounding in another order can explain, for the model's least precise type."""
    return max((_LIMITS.get(tensor.dtype, _LIMIT) for tensor in gm.parameters()), default=_LIMIT)


def _check_error(what: str, error: float, limit: float) -> None:
    if not error <= limit:
        raise VerificationError(
            f"the emitted {what} differs from the compiled model: relative error {error:.2e}, at most {limit:.0e} "
            "expected; nothing is written; this is a fault of lrcompile or of the exporter: try another output format"
        )
