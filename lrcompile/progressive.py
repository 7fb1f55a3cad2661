"""A family of models of one: each smaller than the last, made of it, and recovered (PLRD, arXiv 2406.19995).

Where the last one was split already, the product of its factors is split anew at a lower rank: the number of layers
stays. All of them learn from the original: its outputs, and the values inside that their modules' paths lead back to.
The more one has lost, the longer it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn

from lrcompile.compile import Result, compile, prepare_model, solve
from lrcompile.errors import BudgetError, InputError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.graph.graph import Graph, weight_bytes
from lrcompile.planning.budget import Budget, are_falling_shares
from lrcompile.planning.metric import check_metric
from lrcompile.planning.search import search
from lrcompile.prepared import Prepared
from lrcompile.recover import reached, recover, until_error
from lrcompile.recovery.checkpoint import Checkpoint
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.settings import Recovery
from lrcompile.report.clock import Progress, silent

LEAST_MINUTES = 1e-3  # of a training, whose length in time cannot be nothing


@dataclass(frozen=True, eq=False)
class Member:
    """One of a family: the share of the original's bytes that was asked for, the parent's share (1: the original).

    `speedup` is that over the original: the product of those over the members before.
    """

    size: float
    parent: float
    result: Result
    speedup: float

    def to_json(self) -> dict[str, Any]:
        """Its lineage and figures; the latency before is that of the original."""
        report = self.result.report
        after = report.latency_ms["after"]
        latency = {**report.latency_ms, "before": after * self.speedup, "speedup": self.speedup}
        return {
            "size": self.size, "parent": self.parent, "weight_bytes": report.model["weight_bytes_after"],
            "operations": report.model["ops_after"], "latency_ms": latency,
            "error": dict(report.error), "recovery": report.recovery and dict(report.recovery),
            "rewrites": [rewrite.to_json() for rewrite in report.rewrites],
        }  # fmt: skip


def progressive(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Sequence[float],
    recovery: Recovery,
    data: CalibrationData,
    labels: Tensor | None = None,
    loss: Callable[[Any, Tensor], Any] | None = None,
    budget: Budget | None = None,
    progress: Progress = silent,
    **options: Any,
) -> list[Member]:
    """Models of the given sizes, shares of the original's bytes of weights, each made of the one before and recovered.

    Every one is as accurate as its size allows, within the other limits of `budget`, which are against the original; an
    error is what its training has to reach. They are trained as `recovery` says, on `data`, `labels` and `loss` as in
    `recover`; its steps, or minutes, times the number of sizes are shared in proportion to what the original loses that
    is cut to each size at once: the square of its error, in the measure of the budget. `options` are those of
    `compile`, without a plan.

    Raises:
        InputError: the sizes do not fall, or are no shares; the user's metric is limited.
        BudgetError: a size, or another limit at a size, cannot be reached.
    """
    return list(
        members(
            model, args, kwargs, sizes=sizes, recovery=recovery, data=data, labels=labels, loss=loss, budget=budget,
            progress=progress, **options,
        )
    )  # fmt: skip


def members(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Sequence[float],
    recovery: Recovery,
    data: CalibrationData,
    labels: Tensor | None = None,
    loss: Callable[[Any, Tensor], Any] | None = None,
    budget: Budget | None = None,
    finished: list[Checkpoint] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Iterator[Member]:
    """Those of `progressive`, each when it is made; `finished` is that of `recover`."""
    if not are_falling_shares(sizes):
        raise InputError(f"sizes {', '.join(map(str, sizes)) or 'none'}: expected falling shares, such as 0.8,0.6,0.4")
    budget = budget or Budget()
    if budget.max_drop is not None:
        raise InputError("a family has no limit on the user's metric: leave out max_drop, and judge each member")
    check_metric(options.get("metric"), budget, None)
    first = prepare_model(model, args, kwargs, progress=progress, **options)
    lengths = _lengths(recovery, _lost(first, sizes, budget.measure))
    prepared: Prepared | None = first
    del first
    parent, share, speedup = model, 1.0, 1.0
    lineage: Lineage | None = None
    rewritten: Graph | None = None
    for size, length in zip(sizes, lengths, strict=True):
        limit = size if lineage is None else max(2.0, size * weight_bytes(lineage.original.gm))
        whole = replace(_left(budget, speedup), size=limit)
        wanted, training = until_error(whole, length)
        try:
            if prepared is not None:
                result = solve(prepared, wanted)
            else:
                result = compile(parent, args, kwargs, budget=wanted, progress=progress, **options)
        except BudgetError as error:
            if lineage is None:
                raise
            raise BudgetError(f"size {size:g}, where the original is the member of size {share:g}: {error}") from error
        prepared = None  # which holds what was seen of the original's values
        traced = result.traced.graph
        lineage = lineage.traced_anew(rewritten, traced) if lineage and rewritten else Lineage.of(traced)
        rewritten = Graph(result.model, traced.fake_mode)
        result = recover(
            result, data, training, labels=labels, loss=loss, original=lineage, finished=finished, progress=progress
        )  # fmt: skip
        result = reached(result, whole, length)
        speedup *= result.report.latency_ms["speedup"]
        yield Member(size, share, result, speedup)
        result.model.meta["open_axes"] = result.traced.open_axes  # what is made of it has the same
        parent, share = result.model, size


def _lost(prepared: Prepared, sizes: Sequence[float], measure: str) -> list[float]:
    """What a model loses that is cut to each size at once: its squared error before training, 1 where it is none."""
    lost = []
    for size in sizes:
        budget = Budget(size=size, measure=measure)
        try:
            error = search(prepared.problem(budget), budget).error
        except BudgetError:
            error = 1.0
        lost.append(error**2 if math.isfinite(error) else 1.0)
    return lost


def _lengths(recovery: Recovery, lost: Sequence[float]) -> list[Recovery]:
    """A training for each member: as long together as so many of the given length, in proportion to what each loses."""
    shares = [one / sum(lost) if sum(lost) else 1 / len(lost) for one in lost]
    if recovery.minutes is not None:
        whole = len(lost) * recovery.minutes
        return [replace(recovery, minutes=max(share * whole, LEAST_MINUTES)) for share in shares]
    ends = [round(len(lost) * (recovery.steps or 0) * share) for share in accumulate(shares)]
    return [replace(recovery, steps=end - begin) for begin, end in pairwise([0, *ends])]


def _left(budget: Budget, speedup: float) -> Budget:
    """The limits of the next member, where the one that it is made of is faster than the original by so much."""
    return budget if budget.speedup is None else replace(budget, speedup=max(1.0, budget.speedup / speedup))
