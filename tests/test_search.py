"""The search: budgets kept as measured, rewrites admitted only where they pay, and nothing decomposed in vain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import BudgetError
from lrcompile.graph.graph import Graph
from lrcompile.planning import decompose
from lrcompile.planning.budget import EXACT_ERROR
from lrcompile.planning.price import Candidate
from lrcompile.planning.search import search
from lrcompile.planning.sensitivity import PROBE_ERROR, Evaluator, Sensitivities, rewritten
from lrcompile.planning.strategies.strategy import offered
from lrcompile.report.report import Decision


def decaying(rows: int, columns: int, slope: float) -> nn.Linear:
    """A layer whose singular values fall off like trained ones: the i-th is i to the power of -slope."""
    layer = nn.Linear(columns, rows)
    size = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, size))[0] for n in (rows, columns))
    values = torch.arange(1, size + 1, dtype=torch.float32) ** -slope
    layer.weight.data = (left * values) @ right.T * size**0.5 / values.norm()
    return layer


def stack(width: int = 512, depth: int = 4) -> nn.Module:
    """Layers that differ in how well they can be cut."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [decaying(width, width, 0.5 + 0.5 * i), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 8)).eval()


X = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prepared() -> lrcompile.Prepared:
    return lrcompile.prepare_model(stack(), (X,), target="v100")


def speedup(result: lrcompile.Result) -> float:
    return float(result.report.latency_ms["speedup"])


def test_the_table_says_what_a_rewrite_alone_does_to_the_model(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.1))
    lossy = {r.site: r for r in result.plan.rewrites if not r.exact}
    alone = 0
    for decision in result.report.sites:
        rewrite = lossy.get((decision.site,))
        if rewrite is None or decision.pass_name != rewrite.pass_name:
            continue
        graph = rewritten(prepared.graph, [rewrite], prepared.passes, prepared.context)
        assert decision.effect == pytest.approx(prepared.evaluator.error(graph), rel=0.5)
        assert all(item["effect"] is None or item["effect"] >= 0 for item in decision.alternatives)
        alone += 1
    assert alone > 0
    assert lrcompile.solve(prepared, lrcompile.Budget(strategy="energy", max_error=0.01)).report.sites  # has none
    again = Decision.from_json(result.report.sites[0].to_json())
    assert again.effect == result.report.sites[0].effect


def test_more_error_allowed_is_never_slower(prepared: lrcompile.Prepared) -> None:
    limits = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4)
    results = [lrcompile.solve(prepared, lrcompile.Budget(max_error=limit)) for limit in limits]
    for limit, result in zip(limits, results, strict=True):
        assert result.report.error["measured"] <= max(limit, EXACT_ERROR)
    gains = [speedup(result) for result in results]
    assert gains == sorted(gains)
    assert gains[-1] > gains[0]


def test_an_error_budget_is_spent(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.2))
    assert 0.1 <= result.report.error["measured"] <= 0.2


@pytest.mark.parametrize("asked", [1.1, 1.3, 1.6])
def test_a_speed_up_asked_for_is_reached_at_the_least_error(prepared: lrcompile.Prepared, asked: float) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(speedup=asked))
    assert speedup(result) >= asked * (1 - 1e-6)
    less = lrcompile.solve(prepared, lrcompile.Budget(speedup=1 + (asked - 1) / 2))
    assert less.report.error["measured"] <= result.report.error["measured"] + 1e-9


def test_what_cuts_best_is_cut_first(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.1))
    cut = {decision.site for decision in result.report.sites if decision.decision == "rewritten"}
    assert "6" in cut
    assert "0" not in cut


def test_solving_again_changes_nothing(prepared: lrcompile.Prepared) -> None:
    first = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.1)).plan.dumps()
    lrcompile.solve(prepared, lrcompile.Budget(size=0.5))
    assert lrcompile.solve(prepared, lrcompile.Budget(max_error=0.1)).plan.dumps() == first


def test_a_size_that_needs_slower_rewrites_says_so() -> None:
    narrow = nn.Sequential(*(layer for _ in range(4) for layer in (decaying(64, 64, 1.0), nn.GELU()))).eval()
    result = lrcompile.compile(narrow, (X[:8, :64],), target="v100", budget=lrcompile.Budget(size=0.6))
    assert result.report.model["weight_bytes_after"] <= 0.6 * result.report.model["weight_bytes_before"]
    assert any("do not make the target faster" in note for note in result.report.notes)


def test_limits_that_exclude_each_other(prepared: lrcompile.Prepared) -> None:
    with pytest.raises(BudgetError, match=r"cannot be met together: .* error of about 0\.\d+, more than"):
        lrcompile.solve(prepared, lrcompile.Budget(speedup=1.8, max_error=0.001))


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many eigen-decompositions there were since."""
    calls: list[torch.Size] = []
    original = decompose._eigh

    def count(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(symmetric.shape)
        return original(symmetric)

    monkeypatch.setattr(decompose, "_eigh", count)
    return lambda: len(calls)


def test_each_layer_is_decomposed_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    prepared = lrcompile.prepare_model(stack(), (X,), target="v100")
    for budget in (lrcompile.Budget(max_error=0.1), lrcompile.Budget(speedup=1.3), lrcompile.Budget(max_error=0.2)):
        lrcompile.solve(prepared, budget)
    assert 1 <= count() <= 4


def test_what_is_not_faster_is_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    result = lrcompile.compile(stack(), (X[:1],), target="v100")  # one row: launches are all there is
    assert any(decision.alternatives for decision in result.report.sites)
    assert count() == 0


def test_exact_rewrites_alone_decompose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    prepared = lrcompile.prepare_model(stack(), (X,), target="v100")
    lrcompile.solve(prepared, lrcompile.Budget(max_error=0.0))
    assert count() == 0


def test_one_layer_that_is_misjudged_does_not_cost_the_others_their_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that is cut best costs what its own error says at the rank that is measured, and far more at others."""
    prepared = lrcompile.prepare_model(stack(), (X,), target="v100")
    spared = lrcompile.prepare_model(stack(), (X,), target="v100", skip=["6"])
    own = [c.error for c in prepared.pricing.candidates if c.sites == ("6",) and c.error > 0]
    probe = min(own, key=lambda error: abs(math.log(error / PROBE_ERROR)))
    measured = Evaluator.error_after

    def trapped(self: Evaluator, graph: Graph, candidates: Sequence[Candidate], *given: Any, **named: Any) -> float:
        caught = any(c.sites == ("6",) and c.error not in (0.0, probe) for c in candidates)
        return math.hypot(measured(self, graph, candidates, *given, **named), 0.6 * caught)

    monkeypatch.setattr(Evaluator, "error_after", trapped)
    gains = []
    for limit in (0.05, 0.1, 0.2, 0.3, 0.4):
        result, without = (lrcompile.solve(p, lrcompile.Budget(max_error=limit)) for p in (prepared, spared))
        assert result.report.error["measured"] <= limit
        assert speedup(result) >= 0.99 * speedup(without)
        gains.append(speedup(result))
    assert gains == sorted(gains)


@dataclass(frozen=True)
class Cut:
    """Stands for a candidate: its family, its own error, and that of the model with it alone."""

    family: str
    error: float
    truth: float


class Sums:
    """Stands for an `Evaluator`: errors add up in quadrature."""

    resolution = 1e-12

    def __init__(self) -> None:
        self.asked: list[int] = []

    def error_after(self, graph: object, cuts: Sequence[Cut], *given: object, quick: bool) -> float:
        assert quick
        self.asked.append(len(cuts))
        return math.hypot(*(cut.truth for cut in cuts))


def test_what_is_misjudged_is_found_by_halving() -> None:
    cuts = [Cut(str(i), own, 0.5 * own) for i in range(32) for own in (0.1, 0.05, 0.02)]
    bad = [Cut("bad", own, 0.1 if own == 0.1 else 0.3) for own in (0.1, 0.01, 0.001)]
    everything, evaluator = [*cuts, *bad], Sums()
    sensed = Sensitivities(None, everything, everything, {}, None, evaluator)  # type: ignore[arg-type]
    assert len(evaluator.asked) == 33  # one of each family
    assert sensed.errors[-3:] == pytest.approx([0.1, 0.01, 0.001])
    before = list(sensed.errors)
    picked = [*range(2, 96, 3), 98]  # of each family the most careful cut
    assert sensed.look_closer(picked)
    assert len(evaluator.asked) <= 33 + 1 + 2 * 6 + 3
    assert sensed.errors[-3:] == pytest.approx([0.1, 0.3, 0.3])
    assert sensed.errors[:-3] == before[:-3]
    assert not sensed.look_closer(picked)
    assert sensed.predicted(picked) == pytest.approx(math.hypot(0.3, *[0.01] * 32))


def test_a_share_of_size_is_of_the_model_as_given() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.norm(self.up(x)).relu())

    budget = lrcompile.Budget(size=0.5)
    problem = lrcompile.prepare_model(Normed().eval(), (X[:64, :64],), target="rpi5").problem(budget)
    given, cleaned = 4 * (2 * 64 * 256 + 2 * 256 + 64), 4 * (2 * 64 * 256 + 256 + 64)
    assert problem.bytes_over(budget) == offered(problem, budget).limits.bytes_saved == cleaned - given / 2
    with pytest.raises(BudgetError, match=r"a size of 0\.001 of the original cannot be reached"):
        search(problem, lrcompile.Budget(size=0.001))
