"""Writes what was compiled: verified first, complete or not at all, an existing output untouched until then."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from lrcompile.emit.onnx import lower, save
from lrcompile.emit.verify import onnx_error
from lrcompile.errors import InputError, VerificationError
from lrcompile.frontend.trace import Traced

ONNX_LIMITS = {"fp64": 1e-8, "fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Emitted:
    """What was written, how far it is from the rewritten model, and what the user should know."""

    paths: tuple[Path, ...]
    verification: Mapping[str, float | None]
    notes: Sequence[str] = ()


def emit(out: Path, gm: fx.GraphModule, traced: Traced) -> Emitted:
    """Writes `.onnx`, verified in ONNX Runtime.

    Raises:
        InputError: another suffix, or the place cannot be written.
        VerificationError: ONNX Runtime computes something else; nothing is written.
    """
    check_writable(out)
    lowered = lower(
        gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, dynamic_batch=traced.dynamic_batch,
    )  # fmt: skip
    with staging(out) as folder:
        written = save(lowered.model, folder / out.name)
        verified = onnx_error(
            written[0], gm, traced.flat, lowered.input_names, dynamic_batch=lowered.dynamic_batch
        )
        if not verified.error <= 1e-4 and verified.note is None:
            raise VerificationError(f"ONNX differs by {verified.error:.2e}; nothing is written")
        for path in reversed(written):
            os.replace(path, out.with_name(path.name))
    notes = [*lowered.notes, *([verified.note] if verified.note else [])]
    return Emitted((out,), {"onnx_vs_torch": verified.error}, notes)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary folder beside the output, gone in the end whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"no space left on the disk of {out.parent}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, complete or not at all."""
    with staging(path) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
        os.replace(folder / path.name, path)


def check_writable(out: Path, text: bool = False) -> None:
    """Refuses early what could not be written at the end."""
    if not text and out.suffix != ".onnx":
        raise InputError(f"cannot tell the format of {out}; expected .onnx")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into; create it first")
    if out.is_dir():
        raise InputError(f"{out} is a folder; expected the name of a file")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"the folder {out.parent} is not writable; choose another place for {out.name}")
