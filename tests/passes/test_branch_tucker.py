from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrcompile_passes import BranchTucker, LowRankConv
from lrcompile_passes.layers import TRANSPOSED_CONVS
from torch import Tensor, nn

from lrcompile.graph.graph import Graph
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context
from lrcompile.planning.decompose import tucker
from tests.passes import common
from tests.passes.test_low_rank_conv import convolutions, single

PASS = BranchTucker()


def branched(rank_out: int, rank_in: int, groups: int, site: str = "0") -> Rewrite:
    return Rewrite(PASS.name, (site,), {"rank_out": rank_out, "rank_in": rank_in, "groups": groups})


def dense(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight of a grouped convolution as one of a convolution without groups, zeros between the blocks."""
    blocks = weight.unflatten(0, (groups, -1))
    rows, columns = blocks.shape[1:3]
    full = weight.new_zeros(groups * rows, groups * columns, *weight.shape[2:])
    for i, block in enumerate(blocks):
        full[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
    return full.transpose(0, 1) if transposed else full


def kernel(graph: Graph) -> Tensor:
    """The kernel that the chain amounts to, as [S × C × taps]."""
    down, core, up = (site.module for site in graph.sites().values())
    middle = dense(core.weight, core.groups, isinstance(core, TRANSPOSED_CONVS))  # type: ignore[arg-type]
    return torch.einsum("so,oik,ic->sck", up.weight.flatten(1), middle.flatten(2), down.weight.flatten(1))  # type: ignore[operator, union-attr]


@given(convolutions(), st.data())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_grouped_is_block_diagonal_and_the_error_is_that_of_the_weights(drawn: tuple[Any, int], data: Any) -> None:
    module, axes = drawn
    graph, x = single(module, 2, module.in_channels, *[6] * axes)
    groups = data.draw(st.integers(1, min(module.in_channels, module.out_channels)))
    rank_in = groups * data.draw(st.integers(1, module.in_channels // groups))
    rank_out = groups * data.draw(st.integers(1, module.out_channels // groups))
    ctx = common.context()
    result = common.applied(graph, PASS, branched(rank_out, rank_in, groups), ctx)
    assert result.site("0.1").module.groups == groups
    swap = isinstance(module, TRANSPOSED_CONVS)
    weight = (module.weight.transpose(0, 1) if swap else module.weight).flatten(2)
    tail = ctx.tucker(graph.site("0")).branch_tail(rank_out, rank_in, groups)
    assert common.relative(kernel(result), weight) == pytest.approx(tail, abs=1e-7)
    whole = graph.copy()  # one convolution with the kernel that the chain amounts to
    amounts = kernel(result).unflatten(2, module.kernel_size)
    whole.gm.get_submodule("0").weight = nn.Parameter(amounts.transpose(0, 1) if swap else amounts)
    try:
        assert common.difference(result, whole, x) < 1e-10
    finally:
        whole.gm.get_submodule("0").weight = module.weight


@pytest.mark.parametrize("module", [nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ConvTranspose1d(16, 24, 3, stride=2)])
def test_one_branch_is_tucker(module: nn.Module) -> None:
    graph, x = single(module, 2, 16, *[8] * (module.weight.dim() - 2))  # type: ignore[operator, union-attr]
    plain = Rewrite(LowRankConv.name, ("0",), {"form": "tucker", "rank_out": 16, "rank_in": 8})
    expected = common.applied(graph, LowRankConv(), plain)
    result = common.applied(graph, PASS, branched(16, 8, 1))
    assert common.layers(result) == common.layers(expected)
    assert common.difference(result, expected, x) == 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 48, 3, stride=2, padding=1, dilation=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(2, 32, 9, 9, dtype=torch.float64)
    graph = common.exported(model, x)
    found = {str(rewrite): rewrite for rewrite in common.rewrites(graph, PASS)}
    assert "branch-tucker(conv; rank_out=24, rank_in=16, groups=2)" in found
    assert {rewrite.params["groups"] for rewrite in found.values()} == {2, 4}
    assert len(found) <= 2 * PASS.pairs
    result = common.applied(graph, PASS, found["branch-tucker(conv; rank_out=24, rank_in=16, groups=2)"])
    assert common.layers(result) == {
        "conv.0": "Conv2d(32, 16, kernel_size=(1, 1), stride=(1, 1), bias=False)",
        "conv.1": (
            "Conv2d(16, 24, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 2), groups=2, bias=False)"
        ),
        "conv.2": "Conv2d(24, 48, kernel_size=(1, 1), stride=(1, 1))",
    }  # fmt: skip
    for rewrite in found.values():
        assert not rewrite.exact
        smaller = common.applied(graph, PASS, rewrite)
        assert sum(p.numel() for p in smaller.gm.parameters()) < sum(p.numel() for p in model.parameters())
        assert common.relative(kernel(smaller), model.conv.weight.flatten(2)) == pytest.approx(rewrite.error, rel=1e-7)
    full = common.applied(graph, PASS, branched(48, 32, 1, "conv"))
    assert common.on_other_batch(full, model, (x,), (torch.randn(5, 32, 9, 9, dtype=torch.float64),)) < 1e-10


def test_branches_that_are_there_are_found() -> None:
    """A kernel made of branches, its ranks in any order: cutting the core costs nothing."""
    torch.manual_seed(1)
    core = torch.zeros(12, 12, 9, dtype=torch.float64)
    for i in range(3):
        core[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = torch.randn(4, 4, 9, dtype=torch.float64) * 2.0**i
    mixed = core[torch.randperm(12)][:, torch.randperm(12)]
    found = tucker(mixed.unflatten(2, (3, 3)))
    assert found.branch_tail(12, 12, 3) < 1e-7
    assert found.branch_tail(12, 12, 2) > 0.1
    up, blocks, down = found.branches(12, 12, 3)
    rebuilt = torch.einsum("so,oik,ic->sck", up, dense(blocks, 3, False).flatten(2), down)
    assert common.relative(rebuilt, mixed) < 1e-10


def test_the_order_is_no_worse_than_the_one_given() -> None:
    torch.manual_seed(2)
    for _ in range(20):
        found = tucker(torch.randn(16, 12, 3, 3, dtype=torch.float64))
        energy = found.energy[:16, :12].reshape(4, 4, 4, 3)
        assert found.branch_tail(16, 12, 4) <= float((1 - energy.sum((1, 3)).diagonal().sum()).sqrt()) + 1e-12


def test_error_is_that_of_the_calibration_inputs() -> None:
    torch.manual_seed(3)
    mixing = torch.diag(torch.logspace(-1.5, 0.5, 32).double()) @ torch.randn(32, 32).double()
    x = torch.einsum("dc,nchw->ndhw", mixing, torch.randn(16, 32, 8, 8, dtype=torch.float64))
    graph = common.drawn(nn.Sequential(nn.Conv2d(32, 32, 3, bias=False).double()), x)
    ctx = common.context(graph, (x,))
    for rewrite in common.rewrites(graph, PASS, ctx)[::3]:
        measured = common.difference(common.applied(graph, PASS, rewrite, ctx), graph, x)
        assert measured == pytest.approx(rewrite.error, rel=0.15)  # the window's positions are taken as alike


def test_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    x = torch.randn(2, 16, 8, dtype=torch.float64)
    graph = common.drawn(Twice().double(), x)
    result = common.applied(graph, PASS, branched(16, 16, 2, "conv"), common.context(graph, (x,)))
    assert len(result.site("conv.1").nodes) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 16, 8, 8).to(dtype)
    graph = common.drawn(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1).to(dtype)), x)
    result = common.applied(graph, PASS, branched(16, 16, 1))
    assert {p.dtype for p in result.gm.parameters()} == {dtype}
    assert common.difference(result, graph, x) < (1e-5 if dtype is torch.float32 else 0.03)


def test_refusals() -> None:
    def reason(module: nn.Module, *size: int) -> str:
        graph, _ = single(module, *size)
        assert common.rewrites(graph, PASS) == []
        return common.refusals(graph, PASS)["0"]

    assert reason(nn.Conv2d(32, 32, 3, groups=32), 1, 32, 8, 8) == "depthwise: each channel has a filter of its own"
    assert reason(nn.Conv2d(32, 32, 3, groups=4), 1, 32, 8, 8) == "grouped convolution: groups=4"
    small = "too small: no ranks of the device's step in branches save weights and work of 4×4×3×3"
    assert reason(nn.Conv2d(4, 4, 3), 1, 4, 8, 8) == small
    graph, _ = single(nn.Conv2d(32, 32, 1), 1, 32, 8, 8)
    assert list(PASS.propose(graph, common.context())) == []
    graph, _ = single(nn.Conv2d(32, 32, 3), 1, 32, 8, 8)
    lacking = replace(common.V100, lacks=frozenset({"grouped_conv"}))
    assert list(PASS.propose(graph, Context(lacking))) == []


def test_tied_weight() -> None:
    graph = common.drawn(
        common.Tied(nn.Conv1d(32, 32, 3, padding=1), nn.ConvTranspose1d(32, 32, 3, padding=1)), torch.randn(1, 32, 8)
    )
    assert common.refusals(graph, PASS) == {"down": "weight tied with up", "up": "weight tied with down"}
