"""The 0/1 program against trying everything, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.devices.cost import Cost
from lrcompile.graph.rewrite import Rewrite
from lrcompile.planning.choose import GAP, Limits, Objective, choose
from lrcompile.planning.price import Candidate


def candidate(nodes: Sequence[str], gain_s: float, saved: float = 0.0, exact: bool = False) -> Candidate:
    rewrite = Rewrite("pass", tuple(nodes), {"rank": int(saved)}, exact=exact)
    return Candidate((rewrite,), tuple(nodes), frozenset(nodes), Cost(1.0 + gain_s), Cost(1.0), saved)


def feasible(picked: Sequence[int], candidates: Sequence[Candidate], errors: Sequence[float], limits: Limits) -> bool:
    nodes = [node for i in picked for node in candidates[i].footprint]
    return (
        len(nodes) == len(set(nodes))
        and math.hypot(*(errors[i] for i in picked)) <= limits.error * (1 + 1e-6)
        and sum(candidates[i].gain.latency_s for i in picked) >= limits.gain_s - 1e-6
        and sum(candidates[i].bytes_saved for i in picked) >= limits.bytes_saved - 1e-6
    )


def value(picked: Sequence[int], candidates: Sequence[Candidate], errors: Sequence[float], aim: Objective) -> float:
    """What is to be least."""
    if aim == "error":
        return sum(errors[i] ** 2 for i in picked)
    return -sum(candidates[i].gain.latency_s if aim == "latency" else candidates[i].bytes_saved for i in picked)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Candidate], list[float]]:
    figures = st.integers(-3, 12)
    candidates, errors = [], []
    for _ in range(draw(st.integers(1, 8))):
        nodes = draw(st.sets(st.sampled_from("abcde"), min_size=1, max_size=2))
        candidates.append(candidate(sorted(nodes), draw(figures) / 10, draw(figures)))
        errors.append(draw(st.integers(0, 10)) / 10)
    return candidates, errors


@given(
    problems(),
    st.sampled_from(["latency", "error", "size"]),
    st.sampled_from([math.inf, 1.0, 0.5, 0.0]),
    st.sampled_from([-math.inf, 0.3, 1.0]),
    st.sampled_from([-math.inf, 3.0, 10.0]),
)
def test_no_choice_is_better(
    problem: tuple[list[Candidate], list[float]], aim: Objective, error: float, gain_s: float, saved: float
) -> None:
    candidates, errors = problem
    limits = Limits(error, gain_s, saved)
    every = [
        picked
        for count in range(len(candidates) + 1)
        for picked in itertools.combinations(range(len(candidates)), count)
        if feasible(picked, candidates, errors, limits)
    ]
    picked = choose(candidates, errors, limits, aim)
    if not every:
        assert picked is None
        return
    assert picked is not None
    assert feasible(picked, candidates, errors, limits)
    best = min(value(other, candidates, errors, aim) for other in every)
    assert value(picked, candidates, errors, aim) <= best + GAP[aim] * max(1.0, abs(best)) + 1e-4


def test_nothing_to_choose_from_meets_no_demand() -> None:
    assert choose([], [], Limits()) == []
    assert choose([], [], Limits(gain_s=1e-6)) is None
    assert choose([], [], Limits(bytes_saved=1.0)) is None


def test_a_candidate_without_a_finite_error_is_left_where_errors_count() -> None:
    candidates = [candidate("a", 1.0), candidate("b", 0.5)]
    assert choose(candidates, [math.inf, 0.1], Limits(error=0.2)) == [1]
    assert choose(candidates, [math.inf, 0.1], Limits()) == [0, 1]
    assert choose(candidates, [math.inf, 0.1], Limits(gain_s=1.2), "error") is None


def test_errors_far_below_the_largest_still_count() -> None:
    """The solver's tolerances are absolute; a rewrite a million times milder must not look free."""
    candidates = [candidate("a", 1.0), candidate("a", 1.0), candidate("b", 1.0)]
    assert choose(candidates, [2e-6, 1e-6, 1.0], Limits(gain_s=1.0), "error") == [1]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_units_do_not_matter(scale: float) -> None:
    rng = np.random.default_rng(0)
    gains, errors, saved = rng.uniform(0.1, 1, 20), rng.uniform(0.1, 1, 20), rng.uniform(1, 9, 20)
    candidates = [candidate([f"n{i % 7}"], g * scale, s) for i, (g, s) in enumerate(zip(gains, saved, strict=True))]
    limits = Limits(error=0.8, gain_s=0.5 * scale, bytes_saved=4.0)
    plain = [candidate([f"n{i % 7}"], g, s) for i, (g, s) in enumerate(zip(gains, saved, strict=True))]
    assert choose(candidates, list(errors), limits) == choose(
        plain, list(errors), Limits(error=0.8, gain_s=0.5, bytes_saved=4.0)
    )


def test_the_solver_does_not_write_to_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    choose([candidate("a", 1.0), candidate("b", 0.5)], [0.1, 0.2], Limits(error=0.15))
    assert capfd.readouterr().out == ""
