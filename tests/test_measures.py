"""Errors in measures of classes: what they are, that limits on them hold, and that a plan records them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.cli import run
from lrcompile.errors import BudgetError, InputError
from lrcompile.planning.measures import MEASURES
from tests.test_search import decaying

KL, TOP1 = MEASURES["kl"], MEASURES["top1"]
TARGET = "rpi5"


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_that_of_torch() -> None:
    batches = [(logits(2, 5, 7, seed=1), logits(2, 5, 7, seed=2)), (logits(3, 5, 7, seed=3), logits(3, 5, 7, seed=4))]
    p, q = (torch.cat([pair[i] for pair in batches]).double().reshape(-1, 7) for i in (0, 1))
    expected = nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    assert KL.total(((a,), (b,)) for a, b in batches) == pytest.approx(float(expected), rel=1e-12)


def test_divergence_grows_with_the_square_of_a_difference() -> None:
    y, change = logits(64, 10).double(), 1e-3 * logits(64, 10, seed=1).double()
    once, twice = (KL.root(KL.total([((y,), (y + factor * change,))])) for factor in (1, 2))
    assert twice == pytest.approx(2 * once, rel=1e-2)
    assert KL.value(KL.root(0.3)) == pytest.approx(0.3)


def test_disagreement_is_a_share_of_positions() -> None:
    y = torch.eye(4).repeat(5, 1, 1)
    other = y.clone()
    other[0, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert TOP1.total([((y,), (other,))]) == 1 / 20
    assert TOP1.total([((y,), (other,)), ((y,), (y,))]) == 1 / 40
    assert TOP1.positions((y,)) == 20
    assert MEASURES["kl"].positions((y,)) is None


@pytest.mark.parametrize("measure", MEASURES.values())
def test_no_difference_and_none_that_is_finite(measure: Any) -> None:
    y = logits(6, 5)
    assert measure.total([((y,), (y,))]) == 0
    broken = y.clone()
    broken[0, 0] = math.nan
    assert measure.total([((y,), (broken,))]) == math.inf


def test_masked_classes() -> None:
    y = logits(6, 5)
    y[:, 2] = -math.inf
    assert KL.total([((y,), (y + 1,))]) == pytest.approx(0, abs=1e-12)
    assert KL.total([((logits(6, 5),), (y,))]) == math.inf  # what the original may say is impossible now


def test_the_first_floating_output_counts() -> None:
    y, other = logits(6, 5), logits(6, 5, seed=1)
    ids = torch.arange(6)
    assert KL.total([((ids, y, other), (ids + 1, y, y))]) == 0
    assert TOP1.total([((ids, y, y), (ids, other, y))]) > 0


# ------------------------------------------------------------------------------------------------ budgets


class Classifier(nn.Module):
    """Classes of four positions a sample, as integers too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = decaying(256, 64, 0.7), decaying(256, 256, 1.0), nn.Linear(256, 10)
        self.head.weight.data *= 20

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.second(self.first(x).relu()).relu())
        return y.argmax(-1), y - y.mean((0, 1))


X = torch.randn(64, 4, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prepared() -> lrcompile.Prepared:
    return lrcompile.prepare_model(Classifier().eval(), (X,), target=TARGET)


def figures(net: nn.Module, model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        (_, y), (_, other) = net(X), model(X)
    kl = nn.functional.kl_div(
        other.double().log_softmax(-1).flatten(0, 1), y.double().softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    return {"kl": float(kl), "top1": float((y.argmax(-1) != other.argmax(-1)).double().mean())}


def test_whole_numbers_do_not_count_where_the_error_has_no_limit(prepared: lrcompile.Prepared) -> None:
    limited = lrcompile.solve(prepared, lrcompile.Budget(size=0.9))  # the same prepared model in the other measure
    result = lrcompile.solve(prepared, lrcompile.Budget(size=0.4))
    net = Classifier().eval()
    with torch.no_grad():
        (ids, y), (got_ids, got) = net(X), result.model(X)
    assert bool((ids != got_ids).any())
    assert result.report.error["measured"] == pytest.approx(float((y - got).norm() / y.norm()), rel=1e-4)
    assert any("whole numbers differ" in note for note in result.report.notes)
    assert limited.report.error["measured"] < result.report.error["measured"]


class Steep(nn.Module):
    """Scores and classes of layers that lose next to nothing at low ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = decaying(256, 256, 2.0), decaying(256, 256, 2.0), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.second(self.first(x).relu()).relu())
        return scores, scores.argmax(-1)


@pytest.mark.parametrize("limits", [{}, {"size": 0.5}])
def test_smaller_splits_are_tried_where_larger_ones_turn_whole_numbers(limits: dict[str, float]) -> None:
    """A family whose probe changes a class is not given up: of its other ranks some change none."""
    net, x = Steep().eval(), torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    prepared = lrcompile.prepare_model(net, (x,), target=TARGET)
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.1, **limits))
    assert {rewrite.site for rewrite in result.plan.rewrites} == {("first",), ("second",)}
    assert 0 < result.report.error["measured"] < 0.1
    assert torch.equal(result.model(x)[1], net(x)[1])


def test_the_error_of_whole_numbers_alone_is_the_share_that_differs() -> None:
    class Labels(Classifier):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    result = lrcompile.compile(Labels().eval(), (X,), target=TARGET, budget=lrcompile.Budget(size=0.4))
    with torch.no_grad():
        share = float((Labels().eval()(X) != result.model(X)).double().mean())
    assert 0 < share == result.report.error["measured"]
    assert any("whole numbers: their error is the share" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("measure", "limits"), [("kl", (1e-4, 1e-3, 1e-2)), ("top1", (0.02, 0.1, 0.3))]
)  # fmt: skip
def test_limits_hold_as_measured(prepared: lrcompile.Prepared, measure: str, limits: tuple[float, ...]) -> None:
    gains = []
    for limit in limits:
        result = lrcompile.solve(prepared, lrcompile.Budget(max_error=limit, measure=measure))
        measured = figures(Classifier().eval(), result.model)[measure]
        error = result.report.error
        assert measured <= limit * (1 + 1e-9)
        assert error["measured"] == pytest.approx(measured, rel=1e-4, abs=1e-9)
        assert (error["budget"], error["metric"]) == (limit, MEASURES[measure].label)
        gains.append(result.report.latency_ms["speedup"])
    assert gains == sorted(gains)
    assert gains[0] < gains[-1]


def test_a_share_that_no_batch_alone_can_tell_is_found() -> None:
    """One of eight is 12.5 %, so that a look at one batch would let nothing through."""
    torch.manual_seed(0)
    model = nn.Sequential(decaying(768, 768, 1.5), nn.ReLU(), nn.Linear(768, 10)).eval()
    x = torch.randn(2048, 768)
    data = lrcompile.calibration_from({"input": x}, ["input"], 8, max_batches=None)
    budget = lrcompile.Budget(max_error=0.03, measure="top1")
    result = lrcompile.compile(model, (x[:8],), target=TARGET, calibration=data, budget=budget)
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)
    assert 0 < result.report.error["measured"] <= 0.03


@pytest.mark.parametrize("measure", ["kl", "top1"])
def test_nothing_allowed_is_exact(prepared: lrcompile.Prepared, measure: str) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.0, measure=measure))
    assert all(rewrite.exact for rewrite in result.plan.rewrites)


def test_the_least_in_the_measure_is_sought_for_a_size(prepared: lrcompile.Prepared) -> None:
    """Of the output that is no class, the relative error would be another aim."""
    result = lrcompile.solve(prepared, lrcompile.Budget(size=0.4, measure="kl"))
    by_accident = lrcompile.solve(prepared, lrcompile.Budget(size=0.4, measure="top1"))
    kl = [figures(Classifier().eval(), found.model)["kl"] for found in (result, by_accident)]
    assert kl[0] <= kl[1]
    assert result.report.error["measured"] == pytest.approx(kl[0], rel=1e-4)


def test_a_metric_judges_models_whose_outputs_are_classes() -> None:
    """An integer output that differs is no error where the metric holds."""
    net = Classifier().eval()
    expected = net(X)[0]

    def agreement(model: nn.Module) -> Tensor:
        return (model(X)[0] == expected).float().mean()

    class OnlyClasses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier()

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.net(x)[0],)

    for model in (net, OnlyClasses().eval()):
        budget = lrcompile.Budget(max_drop=0.1)
        result = lrcompile.compile(model, (X,), target=TARGET, metric=agreement, budget=budget)
        assert result.report.latency_ms["speedup"] > 1.1
        assert agreement(result.model) >= 0.9 - 1e-6


def test_limits_that_exclude_each_other(prepared: lrcompile.Prepared) -> None:
    with pytest.raises(BudgetError, match=r"need a KL divergence of classes, in nats of about \S+, more than .* 1e-08"):
        lrcompile.solve(prepared, lrcompile.Budget(size=0.2, max_error=1e-8, measure="kl"))


def test_a_plan_records_the_measure(prepared: lrcompile.Prepared) -> None:
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.01, measure="kl"))
    plan = lrcompile.Plan.loads(result.plan.dumps())
    assert json.loads(result.plan.dumps())["budget"]["measure"] == plan.budget.measure == "kl"
    again = lrcompile.replay(Classifier().eval(), (X,), plan=plan)
    assert again.report.error == result.report.error
    assert again.report.verification == result.report.verification


@pytest.mark.parametrize("net", [nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 4), nn.Flatten(0))])
def test_outputs_without_classes(net: nn.Module) -> None:
    budget = lrcompile.Budget(max_error=0.1, measure="kl")
    x = torch.randn(4, 8)
    if isinstance(net, nn.Linear):
        with pytest.raises(InputError, match=r"the first floating-point output is of shape \[4, 1\]; expected two"):
            lrcompile.compile(net.eval(), (x,), budget=budget)
    else:
        assert lrcompile.compile(net.eval(), (x,), budget=budget).report.error["measured"] == 0


def test_measures_that_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="there is no measure 'kul'; expected one of error, kl, top1"):
        lrcompile.Budget(max_error=0.1, measure="kul")
    with pytest.raises(InputError, match="--measure top1 has no default limit"):
        lrcompile.Budget(measure="top1")


@pytest.mark.usefixtures("tmp_path")
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tests.test_measures:Classifier", "--input", "x=float32[64,4,64]", "--target", TARGET]
    assert run([*words, "--max-error", "0.01", "--measure", "kl"]) == 0
    assert "KL divergence of classes, in nats (measured; weights only; example inputs, budget 0.01)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert run([*words, "--measure", "cosine", "--max-error", "0.1"]) == 2
    assert "there is no measure 'cosine'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ few positions


@pytest.mark.parametrize(("share", "most"), [(0.0, 1 / 257), (0.25, 0.25 + 0.0281), (1.0, 1.0)])
def test_a_share_may_be_larger_by_one_standard_error(prepared: lrcompile.Prepared, share: float, most: float) -> None:
    """Of 64 × 4 positions: also where none was seen to differ, and never beyond all."""
    evaluator = prepared.evaluator.measured_in(TOP1)
    assert share + evaluator.margin(share) == pytest.approx(most, abs=1e-3 if share == 0.25 else 1e-12)
    assert evaluator.margin(share, exact=True) == 0
    assert prepared.evaluator.margin(share) == 0  # of what is measured


class Folded(Classifier):
    """With a batch norm, which is folded exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.norm(x))


def test_few_positions_are_sure_of_exact_rewrites_alone() -> None:
    """None of 8 × 4 positions may seem to differ, and still one in a hundred may."""
    limit = lrcompile.Budget(max_error=0.01, measure="top1")
    results = [lrcompile.compile(Folded().eval(), (X[:count],), target=TARGET, budget=limit) for count in (8, 64)]
    few, many = results
    assert all(rewrite.exact for rewrite in few.plan.rewrites)
    assert any("cannot be told from 0.03" in note for note in few.report.notes)
    assert not any("cannot be told" in note for note in many.report.notes)
    assert few.report.error["measured"] == 0


def test_exact_rewrites_hold_a_share_together_with_a_metric() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    budget = lrcompile.Budget(max_error=0.001, max_drop=0.0, measure="top1")
    result = lrcompile.compile(model, (x,), target=TARGET, metric=lambda m: 1.0, budget=budget)
    assert result.plan.rewrites
    assert all(rewrite.exact for rewrite in result.plan.rewrites)
    assert not any("exact rewrites alone let" in note for note in result.report.notes)
