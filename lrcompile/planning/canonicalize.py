"""Exact rewrites that are always welcome, applied until none is left, and checked as they are made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from lrcompile.errors import PassError, VerificationError
from lrcompile.graph.graph import Graph, prune
from lrcompile.graph.rewrite import Refusal, Rewrite
from lrcompile.passes import Context, Pass, Stage, apply, proposals
from lrcompile.planning.sensitivity import Evaluator, rewritten

ROUNDING = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}  # relative output error of exact rewrites
HALVES = ("fp16", "bf16")
OF_WEIGHTS = 2.0  # times the error of weights rounded once more, which exact rewrites may show in half precision
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

    In half precision a model may make more of rounding than `ROUNDING` says: then what counts is what it makes of
    weights that are rounded once more, as those of exact rewrites are.

    Raises:
        VerificationError: a rewrite that promised equality changed the output.
    """
    limit = rounding(context.dtype)
    if error > limit and context.dtype in HALVES:
        of_weights = _of_rounded_weights(graph, evaluator)
        limit = max(limit, OF_WEIGHTS * of_weights) if math.isfinite(of_weights) else limit
    if error <= limit:
        return
    culprit = _first_beyond(limit, graph, rewrites, passes, context, evaluator)
    raise VerificationError(
        f"pass {culprit.pass_name} at {', '.join(culprit.site)} promised an exact rewrite, but the output changed by "
        f"{error:.2e} (relative; at most {limit:.1g} expected for {context.dtype}); leave it out with "
        f"--passes=-{culprit.pass_name} and report it"
    )


def _of_rounded_weights(graph: Graph, evaluator: Evaluator) -> float:
    """The error that moving all weights by up to half of their last digit makes."""
    moved, drawn = graph.copy(own=True), torch.Generator().manual_seed(0)
    for module in list(moved.gm.modules()):
        for name, weight in module._parameters.items():
            if weight is None or not weight.is_floating_point():
                continue
            part = torch.rand(weight.shape, generator=drawn).to(weight.device) - 0.5
            other = weight.detach().double() * (1 + torch.finfo(weight.dtype).eps * part)
            module._parameters[name] = torch.nn.Parameter(other.to(weight.dtype), requires_grad=False)
    return evaluator.error(moved, first=1)


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
