"""What is left of a choice when the whole model is measured, with measurements made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module

import pytest
import torch
from torch import fx, nn

import lrcompile
from lrcompile.confirm import SECONDS, TRIALS, Measured, confirm, contradicts, worthwhile
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost, total
from lrcompile.devices.layouts import operations_on
from lrcompile.devices.measure import LocalCostModel
from lrcompile.devices.profile import load_device
from lrcompile.errors import BudgetError, LatencyError
from lrcompile.graph.graph import Graph
from lrcompile.graph.op import OpDesc
from lrcompile.graph.rewrite import Rewrite
from lrcompile.planning.search import Choice, Problem, search
from lrcompile.prepared import MEASURED_AGAIN

LAYERS = 4
V100 = AnalyticCostModel(load_device("v100"))


class Net(nn.Module):
    """Layers of low rank, each of which a split makes faster on a V100."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(LAYERS))
        for layer in self.layers:
            layer.weight.data = torch.randn(512, 8) @ torch.randn(8, 512) / 512**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


@dataclass
class Machine:
    """Stands for a `Reference`: its ratio follows from which layers are split."""

    prepared: lrcompile.Prepared
    ratio: Callable[[set[int]], float]
    original_s: float = 1.0
    spread: float = 0.0
    asked: list[set[int]] = field(default_factory=list)
    share: float = 1.0

    @property
    def traced(self) -> object:
        return self.prepared.traced

    def measure(self, graph: Graph, seconds: float = 0.0) -> Measured:
        split = {i for i in range(LAYERS) if not isinstance(graph.gm.get_submodule(f"layers.{i}"), nn.Linear)}
        self.asked.append(split)
        spread = self.spread if seconds <= SECONDS else self.spread / 2
        return Measured(Cost(self.original_s), Cost(self.original_s * self.ratio(split), self.original_s * spread))


@pytest.fixture(scope="module")
def prepared() -> lrcompile.Prepared:
    return lrcompile.prepare_model(Net().eval(), (torch.randn(2048, 512),), target="v100")


def confirmed(
    prepared: lrcompile.Prepared,
    budget: lrcompile.Budget,
    ratio: Callable[[set[int]], float],
    spread: float = 0.0,
    machine: type[Machine] = Machine,
    share: float = 1.0,
) -> tuple[set[int], Measured, Machine]:
    p = prepared
    problem = Problem(p.graph, p.pricing.candidates, p.passes, p.context, p.evaluator, p.base, p.original.latency_s)
    made = machine(prepared, ratio, p.original.latency_s, spread, share=share)
    choice, measured = confirm(made, problem, search(problem, budget), budget, budget)  # type: ignore[arg-type]
    left = {i for i in range(LAYERS) if not isinstance(choice.graph.gm.get_submodule(f"layers.{i}"), nn.Linear)}
    return left, measured, made


def test_a_gain_that_holds_is_measured_once(prepared: lrcompile.Prepared) -> None:
    left, measured, machine = confirmed(prepared, lrcompile.Budget(), lambda split: 1 - 0.2 * len(split))
    assert left == {0, 1, 2, 3}
    assert len(machine.asked) == 1
    assert measured.overruled is None


@pytest.mark.parametrize("bad", [{0}, {2}, {1, 3}])
def test_what_makes_the_whole_model_slower_is_left_out(prepared: lrcompile.Prepared, bad: set[int]) -> None:
    left, measured, _ = confirmed(
        prepared, lrcompile.Budget(), lambda split: 1 + 0.3 * len(split & bad) - 0.1 * len(split - bad)
    )
    assert left == {0, 1, 2, 3} - bad
    assert "some were dropped" in (measured.overruled or "")
    assert not measured.returned_original


def test_a_gain_far_below_the_promised_one_is_looked_into(prepared: lrcompile.Prepared) -> None:
    left, measured, machine = confirmed(
        prepared, lrcompile.Budget(), lambda split: 1 - 0.1 * len(split) + 0.37 * (0 in split)
    )
    assert machine.asked[0] == {0, 1, 2, 3}  # faster than the original, and yet
    assert left == {1, 2, 3}
    assert measured.ratio == pytest.approx(0.7)


def test_if_nothing_helps_the_original_is_returned(prepared: lrcompile.Prepared) -> None:
    left, measured, machine = confirmed(prepared, lrcompile.Budget(), lambda split: 1.05 + 0.1 * len(split))
    assert left == set()
    assert measured.returned_original
    assert "not emitted" in (measured.overruled or "")
    assert len(machine.asked) <= TRIALS + 4


def test_a_model_without_rewrites_is_not_found_slower_than_itself(prepared: lrcompile.Prepared) -> None:
    left, measured, machine = confirmed(prepared, lrcompile.Budget(max_error=0.0), lambda split: 1.013)
    assert left == set()
    assert measured.overruled is None
    assert (measured.ratio, len(machine.asked)) == (1.0, 1)


def test_an_error_must_buy_time(prepared: lrcompile.Prepared) -> None:
    left, measured, _ = confirmed(prepared, lrcompile.Budget(), lambda split: 0.9 - 0.001 * len(split))
    assert left == set()
    assert not measured.returned_original


def test_in_integers_an_error_must_buy_time_over_integers_alone(prepared: lrcompile.Prepared) -> None:
    """Splits that gain in float, and in integers nothing over those, which alone take half of the time."""
    for gain, worth in ((0.0, False), (0.1, True)):
        left, measured, _ = confirmed(
            prepared, lrcompile.Budget(int8=True), lambda split, gain=gain: 0.5 - gain * len(split), share=0.5
        )
        assert (left == {0, 1, 2, 3}) == worth
        assert (left == set()) != worth
        assert not measured.returned_original


@pytest.mark.parametrize(("spread", "is_sure"), [(0.01, True), (0.018, True), (0.04, False)])
def test_an_error_must_buy_time_for_sure(prepared: lrcompile.Prepared, spread: float, is_sure: bool) -> None:
    """A gain of 3 %, in an interval that a longer measurement halves."""
    left, measured, machine = confirmed(
        prepared, lrcompile.Budget(), lambda split: 0.97 if len(split) == LAYERS else 1.0, spread
    )
    assert (left == {0, 1, 2, 3}) == is_sure
    assert (machine.asked[1] == {0, 1, 2, 3}) == (spread > 0.015)
    assert measured.returned_original != is_sure
    assert is_sure or "all of the rewrites took 0.970× the original's time (0.930–1.010)" in (measured.overruled or "")


def test_a_size_that_was_asked_for_is_kept_though_slower(prepared: lrcompile.Prepared) -> None:
    left, measured, _ = confirmed(prepared, lrcompile.Budget(size=0.5), lambda split: 1 + 0.1 * len(split))
    assert len(left) >= 2
    assert "kept for its size" in (measured.remark or "")


def test_a_speed_up_is_that_of_one_measurement(prepared: lrcompile.Prepared) -> None:
    """The machine is three times as slow in the first one, which says nothing about the others."""

    class Slow(Machine):
        def measure(self, graph: Graph, seconds: float = 0.0) -> Measured:
            found = super().measure(graph, seconds)
            slowness = 3.0 if len(self.asked) == 1 else 1.0
            return Measured(Cost(found.before.latency_s * slowness), Cost(found.after.latency_s * slowness))

    left, measured, machine = confirmed(
        prepared, lrcompile.Budget(speedup=1.5), lambda split: 1 - 0.09 * len(split), machine=Slow
    )
    assert len(machine.asked) > 1
    assert 1 / measured.ratio >= 1.5
    assert len(left) == LAYERS


def test_the_best_of_several_figures_is_measured_again(prepared: lrcompile.Prepared) -> None:
    """A ratio of 0.63 is met once by luck, and is 0.8 in truth."""
    ratios = iter([0.8, 0.63, *[0.8] * 20])
    with pytest.raises(BudgetError, match=r"speed-up 1\.5\b"):
        confirmed(prepared, lrcompile.Budget(speedup=1.5), lambda split: next(ratios))


def test_a_latency_is_met_as_measured_by_asking_for_less(prepared: lrcompile.Prepared) -> None:
    def ratio(split: set[int]) -> float:
        return 1 - 0.1 * len(split)

    left, measured, machine = confirmed(prepared, lrcompile.Budget(speedup=1.5), ratio)
    assert len(machine.asked) > 1
    assert len(left) == 4
    assert 1 / measured.ratio >= 1.5


def test_a_latency_that_is_more_than_met_buys_accuracy() -> None:
    net = Net()
    with torch.no_grad():
        for layer in net.layers:
            layer.weight += 0.02 * torch.randn(512, 512)
    noisy = lrcompile.prepare_model(net.eval(), (torch.randn(2048, 512),), target="v100")
    predicted = lrcompile.solve(noisy, lrcompile.Budget(speedup=1.5))
    split = {rewrite.site[0] for rewrite in predicted.plan.rewrites}

    def ratio(split: set[int]) -> float:
        return 1 - 0.2 * len(split)

    left, measured, machine = confirmed(noisy, lrcompile.Budget(speedup=1.5), ratio)
    assert len(machine.asked) > 1
    assert len(left) == 2 < len(split)
    assert 1 / measured.ratio >= 1.5


def test_where_nothing_is_cut_a_latency_in_the_interval_is_kept(prepared: lrcompile.Prepared) -> None:
    """A hundredth more speed than integers alone have is no reason to cut; without an interval, or in float, it is."""

    class Integers(Machine):
        def measure(self, graph: Graph, seconds: float = 0.0) -> Measured:
            return replace(super().measure(graph, seconds), int8=True)

    for kind, spread, cut in ((Integers, 0.004, False), (Integers, 0.0, True), (Machine, 0.004, True)):
        p, budget = prepared, lrcompile.Budget(speedup=1 / 0.495, int8=True)
        problem = Problem(p.graph, p.pricing.candidates, p.passes, p.context, p.evaluator, p.base, p.original.latency_s)
        machine = kind(p, lambda split: 0.5 - 0.01 * len(split), p.original.latency_s, spread, share=0.5)
        asked = lrcompile.Budget(speedup=1.0)
        choice, measured = confirm(machine, problem, Choice((), p.graph, 0.0), budget, asked)  # type: ignore[arg-type]
        assert bool(choice.candidates) == cut
        assert ("in the interval" in (measured.remark or "")) != cut


@dataclass
class Cleaned:
    """Stands for a `Reference` of a model that exact clean-up makes faster by a tenth."""

    traced: object
    asked: int = 0
    share: float = 1.0

    def latency(self) -> Cost:
        return Cost(1.0)

    def measure(self, graph: Graph, seconds: float = 0.0) -> Measured:
        self.asked += 1
        return Measured(Cost(1.0), Cost(0.9))


def test_what_clean_up_gains_counts_towards_a_latency() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    prepared = lrcompile.prepare_model(model, (torch.randn(2, 3, 16, 16),), target="rpi5")
    assert prepared.canonical
    machine = Cleaned(prepared.traced)
    here = replace(prepared, reference=machine, original=prepared.base)  # type: ignore[arg-type]
    result = lrcompile.solve(here, lrcompile.Budget(max_error=0.0, speedup=1.05))
    assert pytest.approx(result.report.latency_ms["speedup"]) == 1 / 0.9
    assert machine.asked == 2  # the clean-up, once for all budgets, and the choice
    lrcompile.solve(here, lrcompile.Budget(max_error=0.0, speedup=1.08))
    assert machine.asked == 3
    with pytest.raises(BudgetError, match="reachable range"):
        lrcompile.solve(here, lrcompile.Budget(max_error=0.0, speedup=1.2))
    lrcompile.solve(here, lrcompile.Budget(max_error=0.0))
    assert machine.asked == 5  # once more with the original measured anew; without a limit it is not measured alone


@pytest.mark.parametrize("still_slow", [False, True])
def test_a_latency_out_of_reach_is_asked_for_of_the_original_measured_anew(
    prepared: lrcompile.Prepared, still_slow: bool
) -> None:
    known, slow = prepared.base, replace(prepared.base, latency_s=3 * prepared.base.latency_s)

    class Fast(Machine):
        def latency(self) -> Cost:
            return slow if still_slow else known

    machine = Fast(prepared, lambda split: 1 - 0.2 * len(split), known.latency_s)
    here = replace(prepared, base=slow, original=slow, reference=machine)  # type: ignore[arg-type]
    if still_slow:
        with pytest.raises(LatencyError, match="reachable range"):
            lrcompile.solve(here, lrcompile.Budget(speedup=1.5))
    else:
        assert lrcompile.solve(here, lrcompile.Budget(speedup=1.5)).report.latency_ms["speedup"] > 1.5
    assert here.base is slow  # what was prepared is not changed


@dataclass(frozen=True)
class Remembering(LocalCostModel):
    """Prices of a V100; what is remembered of it is of an hour in which it took `times` as long."""

    times: float = 1.0
    asked: list[bool] = field(default_factory=list)

    def cost(self, op: OpDesc) -> Cost:
        return self._told(V100.cost(op))

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        self.asked.append(self.recent_only)
        one, other = V100.compare(before, after)
        return self._told(one), self._told(other)

    def _told(self, cost: Cost) -> Cost:
        if self.recent_only:
            return cost
        self.counters.recalled += 1
        return replace(cost, latency_s=self.times * cost.latency_s, sigma_s=self.times * cost.sigma_s)


class AsPredicted(Machine):
    """One on which models take what a V100 is predicted to."""

    def latency(self) -> Cost:
        return self.prepared.original

    def measure(self, graph: Graph, seconds: float = 0.0) -> Measured:
        self.asked.append(set())
        took = total([V100.cost(op) for op in operations_on(self.prepared.target.device, graph.gm).values()])
        return Measured(self.prepared.original, took)


@pytest.mark.parametrize("times", [0.2, 1.0, 5.0], ids=["slower now", "as it was", "faster now"])
def test_layers_are_priced_anew_where_the_whole_model_contradicts_what_is_remembered(
    prepared: lrcompile.Prepared, times: float
) -> None:
    budget = lrcompile.Budget(speedup=1.3)
    known = Remembering(None, times=times)
    target = replace(prepared.target, model=known)
    original = prepared.original
    there = lrcompile.prepare_model(Net().eval(), (torch.randn(2048, 512),), target=target)
    there = replace(there, base=original, original=original)

    machine = AsPredicted(prepared, lambda split: 1.0)
    here = replace(there, reference=machine)  # type: ignore[arg-type]
    found = lrcompile.solve(here, budget)
    assert found.plan.rewrites == lrcompile.solve(prepared, budget).plan.rewrites
    assert any(known.asked) == (times != 1.0)
    assert (here.latest is here) == (times == 1.0)
    assert here.probed is here.latest
    assert (MEASURED_AGAIN in found.report.notes) == (times != 1.0)
    count = len(machine.asked)
    fresh = replace(there, reference=machine)  # type: ignore[arg-type]
    assert (fresh.probed is fresh) == (times == 1.0)  # before a metric is evaluated
    assert len(machine.asked) == count + 1
    assert fresh.probed is fresh.latest
    assert fresh.anew is fresh.probed
    assert len(machine.asked) == count + 1


def test_a_prepared_model_that_was_measured_anew_since_is_not_what_is_probed(prepared: lrcompile.Prepared) -> None:
    target = replace(prepared.target, model=Remembering(None))
    there = lrcompile.prepare_model(Net().eval(), (torch.randn(2048, 512),), target=target)

    here = replace(there, reference=AsPredicted(prepared, lambda split: 1.0))  # type: ignore[arg-type]
    assert here.probed is here
    assert here.anew is not here
    assert here.probed is here.anew


@pytest.mark.parametrize(
    ("ratio", "spread", "remark", "expected"),
    [
        (0.5, 0.0, None, False), (0.57, 0.0, None, False), (0.6, 0.0, None, True), (0.42, 0.0, None, True),
        (0.6, 0.05, None, False), (0.9, 0.0, "busy", False),
    ],
    ids=["as predicted", "a little more", "far more", "far less", "within its interval", "on a busy machine"],
)  # fmt: skip
def test_what_contradicts_a_prediction(ratio: float, spread: float, remark: str | None, expected: bool) -> None:
    measured = Measured(Cost(1.0), Cost(ratio, spread), remark=remark)
    assert contradicts(measured, 0.5) == expected
    off = 0.02  # of the original, which is a fifth of what is left
    assert not contradicts(Measured(Cost(1.0), Cost(0.1 + off)), 0.1)


@pytest.mark.parametrize("cleaned", [1.0, 0.7])
def test_what_clean_up_gains_is_no_contradiction(prepared: lrcompile.Prepared, cleaned: float) -> None:
    machine = Machine(prepared, lambda split: cleaned)
    here = replace(prepared, reference=machine, canonical=(Rewrite("fold", ("layer",), {}, 0.0),))  # type: ignore[arg-type]
    original_s = here.original.latency_s
    choice = Choice((), here.graph, 0.0)
    for ratio, expected in ((1.0, False), (0.7, cleaned == 1.0), (0.4, True)):
        measured = Measured(Cost(original_s), Cost(ratio * original_s))
        assert here.contradicted(choice, measured) == expected


def test_a_latency_that_is_not_reached_as_measured_is_an_error(prepared: lrcompile.Prepared) -> None:
    with pytest.raises(BudgetError, match=r"not reached as measured on the whole model: .* \(speed-up 1\.0[0-9]*\)"):
        confirmed(prepared, lrcompile.Budget(speedup=1.5), lambda split: 1 - 0.01 * len(split))


def test_groups_are_halved_no_more_often_than_allowed() -> None:
    asked: list[tuple[int, ...]] = []

    def ratio(group: tuple[int, ...]) -> float:
        asked.append(group)
        return 1.0

    assert worthwhile(tuple(range(64)), ratio, 0.9, trials=9) == ()
    assert len(asked) == 9
    assert worthwhile((), ratio, 0.9, trials=9) == ()
    assert worthwhile(tuple(range(8)), lambda group: 1.2 if 5 in group else 0.5, 0.9, trials=9) == (0, 1, 2, 3, 4, 6, 7)


def test_a_replay_says_that_the_machine_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        @classmethod
        def of(cls, traced: object) -> Busy:
            return cls()

        def measure(self, graph: Graph) -> Measured:
            return Measured(Cost(1.0), Cost(1.0), remark="the machine was busy")

    net, x = nn.Linear(8, 8), torch.randn(4, 8)
    plan = lrcompile.compile(net, (x,), target="v100").plan
    monkeypatch.setattr(import_module("lrcompile.compile"), "Reference", Busy)
    result = lrcompile.replay(net, (x,), plan=replace(plan, target="local"))
    assert "the machine was busy" in result.report.notes
