"""Runs what was emitted, in ONNX Runtime, against the graph that it was emitted from."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import fx

from lrcompile.emit.onnx import save
from lrcompile.emit.widen import widen_onnx, widen_tensor, widen_torch
from lrcompile.errors import VerificationError, first_line
from lrcompile.frontend.export import batch_size
from lrcompile.frontend.trace import at_other_batch, run
from lrcompile.graph.verify import is_float, relative_error, rounded_error

ORT_ERRORS = tuple(
    value for value in vars(ort_errors).values() if isinstance(value, type) and issubclass(value, Exception)
)


@dataclass(frozen=True)
class VerifiedOnnx:
    """The largest relative error over outputs and batch sizes, and how it was measured where that needs saying."""

    error: float
    note: str | None = None


def torch_error(before: fx.GraphModule, after: fx.GraphModule, flat: Sequence[Any]) -> float:
    """The `relative_error` of a rewritten lifted graph against the one before, on one set of flat inputs."""
    return relative_error(run(before, flat), run(after, flat))


def onnx_error(
    model: str | Path | bytes,
    gm: fx.GraphModule,
    flat: Sequence[Any],
    input_names: Sequence[str],
    *,
    dynamic_batch: bool = False,
    others: Sequence[Sequence[Any]] = (),
    limit: float = 1e-3,
) -> VerifiedOnnx:
    """Runs an ONNX model (a path or its bytes) on the CPU and compares it with the lifted graph it was made from.

    `flat` are the graph's flat inputs, `input_names` what the model calls those of them that are tensors.
    With `dynamic_batch` a second batch size is run too, and `others` are inputs of other sizes, so that a size baked
    into a shape shows. Where ONNX Runtime has no CPU kernel for the model's floating-point type, copies of both in
    float32 are compared instead, and the note says so.

    Raises:
        VerificationError: ONNX Runtime cannot load or run the model, or at other sizes it fails or is further off than
            `limit` and ten times further off than at the first.
    """
    session, note = _native(model, gm, flat), None
    if session is None:
        session, gm, flat = _open_widened(model), widen_torch(gm), [widen_tensor(value) for value in flat]
        others = [[widen_tensor(value) for value in other] for other in others]
        note = "checked in float32: ONNX Runtime's CPU provider lacks kernels for the model's data type"

    run_session = runner(session, input_names)
    error = emitted_error(run_session, gm, flat, dynamic_batch=dynamic_batch, others=others, limit=limit)
    return VerifiedOnnx(error, note)


def runner(
    session: onnxruntime.InferenceSession, input_names: Sequence[str]
) -> Callable[[Sequence[Any]], list[torch.Tensor]]:
    """What runs a session on flat inputs; `input_names` are what it calls those of them that are tensors."""

    def run_session(flat: Sequence[Any]) -> list[torch.Tensor]:
        feeds = dict(zip(input_names, arrays(flat), strict=True))
        return [torch.from_numpy(value) for value in session.run(None, feeds)]

    return run_session


def arrays(flat: Sequence[Any]) -> list[np.ndarray]:
    """The tensors among flat inputs, as ONNX Runtime takes them."""
    return [value.detach().contiguous().numpy() for value in flat if isinstance(value, torch.Tensor)]


def emitted_error(
    emitted: Callable[[Sequence[Any]], Sequence[Any]],
    gm: fx.GraphModule,
    flat: Sequence[Any],
    *,
    dynamic_batch: bool = False,
    others: Sequence[Sequence[Any]] = (),
    limit: float = 1e-3,
    rounded: bool = False,
) -> float:
    """The `rounded_error` of what `emitted` returns for flat inputs, against the lifted graph it was made from.

    Where `emitted` is `rounded`, its whole numbers may be others, as classes are whose scores lie close together.

    Raises:
        VerificationError: it does not run, or, with `dynamic_batch` at a second batch size, or on the `others`, it
            fails or is further off than `limit` and ten times further off than on the first inputs.
    """
    error = _compare(emitted, gm, flat, rounded)
    size = batch_size(flat)
    there = [(f"at sizes {_listed(other)}", f"at {_listed(flat)}", other) for other in others]
    if dynamic_batch and size is not None:
        more = at_other_batch(gm, flat, size)
        there.append((f"at batch size {batch_size(more)}", f"at batch size {size}", more))
    errors = [error]
    for where, here, other in there:
        try:
            errors.append(_compare(emitted, gm, other, rounded))
        except VerificationError as failure:
            raise VerificationError(f"{where} (traced {here}): {failure}") from failure
        if not errors[-1] <= max(limit, 10 * error):
            raise VerificationError(
                f"{where} the emitted model differs from the compiled one: relative error {errors[-1]:.2e}, "
                f"while it is {error:.2e} {here}; this is a fault of lrcompile, and nothing is written"
            )
    return max(errors)


def _listed(flat: Sequence[Any]) -> str:
    return ", ".join(str(list(value.shape)) for value in flat if isinstance(value, torch.Tensor))


def _native(model: str | Path | bytes, gm: fx.GraphModule, flat: Sequence[Any]) -> onnxruntime.InferenceSession | None:
    """A session on the model as it is; None where there are no kernels for its data type."""
    tensors = [*gm.parameters(), *gm.buffers(), *(value for value in flat if isinstance(value, torch.Tensor))]
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):  # NumPy has no such type either
        return None
    try:
        return open_onnx(model)
    except VerificationError as error:
        if isinstance(error.__cause__, ort_errors.NotImplemented):
            return None  # a type for which there is no kernel; if that is not it, float32 fails likewise
        raise


def _open_widened(model: str | Path | bytes) -> onnxruntime.InferenceSession:
    wide = ir.from_proto(onnx.load_from_string(model)) if isinstance(model, bytes) else ir.load(model)
    widen_onnx(wide)
    with tempfile.TemporaryDirectory(prefix="lrcompile-") as folder:
        path = Path(folder) / "float32.onnx"
        save(wide, path)
        return open_onnx(path)


def open_onnx(model: str | Path | bytes) -> onnxruntime.InferenceSession:
    """A session on an ONNX model, a path or its bytes, on the CPU.

    Raises:
        VerificationError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise VerificationError(f"ONNX Runtime cannot load the emitted model: {first_line(error)}") from error


def _compare(
    emitted: Callable[[Sequence[Any]], Sequence[Any]], gm: fx.GraphModule, flat: Sequence[Any], rounded: bool
) -> float:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own, which the user has seen when it was traced
        try:
            expected = [value for value in run(gm, flat) if isinstance(value, torch.Tensor)]
        except Exception as error:  # whatever an operation raises for a shape that it was not traced with
            raise VerificationError(f"the compiled graph does not run: {first_line(error)}") from error
        try:
            got = [value for value in emitted(flat) if isinstance(value, torch.Tensor)]
        except Exception as error:  # whatever the runtime raises
            raise VerificationError(f"the emitted model does not run: {first_line(error)}") from error
    if rounded and len(expected) == len(got):
        got = [y if _whole_of_one_shape(y, other) else other for y, other in zip(expected, got, strict=True)]
    return rounded_error(expected, got)


def _whole_of_one_shape(expected: torch.Tensor, got: torch.Tensor) -> bool:
    return not is_float(expected) and expected.shape == got.shape
