"""The user's metric with each rewrite alone: how far it falls at each site, as evaluated, and what that takes."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import lrcompile
from lrcompile.errors import InputError
from lrcompile.planning.metric import MOST_EVALUATIONS
from lrcompile.planning.price import Candidate
from lrcompile.planning.sensitivity import rewritten
from lrcompile.report.report import Decision, told_of
from lrcompile.report.terminal import print_decisions
from tests.test_metric import TARGET, WIDTH, X, accuracy, metric_of, mlp, sampled

BUDGET = lrcompile.Budget(max_drop=0.02)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return mlp()


def told(prepared: lrcompile.Prepared, result: lrcompile.Result) -> dict[str, Candidate]:
    """The candidates of a choice by their sites, and what might have been made of the rest."""
    made = {str(rewrite) for rewrite in result.plan.rewrites}
    chosen = [c for c in prepared.pricing.candidates if c.rewrites and {str(r) for r in c.rewrites} <= made]
    return told_of(prepared.graph, prepared.pricing, chosen, result.plan.budget)


def test_each_site_has_what_the_metric_loses_with_its_rewrite_alone(net: nn.Module) -> None:
    calls, said = [], list[str]()

    def counted(model: nn.Module) -> float:
        calls.append(model)
        return accuracy(model)

    p = lrcompile.prepare_model(
        net, (X[:256],), target=TARGET, metric=counted, metric_by_site=True,
        progress=lambda stage, done, total: said.append(stage),
    )  # fmt: skip
    result = lrcompile.solve(p, BUDGET)
    expected = {
        site: accuracy(net) - accuracy(rewritten(p.graph, candidate.rewrites, p.passes, p.context).gm)
        for site, candidate in told(p, result).items()
    }
    assert {site.site: site.drop for site in result.report.sites if site.drop is not None} == pytest.approx(expected)
    assert set(expected) >= {"0", "2"}
    assert any("more evaluations of" in line and line.endswith("s") for line in said)
    assert len(calls) <= metric_of(result)["evaluations"] + len(expected)
    assert metric_of(result)["evaluations"] <= MOST_EVALUATIONS  # of the search alone
    before = len(calls)
    again = lrcompile.solve(p, BUDGET)
    assert len(calls) == before  # what was evaluated is known
    assert again.plan.dumps() == result.plan.dumps()


def test_the_choice_is_the_same_as_without(net: nn.Module) -> None:
    options: dict[str, Any] = {"target": TARGET, "metric": sampled, "budget": BUDGET}
    plans = [
        json.loads(lrcompile.compile(net, (X[:256],), metric_by_site=by_site, **options).plan.dumps())
        for by_site in (False, True)
    ]
    drops = [[site.pop("drop") for site in plan["sites"]] for plan in plans]
    assert plans[0] == plans[1]
    assert set(drops[0]) == {None}
    assert any(drop is not None for drop in drops[1])


def test_a_layer_without_which_nothing_works(net: nn.Module) -> None:
    """The metric is not finite once the first layer is rewritten: the worst there is, which no JSON can hold."""

    def fragile(model: nn.Module) -> float:
        whole = any(isinstance(module, nn.Linear) and module.weight.shape == (256, WIDTH) for module in model.modules())
        return accuracy(model) if whole else math.nan

    result = lrcompile.compile(net, (X[:256],), target=TARGET, metric=fragile, metric_by_site=True, budget=BUDGET)
    drops = {site.site: site.drop for site in result.report.sites}
    assert drops["0"] == math.inf
    assert drops["2"] is not None
    assert drops["2"] < 0.1
    assert json.loads(result.plan.dumps())["sites"][0]["drop"] is None


@pytest.mark.parametrize("width", [160, 60])
def test_the_screen_and_the_page_have_it(net: nn.Module, width: int) -> None:
    result = lrcompile.compile(net, (X[:256],), target=TARGET, metric=accuracy, metric_by_site=True, budget=BUDGET)
    sites = [Decision.from_json(site.to_json()) for site in result.report.sites]
    without = [replace(site, drop=None) for site in sites]
    screens = []
    for shown in (sites, without):
        console = Console(file=io.StringIO(), width=width)
        print_decisions(console, shown)
        screens.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert ["metric falls" in screen for screen in screens] == [True, False]
    assert "metric falls" in result.report.to_html()
    assert "metric falls" not in replace(result.report, sites=without).to_html()


def test_there_has_to_be_a_metric(net: nn.Module) -> None:
    with pytest.raises(InputError, match="--eval-by-site evaluates a metric for each rewrite, and there is none"):
        lrcompile.compile(net, (X[:8],), metric_by_site=True)


def test_a_skipped_site_is_not_evaluated(net: nn.Module) -> None:
    result = lrcompile.compile(
        net, (X[:256],), target=TARGET, metric=accuracy, metric_by_site=True, budget=BUDGET, skip=["0"]
    )
    drops = {site.site: site.drop for site in result.report.sites}
    assert drops["0"] is None
    assert drops["2"] is not None
