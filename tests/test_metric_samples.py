"""A metric that gives a number for each sample: one standard error of its fall is kept from the limit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.errors import InputError
from lrcompile.quantization.quantize import RESERVE
from lrcompile.report.summary import summary
from tests.quantized import Mlp, data
from tests.test_metric import LABELS, TARGET, X, made_up, metric_of, mlp, speedup

SEEN = slice(0, 200)


def right(model: nn.Module, some: slice = SEEN) -> Tensor:
    """Whether the class of each sample is right."""
    return (model(X[some]).argmax(-1) == LABELS[some]).float()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return mlp()


@pytest.fixture(scope="module")
def prepared(net: nn.Module) -> dict[str, lrcompile.Prepared]:
    metrics: dict[str, Callable[[nn.Module], Any]] = {"each": right, "mean": lambda model: right(model).mean()}
    return {
        name: lrcompile.prepare_model(net, (X[:256],), target=TARGET, metric=metric) for name, metric in metrics.items()
    }


@pytest.mark.parametrize("max_drop", [0.02, 0.05, 0.1])
def test_the_drop_and_its_standard_error_are_within_the_limit(
    net: nn.Module, prepared: dict[str, lrcompile.Prepared], max_drop: float
) -> None:
    result = lrcompile.solve(prepared["each"], lrcompile.Budget(max_drop=max_drop))
    figures = metric_of(result)
    fall = (right(net) - right(result.model)).detach().numpy().astype(float)
    error = fall.std(ddof=1) / math.sqrt(len(fall))
    assert error > 0
    assert figures["samples"] == 200
    assert figures["standard_error"] == pytest.approx(error, rel=1e-6)
    assert figures["before"] - figures["after"] == pytest.approx(fall.mean(), abs=1e-9)
    assert fall.mean() + error <= max_drop + 1e-6


def test_less_is_taken_and_falls_less_often_too_far(net: nn.Module, prepared: dict[str, lrcompile.Prepared]) -> None:
    """Over many limits: with one number, what 200 samples flatter is taken."""
    x, labels = made_up(20000, 77)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(-1) == labels).float().mean())

    before, limits = accuracy(net), np.linspace(0.01, 0.1, 12)
    gains, over = dict.fromkeys(prepared, 0.0), dict.fromkeys(prepared, 0)
    for drop, (name, p) in itertools.product(limits, prepared.items()):
        result = lrcompile.solve(p, lrcompile.Budget(max_drop=drop))
        gains[name] += speedup(result)
        over[name] += before - accuracy(result.model) > drop
    assert len(limits) < gains["each"] < gains["mean"]
    assert over["each"] < over["mean"]


def test_exact_rewrites_have_no_standard_error(net: nn.Module) -> None:
    """No sample changes with them, so that a drop of nothing holds."""
    model = nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(8 * 62, 6)).eval()
    x = X[:256, None]
    expected = model(x).argmax(-1)
    result = lrcompile.compile(
        model, (x,), target=TARGET, metric=lambda m: (m(x).argmax(-1) == expected).float(),
        budget=lrcompile.Budget(max_drop=0.0),
    )  # fmt: skip
    figures = metric_of(result)
    assert (figures["before"], figures["after"], figures["standard_error"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.Tensor.double, torch.Tensor.bool])
def test_numbers_come_in_any_row(net: nn.Module, kind: Callable[[Tensor], Any]) -> None:
    p = lrcompile.prepare_model(net, (X[:8],), metric=lambda model: kind(right(model)))
    assert p.metric is not None
    assert p.metric.samples == 200
    assert p.metric.base == pytest.approx(float(right(net).double().mean()))


def test_numbers_of_other_samples_are_refused(net: nn.Module) -> None:
    counts = iter([200, 200, 150])

    def fewer(model: nn.Module) -> Tensor:
        return right(model, slice(0, next(counts)))

    with pytest.raises(InputError, match="200 numbers for the original and 150 later; expected one number for each"):
        lrcompile.compile(net, (X[:256],), target=TARGET, metric=fewer, budget=lrcompile.Budget(max_drop=0.1))


BAD: list[tuple[Any, str]] = [
    (torch.ones(9, 1), r"returned a tensor of shape \[9, 1\]; expected one number"),
    (torch.ones(9, dtype=torch.complex64), r"returned a tensor of shape \[9\]; expected one number"),
    (["0.8"] * 9, "returned a list of 9; expected one number"),
    ([[0.8, 0.9]] * 9, "returned a list of 9; expected one number"),
    (torch.tensor([math.nan, *[0.5] * 8]), "returned nan; expected a finite number"),
]


@pytest.mark.parametrize(("value", "says"), BAD)
def test_rows_that_cannot_be_used(net: nn.Module, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        lrcompile.prepare_model(net, (X[:8],), metric=lambda model: value)


def test_one_sample_that_is_not_finite_is_the_worst(net: nn.Module) -> None:
    expected = net(X[SEEN]).detach()

    def fragile(model: nn.Module) -> Tensor:
        off = (model(X[SEEN]) - expected).abs().amax(-1)
        return torch.where(off > 1e-3, math.nan, right(model))

    result = lrcompile.compile(
        net, (X[:256],), target=TARGET, metric=fragile, budget=lrcompile.Budget(max_drop=0.5)
    )  # fmt: skip
    assert float((result.model(X[SEEN]).detach() - expected).abs().max()) <= 1e-3
    assert any("was not finite" in note for note in result.report.notes)


def test_the_summary_says_how_well_it_is_known(prepared: dict[str, lrcompile.Prepared]) -> None:
    report = lrcompile.solve(prepared["each"], lrcompile.Budget(max_drop=0.05)).report
    said = dict(summary(report))["metric"]
    assert "of 200 samples, allowed 0.05" in said


def test_an_int8_file_is_held_to_it(tmp_path: Path) -> None:
    """What 8-bit integers lose may not be known too badly either."""
    torch.manual_seed(0)
    model, given = Mlp().eval(), data(Mlp)
    x = torch.cat([batch["x"] for batch in given.batches])
    expected = model(x).detach()

    def closeness(module: nn.Module) -> Tensor:
        return -(module(x) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)

    result = lrcompile.compile(
        model, (given.batches[0]["x"],), target="rpi5", calibration=given, passes=[], metric=closeness,
        budget=lrcompile.Budget(max_drop=0.2, reserve=RESERVE),
    )  # fmt: skip
    report = result.save(tmp_path / "out.onnx", quantize=lrcompile.Quantization(given))
    figures = report.metric
    assert figures is not None
    assert report.quantization is not None
    assert report.quantization["metric_standard_error"] == figures["standard_error"] > 0
    assert figures["before"] - figures["after"] + figures["standard_error"] <= 0.2
