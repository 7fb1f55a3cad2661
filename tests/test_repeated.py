"""Graphs of one operation several times over: their shapes, and that no copy is left out when they run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch

from lrcompile.devices.bench import session_options
from lrcompile.devices.features import family
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.measure import open_region
from lrcompile.devices.onnx_region import lower_region
from lrcompile.devices.profile import load_device
from lrcompile.devices.repeated import (
    MOST_BYTES,
    MOST_COPIES,
    call_of,
    chain,
    copies_for,
    encoder,
    in_a_row,
    least_copies,
    repeated,
)
from lrcompile.devices.sampling import WEIGHTS, operations, rows
from lrcompile.graph.op import (
    FUNCTIONS,
    AttentionShape,
    ConvShape,
    Function,
    OpDesc,
    RecurrentShape,
    attention_op,
    conv_op,
    gemm_op,
    recurrent_op,
)
from tests.optimised import optimised

X86 = load_device("x86-ort")
CONV = ConvShape(2, 16, 32, (9, 9), (5, 5), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
VOLUME = ConvShape(1, 4, 6, (5, 6, 7), (5, 6, 7), (3, 3, 3), (1,) * 3, ((1, 1),) * 3, (1,) * 3)
ATTENTION = AttentionShape(2, 4, 2, 7, 9, 8)
OPS = {
    "gemm": gemm_op(8, 16, 32, "fp32"),
    "batched gemm": gemm_op(8, 16, 32, "fp32", batch=3, weight=False),
    "conv": conv_op(CONV, "fp32"),
    "depthwise": conv_op(replace(CONV, channels_out=16, groups=16), "fp32"),
    "transposed conv": conv_op(replace(CONV, size_in=(5, 5), size_out=(10, 10), transposed=True), "fp32"),
    "volume": conv_op(VOLUME, "fp32"),
    "attention": attention_op(ATTENTION, "fp32"),
    "causal": attention_op(replace(ATTENTION, keys=7, causal=True), "fp32"),
    "masked": attention_op(replace(ATTENTION, mask="number"), "fp32"),
    "boolean mask": attention_op(replace(ATTENTION, mask="boolean"), "fp32"),
    "lstm": recurrent_op(RecurrentShape(2, 5, 6, 8, 2, 2, 4), "fp32"),
    "gru": recurrent_op(RecurrentShape(2, 5, 6, 8, 1, 1, 3), "fp32"),
    "half": OpDesc("elementwise", "fp16", 100.0, 0.0, 400.0),
    **{name: OpDesc("elementwise", "fp32", 960, 0.0, 7680.0, function=name, row=24) for name in FUNCTIONS},
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_operations_run_as_often_as_they_are_asked_for(name: str, tmp_path: Path) -> None:
    counts = []
    for copies in (2, 5):
        graph = repeated(OPS[name], copies)
        assert graph is not None
        region = lower_region(graph, dynamic_batch=False)
        open_region(region)()
        options = session_options()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(region.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
        counts.append(Counter(node.op_type for node in nodes if not node.op_type.startswith("Reorder")))
    more = counts[1] - counts[0]
    assert more
    assert all(count % 3 == 0 for count in more.values()), more


@pytest.mark.parametrize("name", ["conv", "depthwise"])
def test_convolutions_of_images_stay_in_blocks(name: str, tmp_path: Path) -> None:
    """However often they run, values are laid out once and restored once, and each is one kernel."""
    graph = repeated(OPS[name], 5)
    assert graph is not None
    model = optimised(lower_region(graph, dynamic_batch=False).model(), tmp_path)
    found = Counter(node.op_type for node in model.graph.node)
    assert found == {"Conv": 5, "ReorderInput": 1, "ReorderOutput": 1, "MatMul": 1}


def test_shapes_are_those_described() -> None:
    for op in islice(operations(4), 120):
        if op.flops > 1e7:
            continue
        graph = repeated(op, 1, alone=True)
        assert graph is not None
        (result,) = call_of(graph)()
        if op.conv is not None:
            assert result.shape == (op.conv.batch, op.conv.channels_out, *op.conv.size_out)
        if op.gemm is not None:
            assert result.shape[-2:] == (op.gemm.m, op.gemm.n)
        if op.attention is not None:
            width = op.attention.heads * op.attention.head_dim
            assert result.shape == (op.attention.batch, op.attention.queries, width)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_as_many_bytes_are_moved_as_described(function: Function) -> None:
    drawn = (op for op in operations(1) if family(op) == function)
    op = next(op for op in drawn if op.row >= 128 and 1e4 < op.activation_bytes < 1e6)
    graph = repeated(op, 1, alone=True)
    assert graph is not None
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    results = [result.numel() for result in call_of(graph)()]
    read = sum(value.numel() for value in values if value.numel() >= op.row)
    moved = read if function == "reduce" else read + sum(results)
    assert 4 * moved == pytest.approx(op.weight_bytes + op.activation_bytes, rel=0.01)


def test_every_transpose_moves_something() -> None:
    drawn = [op for op in islice(operations(1), 3000) if op.function == "transpose"]
    assert {1} < {op.row for op in drawn}
    for op in drawn:
        graph = repeated(op, 1)
        assert graph is not None
        moved = [node for node in graph.graph.nodes if node.target is torch.ops.aten.transpose.int]
        assert [min(node.args[0].meta["val"].shape[:2]) > 1 for node in moved] == [True]


@pytest.mark.parametrize(("name", "kind"), [("skip_layer_norm", "SkipLayerNormalization"), ("bias_gelu", "BiasGelu")])
def test_what_takes_an_addition_in_is_measured_as_one(name: str, kind: str, tmp_path: Path) -> None:
    op = next(op for op in operations(1) if family(op) == name and op.activation_bytes < 1e5)
    graph = repeated(op, 2)
    assert graph is not None
    model = optimised(lower_region(graph, dynamic_batch=False).model(), tmp_path)
    assert Counter(node.op_type for node in model.graph.node) == {"MatMul": 1, kind: 2}


@pytest.mark.parametrize("first", [True, False])
def test_networks_are_fused_as_exported_models_are(first: bool, tmp_path: Path) -> None:
    """Norms of sums after a Reshape are fused only where the file says what its shape is."""
    graph = encoder(replace(ATTENTION, heads_kv=4, keys=7), 2, first=first)
    kinds = Counter(node.op_type for node in optimised(lower_region(graph).model(), tmp_path).graph.node)
    ops = describe_all(graph, X86.fuses, X86.lacks).values()
    for kind, name in (("SkipLayerNormalization", "skip_layer_norm"), ("BiasGelu", "bias_gelu")):
        assert kinds[kind] == sum(op.function == name for op in ops), kinds
    assert kinds["BiasGelu"] == 2


def test_alone_there_is_nothing_but_the_operation() -> None:
    for op in (OPS["conv"], OPS["volume"], gemm_op(8, 16, 32, "bf16"), gemm_op(8, 16, 32, "fp16", layout="NN")):
        graph = repeated(op, 3, alone=True)
        assert graph is not None
        ops = [found for found in describe_all(graph, frozenset(), frozenset()).values() if found.kind != "view"]
        assert [found.kind for found in ops] == [op.kind] * 3
        if op.gemm is not None:
            assert all(found.gemm == op.gemm and found.dtype == op.dtype for found in ops)
            assert call_of(graph)()[0].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[op.dtype]
        if op.conv is not None:
            assert all(found.conv == op.conv for found in ops)


def test_a_transpose_alone_is_a_copy() -> None:
    graph = repeated(OpDesc("movement", "fp32", 0, 0, 2 * 4 * 24 * 16, function="transpose", row=16), 1, alone=True)
    assert graph is not None
    (result,) = call_of(graph)()
    assert result.is_contiguous()
    assert result.shape == (3, 8, 16)


def test_channels_last() -> None:
    graph = repeated(OPS["conv"], 1, alone=True)
    assert graph is not None
    (result,) = call_of(graph, channels_last=True)()
    assert not result.is_contiguous()
    assert result.stride(1) == 1
    graph = repeated(OPS["volume"], 1, alone=True)
    assert graph is not None
    call_of(graph, channels_last=True)
    assert graph.m0.weight.stride(1) == 1


def test_a_chain_feeds_each_operation_with_the_one_before() -> None:
    wide = [gemm_op(8, 4, 32, "fp16"), gemm_op(8, 16, 4, "fp16")]
    assert [op.gemm for op in describe_all(chain(wide), frozenset(), frozenset()).values() if op.gemm] == [
        op.gemm for op in wide
    ]
    assert call_of(chain(wide))()[0].shape == (8, 16)
    convs = [OPS["conv"], conv_op(replace(CONV, channels_in=32, size_in=(5, 5), size_out=(3, 3)), "fp32")]
    assert call_of(chain(convs))()[0].shape == (2, 32, 3, 3)


def test_what_has_no_such_form() -> None:
    assert repeated(OpDesc("recurrent", "fp32", 0, 0, 0), 1) is None
    assert repeated(gemm_op(2, 2, 2, "int8"), 1) is None
    assert repeated(conv_op(replace(CONV, padding=((0, 1), (1, 1))), "fp32"), 1) is None


def test_how_many_copies() -> None:
    for op in islice(operations(6), 200):
        for latency_s in (1e-9, 1e-5, 1.0):
            copies = copies_for(op, latency_s)
            assert 1 <= copies <= MOST_COPIES
            assert copies <= 2 or copies * (op.weight_bytes + op.activation_bytes) < 1.6 * MOST_BYTES
        assert copies_for(op, 1e-9) >= copies_for(op, 1.0)
        in_blocks = int(family(op) in ("conv", "pointwise", "depthwise", "grouped"))
        assert [least_copies(op, copies) for copies in (0, 7, 80)] == [in_blocks, in_blocks, 10]
    assert {family(op) for op in islice(operations(6), 400)} == set(WEIGHTS)


def test_networks_run() -> None:
    shapes = min(rows(0, 12), key=lambda row: sum(conv_op(shape, "fp32").flops for shape in row))
    graph = in_a_row(shapes)
    open_region(lower_region(graph))()
    assert call_of(graph)()[0].shape == (shapes[-1].batch, shapes[-1].channels_out, *shapes[-1].size_out)
    for first in (True, False):
        graph = encoder(replace(ATTENTION, heads_kv=4, keys=7), 2, first=first)
        open_region(lower_region(graph))()
        assert call_of(graph)()[0].shape == (2, 7, 32)
        kinds = Counter(op.kind for op in describe_all(graph, X86.fuses, X86.lacks).values())
        assert (kinds["gemm"], kinds["attention"], kinds["normalization"]) == (12, 2, 4)
