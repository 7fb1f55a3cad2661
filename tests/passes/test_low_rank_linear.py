from __future__ import annotations

import pytest
import torch
from lrcompile_passes import LowRankLinear
from lrcompile_passes.low_rank_linear import break_even
from torch import nn

from lrcompile.graph.rewrite import Rewrite
from lrcompile.nn.linear import TransposedLinear
from tests.passes import common

PASS = LowRankLinear()


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(40, 64, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


class Twice(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fc(x), self.fc(3 * x)])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(index))


def correlated(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64) @ torch.diag(torch.linspace(0.2, 3, columns).double())


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), correlated(4, 40)
    graph = common.exported(model, x)
    found = common.rewrites(graph, PASS)
    assert [str(r) for r in found] == [
        "low-rank-linear(fc; rank=8)",
        "low-rank-linear(fc; rank=16)",
        "low-rank-linear(fc; rank=24)",
    ]
    assert not found[0].exact
    result = common.applied(graph, PASS, found[1])
    assert common.text(result) == (
        "x = placeholder x()\n"
        "fc_0 = call_module fc.0(x)\n"
        "fc_1 = call_module fc.1(fc_0)\n"
        "relu = call_function relu.default(fc_1)\n"
        "output = output output((relu,))"
    )
    assert common.layers(result) == {
        "fc.0": "Linear(in_features=40, out_features=16, bias=False)",
        "fc.1": "Linear(in_features=16, out_features=64, bias=True)",
    }
    expected = Net().double()
    expected.fc.weight.data = (result.gm.fc[1].weight @ result.gm.fc[0].weight).detach()
    expected.fc.bias.data = model.fc.bias.data
    assert common.on_other_batch(result, expected, (x,), (correlated(7, 40),)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_full_rank_is_the_identity(bias: bool, calibrated: bool) -> None:
    torch.manual_seed(1)
    x = correlated(50, 40)
    graph = common.drawn(Net(bias).double(), x)
    ctx = common.context(graph, (x,)) if calibrated else common.context()
    result = common.applied(graph, PASS, Rewrite(PASS.name, ("fc",), {"rank": 40}), ctx)
    assert common.difference(result, graph, x) < 1e-10


def test_error_is_that_of_the_calibration_inputs() -> None:
    torch.manual_seed(2)
    x = correlated(200, 40)
    graph = common.drawn(nn.Sequential(nn.Linear(40, 64, bias=False)).double(), x)
    ctx = common.context(graph, (x[:120],), (x[120:],))
    aware, plain = common.rewrites(graph, PASS, ctx), common.rewrites(graph, PASS)
    for rewrite, blind in zip(aware, plain, strict=True):
        measured = common.difference(common.applied(graph, PASS, rewrite, ctx), graph, x)
        assert measured == pytest.approx(rewrite.error, rel=0.01, abs=1e-6)
        assert measured < common.difference(common.applied(graph, PASS, blind), graph, x)


def test_without_calibration_error_is_that_of_the_weights() -> None:
    torch.manual_seed(3)
    graph = common.drawn(Net().double(), correlated(4, 40))
    for rewrite in common.rewrites(graph, PASS):
        fc = common.applied(graph, PASS, rewrite).gm.fc
        assert common.relative(fc[1].weight @ fc[0].weight, graph.gm.fc.weight) == pytest.approx(
            rewrite.error, rel=1e-9
        )


def test_module_called_twice_is_split_once_for_both_inputs() -> None:
    torch.manual_seed(4)
    x = correlated(100, 40)
    graph = common.drawn(Twice(bias=False).double(), x)
    ctx = common.context(graph, (x,))
    rewrite = common.rewrites(graph, PASS, ctx)[0]
    result = common.applied(graph, PASS, rewrite, ctx)
    assert list(common.layers(result)) == ["fc.0", "fc.1"]
    assert len(result.site("fc.0").nodes) == 2
    assert common.difference(result, graph, x) == pytest.approx(rewrite.error, rel=0.01)


def test_statistics_outlive_a_rewrite_of_the_input() -> None:
    torch.manual_seed(5)
    x = correlated(100, 40)
    graph = common.drawn(nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 40)).double(), x)
    ctx = common.context(graph, (x,))
    first, second = (next(r for r in common.rewrites(graph, PASS, ctx) if r.site == (s,)) for s in ("0", "1"))
    both = common.applied(common.applied(graph, PASS, first, ctx), PASS, second, ctx)
    alone = common.applied(graph, PASS, second, ctx)
    assert torch.equal(both.gm.get_submodule("1.0").weight, alone.gm.get_submodule("1.0").weight)


def test_transposed_linear() -> None:
    torch.manual_seed(6)
    module = TransposedLinear(40, 64).double()
    graph = common.drawn(nn.Sequential(nn.Linear(40, 40).double(), module), correlated(4, 40))
    result = common.applied(graph, PASS, Rewrite(PASS.name, ("1",), {"rank": 40}))
    assert common.difference(result, graph, correlated(4, 40)) < 1e-10
    assert type(result.gm.get_submodule("1.1")) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    graph = common.drawn(Net().to(dtype), correlated(4, 40).to(dtype))
    result = common.applied(graph, PASS, Rewrite(PASS.name, ("fc",), {"rank": 40}))
    assert {p.dtype for p in result.gm.parameters()} == {dtype}
    assert common.difference(result, graph, correlated(4, 40).to(dtype)) < 0.02


def test_refusals() -> None:
    tied = common.exported(Tied(), torch.randint(0, 40, (4, 3)))
    assert common.refusals(tied, PASS) == {"head": "weight tied with embedding"}
    small = common.drawn(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    assert common.refusals(small, PASS) == {"0": "too small: no rank of the device's step saves weights of 8×8"}
    assert common.rewrites(small, PASS) == []
    quantised = nn.Sequential(nn.Linear(64, 64))
    quantised[0].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    quantised[0].bias = nn.Parameter(torch.zeros(64, dtype=torch.int8), requires_grad=False)
    graph = common.drawn(quantised, torch.zeros(2, 64, dtype=torch.int8))
    assert common.refusals(graph, PASS) == {"0": "weight is of type int8"}


def test_break_even() -> None:
    assert break_even(64, 64) == 32
    assert 31 * (64 + 64) < 64 * 64
    assert break_even(3, 5) == 2


def test_gradients_follow_the_original() -> None:
    frozen = Net()
    frozen.requires_grad_(False)
    result = common.applied(common.drawn(frozen, torch.randn(2, 40)), PASS, Rewrite(PASS.name, ("fc",), {"rank": 8}))
    assert not any(p.requires_grad for p in result.gm.parameters())
