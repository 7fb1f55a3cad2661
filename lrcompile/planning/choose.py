"""Chooses among priced candidates: one 0/1 program over the whole model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lrcompile.planning.price import Candidate

Objective = Literal["latency", "error", "size"]


@dataclass(frozen=True)
class Limits:
    """What a choice must keep to, in absolute terms; infinite where there is no limit.

    `error` bounds the root of the summed squares of the candidates' model errors; `gain_s` is the least latency to
    save and `bytes_saved` the least number of bytes.
    """

    error: float = math.inf
    gain_s: float = -math.inf
    bytes_saved: float = -math.inf


def choose(
    candidates: Sequence[Candidate], errors: Sequence[float], limits: Limits, objective: Objective = "latency"
) -> list[int] | None:
    """Indices of the best candidates, at most one on any original node; None if the limits cannot be met.

    `errors[i]` is the error of the model's output when only candidate i is applied. Errors of several are added in
    quadrature: a guide, not a promise; the caller measures. The choice depends only on the candidates' order.
    """
    if not candidates:
        return [] if limits.gain_s <= 0 and limits.bytes_saved <= 0 else None
    gain = np.array([c.gain.latency_s for c in candidates])
    saved = np.array([c.bytes_saved for c in candidates])
    square = np.square(np.array(errors))
    rows: list[np.ndarray] = []
    lower: list[float] = []
    upper: list[float] = []

    def limit(row: np.ndarray, low: float, high: float) -> None:
        scale = float(np.abs(row).max()) or 1.0
        rows.append(row / scale)
        lower.append(low / scale)
        upper.append(high / scale)

    if math.isfinite(limits.error):
        limit(square, -math.inf, limits.error**2)
    if math.isfinite(limits.gain_s):
        limit(gain, limits.gain_s, math.inf)
    if math.isfinite(limits.bytes_saved):
        limit(saved, limits.bytes_saved, math.inf)
    overlap = _overlaps(candidates)
    constraints = [LinearConstraint(overlap, -math.inf, 1)]
    if rows:
        constraints.append(LinearConstraint(np.array(rows), lower, upper))
    tie_break = 1e-9 * np.arange(len(candidates)) / len(candidates)
    aims = {"latency": -gain, "error": square, "size": -saved}
    aim = aims[objective] / (np.abs(aims[objective]).max() or 1.0) + tie_break
    if objective == "error":
        aim = aim - 1e-6 * gain / (np.abs(gain).max() or 1.0)
    result = milp(
        aim, constraints=constraints, integrality=np.ones(len(candidates)), bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 20.0},
    )  # fmt: skip
    if result.x is None:
        return None
    return [i for i, x in enumerate(result.x) if x > 0.5]


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
