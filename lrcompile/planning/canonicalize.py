"""Exact rewrites that are always welcome: applied until none is left, checked, undone where they round too much."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lrcompile.errors import BudgetError, PassError, VerificationError
from lrcompile.frontend.rounding import of_rounding
from lrcompile.graph.describe import DTYPE_NAMES
from lrcompile.graph.graph import Graph, prune
from lrcompile.graph.rewrite import Refusal, Rewrite
from lrcompile.passes import Context, Pass, Stage, apply, proposals
from lrcompile.planning.budget import EXACT_ERROR, Budget
from lrcompile.planning.search import OVER_THE_ERROR, Choice
from lrcompile.planning.sensitivity import Evaluator, rewritten

ROUNDING = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}  # relative output error of exact rewrites
HALVES = ("fp16", "bf16")
MOST_ROUNDS = 20


def canonicalize(
    graph: Graph, passes: Sequence[Pass], context: Context, keep: Callable[[str], bool] = lambda site: True
) -> tuple[Graph, tuple[Rewrite, ...], tuple[Refusal, ...]]:
    """(rewritten copy, what was applied in order, what was refused in the last round)."""
    result = graph.copy()
    applied: list[Rewrite] = []
    for done in range(MOST_ROUNDS + 1):
        refusals: list[Refusal] = []
        before = len(applied)
        for transform in passes:
            if transform.stage is not Stage.CANONICALIZE:
                continue
            for proposal in list(proposals(result, transform, context)):
                if isinstance(proposal, Refusal):
                    refusals.append(proposal)
                elif all(keep(site) for site in proposal.site):
                    apply(result, transform, proposal, context)
                    applied.append(proposal)
        if len(applied) == before:
            break
        if done == MOST_ROUNDS:
            last = applied[-1]
            problem = f"still proposes rewrites after {MOST_ROUNDS} rounds; a canonical rewrite must not enable itself"
            raise PassError(last.pass_name, last.site[0], problem)
    result.gm.graph.lint()
    prune(result.gm)
    result.gm.recompile()
    return result, tuple(applied), tuple(refusals)


def rounding(dtype: str) -> float:
    """The relative output error that exact rewrites may show in a precision."""
    return ROUNDING.get(dtype, ROUNDING["fp32"])


def check_exact(
    graph: Graph,
    rewrites: Sequence[Rewrite],
    passes: Mapping[str, Pass],
    context: Context,
    evaluator: Evaluator,
    error: float,
) -> None:
    """Accepts an error within rounding; otherwise finds and names the first rewrite that is not exact.

    The precision is that of the least precise layer that is rewritten. In half precision a model may make more of
    rounding than `ROUNDING` says: then what counts is what it makes of weights that are rounded once more, as those of
    exact rewrites are.

    Raises:
        VerificationError: a rewrite that promised equality changed the output.
    """
    dtype = _least_precise(graph, rewrites, context.dtype)
    limit = rounding(dtype)
    if error > limit and dtype in HALVES:
        limit = of_rounding(limit, graph, lambda moved: evaluator.error(moved, first=1))
    if error <= limit:
        return
    culprit = _first_beyond(limit, graph, rewrites, passes, context, evaluator)
    raise VerificationError(
        f"pass {culprit.pass_name} at {', '.join(culprit.site)} promised an exact rewrite, but the output changed by "
        f"{error:.2e} (relative; at most {limit:.1g} expected for {dtype}); leave it out with "
        f"--passes=-{culprit.pass_name} and report it"
    )


def _least_precise(graph: Graph, rewrites: Sequence[Rewrite], dtype: str) -> str:
    """The least precise of a model's precision and those of the layers that are rewritten."""
    sites = graph.sites()
    layers: list[Any] = [sites[path].module for rewrite in rewrites for path in rewrite.site if path in sites]
    weights = [weight for layer in layers if isinstance(weight := getattr(layer, "weight", None), Tensor)]
    return max((dtype, *(DTYPE_NAMES.get(weight.dtype, dtype) for weight in weights)), key=rounding)


def check_finite(
    graph: Graph,
    rewrites: Sequence[Rewrite],
    passes: Mapping[str, Pass],
    context: Context,
    evaluator: Evaluator,
    error: float,
) -> None:
    """Refuses a model whose output is no longer finite, and names the first rewrite that made it so.

    Raises:
        VerificationError: a rewrite leads to infinite values or NaN, as overflow in half precision does.
    """
    if math.isfinite(error) or not rewrites:
        return
    culprit = _first_beyond(sys.float_info.max, graph, rewrites, passes, context, evaluator)
    raise VerificationError(
        f"pass {culprit.pass_name} at {', '.join(culprit.site)} makes the output infinite or NaN in {context.dtype}; "
        f"leave the site alone with --skip {culprit.site[0]}, or compile in fp32"
    )


def _first_beyond(
    limit: float,
    graph: Graph,
    rewrites: Sequence[Rewrite],
    passes: Mapping[str, Pass],
    context: Context,
    evaluator: Evaluator,
) -> Rewrite:
    """The rewrite with which the error first exceeds the limit, found by halving."""
    low, high = 0, len(rewrites)  # the first `low` rewrites are within the limit, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        trial = evaluator.error(rewritten(graph, rewrites[:middle], passes, context), first=1)
        low, high = (middle, high) if trial <= limit else (low, middle)
    return rewrites[high - 1]


def or_as_it_was(choice: Choice, original: Graph, budget: Budget, dtype: str) -> Choice:
    """The choice, or the original graph where exact rewrites, which round anew, already cost more than is allowed.

    Raises:
        BudgetError: the original does not keep the limits on size or latency.
    """
    limit, lossy = budget.error_limit, not all(rewrite.exact for rewrite in choice.rewrites)
    turned = not math.isfinite(choice.error)  # whole numbers of an output
    if limit is None or (limit == 0 and not turned):  # of 0, exact rewrites alone, whatever they round to
        return choice
    if lossy or choice.untouched or choice.error <= max(limit, EXACT_ERROR):
        return choice
    if any((budget.size, budget.speedup, budget.max_latency_s)):
        if turned:
            raise BudgetError(
                "exact rewrites alone change whole numbers of an output, by rounding; leave out --max-error, or the "
                "other limits"
            )
        got, most = (budget.measure_in_use.value(root) for root in (choice.error, limit))
        raise BudgetError(
            f"exact rewrites alone round to an error of {got:.3g} in {dtype}, above the {most:.3g} that rewrites may "
            "take; allow more, or compile with --dtype fp32"
        )
    why = "exact rewrites alone change whole numbers of an output, by rounding" if turned else OVER_THE_ERROR
    return Choice((), original.copy(), 0.0, untouched=why)
