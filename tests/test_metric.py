"""A budget on the user's own metric: held as evaluated, in few evaluations, with the noise that the metric has."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.confirm import Measured, confirm
from lrcompile.devices.cost import Cost
from lrcompile.errors import BudgetError, InputError
from lrcompile.graph.graph import Graph
from lrcompile.planning.choose import thin
from lrcompile.planning.metric import KEPT_BACK, MOST_EVALUATIONS, DropLimit
from lrcompile.planning.price import Candidate
from lrcompile.planning.search import Problem, metric_holds, search
from lrcompile.planning.sensitivity import rewritten
from tests.panel import randomise
from tests.test_search import decaying

TARGET = "rpi5"
WIDTH = 64
Function = Callable[[nn.Module], Any]


def made_up(count: int, seed: int, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Samples around one centre a class, close enough to be mixed up now and then."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 2.2 * torch.randn(count, WIDTH, generator=generator), labels


def trained(model: nn.Module, shape: tuple[int, ...] = (WIDTH,)) -> nn.Module:
    torch.manual_seed(1)
    x, labels = made_up(2048, 1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.reshape(-1, *shape)), labels).backward()
        optimizer.step()
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    wide = 256
    layers = (decaying(wide, WIDTH, 0.7), nn.ReLU(), decaying(wide, wide, 1.0), nn.ReLU(), nn.Linear(wide, 6))
    return trained(nn.Sequential(*layers))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


X, LABELS = made_up(1000, 2)


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(-1) == LABELS).float().mean())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return mlp()


@pytest.fixture(scope="module")
def prepared(net: nn.Module) -> lrcompile.Prepared:
    return lrcompile.prepare_model(net, (X[:256],), target=TARGET, metric=accuracy)


def metric_of(result: lrcompile.Result) -> dict[str, Any]:
    assert result.report.metric is not None
    return dict(result.report.metric)


def speedup(result: lrcompile.Result) -> float:
    return float(result.report.latency_ms["speedup"])


@pytest.mark.parametrize("max_drop", [0.0, 0.005, 0.05, 0.3])
def test_the_drop_holds(net: nn.Module, prepared: lrcompile.Prepared, max_drop: float) -> None:
    before = accuracy(net)
    assert 0.7 < before < 1
    result = lrcompile.solve(prepared, lrcompile.Budget(max_drop=max_drop))
    after = accuracy(result.model)
    assert after >= before - max_drop - 1e-6
    figures = metric_of(result)
    assert figures["before"] == pytest.approx(before, abs=1e-6)
    assert figures["after"] == pytest.approx(after, abs=1e-6)
    assert (figures["max_drop"], figures["noise"], figures["name"]) == (max_drop, 0.0, "tests.test_metric:accuracy")
    assert 2 < figures["evaluations"] <= MOST_EVALUATIONS
    assert result.report.to_json()["metric"] == figures == json.loads(result.plan.dumps())["metric"]


def test_more_drop_allowed_is_faster(prepared: lrcompile.Prepared) -> None:
    gains = [speedup(lrcompile.solve(prepared, lrcompile.Budget(max_drop=drop))) for drop in (0.0, 0.02, 0.3)]
    assert gains[0] < gains[1] < gains[2]


def test_no_drop_allows_lossy_rewrites_that_do_no_harm(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.0))
    assert speedup(result) > 1.05
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)


def test_the_metric_is_spent_not_the_error(prepared: lrcompile.Prepared) -> None:
    """A classifier keeps its accuracy far beyond the default limit on the output error."""
    by_metric = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.01))
    by_error = lrcompile.solve(prepared, lrcompile.Budget())
    assert by_metric.report.error["measured"] > 2 * by_error.report.error["measured"]
    assert speedup(by_metric) > speedup(by_error)


def test_near_the_best_of_all_choices(prepared: lrcompile.Prepared) -> None:
    p = prepared
    surely = (c for c in p.pricing.candidates if c.p_faster >= 0.8 and c.gain.latency_s > 0)
    by_site: dict[tuple[str, ...], list[Candidate | None]] = {}
    for candidate in thin(surely):
        by_site.setdefault(candidate.sites, [None]).append(candidate)
    assert set(by_site) == {("0",), ("2",)}
    all_choices = []
    for picked in itertools.product(*by_site.values()):
        rewrites = [rewrite for candidate in picked if candidate for rewrite in candidate.rewrites]
        model = rewritten(p.graph, rewrites, p.passes, p.context).gm
        all_choices.append((sum(candidate.gain.latency_s for candidate in picked if candidate), accuracy(model)))
    assert len(all_choices) > 50
    assert p.metric is not None
    for max_drop in (0.0, 0.002, 0.01, 0.1):
        result = lrcompile.solve(p, lrcompile.Budget(max_drop=max_drop))
        best_s = max(gain_s for gain_s, value in all_choices if value >= p.metric.base - max_drop - 1e-6)
        assert result.report.latency_ms["after"] <= 1.02e3 * (p.base.latency_s - best_s)


def test_convolutions() -> None:
    net = trained(ConvNet(), (1, 8, 8))

    def on_images(model: nn.Module) -> Tensor:
        return (model(X.reshape(-1, 1, 8, 8)).argmax(-1) == LABELS).double().mean()

    result = lrcompile.compile(
        net, (X[:64].reshape(-1, 1, 8, 8),), target=TARGET, metric=on_images, budget=lrcompile.Budget(max_drop=0.02)
    )
    assert on_images(result.model) >= on_images(net) - 0.02 - 1e-6
    assert speedup(result) > 1


class Block(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.linear = decaying(WIDTH, WIDTH, slope)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.tanh(self.linear(x))


@pytest.mark.slow
def test_sixty_layers_take_few_evaluations() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(0.5 + 0.03 * i) for i in range(60)), nn.Linear(WIDTH, 6)).eval()
    x = torch.randn(1024, WIDTH)

    def classes(model: nn.Module) -> Tensor:
        y = model(x)
        return (y - y.mean(0)).argmax(-1)

    with torch.no_grad():
        expected, calls = classes(net), []

    def agreement(model: nn.Module) -> float:
        calls.append(model)
        return float((classes(model) == expected).float().mean())

    result = lrcompile.compile(
        net, (x,), target=TARGET, metric=agreement, budget=lrcompile.Budget(max_drop=0.05)
    )  # fmt: skip
    assert len(calls) == metric_of(result)["evaluations"] <= MOST_EVALUATIONS == 25
    assert speedup(result) > 1.05
    assert agreement(result.model) >= 0.95 - 1e-6


# ------------------------------------------------------------------------------------------------ noise


def sampled(model: nn.Module) -> float:
    """The accuracy on some of the samples, drawn anew each time."""
    rows = torch.randperm(len(X))[:300]
    return float((model(X[rows]).argmax(-1) == LABELS[rows]).float().mean())


def test_noise_is_measured_and_widens_the_limit(net: nn.Module) -> None:
    prepared = lrcompile.prepare_model(net, (X[:256],), target=TARGET, metric=sampled)
    assert prepared.metric is not None
    noise = prepared.metric.noise
    assert 0 < noise < 0.1
    limit = DropLimit(prepared.metric, 0.01)
    assert limit.least == pytest.approx(prepared.metric.base - 0.01 - noise, abs=1e-6)
    result = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.01))
    figures = metric_of(result)
    assert figures["noise"] == noise
    assert figures["before"] - figures["after"] <= 0.01 + noise + 1e-6
    assert any(f"{noise:.2g}" in note for note in result.report.notes)


def test_a_metric_that_is_random_gives_the_same_plan(net: nn.Module) -> None:
    def plan() -> str:
        return lrcompile.compile(
            net, (X[:256],), target=TARGET, metric=sampled, budget=lrcompile.Budget(max_drop=0.02)
        ).plan.dumps()

    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = plan()
    torch.manual_seed(4)
    np.random.seed(4)
    assert plan() == first
    assert json.loads(first)["metric"]["noise"] > 0
    torch.set_rng_state(state)


def test_solving_again_changes_nothing(prepared: lrcompile.Prepared) -> None:
    first = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.02)).plan.dumps()
    lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.3))
    assert lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.02)).plan.dumps() == first


def test_what_holds_once_by_luck_is_not_taken(net: nn.Module) -> None:
    """Every model but the original is worse, except when it is looked at first."""
    seen: dict[str, int] = {}

    def lucky(model: nn.Module) -> float:
        key = str(float(model(X[:8]).double().sum()))
        seen[key] = seen.get(key, 0) + 1
        return 1.0 if seen[key] == 1 or len(seen) == 1 else 0.5

    result = lrcompile.compile(
        net, (X[:256],), target=TARGET, metric=lucky, budget=lrcompile.Budget(max_drop=0.1)
    )  # fmt: skip
    assert torch.equal(result.model(X), net(X))
    assert metric_of(result)["after"] == metric_of(result)["before"] == 1.0


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = decaying(256, WIDTH, 2.0), nn.BatchNorm1d(256), nn.Linear(256, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).relu())


def test_exact_rewrites_are_left_where_others_held_by_luck() -> None:
    """Every split holds when it is looked at first, and never again."""
    torch.manual_seed(0)
    net, seen = Normed().eval(), set[str]()

    def lucky(model: nn.Module) -> float:
        split = sum(isinstance(module, nn.Linear) for module in model.modules()) > 2
        key = str(float(model(X[:8]).double().sum()))
        again = key in seen
        seen.add(key)
        return 0.5 if split and again else 1.0

    result = lrcompile.compile(net, (X[:256],), target=TARGET, metric=lucky, budget=lrcompile.Budget(max_drop=0.1))
    assert [rewrite.pass_name for rewrite in result.plan.rewrites] == ["fold-batch-norm"]
    assert metric_of(result)["after"] == 1


# ------------------------------------------------------------------------------------------------ several limits


def test_together_with_an_error(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.3, max_error=0.02))
    assert result.report.error["measured"] <= 0.02
    assert speedup(result) < speedup(lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.3)))


def test_together_with_a_size(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.05, size=0.6))
    model = result.report.model
    assert model["weight_bytes_after"] <= 0.6 * model["weight_bytes_before"]
    assert metric_of(result)["after"] >= metric_of(result)["before"] - 0.05 - 1e-6


def test_together_with_a_speed_up(prepared: lrcompile.Prepared) -> None:
    fastest = speedup(lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.02)))
    asked = 1 + (fastest - 1) / 2
    result = lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.02, speedup=asked))
    assert speedup(result) >= max(asked, 0.98 * fastest)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"size": 0.08}, r"the metric falls from 0\.\d+ to 0\.\d+ with .* --max-drop of 0\.002 .* a speed-up of 2"),
        ({"speedup": 2.55}, r"the metric falls from 0\.\d+ to 0\.\d+ with .* allow a larger drop, or ask for less"),
        ({"size": 0.2, "max_error": 0.001}, r"need a relative output error of about 0\.\d+, more than the 0\.001 that"),
        ({"speedup": 1000.0}, r"the reachable range is"),
    ],
)
def test_limits_that_exclude_each_other(prepared: lrcompile.Prepared, limits: dict[str, float], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.002, **limits))


def test_exact_rewrites_that_harm_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    x = torch.randn(4, 3, 8, 8)

    def pedantic(model: nn.Module) -> float:
        return float(any(isinstance(module, nn.BatchNorm2d) for module in model.modules()))

    result = lrcompile.compile(net, (x,), target=TARGET, metric=pedantic, budget=lrcompile.Budget(max_drop=0.5))
    assert torch.equal(result.model(x), net(x))
    assert result.plan.rewrites == ()
    assert speedup(result) == 1
    assert any("let the metric fall from 1 to 0, further" in note for note in result.report.notes)
    rounded = lrcompile.compile(
        net, (x,), target=TARGET, dtype="fp16", metric=lambda model: 1.0,
        budget=lrcompile.Budget(max_drop=0.5, max_error=1e-5),
    )  # fmt: skip
    assert any("round to an error above what is allowed: the model is as it was" in n for n in rounded.report.notes)
    again = lrcompile.replay(net, (x,), plan=lrcompile.Plan.loads(result.plan.dumps()))
    assert torch.equal(again.model(x), net(x))


# ------------------------------------------------------------------------------------------------ local


class Machine:
    """Stands for a `Reference`: some of the layers' splits make the whole model slower."""

    share = 1.0

    def __init__(self, prepared: lrcompile.Prepared, slow: str) -> None:
        self.traced, self.slow = prepared.traced, slow

    def measure(self, graph: Graph, seconds: float = 0.0) -> Measured:
        is_split = {name: not isinstance(graph.gm.get_submodule(name), nn.Linear) for name in ("0", "2")}
        ratio = 1 - 0.2 * sum(is_split.values()) + (0.5 if is_split[self.slow] else 0.0)
        return Measured(Cost(1.0), Cost(ratio))


def problem_of(p: lrcompile.Prepared, drop: DropLimit) -> Problem:
    original_s = p.original.latency_s
    return Problem(p.graph, p.pricing.candidates, p.passes, p.context, p.evaluator, p.base, original_s, drop=drop)


@pytest.mark.parametrize("slow", ["0", "2"])
def test_what_a_measurement_leaves_holds_the_drop(prepared: lrcompile.Prepared, slow: str) -> None:
    assert prepared.metric is not None
    drop = DropLimit(prepared.metric, 0.02)
    budget = lrcompile.Budget(max_drop=0.02)
    choice = search(problem_of(prepared, drop.kept_back()), budget)
    assert len(drop.asked) + 2 <= MOST_EVALUATIONS - KEPT_BACK
    problem = problem_of(prepared, drop)
    left, _ = confirm(Machine(prepared, slow), problem, choice, budget, budget)  # type: ignore[arg-type]
    assert 0 < len(left.candidates) < len(choice.candidates)
    assert metric_holds(problem, left.candidates)
    assert accuracy(left.graph.gm) >= prepared.metric.base - 0.02 - 1e-6
    assert drop.result(left.rewrites).after == pytest.approx(accuracy(left.graph.gm), abs=1e-6)


def test_what_a_measurement_leaves_and_harms_is_not_emitted(net: nn.Module) -> None:
    """Half of the rewrites, on their own, are worse than all of them or none."""

    def together(model: nn.Module) -> float:
        split = sum(isinstance(module, nn.Linear) for module in model.modules())
        return 0.0 if split == 4 else 1.0

    prepared = lrcompile.prepare_model(net, (X[:256],), target=TARGET, metric=together)
    assert prepared.metric is not None
    problem = problem_of(prepared, DropLimit(prepared.metric, 0.5))
    choice = search(replace(problem, drop=None), lrcompile.Budget(max_error=0.9))
    assert len(choice.candidates) == 2
    assert metric_holds(problem, choice.candidates)
    machine, budget = Machine(prepared, "2"), lrcompile.Budget(max_drop=0.5)
    left, _ = confirm(machine, problem, choice, budget, budget)  # type: ignore[arg-type]
    assert left.candidates == ()
    assert problem.drop is not None
    assert problem.drop.result(left.rewrites).after == 1


# ------------------------------------------------------------------------------------------------ bad input


def raising(model: nn.Module) -> float:
    raise KeyError("no such data")


BAD: list[tuple[Any, str]] = [
    (raising, r"raising raised KeyError: 'no such data'"),
    (lambda model: model.generate(X), "raised AttributeError: .*none of its other methods"),
    (lambda model: float("nan"), "returned nan; expected a finite number"),
    (lambda model: float("inf"), "returned inf; expected a finite number"),
    (lambda model: torch.ones(3), r"returned a tensor of shape \[3\]; .*one number for each sample, at least 8"),
    (lambda model: [], "returned a list of 0; expected one number"),
    (lambda model: (0.9, 0.1), "returned a tuple; expected one number"),
    (lambda model: np.ones((2, 2)), r"returned an array of shape \[2, 2\]"),
    (lambda model: {"accuracy": 0.9}, "returned a dict; expected one number"),
    (lambda model: "0.9", "returned a str"),
    (lambda model: 1j, "returned a complex"),
    (lambda model: None, "returned None"),
    (0.9, "the metric is a float; expected a function"),
]


@pytest.mark.parametrize(("metric", "says"), BAD)
def test_metrics_that_cannot_be_used(net: nn.Module, metric: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        lrcompile.compile(net, (X[:8],), metric=metric, budget=lrcompile.Budget(max_drop=0.1))


@pytest.mark.parametrize("worst", [float("nan"), float("-inf"), float("inf")])
def test_a_rewritten_model_without_a_finite_metric_does_not_hold(net: nn.Module, worst: float) -> None:
    reference = net(X).detach()
    tried = []

    def fragile(model: nn.Module) -> float:
        tried.append(float((model(X) - reference).norm() / reference.norm()) > 0.05)
        return worst if tried[-1] else accuracy(model)

    budget = lrcompile.Budget(max_drop=0.02)
    result = lrcompile.compile(net, (X[:256],), target=TARGET, metric=fragile, budget=budget)
    assert any(tried)
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)
    assert float((result.model(X).detach() - reference).norm() / reference.norm()) <= 0.05
    assert any("was not finite, which counts as the worst there is" in note for note in result.report.notes)


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.array([1.0]), torch.tensor(1.0), torch.tensor([[1]])])
def test_whatever_is_one_number_is_a_value(net: nn.Module, value: Any) -> None:
    prepared = lrcompile.prepare_model(net, (X[:8],), metric=lambda model: value)
    assert prepared.metric is not None
    assert (prepared.metric.base, prepared.metric.noise, prepared.metric.samples) == (1.0, 0.0, 1)


def test_a_metric_and_its_limit_belong_together(net: nn.Module, prepared: lrcompile.Prepared) -> None:
    with pytest.raises(InputError, match="accuracy has no limit; say how far it may fall"):
        lrcompile.compile(net, (X[:8],), metric=accuracy)
    with pytest.raises(InputError, match="has no limit"):
        lrcompile.compile(net, (X[:8],), metric=accuracy, budget=lrcompile.Budget(max_error=0.1))
    limited = lrcompile.Budget(max_drop=0.1)
    with pytest.raises(InputError, match="of no metric; give one"):
        lrcompile.compile(net, (X[:8],), budget=limited)
    with pytest.raises(InputError, match="of no metric; give one"):
        lrcompile.solve(lrcompile.prepare_model(net, (X[:8],)), limited)
    plan = lrcompile.solve(prepared, limited).plan
    with pytest.raises(InputError, match="--plan replays one"):
        lrcompile.compile(net, (X[:256],), metric=accuracy, budget=limited, plan=plan)


@pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf")])
def test_drops_that_mean_nothing(drop: float) -> None:
    with pytest.raises(InputError, match="budget max_drop is"):
        lrcompile.Budget(max_drop=drop)


# ------------------------------------------------------------------------------------------------ the model it gets


def test_a_metric_may_do_to_its_model_what_it_likes(net: nn.Module) -> None:
    before = [parameter.clone() for parameter in net.parameters()]

    def rough(model: nn.Module) -> float:
        value = accuracy(model)
        for parameter in model.half().parameters():
            parameter.zero_()
        return value

    compiled = [
        lrcompile.compile(net, (X[:256],), target=TARGET, metric=m, budget=lrcompile.Budget(max_drop=0.02))
        for m in (rough, accuracy)
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(compiled[0].model(X), compiled[1].model(X))


def test_without_a_limit_on_it_a_metric_holds_nothing(net: nn.Module, prepared: lrcompile.Prepared) -> None:
    """A result that was not held to a metric does not hold what is made of it later to a drop of nothing."""
    assert lrcompile.solve(prepared, lrcompile.Budget(max_drop=0.01)).metric is not None
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.05))
    assert result.metric is None
    assert result.report.metric is None
