"""Ways to quantise an ONNX model, compared on this machine: `python -m tools.bench_quantize model.onnx calib.npz`.

Each is held against the float model: outputs on the last quarter of the data, which ranges are not calibrated with, and
latency at a batch, paired. What `--quantize int8` does is the best of them; docs/quantization.md has the tables.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

from lrcompile.devices.bench import paired, session_options
from lrcompile.emit.int8 import STATIC, Feeds, Reader, quantizable

ACTIVATIONS = ("Relu", "Clip")


def ways(model: Path, out: Path, feeds: Sequence[Feeds]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each way by its name, and what writes its file."""
    found = quantizable(onnx.load(model))
    convolutions = any(node.kind == STATIC for node in found)
    operators = ["Conv"] if convolutions else ["MatMul"]
    with_activations = [*operators, *ACTIVATIONS] if convolutions else operators
    names = [node.name for node in onnx.load(model).graph.node if node.op_type in with_activations]

    def static(narrow: bool, weights: QuantType, symmetric: bool = True) -> None:
        quantize_static(
            model, out, Reader(feeds), per_channel=True, reduce_range=narrow, activation_type=QuantType.QUInt8,
            weight_type=weights, op_types_to_quantize=with_activations, nodes_to_quantize=names,
            extra_options={"MatMulConstBOnly": True, "WeightSymmetric": symmetric},
        )  # fmt: skip

    def dynamic(narrow: bool) -> None:
        quantize_dynamic(
            model, out, op_types_to_quantize=operators, per_channel=True, reduce_range=narrow,
            weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip

    yield "static, signed 8-bit weights", lambda: static(False, QuantType.QInt8)
    yield "static, signed 7-bit weights", lambda: static(True, QuantType.QInt8)
    yield "static, unsigned 8-bit weights", lambda: static(False, QuantType.QUInt8, False)
    yield "dynamic, signed 8-bit weights", lambda: dynamic(False)
    yield "dynamic, signed 7-bit weights", lambda: dynamic(True)


def outputs(model: Path, feeds: Sequence[Feeds]) -> list[np.ndarray]:
    """The floating-point outputs over all batches."""
    session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    runs = [session.run(None, feed) for feed in feeds]
    return [np.concatenate(values).astype(np.float64) for values in zip(*runs, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="to measure each way for")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # the quantizer's advice
    with np.load(options.calib) as data:
        arrays = {name: data[name] for name in data.files}
    count = len(next(iter(arrays.values()))) // options.batch
    feeds = [
        {name: array[i * options.batch : (i + 1) * options.batch] for name, array in arrays.items()}
        for i in range(count)
    ]
    fitted, judged = feeds[: count - count // 4], feeds[count - count // 4 :]
    expected = outputs(options.model, judged)
    print("| way | output error | time of the float model's |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        for name, write in ways(options.model, out, fitted):
            write()
            got = outputs(out, judged)
            error = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(expected, got, strict=True))
            found = paired(options.model, out, inputs=judged[0], seconds=options.seconds)
            print(
                f"| {name} | {error:.3f} | {found.ratio:.2f} ({found.ratio_low:.2f}–{found.ratio_high:.2f}) |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
