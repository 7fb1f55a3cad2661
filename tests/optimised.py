"""What ONNX Runtime makes of a model before it runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

from lrcompile.emit.onnx import to_onnx
from lrcompile.frontend.trace import Traced


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as it is run on this machine's CPU."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def operators(traced: Traced, folder: Path) -> Counter[str]:
    """How many there are of each."""
    model = to_onnx(
        traced.graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, open_axes=traced.open_axes,
    )  # fmt: skip
    return Counter(node.op_type for node in optimised(model, folder).graph.node)
