"""Chooses, applies, measures, and chooses again until the budget is met as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrcompile.devices.cost import Cost
from lrcompile.errors import BudgetError
from lrcompile.graph.graph import Graph, weight_bytes
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, Pass
from lrcompile.planning.budget import Budget
from lrcompile.planning.choose import Limits, Objective, choose
from lrcompile.planning.price import Candidate
from lrcompile.planning.sensitivity import Evaluator, model_errors, rewritten

EXACT_ERROR = 1e-5  # what exact rewrites may show in single precision
ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen candidates, the graph with them applied, and its measured output error.

    `relaxed` says that rewrites had to be admitted that do not make the target faster, to reach the size asked for.
    """

    candidates: tuple[Candidate, ...]
    graph: Graph
    error: float
    relaxed: bool = False

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """All rewrites in the order of application."""
        return tuple(rewrite for candidate in self.candidates for rewrite in candidate.rewrites)

    @property
    def gain_s(self) -> float:
        """Predicted latency saved, seconds."""
        return sum(c.gain.latency_s for c in self.candidates)


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a search needs; a new budget on the same problem costs only the solving and the measuring."""

    graph: Graph
    candidates: tuple[Candidate, ...]
    passes: Mapping[str, Pass]
    context: Context
    evaluator: Evaluator
    base: Cost
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


def search(problem: Problem, budget: Budget) -> Choice:
    """The best choice within the budget.

    Raises:
        BudgetError: the budget cannot be met; the message holds the range that can be.
    """
    total_bytes = float(weight_bytes(problem.graph.gm))
    limits = Limits(
        error=math.inf,
        gain_s=problem.base.latency_s - budget.latency_limit_s(problem.base.latency_s),
        bytes_saved=total_bytes - budget.bytes_limit(total_bytes),
    )
    admitted, relaxed = _admit(problem, budget, limits, total_bytes)
    error_limit = budget.error_limit
    if error_limit is not None and error_limit <= EXACT_ERROR:
        admitted = tuple(c for c in admitted if c.exact)
    errors = model_errors(problem.graph, admitted, problem.passes, problem.context, problem.evaluator, problem.progress)
    if error_limit is None:
        picked = choose(admitted, errors, limits, "error")
        assert picked is not None, "feasibility was checked"
        return replace(applied(problem, admitted, picked), relaxed=relaxed)
    choice = _closed_loop(problem, admitted, errors, limits, max(error_limit, EXACT_ERROR))
    if choice is None:
        raise BudgetError(_unreachable_together(problem, admitted, errors, limits, error_limit))
    return replace(choice, relaxed=relaxed)


def _admit(problem: Problem, budget: Budget, limits: Limits, total_bytes: float) -> tuple[tuple[Candidate, ...], bool]:
    """The candidates that count under this budget; checks that latency and size can be reached at any error."""
    faster = thin(c for c in problem.candidates if c.p_faster >= budget.confidence and c.gain.latency_s > 0)
    reach = _reach(problem, faster, total_bytes)
    base_ms = problem.base.latency_s * 1e3
    if limits.gain_s > reach.gain_s:
        raise BudgetError(
            f"latency of {(problem.base.latency_s - limits.gain_s) * 1e3:.4g} ms "
            f"(speed-up {problem.base.latency_s / max(1e-12, problem.base.latency_s - limits.gain_s):.3g}) cannot be reached: "
            f"the reachable range is {base_ms - reach.gain_s * 1e3:.4g}–{base_ms:.4g} ms "
            f"(speed-up 1–{problem.base.latency_s / max(1e-12, problem.base.latency_s - reach.gain_s):.3g}) at any error; "
            "ask for less, or try another --target or a larger --batch"
        )
    if limits.bytes_saved <= reach.bytes_saved and choose(faster, [0.0] * len(faster), limits) is not None:
        return faster, False
    everything = thin(c for c in problem.candidates if c.gain.latency_s > 0 or c.bytes_saved > 0)
    widest = _reach(problem, everything, total_bytes)
    if limits.bytes_saved <= widest.bytes_saved and choose(everything, [0.0] * len(everything), limits) is not None:
        return everything, True
    raise BudgetError(
        f"a size of {(total_bytes - limits.bytes_saved) / total_bytes:.3g} of the original cannot be reached"
        f"{' together with the latency asked for' if limits.bytes_saved <= widest.bytes_saved else ''}: "
        f"the reachable range is {1 - widest.bytes_saved / total_bytes:.3g}–1; ask for a larger --size"
    )


def _reach(problem: Problem, candidates: Sequence[Candidate], total_bytes: float) -> Limits:
    """The most latency and the most bytes that could be saved, each on its own."""
    nothing = [0.0] * len(candidates)
    most: dict[Objective, list[int]] = {
        aim: choose(candidates, nothing, Limits(), aim) or [] for aim in ("latency", "size")
    }
    return Limits(
        gain_s=max(0.0, sum(candidates[i].gain.latency_s for i in most["latency"])),
        bytes_saved=max(0.0, sum(candidates[i].bytes_saved for i in most["size"])),
    )


def thin(candidates: object) -> tuple[Candidate, ...]:
    """Drops candidates that another on the same footprint beats in latency, size and error alike."""
    groups: dict[frozenset[str], list[Candidate]] = {}
    for candidate in candidates:  # type: ignore[attr-defined]
        groups.setdefault(candidate.footprint, []).append(candidate)
    kept = []
    for members in groups.values():
        for c in members:
            beaten = any(
                o is not c
                and (o.error, -o.gain.latency_s, -o.bytes_saved) != (c.error, -c.gain.latency_s, -c.bytes_saved)
                and o.error <= c.error
                and o.gain.latency_s >= c.gain.latency_s
                and o.bytes_saved >= c.bytes_saved
                for o in members
            )
            if not beaten:
                kept.append(c)
    return tuple(kept)


def _closed_loop(
    problem: Problem, candidates: tuple[Candidate, ...], errors: Sequence[float], limits: Limits, budget_error: float
) -> Choice | None:
    """Tightens or relaxes the predicted-error limit until the measured error is just within the budget."""
    best: Choice | None = None
    seen: set[tuple[int, ...]] = set()
    target, low, high = budget_error, 0.0, math.inf
    for done in range(ROUNDS):
        problem.progress("choose", done, ROUNDS)
        picked = choose(candidates, errors, replace(limits, error=target))
        if picked is None:  # the limits ask for more than this error allows
            low = target
            target = (low * high) ** 0.5 if math.isfinite(high) else 4 * target
            continue
        if tuple(picked) in seen:
            break
        seen.add(tuple(picked))
        choice = applied(problem, candidates, picked)
        if choice.error <= budget_error and (best is None or choice.gain_s > best.gain_s):
            best = choice
        if 0.95 * budget_error <= choice.error <= budget_error:
            break
        predicted = math.hypot(*(errors[i] for i in picked))
        low, high = (max(low, target), high) if choice.error <= budget_error else (low, min(high, predicted))
        # the measured error is taken as proportional to the predicted one, and the answer kept inside the bracket
        target = 0.98 * budget_error * predicted / choice.error if min(predicted, choice.error) > 0 else 4 * target
        if not low < target < high:
            target = (
                (low * high) ** 0.5 if low and math.isfinite(high) else 0.5 * high if math.isfinite(high) else 2 * low
            )
    problem.progress("choose", ROUNDS, ROUNDS)
    if best is None and limits.gain_s <= 0 and limits.bytes_saved <= 0:
        exact = [i for i, c in enumerate(candidates) if c.exact]
        only_exact = tuple(candidates[i] for i in exact)
        picked = choose(only_exact, [0.0] * len(exact), limits) or []
        return applied(problem, only_exact, picked)
    return best


def applied(problem: Problem, candidates: Sequence[Candidate], picked: Sequence[int]) -> Choice:
    """The choice of some candidates, applied and measured."""
    chosen = tuple(candidates[i] for i in picked)
    rewrites = [rewrite for candidate in chosen for rewrite in candidate.rewrites]
    graph = rewritten(problem.graph, rewrites, problem.passes, problem.context)
    return Choice(chosen, graph, problem.evaluator.error(graph))


def _unreachable_together(
    problem: Problem, candidates: Sequence[Candidate], errors: Sequence[float], limits: Limits, error_limit: float
) -> str:
    picked = choose(candidates, errors, limits, "error")
    if picked is None:
        return "the limits cannot be met together; relax one of them"
    measured = applied(problem, candidates, picked).error
    return (
        f"the limits cannot be met together: size and latency as asked need a relative output error of about "
        f"{measured:.3g}, more than the --max-error of {error_limit:.3g}; allow more error, or ask for less"
    )
