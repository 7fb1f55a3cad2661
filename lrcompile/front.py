"""The Pareto front of latency against error of one model: prepared once, solved for budgets spread over the range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lrcompile.compile import Result, prepare_model, solve
from lrcompile.errors import BudgetError, InputError
from lrcompile.graph.graph import Graph
from lrcompile.graph.verify import is_float
from lrcompile.planning.budget import DEFAULT_CONFIDENCE, Budget
from lrcompile.planning.strategies import search, strategy_of
from lrcompile.planning.strategies.strategy import Strategy
from lrcompile.prepared import Prepared

SCHEMA = 1
MOST_POINTS = 1000
ROUNDING = 1e-9  # relative: a limit that is just reached is not missed by it


def tradeoff(
    model: nn.Module | ExportedProgram | torch.jit.ScriptModule | Prepared,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    points: int = 8,
    max_error: float | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    strategy: str | Strategy = "milp",
    **options: Any,
) -> list[Result]:
    """The models on the front of latency against output error, slowest and most accurate first.

    `points` latencies are spread evenly from what exact rewrites reach to the fastest within `max_error`, or at any
    error without; the most accurate model at each is sought. Those that another beats in latency or error and does not
    lose to in the other are dropped, and so are those that the strategy does not reach, or the target not as measured:
    the result may be shorter than `points`.
    `options` are those of `prepare_model`; a model that is prepared already takes none.

    Raises:
        InputError: the model, inputs or options cannot be used.
        VerificationError: a rewrite changed what the model computes.
    """
    if isinstance(points, bool) or not isinstance(points, int) or not 2 <= points <= MOST_POINTS:
        raise InputError(f"--points {points} makes no front; expected 2 to {MOST_POINTS}, such as 8")
    if options.get("metric") is not None or options.get("metric_by_site"):
        raise InputError("a front is of latency and output error, and limits no metric; leave the metric out")
    widest = Budget(max_error=max_error, confidence=confidence, strategy=strategy)
    if isinstance(model, Prepared):
        if args or kwargs or options:
            raise InputError("the model is prepared already; give its inputs and options to prepare_model")
        prepared = model
    else:
        prepared = prepare_model(model, args, kwargs, **options)
    prepared = prepared.probed
    results = []
    for i, budget in enumerate(budgets(prepared, widest, points)):
        prepared.clock.progress("tradeoff", i, points)
        try:
            results.append(solve(prepared, budget))
        except BudgetError:  # not as measured, or not by this strategy: no point there
            continue
    prepared.clock.progress("tradeoff", points, points)
    return undominated([result for result in results if max_error is None or _within(prepared, result, max_error)])


def budgets(prepared: Prepared, widest: Budget, points: int) -> list[Budget]:
    """Exact rewrites alone, then speed-ups at equal steps of latency, up to the fastest within the widest budget."""
    problem = replace(prepared.problem(widest), base=prepared.cleaned)
    original_s = prepared.original.latency_s
    free, exact = replace(widest, max_error=None), replace(widest, max_error=0.0)
    slowest_s = strategy_of(exact).reach_s(problem, exact)
    if widest.max_error is None:
        fastest_s = strategy_of(free).reach_s(problem, free)
    else:
        fastest_s = problem.base.latency_s - search(problem, widest).gain_s
    if not fastest_s < slowest_s:
        return [exact]
    speedups = [
        max(1.0, original_s / max(latency_s, 1e-12) * (1 - ROUNDING))
        for latency_s in np.linspace(slowest_s, fastest_s, points)[1:].tolist()
    ]
    asked = [exact, *(replace(free, speedup=speedup) for speedup in speedups)]
    return asked if widest.max_error is None else [*asked[:-1], widest]


def _within(prepared: Prepared, result: Result, max_error: float) -> bool:
    """Whether a result keeps a limit on the error, which whole numbers of outputs that differ do not."""
    outputs = prepared.evaluator.reference[0]
    if _merits(result)[1] > max_error or all(is_float(y) for y in outputs if isinstance(y, Tensor)):
        return _merits(result)[1] <= max_error
    return math.isfinite(prepared.evaluator.error(Graph(result.model, prepared.graph.fake_mode)))


def undominated(results: Sequence[Result]) -> list[Result]:
    """The results that no other is as good as in latency and error and better in one, slowest first; equals once."""
    front: list[Result] = []
    for result in sorted(results, key=_merits):
        if not front or _merits(result)[1] < _merits(front[-1])[1]:
            front.append(result)
    return front[::-1]


def _merits(result: Result) -> tuple[float, float]:
    """(share of the original's latency, error); what exact rewrites show is rounding and counts as none."""
    latency = result.report.latency_ms  # measured points each have an original of their own, measured beside them
    exact = all(rewrite.exact for rewrite in result.plan.rewrites)
    return latency["after"] / max(latency["before"], 1e-12), 0.0 if exact else result.report.error["measured"]


def front_figures(results: Sequence[Result], plans: Sequence[str | None]) -> dict[str, Any]:
    """A front as plain values; `plans` names the plan file of each point, None where none is written.

    Latencies are in ms, `kind` is "analytic" or "measured", `sigma` the standard deviation of the saving, `size` the
    share of the weight bytes that is left. Notes that hold for all points stand once, at the end.
    """
    first = results[0]
    shared = [note for note in first.report.notes if all(note in result.report.notes for result in results)]
    return {
        "schema": SCHEMA,
        "target": first.report.target,
        "settings": dict(first.report.settings),
        "error": {key: first.report.error[key] for key in ("metric", "basis")},
        "points": [
            {
                "point": number,
                "latency_ms": {key: value for key, value in result.report.latency_ms.items() if key != "speedup"},
                "speedup": result.report.latency_ms["speedup"],
                "weight_bytes": result.report.model["weight_bytes_after"],
                "size": result.report.model["weight_bytes_after"] / max(1, result.report.model["weight_bytes_before"]),
                "error": result.report.error["measured"],
                "rewrites": len(result.plan.rewrites),
                "plan": plan,
                "notes": [note for note in result.report.notes if note not in shared],
            }
            for number, (result, plan) in enumerate(zip(results, plans, strict=True), start=1)
        ],
        "notes": shared,
    }
