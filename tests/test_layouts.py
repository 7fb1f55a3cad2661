"""Values that ONNX Runtime lays out anew between convolutions in blocks of channels and all else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcompile
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.layouts import laid_out_anew, operations_on
from lrcompile.devices.measure import local_device
from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import trace

HERE = local_device()
BLOCK = HERE.alignment_conv["fp32"]
IMAGE = torch.randn(2, 2 * BLOCK, 12, 12)
Function = Callable[["Between", Tensor], Tensor]


class Between(nn.Module):
    """Something between two convolutions whose channels come in blocks."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        wide = 2 * BLOCK
        self.first, self.last = nn.Conv2d(wide, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1)
        self.aside = nn.Conv2d(wide, wide, 1)
        self.joined = nn.Conv2d(2 * wide, wide, 1)
        self.parts = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.norm, self.groups = nn.BatchNorm2d(wide), nn.GroupNorm(4, wide)
        self.few = nn.Sequential(nn.Conv2d(wide, BLOCK // 2, 1), nn.Conv2d(BLOCK // 2, wide, 1))
        self.odd = nn.Sequential(nn.Conv2d(wide, BLOCK + 1, 1), nn.Conv2d(BLOCK + 1, wide, 1))
        self.even = nn.Sequential(nn.Conv2d(wide, BLOCK + 4, 1), nn.Conv2d(BLOCK + 4, wide, 1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


FUNCTIONS: dict[str, tuple[Function, int]] = {  # and how many copies there are
    "nothing": (lambda net, x: x, 0),
    "rank below a block": (lambda net, x: net.few(x), 1),
    "rank not in fours": (lambda net, x: net.odd(x), 2),
    "rank in fours": (lambda net, x: net.even(x), 0),
    "relu": (lambda net, x: x.relu(), 0),
    "relu6": (lambda net, x: functional.relu6(x), 0),
    "tanh": (lambda net, x: x.tanh(), 0),
    "silu": (lambda net, x: functional.silu(x), 0),
    "gelu": (lambda net, x: functional.gelu(x), 0),
    "hardswish": (lambda net, x: functional.hardswish(x), 0),
    "elu": (lambda net, x: functional.elu(x), 2),
    "norm after relu": (lambda net, x: net.norm(x.relu()), 0),
    "group norm": (lambda net, x: net.groups(x), 2),
    "depthwise": (lambda net, x: net.parts(x), 0),
    "max pool": (lambda net, x: functional.max_pool2d(x, 2), 0),
    "average pool": (lambda net, x: functional.avg_pool2d(x, 2), 0),
    "mean": (lambda net, x: x.mean((2, 3), keepdim=True), 2),
    "gates": (lambda net, x: x * net.aside(x.mean((2, 3), keepdim=True)).sigmoid(), 4),
    "addition": (lambda net, x: x + net.aside(x), 0),
    "product": (lambda net, x: x * net.aside(x), 0),
    "half plain": (lambda net, x: x + net.aside(x).exp(), 3),
    "difference": (lambda net, x: x - net.aside(x), 3),
    "read twice": (lambda net, x: x.exp() + x.sin(), 2),
    "joined": (lambda net, x: net.joined(torch.cat([x, net.aside(x)], 1)), 0),
    "a piece": (lambda net, x: x[:, :, 1:], 2),
    "padding": (lambda net, x: functional.pad(x, (1, 1, 1, 1)), 0),
    "padding with ones": (lambda net, x: functional.pad(x, (1, 1, 1, 1), value=1.0), 2),
    "wider": (lambda net, x: functional.interpolate(x, scale_factor=2.0, mode="nearest"), 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_onnx_runtime_lays_out_anew_what_is_counted(name: str, tmp_path: Path) -> None:
    function, copies = FUNCTIONS[name]
    torch.manual_seed(0)
    result = lrcompile.compile(Between(function).eval(), (IMAGE,), target="x86-ort", passes=[])
    counted = laid_out_anew(result.model, operations_on(HERE, result.model), BLOCK)
    assert len(counted) == copies
    result.save(tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    at_the_ends = 2  # not counted: what enters and what leaves
    assert kinds["ReorderInput"] + kinds["ReorderOutput"] - at_the_ends == copies, kinds


def test_blocks_are_filled_up() -> None:
    """Of a rank of 1 a whole block is read, and what is written is one channel."""
    net = nn.Sequential(nn.Conv2d(2 * BLOCK, 1, 1), nn.Conv2d(1, 2 * BLOCK, 1)).eval()
    gm = trace(net, (IMAGE,)).graph.gm
    (copy,) = laid_out_anew(gm, operations_on(HERE, gm), BLOCK).values()
    assert copy.activation_bytes == 4 * 2 * 12 * 12 * (1 + BLOCK)


def test_splits_below_a_block_pay_for_the_copy() -> None:
    dense = nn.Conv2d(2 * BLOCK, 2 * BLOCK, 1).eval()
    split = nn.Sequential(nn.Conv2d(2 * BLOCK, 4, 1), nn.Conv2d(4, 2 * BLOCK, 1)).eval()
    before, after = (trace(net, (IMAGE,)).graph.gm for net in (dense, split))
    device = load_device("x86-ort")
    plain = replace(device, lacks=device.lacks - {"plain_images"})
    with_copies, without = (AnalyticCostModel(one).compare(before, after) for one in (device, plain))
    assert with_copies[0].latency_s == without[0].latency_s
    assert with_copies[1].latency_s > without[1].latency_s


@pytest.mark.parametrize("target", ["v100", "rpi5"])
def test_other_runtimes_have_one_layout(target: str) -> None:
    device = load_device(target)
    net = nn.Sequential(nn.Conv2d(2 * BLOCK, 3, 1), nn.Conv2d(3, 2 * BLOCK, 1)).eval()
    gm = trace(net, (IMAGE,)).graph.gm
    for ops in (operations_on(device, gm), operations_on(HERE, gm, training=True)):
        assert not any(op.label == "reorder" for op in ops.values())


class Heads(nn.Module):
    """Attention, and views of which some are nodes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.all(x).split(16, -1)
        q, k, v = (part.view(batch, tokens, 2, 8).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, 16)
        y = self.out(y).view(batch, tokens, 4, 4).view(batch, -1, 4)  # of two in a row the last
        return y.sin().reshape(batch, -1).exp().view(batch, -1)  # the last is none


def test_views_are_operations_but_for_those_around_attention() -> None:
    traced = trace(Heads().eval(), (torch.randn(2, 6, 16),))
    ops = operations_on(HERE, traced.graph.gm)
    views = [op for op in ops.values() if op.kind == "movement" and op.activation_bytes == 0]
    assert len(views) == 2
    assert AnalyticCostModel(HERE).cost(views[0]).latency_s == HERE.launch_s["other"]
    plain = replace(HERE, lacks=HERE.lacks - {"free_views"})
    assert not any(
        op.kind == "movement" and not op.activation_bytes for op in operations_on(plain, traced.graph.gm).values()
    )
