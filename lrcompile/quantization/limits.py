"""Limits of a file in 8-bit integers, as limits of the float model that it is made of."""

from __future__ import annotations

import math
from dataclasses import replace

from lrcompile.confirm import Reference, int8_of
from lrcompile.emit.int8 import stored_bytes
from lrcompile.errors import BudgetError
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import weight_bytes
from lrcompile.planning.budget import Budget
from lrcompile.planning.search import Choice, Problem
from lrcompile.planning.strategies import search

ATTEMPTS = 5  # to meet a size: scales and zeros take bytes too
SAFETY = 0.99


def search_for_int8(
    problem: Problem, budget: Budget, traced: Traced, reference: Reference | None
) -> tuple[Choice, Budget, Reference | None]:
    """(the choice whose int8 file keeps a budget, what was asked of the search for that, what to measure it with).

    The latency asked for is that of the budget over the share of the time that integers leave of a model that is not
    cut, which is measured, and nothing where its interval holds the budget already; without a reference, or where
    integers make nothing faster here, it is that of the float model. A size is asked for until the integers keep it.

    Raises:
        BudgetError: it cannot be kept.
        VerificationError: the quantizer fails.
    """
    asked = budget
    if reference is not None:
        reference = reference.in_int8(problem.graph)
        limit_s = budget.latency_limit_s(problem.original_s)
        if reference.int8 and math.isfinite(limit_s):
            of_floats_s = limit_s / reference.share * problem.base.latency_s / problem.original_s
            if reference.share_open * problem.original_s <= limit_s:
                of_floats_s = max(of_floats_s, problem.base.latency_s)
            asked = replace(asked, speedup=None, max_latency_s=of_floats_s)
    try:
        if budget.size is not None:
            return *_sized(problem, asked, traced), reference
        return search(problem, asked), asked, reference
    except BudgetError as error:
        if asked == budget and budget.size is None:
            raise
        raise type(error)(
            f"{error} (limits of the float model, so that its int8 file is what was asked for)"
        ) from error


def _sized(problem: Problem, asked: Budget, traced: Traced) -> tuple[Choice, Budget]:
    """The choice that has the size asked for in 8-bit integers, and what was asked of the search for that.

    Beside a limit on the user's metric, of which evaluations are few, it is first found out what to ask for without it.
    """
    limit, uncut = asked.bytes_limit(weight_bytes(traced.graph.gm)), float(weight_bytes(problem.graph.gm))
    if problem.drop is not None:
        known = _sized(replace(problem, drop=None), asked, traced)[1].size or 1.0
        size, got = known if known > 1 else uncut, limit
    else:
        size, got = uncut, stored_bytes(int8_of(traced, problem.graph))
    for _ in range(ATTEMPTS):
        size *= limit / got
        asked = replace(asked, size=1.0 if size >= uncut else max(2.0, size))
        choice = search(problem, asked)
        got = stored_bytes(int8_of(traced, choice.graph))
        if got <= limit:
            return choice, asked
        size *= SAFETY
    raise BudgetError(
        f"a size of {limit:.0f} bytes in 8-bit integers is not reached: the best that was tried has {got}"
    )
