"""Writes what was compiled where the user wants it: checked first, verified, and in place only when complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lrcompile.writing import cannot_write, check_place, followed, install, staging

MARK = '"""Written by lrcompile'
"""The first words of every `model.py` that lrcompile writes: a folder with one may be replaced."""

OPSETS = range(18, 24)
_FOLDER_FILES = frozenset(("model.py", "weights.safetensors", "__pycache__"))
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
    kind, path = _kind(path), followed(path)
    stale = _data_file(path) if kind == ".onnx" else None
    with staging(path, weight_bytes(gm)) as folder:
        emitted, written = _EMITTERS[kind](folder / path.name, gm, traced)
        if refine is not None:
            if len(written) > 1:
                raise InputError("--quantize takes models of up to 2 GB of weights; compile this one without it")
            refined, notes = refine(written[0])
            emitted = replace(emitted, refined=refined, notes=(*emitted.notes, *notes))
        install([(file, path.with_name(file.name)) for file in written], folder)
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


def check_writable(path: str | Path) -> None:
    """Checks before the work that its result can be written.

    A path that ends with "/" or has no suffix is a folder; one that exists is replaced only if lrcompile wrote it.

    Raises:
        InputError: it cannot be; the message says what to do.
    """
    with cannot_write(path):
        real = check_place(path)
        if _kind(path) == "folder":
            _check_folder(path, real)
        elif real.exists() and not real.is_file():
            raise InputError(f"cannot write {path}: it exists and is not a file; give another path")


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
