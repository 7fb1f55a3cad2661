"""The analytic cost model: limits, orders and symmetries that hold whatever the constants are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from lrcompile.devices.analytic import AnalyticCostModel, conv_latency_s, gemm_latency_s, turned
from lrcompile.devices.cost import CostModel
from lrcompile.devices.device import Engine, Kernels
from lrcompile.devices.profile import available_devices, load_device
from lrcompile.errors import DeviceError
from lrcompile.graph.op import (
    DTYPE_BYTES,
    AttentionShape,
    ConvShape,
    GemmShape,
    Kind,
    OpDesc,
    RecurrentShape,
    conv_op,
    gemm_op,
)

V100 = load_device("v100")
DEVICES = [load_device(name) for name in available_devices()]
CONV = ConvShape(8, 64, 128, (28, 28), (28, 28), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
ATTENTION = AttentionShape(2, 12, 12, 128, 128, 64)


def each_device(function):  # type: ignore[no-untyped-def]
    return pytest.mark.parametrize("model", [AnalyticCostModel(d) for d in DEVICES], ids=available_devices())(function)


def one_of_each(dtype: str) -> list[OpDesc]:
    plain: list[Kind] = ["normalization", "reduction", "elementwise", "gather", "movement", "view"]
    return [
        gemm_op(100, 64, 32, dtype),
        gemm_op(100, 64, 32, dtype, batch=12, weight=False),
        conv_op(CONV, dtype),
        OpDesc("attention", dtype, 1e6, 0, 1e5, attention=ATTENTION),
        OpDesc("recurrent", dtype, 1e6, 1e5, 1e5, recurrent=RecurrentShape(4, 10, 64, 64, 2, 2, 4)),
        *(OpDesc(kind, dtype, 1e4, 1e3, 1e5) for kind in plain),
    ]


@each_device
@pytest.mark.parametrize("training", [False, True])
def test_every_kind_and_dtype_has_a_finite_price(model: AnalyticCostModel, training: bool) -> None:
    model = AnalyticCostModel(model.device, training)
    for dtype in DTYPE_BYTES:
        for op in one_of_each(dtype):
            cost = model.cost(op)
            assert 0 <= cost.latency_s < 1
            assert (cost.latency_s == 0) == (op.kind == "view"), op
            assert cost.sigma_s <= cost.latency_s


@each_device
def test_extreme_shapes_stay_finite(model: AnalyticCostModel) -> None:
    big = 10**7
    shapes = [gemm_op(big, big, big, "fp32"), gemm_op(1, 1, 1, "fp16"), gemm_op(0, 64, 64, "fp16")]
    shapes += [gemm_op(64, 0, 64, "fp32"), gemm_op(64, 64, 0, "fp32"), gemm_op(8, 8, 8, "fp32", batch=0)]
    shapes += [
        conv_op(replace(CONV, batch=0), "fp16"),
        conv_op(replace(CONV, size_in=(0, 28), size_out=(0, 28)), "fp32"),
    ]
    shapes += [conv_op(replace(CONV, channels_in=10**5, channels_out=10**5), "fp32")]
    for training in (False, True):
        for op in shapes:
            assert 0 < AnalyticCostModel(model.device, training).cost(op).latency_s < math.inf


@each_device
def test_more_work_never_costs_less(model: AnalyticCostModel) -> None:
    """By the formula, and but for what is not aligned where kernels for that are slow."""
    model, dtype = AnalyticCostModel(replace(model.device, residuals={})), model.device.default_dtype
    sizes, rests = [1, 8, 16, 24, 64, 65, 127, 128, 200, 256, 512, 777, 1024, 4096], (1, 64, 1000)
    if model.device.engine_for(dtype).gemm.misaligned < 1:
        assert model.cost(gemm_op(4096, 4095, 4096, dtype)).latency_s > model.cost(
            gemm_op(4096, 4096, 4096, dtype)).latency_s * 2  # fmt: skip
        sizes, rests = [size for size in sizes if size % 8 == 0], (8, 64, 1000)
    for rest in rests:
        for turn in range(3):
            extents = [(size, rest, rest) for size in sizes]
            costs = [model.cost(gemm_op(*one[turn:], *one[:turn], dtype)).latency_s for one in extents]
            assert costs == sorted(costs)
    widths = [8, 16, 32, 64, 96, 128, 256]
    costs = [model.cost(conv_op(replace(CONV, channels_out=width), dtype)).latency_s for width in widths]
    assert costs == sorted(costs)


@each_device
def test_never_faster_than_the_roofline(model: AnalyticCostModel) -> None:
    device = model.device
    for m, n, k in ((4096, 4096, 4096), (1, 4096, 4096), (1 << 16, 64, 64), (128, 8, 1 << 15)):
        op = gemm_op(m, n, k, device.default_dtype)
        moved_s = (op.weight_bytes + op.activation_bytes) / device.bandwidth_bytes_s
        assert model.cost(op).latency_s > max(op.flops / device.peak_flops[device.default_dtype], moved_s)


def compute_bound(engine: Engine | None = None) -> AnalyticCostModel:
    device = replace(load_device("v100"), bandwidth_bytes_s=1e18, l2_bandwidth_bytes_s=1e18)
    return AnalyticCostModel(replace(device, engines=dict.fromkeys(device.engines, engine)) if engine else device)


def test_whole_waves_of_whole_tiles() -> None:
    engine = Engine(((128, 128),), *(Kernels(0.5, 0.0, (1,)),) * 4, depthwise_efficiency=0.25)
    model = compute_bound(engine)
    wave_s = 2 * 128 * 128 * 4096 / (15.7e12 / 80 * 0.5)
    for rows, waves in ((1, 1), (128 * 10, 1), (128 * 10 + 1, 2), (128 * 20, 2)):  # 8 columns of tiles, 80 units
        latency_s = model.cost(gemm_op(rows, 1024, 4096, "fp32")).latency_s
        assert latency_s == pytest.approx(8e-6 + waves * wave_s, rel=1e-3)


def test_misaligned_extents_round_up() -> None:
    model = compute_bound()
    prices = {k: model.cost(gemm_op(4096, 4096, k, "fp16")).latency_s for k in (57, 64, 65, 72)}
    assert prices[57] == prices[64] < prices[65] == prices[72]


def test_extents_of_attention_and_recurrent_steps_round_up_too() -> None:
    """As they did before products had kernels of their own."""
    model = compute_bound()
    attention = AttentionShape(8, 12, 12, 512, 512, 64)
    described = OpDesc("attention", "fp16", 1, 0, 1, attention=attention)
    prices = [
        model.cost(replace(described, attention=replace(attention, keys=keys))).latency_s for keys in (505, 512, 513)
    ]
    assert prices[0] == pytest.approx(prices[1])
    assert prices[1] < prices[2]
    widths = [RecurrentShape(64, 20, 512, width, 1, 1, 1) for width in (505, 512, 513)]
    prices = [model.cost(OpDesc("recurrent", "fp16", 1, 0, 1, recurrent=shape)).latency_s for shape in widths]
    assert prices[0] == pytest.approx(prices[1])
    assert prices[1] < prices[2]


def test_channels_round_up() -> None:
    model = compute_bound()
    prices = [model.cost(conv_op(replace(CONV, channels_in=c), "fp16")).latency_s for c in (57, 64, 65)]
    assert prices[0] == prices[1] < prices[2]


def test_v100_computes_bf16_at_fp32_rate() -> None:
    model = AnalyticCostModel(load_device("v100"))
    fp32, fp16, bf16 = (model.cost(gemm_op(4096, 4096, 4096, dtype)).latency_s for dtype in ("fp32", "fp16", "bf16"))
    assert bf16 > 4 * fp16
    assert bf16 == pytest.approx(fp32, rel=0.1)


@pytest.mark.parametrize("dtype", ["fp4", "", "float32"])
@pytest.mark.parametrize("kind", ["elementwise", "view"])
def test_unknown_dtype_is_a_device_error(dtype: str, kind: Kind) -> None:
    with pytest.raises(DeviceError, match=f"unknown data type '{dtype}'"):
        AnalyticCostModel(load_device("t4")).cost(OpDesc(kind, dtype, 1, 1, 1))


@each_device
def test_training_runs_all_three_products(model: AnalyticCostModel) -> None:
    shape = GemmShape(512, 256, 1024)
    assert turned(shape, "data") == GemmShape(512, 1024, 256, layout="NN")
    assert turned(shape, "weight") == GemmShape(1024, 256, 512, layout="NT")
    train = AnalyticCostModel(model.device, training=True)
    for op in (gemm_op(512, 256, 1024, "fp32"), conv_op(CONV, "fp32"), OpDesc("elementwise", "fp32", 1, 0, 1e8)):
        assert 2.4 < train.cost(op).latency_s / model.cost(op).latency_s < 5
    assert train.cost(gemm_op(512, 256, 1024, "fp32")).flops == 3 * model.cost(gemm_op(512, 256, 1024, "fp32")).flops


@each_device
def test_transposed_convolution_is_the_input_gradient(model: AnalyticCostModel) -> None:
    up = replace(CONV, size_in=(14, 14), size_out=(28, 28), kernel=(2, 2), stride=(2, 2), transposed=True)
    down = replace(up, channels_in=128, channels_out=64, size_in=(28, 28), size_out=(14, 14), transposed=False)
    train = AnalyticCostModel(model.device, training=True)
    assert train.cost(conv_op(up, "fp32")).latency_s == pytest.approx(train.cost(conv_op(down, "fp32")).latency_s)
    assert model.cost(conv_op(up, "fp32")).latency_s != model.cost(conv_op(down, "fp32")).latency_s


@each_device
def test_groups(model: AnalyticCostModel) -> None:
    wide = replace(CONV, channels_in=512, channels_out=512)
    dense, depthwise = (model.cost(conv_op(replace(wide, groups=g), "fp32")).latency_s for g in (1, 512))
    assert depthwise < dense
    moved_s = conv_op(replace(wide, groups=512), "fp32").activation_bytes / model.device.bandwidth_bytes_s
    assert depthwise > moved_s
    formula = AnalyticCostModel(replace(model.device, residuals={}))  # those of a family are of what was measured
    lacking = AnalyticCostModel(replace(formula.device, lacks=frozenset({"grouped_conv"})))
    for groups in (32, 128, 512):  # also groups of few channels
        grouped = lacking.cost(conv_op(replace(wide, groups=groups), "fp32"))
        assert grouped.latency_s == formula.cost(conv_op(wide, "fp32")).latency_s


def test_volumes_and_signals_are_convolutions_too() -> None:
    model = AnalyticCostModel(load_device("a100"))
    volume = ConvShape(1, 32, 32, (32,) * 3, (32,) * 3, (3,) * 3, (1,) * 3, ((1, 1),) * 3, (1,) * 3)
    signal = ConvShape(8, 64, 64, (1000,), (1000,), (5,), (1,), ((2, 2),), (1,))
    assert 1e-5 < model.cost(conv_op(volume, "fp16")).latency_s < 1e-2
    assert 1e-5 < model.cost(conv_op(signal, "fp16")).latency_s < 1e-3


def test_batched_products_run_in_tiles_of_their_own() -> None:
    device = load_device("a100")

    def latency_s(rows: int, batch: int, depth: int = 2048) -> float:
        return gemm_latency_s(device, GemmShape(rows, 128, depth, batch, "NN"), "fp32")

    assert latency_s(16, 512) == pytest.approx(latency_s(128, 512), rel=0.05)  # one tile is as long as another
    assert latency_s(16, 1, 65536) < 0.8 * latency_s(128, 1, 65536)
    assert latency_s(16, 2, 65536) > 3 * latency_s(16, 1, 65536)  # which is cut along K
    assert latency_s(16, 2) == pytest.approx(latency_s(16, 60), rel=0.2)  # each on a unit of its own


def test_fused_attention_saves_the_scores() -> None:
    long = OpDesc("attention", "fp16", 1e9, 0, 1e7, attention=replace(ATTENTION, queries=4096, keys=4096))
    device = load_device("a100")
    fused = AnalyticCostModel(device).cost(long).latency_s
    plain = AnalyticCostModel(replace(device, lacks=frozenset({"flash_attention"}))).cost(long).latency_s
    assert fused < plain
    assert long.attention is not None
    causal = replace(long, attention=replace(long.attention, causal=True))
    assert AnalyticCostModel(device).cost(causal).latency_s < fused


def test_sigma_follows_the_class_of_operation() -> None:
    device = load_device("v100")
    model = AnalyticCostModel(device)
    for op, name in zip(one_of_each("fp16")[1:6], ("gemm", "conv", "gemm", "recurrent", "other"), strict=True):
        cost = model.cost(op)
        assert cost.sigma_s == pytest.approx(device.sigma_relative[name] * cost.latency_s)


def test_prices_are_remembered() -> None:
    model: CostModel = AnalyticCostModel(load_device("v100"))
    assert model.cost(gemm_op(1000, 64, 64, "fp16")) is model.cost(gemm_op(1000, 64, 64, "fp16"))


class Shapes(fx.Interpreter):
    """Runs a graph on the meta device and leaves each node's value behind."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def traced(module: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    gm = fx.symbolic_trace(module.to("meta"))
    Shapes(gm).run(torch.empty(shape, device="meta"))
    return gm


def test_compare_leaves_out_what_is_the_same() -> None:
    class Two(nn.Module):
        def __init__(self, *first: nn.Module) -> None:
            super().__init__()
            self.first = nn.Sequential(*first)
            self.last = nn.Linear(512, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    dense = traced(Two(nn.Linear(4096, 512)), (256, 4096))
    thin = traced(Two(nn.Linear(4096, 32, bias=False), nn.Linear(32, 512)), (256, 4096))
    model = AnalyticCostModel(load_device("rpi5"))
    before, after = model.compare(dense, thin)
    assert after.latency_s < 0.5 * before.latency_s
    assert (before - after).p_positive > 0.95
    assert before.flops == pytest.approx(2 * 256 * 4096 * 512, rel=0.01)  # the last layer is in neither sum
    same, also = model.compare(dense, traced(Two(nn.Linear(4096, 512)), (256, 4096)))
    assert same.latency_s == also.latency_s == same.sigma_s == 0


def test_volumes_have_no_blocked_channels() -> None:
    """ONNX Runtime takes as long as there are channels: 8.7, 16, 34 and 71 ms for 1, 2, 4 and 8 (7×7×7, 32³, x86)."""
    device = load_device("x86-ort")
    sizes = {"size_in": (32, 32, 32), "size_out": (32, 32, 32), "kernel": (7, 7, 7)}
    unit = {"stride": (1, 1, 1), "padding": ((3, 3),) * 3, "dilation": (1, 1, 1)}
    one, eight = (conv_latency_s(device, ConvShape(1, width, 8, **sizes, **unit), "fp32") for width in (1, 8))
    assert one < eight / 6


def test_a_hard_maximum_leaves_small_times_as_they_are() -> None:
    """Powers of seconds would be zero: 1e-6 to the power of 64."""
    shape, device = GemmShape(64, 64, 64, 1), replace(V100, norm_exponent=110.0)
    soft, hard = (gemm_latency_s(one, shape, "fp32") - one.launch_s["gemm"] for one in (V100, device))
    assert 0 < hard < soft < 3 * hard


def test_a_fused_addition_is_as_much_slower_in_a_network_as_others() -> None:
    op = OpDesc("fused", "fp32", 0, 0, 1e6)
    alone, among = (AnalyticCostModel(d).cost(op).latency_s for d in (V100, replace(V100, network={"slower": 1.5})))
    assert among == pytest.approx(1.5 * alone)
