"""ONNX Runtime's own int8: static with calibration, and dynamic. It needs no peers' environment and no search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from lrcompile.emit.int8 import Reader
from lrcompile.emit.verify import arrays, open_onnx, runner

CPU_FACTS = Path("/proc/cpuinfo")


def quantized(
    name: str, onnx: bytes, names: Sequence[str], batches: Sequence[tuple[Tensor, ...]], folder: Path
) -> tuple[Path, tuple[str, ...]]:
    """(the int8 model, notes), by the peer `name`, "ort-static" or "ort-dynamic"."""
    whole, ready, path = folder / "float.onnx", folder / "ready.onnx", folder / f"{name}.onnx"
    whole.write_bytes(onnx)
    try:
        quant_pre_process(str(whole), str(ready))
    except Exception:  # its inference of symbolic shapes gives up on some models, with errors of any kind
        quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
    narrow = not fast_int8()
    shared = {"per_channel": True, "reduce_range": narrow, "weight_type": QuantType.QInt8}
    feeds = (dict(zip(names, arrays(batch), strict=True)) for batch in batches)
    if name == "ort-static":
        quantize_static(
            str(ready), str(path), Reader(feeds),
            quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, **shared,
        )  # fmt: skip
    else:
        quantize_dynamic(str(ready), str(path), **shared)
    return path, (("7-bit weights: this processor lacks VNNI",) if narrow else ())


def fast_int8() -> bool:
    """Whether products of int8 do not saturate here; ONNX Runtime's guide asks for `reduce_range` otherwise."""
    try:
        words = CPU_FACTS.read_text().split()
    except OSError:
        return False
    return any("vnni" in word or word in ("asimddp", "i8mm") for word in words)


def as_callable(path: Path) -> Callable[..., Tensor]:
    """An ONNX model as what a task's judge calls: tensors in, its first output out."""
    session = open_onnx(path)
    run_session = runner(session, [port.name for port in session.get_inputs()])
    return lambda *inputs: run_session(inputs)[0]
