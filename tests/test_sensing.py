"""Statistics that count by what the model's outputs feel: of padded rows nothing, of directions by their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Context, Graph, Rewrite, calibration_from
from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import trace
from lrcompile.passes import apply, proposals
from lrcompile.planning.calibration import Statistics, collect
from lrcompile.planning.decompose import Outputs, spectrum
from lrcompile.planning.moments import Window, moments
from lrcompile.plugins import discover

DEVICE = load_device("rpi5")
PASSES = {transform.name: transform for transform in discover().passes}


class Pooled(nn.Module):
    """The mean over what a mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh())
        return (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


class Skewed(nn.Module):
    """Two layers, of whose outputs a few count for much more than the others."""

    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(24, 32, 3, padding=1) if conv else nn.Linear(24, 32)
        self.head = nn.Linear(32, 16, bias=False)
        with torch.no_grad():
            self.head.weight *= torch.logspace(0, -2, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(y.mean((2, 3)) if y.dim() == 4 else y)


def context(statistics: Statistics) -> Context:
    return Context(DEVICE, grams=statistics.grams, gradients=statistics.gradients)


def test_what_a_mask_drops_counts_for_nothing() -> None:
    torch.manual_seed(0)
    model, x, mask = Pooled().eval(), torch.randn(6, 10, 12), torch.zeros(6, 10)
    mask[:, :4] = 1
    graph = trace(model, (x, mask)).graph
    plain, weighted = (collect(graph, [(x, mask)], weighted=choice) for choice in (False, True))
    x[:, 4:] = 100.0  # in another run, what is dropped is something else
    again = collect(graph, [(x, mask)], weighted=True)
    key = ("x", -1)
    assert torch.allclose(weighted.grams[key].gram, again.grams[key].gram)
    assert not torch.allclose(plain.grams[key].gram, collect(graph, [(x, mask)]).grams[key].gram)
    assert weighted.grams[key].rows < plain.grams[key].rows


def test_weighted_moments_are_sums_of_weighted_terms() -> None:
    rows, weights = torch.randn(5, 7, 3, dtype=torch.float64), torch.rand(5, 7, dtype=torch.float64)
    flat, w = rows.flatten(0, 1), weights.flatten()
    for most in (10, 2**22):
        found = moments(rows, weights=weights, most=most)
        assert torch.allclose(found.gram, (flat * w.unsqueeze(1)).T @ flat)
        assert torch.allclose(found.mean, (flat * w.unsqueeze(1)).sum(0) / w.sum())
        assert found.rows == pytest.approx(float(w.sum()))


def test_gradients_of_a_linear_output_are_its_weights() -> None:
    torch.manual_seed(0)
    model, x = Skewed().eval(), torch.randn(4000, 24)
    graph = trace(model, (x[:8],)).graph
    found = collect(graph, [(part,) for part in x.split(500)], weighted=True)
    wanted = model.head.weight.detach().double()
    gram = found.gradients["layer"].gram
    assert torch.allclose(gram / gram.trace(), wanted.T @ wanted / wanted.square().sum(), atol=0.02)


@pytest.mark.parametrize("conv", [False, True])
def test_at_equal_rank_the_model_loses_less(conv: bool) -> None:
    torch.manual_seed(0)
    model = Skewed(conv).eval()
    x = torch.randn(64, 24, 6, 6) if conv else torch.randn(512, 24)
    graph = trace(model, (x[:8],)).graph
    batches = [(part,) for part in x.split(32)]
    name = "low-rank-conv" if conv else "low-rank-linear"
    errors: dict[str, list[float]] = {}
    for weighted in (False, True):
        known = context(collect(graph, batches, weighted=weighted))
        for rewrite in proposals(graph, PASSES[name], known):
            if isinstance(rewrite, Rewrite) and rewrite.site == ("layer",):
                errors.setdefault(str(rewrite), []).append(error_of(model, graph, rewrite, known, x))
    pairs = [pair for pair in errors.values() if len(pair) == 2]  # proposed by both
    assert len(pairs) >= 3
    assert all(after < before for before, after in pairs), errors
    assert min(after / before for before, after in pairs) < 0.7


def error_of(model: nn.Module, graph: Graph, rewrite: Rewrite, known: Context, x: Tensor) -> float:
    trial = graph.copy()
    apply(trial, PASSES[rewrite.pass_name], rewrite, known)
    trial.gm.recompile()
    with torch.no_grad():
        return float((trial.gm(x) - model(x)).norm() / model(x).norm())


def test_full_rank_is_the_identity() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30)
    gradients = (g := torch.randn(200, 20, dtype=torch.float64) * torch.logspace(0, -4, 20)).T @ g
    outputs = Outputs.of(gradients, weight.dtype)
    found = spectrum(outputs.weighted(weight))
    up, down = replace(found, outputs=outputs).factors(20)
    assert torch.allclose(up.double() @ down.double(), weight.double(), atol=1e-5)
    assert up.dtype == down.dtype == weight.dtype


def test_of_merged_layers_each_part_counts_by_itself() -> None:
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x).tanh(), self.b(x).tanh()

    torch.manual_seed(0)
    x = torch.randn(40, 8)
    graph = trace(Siblings().eval(), (x,)).graph
    known = context(collect(graph, [(x,)], weighted=True))
    merge = PASSES["merge-siblings"]
    (rewrite,) = (r for r in proposals(graph, merge, known) if isinstance(r, Rewrite))
    parts = [known._felt(node) for node in graph.nodes if node.name in ("a", "b")]
    apply(graph, merge, rewrite, known)
    (site,) = graph.modules_of(nn.Linear)
    felt = known._felt(site.nodes[0])
    assert felt is not None
    assert torch.equal(felt, torch.block_diag(*[part for part in parts if part is not None]))
    outputs = known.outputs(site)
    assert outputs is not None
    assert outputs.root.shape == (10, 10)


@pytest.mark.parametrize("why", ["half", "integer", "no derivative"])
def test_without_gradients_rows_count_alike(why: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y.argmax(-1) if why == "integer" else y

    model: Any = Net().eval()
    x = torch.randn(10, 8)
    if why == "half":
        model, x = model.half(), x.half()
    graph = trace(model, (x,)).graph
    if why == "no derivative":
        for node in graph.nodes:
            if node.op == "call_module":
                graph.gm.get_submodule(node.target).register_forward_hook(lambda _m, _x, y: Undifferentiable.apply(y))
    found = collect(graph, [(x,)], weighted=True)
    assert found.grams["x", -1].rows == 10
    assert not found.gradients


class Undifferentiable(torch.autograd.Function):
    """Has no backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Length(nn.Module):
    """The length of two values, of which the gradient is no number where both are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sqrt(self.a(x) ** 2 + self.b(x) ** 2))


@pytest.mark.parametrize("place", [0, 15])
def test_a_gradient_that_is_no_number_counts_for_nothing(place: int) -> None:
    """In the first batch nothing is weighted then; in a later one the row is left out."""
    torch.manual_seed(0)
    x = torch.randn(16, 12)
    x[place] = 0.0
    graph = trace(Length().eval(), (x[:4] + 1,)).graph
    known = collect(graph, [(part,) for part in x.split(4)], weighted=True)
    rows = torch.cat([x[:place], x[place + 1 :]])
    plain = collect(graph, [(part,) for part in rows.split(3)])
    (key,) = [key for key in known.grams if key[0] == "x"]
    assert bool(known.gradients) == (place > 0)
    if place == 0:
        torch.testing.assert_close(known.grams[key].gram, plain.grams[key].gram, rtol=1e-4, atol=1e-5)
    assert known.grams[key].gram.isfinite().all()
    data = calibration_from({"x": x}, ["x"], 4)
    lrcompile.compile(Length().eval(), (x[:4] + 1,), target="rpi5", budget=Budget(size=0.8), calibration=data)


def test_a_window_counts_by_what_its_output_is_felt() -> None:
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[..., 0, 0]

    torch.manual_seed(0)
    model, x = Corner().eval(), torch.randn(50, 3, 6, 6)
    graph = trace(model, (x,)).graph
    found = collect(graph, [(x,)], weighted=True)
    window = Window.of(model.conv)
    assert window is not None
    corner = window.patches(x)[:, 0, 0].flatten(1).double()
    gram = found.grams["x", window].gram
    assert torch.allclose(gram / gram.trace(), corner.T @ corner / corner.square().sum(), atol=1e-6)


def test_a_compile_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    model, x = Skewed().eval(), torch.randn(64, 24)
    data = calibration_from({"x": x}, ["x"], 8)
    results = [lrcompile.compile(model, (x[:8],), budget=Budget(size=0.7), calibration=data) for _ in range(2)]
    first, second = (result.model.state_dict() for result in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert results[0].plan.dumps() == results[1].plan.dumps()
