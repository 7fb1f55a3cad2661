"""Chooses among priced candidates: one 0/1 program over the whole model."""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lrcompile.planning.price import Candidate

Objective = Literal["latency", "error", "size"]
NODES = 20_000  # of the branch-and-bound tree
REFINEMENTS = 4
GAP = {"latency": 1e-5, "size": 1e-5, "error": 1e-2}
"""How far from the optimum an answer may be, relative: predicted squared errors are a guide, and their last percent
costs five times the work."""
SECOND_AIM = 1e-4  # weight of the latency where the error is to be least


@dataclass(frozen=True)
class Limits:
    """What a choice must keep to, in absolute terms; infinite where there is no limit.

    `error` bounds the root of the summed squares of the candidates' model errors; `gain_s` is the least latency to
    save and `bytes_saved` the least number of bytes.
    """

    error: float = math.inf
    gain_s: float = -math.inf
    bytes_saved: float = -math.inf


def thin(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Drops candidates that another on the same footprint beats in latency, size and error alike.

    Errors compare within a family only: what they do to the model is not known yet. Exact candidates beat lossy ones.
    """
    groups: dict[frozenset[str], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.footprint, []).append(candidate)
    return tuple(c for members in groups.values() for c in members if not any(_beats(o, c) for o in members))


def _beats(one: Candidate, other: Candidate) -> bool:
    if not one.exact and one.family != other.family:
        return False
    merits = [(-c.gain.latency_s, -c.bytes_saved, c.error) for c in (one, other)]
    return merits[0] != merits[1] and all(a <= b for a, b in zip(*merits, strict=True))


def choose(
    candidates: Sequence[Candidate],
    errors: Sequence[float],
    limits: Limits,
    objective: Objective = "latency",
    gap: float | None = None,
) -> list[int] | None:
    """Indices of the best candidates, at most one on any original node; None if the limits cannot be met.

    `errors[i]` is the error of the model's output when only candidate i is applied. Errors of several are added in
    quadrature: a guide, not a promise; the caller measures. Candidates without a finite error are not taken where
    errors count. `gap` is how far from the optimum the least latency or size may be, relative.
    """
    if not candidates:
        return [] if limits.gain_s <= 0 and limits.bytes_saved <= 0 else None
    gain = np.array([c.gain.latency_s for c in candidates])
    saved = np.array([c.bytes_saved for c in candidates])
    error = np.array(errors)
    allowed = np.ones(len(candidates), dtype=bool)
    if math.isfinite(limits.error) or objective == "error":
        allowed &= error <= min(limits.error, np.finfo(float).max)
    square = np.square(np.where(allowed, error, 0.0))
    constraints = [LinearConstraint(_overlaps(candidates), -math.inf, 1)]
    if limits.error > 0 and math.isfinite(limits.error):
        constraints.append(LinearConstraint(square / limits.error**2, -math.inf, 1))
    for row, least in ((gain, limits.gain_s), (saved, limits.bytes_saved)):
        if math.isfinite(least):
            scale = float(np.abs(row).max()) or 1.0
            constraints.append(LinearConstraint(row / scale, least / scale, math.inf))
    if objective != "error":
        return _solved(-(gain if objective == "latency" else saved), constraints, allowed, gap or GAP[objective])
    picked = _solved(square, constraints, allowed, GAP[objective], gain)
    for _ in range(REFINEMENTS):  # the solver's tolerances are absolute: leave out what is beyond the best so far
        least = float(square[picked].sum()) if picked else 0.0
        if picked is None or not 0 < least < 0.1 * square[allowed].max():
            break
        allowed &= square <= least
        picked = _solved(square, constraints, allowed, GAP[objective], gain) or picked
    return picked


def _solved(
    aim: np.ndarray,
    constraints: Sequence[LinearConstraint],
    allowed: np.ndarray,
    gap: float,
    gain: np.ndarray | None = None,
) -> list[int] | None:
    """The indices that minimise `aim`, and next to it, much more weakly, maximise `gain`."""
    aim = aim / (np.abs(aim[allowed]).max(initial=0.0) or 1.0)
    if gain is not None:
        aim = aim - SECOND_AIM * gain / (np.abs(gain).max() or 1.0)
    with _quiet():
        result = milp(
            aim,
            constraints=constraints,
            integrality=np.ones(len(aim)),
            bounds=Bounds(0, allowed.astype(float)),
            options={"mip_rel_gap": gap, "node_limit": NODES},  # a limit in seconds would depend on the machine
        )
    return None if result.x is None else [i for i, x in enumerate(result.x) if x > 0.5]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps HiGHS from writing to standard output, as it does whatever its options (HiGHS.jl issue 312)."""
    sys.stdout.flush()
    try:
        terminal = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(terminal, 1)
            os.close(terminal)


def _overlaps(candidates: Sequence[Candidate]) -> csr_array:
    """One row for each original node: which candidates take it up."""
    users: dict[str, list[int]] = defaultdict(list)
    for i, candidate in enumerate(candidates):
        for node in candidate.footprint:
            users[node].append(i)
    distinct = sorted({tuple(indices) for indices in users.values()})
    row = [r for r, indices in enumerate(distinct) for _ in indices]
    column = [i for indices in distinct for i in indices]
    return csr_array((np.ones(len(row)), (row, column)), shape=(max(1, len(distinct)), len(candidates)))
