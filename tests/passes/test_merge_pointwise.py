from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrcompile_passes import MergePointwise
from lrcompile_passes.layers import CONVS
from torch import Tensor, nn

import lrcompile
from lrcompile.graph.rewrite import Rewrite
from tests.passes import common

aten = torch.ops.aten
DROP, MOVE = MergePointwise(through="drop"), MergePointwise(through="move")


class Bottleneck(nn.Module):
    """1×1, activation, 3×3, activation, 1×1; without activations where `linear`."""

    def __init__(self, a: nn.Module, k: nn.Module, d: nn.Module, linear: bool = False) -> None:
        super().__init__()
        self.a, self.k, self.d, self.linear = a, k, d, linear

    def forward(self, x: Tensor) -> Tensor:
        act = (lambda y: y) if self.linear else aten.relu.default
        return aten.tanh.default(self.d(act(self.k(act(self.a(x))))))


def bottleneck(width: int = 32, **options: Any) -> Bottleneck:
    torch.manual_seed(0)
    k = nn.Conv2d(width, width, 3, padding=1, **options)
    return Bottleneck(nn.Conv2d(2 * width, width, 1), k, nn.Conv2d(width, 2 * width, 1)).eval()


def merge(through: str, rank_out: int, rank_in: int, *sites: str) -> Rewrite:
    return Rewrite("merge-pointwise", sites or ("k", "a", "d"), {
        "through": through, "rank_out": rank_out, "rank_in": rank_in
    }, 1.0)  # fmt: skip


def test_refused_unless_asked_for() -> None:
    graph = common.exported(bottleneck(), torch.randn(2, 64, 6, 6))
    assert common.rewrites(graph, MergePointwise()) == []
    assert common.refusals(graph, MergePointwise()) == {
        "k": "merging it with a and d would drop or move relu and relu_1, and change the model; "
        "ask for it with MergePointwise(through='drop') or 'move'"
    }
    plain = bottleneck()
    plain.linear = True
    graph = common.exported(plain, torch.randn(2, 64, 6, 6))
    for transform in (MergePointwise(), DROP):
        assert list(transform.propose(graph, common.context())) == []  # nothing between: compose-linear is exact


@pytest.mark.parametrize(("transform", "acts"), [(DROP, 0), (MOVE, 2)])
def test_golden(transform: MergePointwise, acts: int) -> None:
    model, x = bottleneck().double(), torch.randn(2, 64, 6, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    rewrite = common.rewrites(graph, transform)[0]
    assert str(rewrite) == f"merge-pointwise(k, a, d; through={transform.through}, rank_out=8, rank_in=8)"
    assert not rewrite.exact
    assert rewrite.error > 1
    result = common.applied(graph, transform, rewrite)
    between = ["relu"] * (acts // 2)
    kinds = [node.name.split("_")[0] for node in result.nodes]
    assert kinds == ["x", "k", *between, "k", *between, "k", "tanh", "output"]
    assert common.layers(result) == {
        "k_a_d.0": "Conv2d(64, 8, kernel_size=(1, 1), stride=(1, 1))",
        "k_a_d.1": "Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)"
        + (")" if acts else ", bias=False)"),
        "k_a_d.2": "Conv2d(8, 64, kernel_size=(1, 1), stride=(1, 1))",
    }
    if transform is DROP:
        plain = bottleneck().double()
        plain.linear = True
        whole = common.applied(graph, transform, merge("drop", 32, 32))
        assert common.on_other_batch(whole, plain, (x,), (torch.randn(5, 64, 6, 6, dtype=torch.float64),)) < 1e-10


@pytest.mark.slow
@given(st.data())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_at_full_rank_dropping_is_the_model_without_activations(data: Any) -> None:
    axes = data.draw(st.integers(1, 3))
    make = CONVS[axes - 1]
    widths = [data.draw(st.integers(1, 4)) for _ in range(4)]
    biases = [data.draw(st.booleans()) for _ in range(3)]
    options: dict[str, Any] = {"dilation": data.draw(st.integers(1, 2)), "bias": biases[1]}
    if data.draw(st.booleans()):
        options["padding"] = "same"
    else:
        options |= {"stride": data.draw(st.integers(1, 2)), "padding": data.draw(st.integers(0, 1))}
    layers = [
        make(widths[0], widths[1], 1, bias=biases[0], stride=data.draw(st.integers(1, 2))),
        make(widths[1], widths[2], data.draw(st.integers(2, 3)), **options),
        make(widths[2], widths[3], 1, bias=biases[2], stride=data.draw(st.integers(1, 2))),
    ]
    x = torch.randn(2, widths[0], *[11] * axes, dtype=torch.float64)
    graph = common.drawn(Bottleneck(*layers).double(), x)
    plain = common.drawn(Bottleneck(*layers, linear=True), x)
    result = common.applied(graph, DROP, merge("drop", widths[2], widths[1]))
    assert len(common.layers(result)) == 3
    assert common.difference(result, plain, x) < 1e-10
    moved = common.applied(graph, MOVE, merge("move", widths[2], widths[1]))
    assert sum(node.op == "call_module" for node in moved.nodes) == 3


def test_moved_activations_act_on_the_core() -> None:
    model, x = bottleneck().double(), torch.randn(2, 64, 6, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    ctx = common.context()
    result = common.applied(graph, MOVE, merge("move", 16, 8), ctx)
    up, core, down = ctx.tucker(graph.site("k")).factors(16, 8)
    with torch.no_grad():
        inner = up.T @ model.k.bias
        y = torch.relu(torch.einsum("rc,nchw->nrhw", down, model.a(x)))
        y = torch.relu(nn.functional.conv2d(y, core, inner, padding=1))
        y = torch.einsum("sr,nrhw->nshw", up, y) + (model.k.bias - up @ inner).view(1, -1, 1, 1)
        assert common.relative(common.outputs(result, x)[0], torch.tanh(model.d(y))) < 1e-10


@pytest.mark.parametrize("side", ["a", "d"])
def test_one_side(side: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.k, self.d = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.nn.functional.gelu(self.a(x)) if side == "a" else x
            y = self.k(y)
            return self.d(torch.nn.functional.gelu(y)) if side == "d" else y

    x = torch.randn(2, 8, 9, dtype=torch.float64)
    graph = common.exported(Half().double(), x)
    (refused,) = common.refusals(graph, MergePointwise()).values()
    assert refused.startswith(f"merging it with {side} would drop or move gelu,")
    result = common.applied(graph, MOVE, merge("move", 8, 8, "k", side))
    assert len(common.layers(result)) == 3
    assert [node.name for node in result.nodes if node.name.startswith("gelu")] == ["gelu_default"]


def test_reported_as_lossy_with_the_measured_error() -> None:
    model, x = bottleneck(128).eval(), torch.randn(8, 256, 28, 28, generator=torch.Generator().manual_seed(1))
    result = lrcompile.compile(model, (x,), target="v100", passes=[DROP], budget=lrcompile.Budget(max_error=2.0))
    (rewrite,) = result.report.rewrites
    assert rewrite.pass_name == "merge-pointwise"
    assert not rewrite.exact
    with torch.no_grad():
        measured = common.relative(result.model(x), model(x))
    assert result.report.error["measured"] == pytest.approx(measured, rel=1e-3)
    assert measured > 0.1
    again = lrcompile.compile(model, (x,), plan=lrcompile.Plan.loads(result.plan.dumps()), passes=[MergePointwise()])
    assert torch.equal(again.model(x), result.model(x))
    exact = lrcompile.compile(model, (x,), target="v100", passes=[DROP], budget=lrcompile.Budget(max_error=0.0))
    assert exact.report.rewrites == ()


def test_refusals() -> None:
    x = torch.randn(2, 64, 6, 6)
    grouped = common.exported(bottleneck(groups=2), x)
    assert common.refusals(grouped, DROP) == {"k": "grouped convolution: groups=2"}
    tied = bottleneck()
    tied.a = nn.Conv2d(64, 32, 1)
    tied.d = nn.Conv2d(32, 64, 1)
    tied.d.bias = nn.Parameter(torch.zeros(64))
    tied.k.bias = tied.a.bias
    assert common.refusals(common.exported(tied, x), DROP) == {"k": "weight tied with a"}

    class Twice(Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.k(torch.relu(self.a(x))))
            return self.d(y) + self.a(torch.relu(x))

    parts = bottleneck()
    twice = common.exported(Twice(parts.a, parts.k, nn.Conv2d(32, 32, 1)), x)
    assert common.refusals(twice, DROP) == {"k": "module a called at 2 sites"}
    ctx = common.context()
    shared = common.exported(Bottleneck(parts.a, parts.k, nn.Conv2d(32, 64, 1, padding=1)), x)
    assert next(r.site for r in common.rewrites(shared, DROP, ctx)) == ("k", "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    x = torch.randn(2, 64, 6, 6).to(dtype)
    plain = bottleneck().to(dtype)
    graph = common.drawn(plain, x)
    plain.linear = True
    result = common.applied(graph, DROP, merge("drop", 32, 32))
    limit = 1e-5 if dtype is torch.float32 else 0.05
    assert common.difference(result, common.drawn(plain, x), x) < limit
