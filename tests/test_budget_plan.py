"""Budgets and plans as values and as text: what they mean, and that nothing odd in a file gets past a clear refusal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.cli import run
from lrcompile.errors import InputError, PlanError
from lrcompile.graph.rewrite import Rewrite
from lrcompile.planning.budget import DEFAULT_MAX_ERROR, Budget, parse_latency, parse_size
from lrcompile.planning.plan import Plan

PLAN = Plan(
    target="v100",
    dtype="fp32",
    batch=8,
    fingerprint="f" * 40,
    calibration=None,
    seed=0,
    budget=Budget(max_error=0.02, size=0.5),
    rewrites=(
        Rewrite("fold-batch-norm", ("conv", "bn"), exact=True),
        Rewrite("low-rank-linear", ("fc",), {"rank": 32}, 0.125),
    ),
    options={"low-rank-linear": {}},
    sites=[{"site": "fc", "decision": "rewritten"}],
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5", 0.5), ("50%", 0.5), (" 12MB ", 12e6), ("300KiB", 300 * 1024), ("7b", 7), ("1GiB", 2**30), ("1", 1.0)],
)
def test_sizes(text: str, expected: float) -> None:
    assert parse_size(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"), [("12ms", 0.012), ("800us", 8e-4), ("0.5s", 0.5), ("12", 0.012), ("3 MS", 0.003)]
)
def test_latencies(text: str, expected: float) -> None:
    assert parse_latency(text) == pytest.approx(expected)


def test_numbers_of_numpy_are_numbers() -> None:
    budget = Budget(max_error=np.float32(0.25), size=np.float64(0.5), speedup=np.int64(2))
    assert budget == Budget(max_error=0.25, size=0.5, speedup=2)
    assert json.loads(replace(PLAN, budget=budget).dumps())["budget"]["max_error"] == 0.25
    with pytest.raises(InputError, match="expected a finite number"):
        Budget(max_error=np.float32("nan"))


@pytest.mark.parametrize("text", ["", "half", "1.2.3", "-5", "5 apples", "nan", "1e400MB", "%"])
def test_what_is_no_size_or_latency_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a share such as"):
        parse_size(text)
    with pytest.raises(InputError, match="expected a duration such as"):
        parse_latency(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_error": -0.1},
        {"max_error": math.nan},
        {"max_latency_s": math.inf},
        {"speedup": 0.5},
        {"size": 0.0},
        {"size": "0.5"},
        {"confidence": 1.0},
    ],
)
def test_budgets_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        Budget(**wrong)


@pytest.mark.parametrize("text", ["150%", "1B", "0.5b", "0kb", "1.5", "50"])
def test_shares_and_bytes_are_told_apart(text: str) -> None:
    with pytest.raises(InputError, match="expected a share such as"):
        parse_size(text)


def test_a_metric_is_for_one_strategy() -> None:
    with pytest.raises(InputError, match="leave out --max-drop, or use milp"):
        Budget(max_drop=0.1, strategy="beam")


def test_which_limits_are_in_force() -> None:
    assert Budget().error_limit == DEFAULT_MAX_ERROR
    assert Budget(max_error=0.0).error_limit == 0.0
    assert Budget(size=0.5).error_limit is None
    assert Budget(size=0.5, max_error=0.1).error_limit == 0.1
    assert Budget(size=0.5).bytes_limit(100) == 50
    assert Budget(size=4000).bytes_limit(100) == 4000
    assert Budget(speedup=2, max_latency_s=0.3).latency_limit_s(1.0) == 0.3
    assert Budget(speedup=4, max_latency_s=0.3).latency_limit_s(1.0) == 0.25
    assert Budget().latency_limit_s(1.0) == math.inf


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.dumps())
    assert Plan.load(path) == Plan.load(str(path)) == PLAN
    assert Plan.load(path).dumps() == PLAN.dumps()


def test_a_plan_holds_no_infinity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endless: dict[str, Any] = {"recovery": {"steps": 1, "loss": [math.inf, 1.0]}, "metric": {"after": math.nan}}
    text = replace(PLAN, sites=[{"site": "fc", "error": math.inf}], **endless).dumps()
    assert json.loads(text, parse_constant=pytest.fail)["recovery"]["loss"] == [None, 1.0]
    old = tmp_path / "old.json"
    old.write_text(text.replace('"error": null', '"error": Infinity'))
    for words in ((), ("fc",)):
        assert run(["explain", str(old), *words, "--json"]) == 0
        assert '"error": null' in capsys.readouterr().out


def test_a_plan_of_what_json_cannot_hold_is_refused_in_words() -> None:
    plan = replace(PLAN, options={"of-a-plugin": {"kinds": frozenset({"a"})}})
    with pytest.raises(PlanError, match="frozenset is not JSON serializable; a plugin has an option"):
        plan.dumps()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema": 99}', '{"schema": 1}', "\0", "{", "[" * 10**5])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--plan-out"):
        Plan.loads(text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_damaged_plan_is_refused_or_harmless(data: st.DataObject) -> None:
    """One value of the file, anywhere in it, is replaced by something else."""
    tree = json.loads(PLAN.dumps())
    holder, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(holder[key], dict | list) and holder[key] and data.draw(st.booleans()):
        holder = holder[key]
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    holder[key] = data.draw(JSON_VALUES)
    try:
        plan = Plan.loads(json.dumps(tree))
    except (PlanError, InputError):
        return
    assert isinstance(plan.dumps(), str)


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read plan .*nothing\.json"):
        Plan.load(tmp_path / "nothing.json")


def test_a_plan_fits_its_own_model_and_data_only() -> None:
    PLAN.check_fits("f" * 40, None)
    with pytest.raises(PlanError, match="made for another model"):
        PLAN.check_fits("0" * 40, None)
    with pytest.raises(PlanError, match="no calibration data, got calibration data"):
        PLAN.check_fits("f" * 40, "abc")
