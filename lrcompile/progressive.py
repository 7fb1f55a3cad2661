"""A family of models of one: each smaller than the last, made of it, and recovered (PLRD, arXiv 2406.19995).

Where the last one was split already, the product of its factors is split anew at a lower rank: the number of layers
stays. All of them learn from the original: its outputs, and the values inside that their modules' paths lead back to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lrcompile.compile import Result, compile
from lrcompile.errors import InputError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.graph.graph import Graph, weight_bytes
from lrcompile.planning.budget import Budget
from lrcompile.recover import recover
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.settings import Recovery
from lrcompile.report.clock import Progress, silent


@dataclass(frozen=True, eq=False)
class Member:
    """One of a family: the share of the original's bytes that was asked for, the parent's share (1: the original)."""

    size: float
    parent: float
    result: Result

    def to_json(self) -> dict[str, Any]:
        """Its lineage and figures."""
        report = self.result.report
        return {
            "size": self.size, "parent": self.parent, "weight_bytes": report.model["weight_bytes_after"],
            "operations": report.model["ops_after"], "latency_ms": dict(report.latency_ms),
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
    budget: Budget | None = None,
    progress: Progress = silent,
    **options: Any,
) -> list[Member]:
    """Models of the given sizes, shares of the original's bytes of weights, each made of the one before and recovered.

    Every one is as accurate as its size allows, within the other limits of `budget`; it is trained as `recovery` says,
    on `data` and `labels`. `options` are those of `compile`, without a plan. Errors are those against the original.

    Raises:
        InputError: the sizes do not fall, or are no shares.
        BudgetError: a size cannot be reached.
    """
    if not sizes or any(not 0 < size < 1 for size in sizes) or list(sizes) != sorted(set(sizes), reverse=True):
        raise InputError(f"sizes {', '.join(map(str, sizes)) or 'none'}: expected falling shares, such as 0.8,0.6,0.4")
    family: list[Member] = []
    parent, share = model, 1.0
    lineage: Lineage | None = None
    rewritten: Graph | None = None
    for size in sizes:
        limit = size if lineage is None else max(2.0, size * weight_bytes(lineage.original.gm))
        wanted = replace(budget or Budget(), size=limit)
        result = compile(parent, args, kwargs, budget=wanted, progress=progress, **options)
        traced = result.traced.graph
        lineage = lineage.traced_anew(rewritten, traced) if lineage and rewritten else Lineage.of(traced)
        rewritten = Graph(result.model, traced.fake_mode)
        result = recover(result, data, recovery, labels=labels, original=lineage, progress=progress)
        family.append(Member(size, share, result))
        parent, share = result.model, size
    return family
