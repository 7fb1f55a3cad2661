"""What the residuals of convolutions depend on: how ONNX Runtime lays them out, read off the graph it optimises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.devices.features import features
from lrcompile.devices.measure import local_device
from lrcompile.devices.mlas import in_blocks
from lrcompile.devices.profile import load_device
from lrcompile.graph.op import ConvShape, conv_op, gemm_op
from tests.optimised import optimised

SHAPE = ConvShape(1, 8, 8, (16, 16), (16, 16), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
BLOCK = local_device().alignment_conv["fp32"]
X86 = load_device("x86-ort")


def is_laid_out(shape: ConvShape, folder: Path) -> bool:
    """Whether ONNX Runtime makes the convolution one of blocks of channels."""
    weight = np.ones((shape.channels_out, shape.channels_in // shape.groups, *shape.kernel), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, group=shape.groups),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    sizes = [(name, [1, channels, 16, 16]) for name, channels in (("x", shape.channels_in), ("z", shape.channels_out))]
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes)
    graph = helper.make_graph(nodes, "one", [x], [z], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return any(node.op_type == "Conv" and "nchwc" in node.domain for node in optimised(model, folder).graph.node)


@pytest.mark.parametrize("groups", [1, 2, 4, 12, 20, 32])
def test_channels_are_in_blocks_where_the_runtime_lays_them_out_so(groups: int, tmp_path: Path) -> None:
    widths = sorted(
        {BLOCK // 2 - 1, BLOCK - 1, BLOCK, BLOCK + 2, BLOCK + 4} if groups == 1 else {1, 4, BLOCK, BLOCK + 4}
    )
    for into in widths:
        for out in (1, BLOCK, BLOCK + 4) if groups > 1 else (BLOCK, BLOCK + 1):
            shape = replace(SHAPE, channels_in=groups * into, channels_out=groups * out, groups=groups)
            assert in_blocks(shape, BLOCK) == is_laid_out(shape, tmp_path), (groups, into, out)


def test_features_of_products_follow_the_vectors_of_the_device() -> None:
    """A product of 24 columns is three vectors of 8, and one and a half of 16."""
    narrow, wide = (replace(X86, alignment_conv={**X86.alignment_conv, "fp32": block}) for block in (8, 16))
    op = gemm_op(12, 24, 64, "fp32")
    assert features(op, narrow)[6:9] == [0, pytest.approx(np.log2(32 / 24)), 0]
    assert features(op, wide)[6:9] == [pytest.approx(np.log2(32 / 24)), pytest.approx(np.log2(32 / 24)), 0]


def test_one_image_with_more_filters_than_pixels_is_unfolded_whole() -> None:
    deep = replace(SHAPE, channels_in=9, channels_out=300)
    for shape, whole in ((deep, 1), (replace(deep, channels_out=200), 0), (replace(deep, batch=3), 1)):
        assert features(conv_op(shape, "fp32"), X86)[-6:-4] == [whole, 0]


def test_threads_idle_where_images_do_not_come_out_even() -> None:
    odd = replace(SHAPE, channels_in=9, batch=3)
    device = replace(X86, units=2)
    assert features(conv_op(odd, "fp32"), device)[-5] == pytest.approx(np.log2(4 / 3))
    assert features(conv_op(replace(odd, batch=4), "fp32"), device)[-5] == 0
