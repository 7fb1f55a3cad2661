"""Chooses, applies, measures, and chooses again until the budget is met as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrcompile.devices.cost import Cost
from lrcompile.errors import BudgetError, LatencyError
from lrcompile.graph.graph import Graph, weight_bytes
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, Pass
from lrcompile.planning.budget import DEFAULT_MAX_ERROR, EXACT_ERROR, Budget
from lrcompile.planning.choose import Limits, Objective, choose, thin
from lrcompile.planning.metric import CHECK, DropLimit, Value
from lrcompile.planning.price import Candidate
from lrcompile.planning.sensitivity import MISJUDGED, Evaluator, Sensitivities, rewritten

ROUNDS = 8
LOOKS = 4  # choices that are looked at closer before one is taken
CONFIRMATIONS = 3
WELL_SPENT = 0.95  # share of the error budget from which looking on is not worth the forwards
STEP = 4.0  # factor between error limits until one holds and one does not
CLOSE = 1.002  # ratio of two error limits between which no other choice is looked for
MOST_LIMIT = 1e3  # a predicted output error at which nothing is left of the output
WORTH_A_LOOK = 0.002  # share of the latency below which a gain is not worth an evaluation of the metric
WORTH_A_STEP = 0.01  # the same for one candidate instead of another
STEPS_IN_VAIN = 5  # of those, in a row, after which the rest is not looked at
OVER_THE_ERROR = "exact rewrites alone round to an error above what is allowed"
CHECKS = 3  # evaluations kept for the choices that hold, of which each needs a second one


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen candidates, the graph with them applied, and its measured output error.

    In another measure `error` is the root of that. `relaxed` says that rewrites had to be admitted that do not make the
    target faster, to reach the size asked for; `untouched` why the graph is the model as given, without exact clean-up
    either, and nothing where it is not.
    """

    candidates: tuple[Candidate, ...]
    graph: Graph
    error: float
    relaxed: bool = False
    untouched: str = ""

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
    """Everything a search needs; a new budget on the same problem costs only the solving and the measuring.

    `base` prices the graph as it stands; `original_s` is the latency of the model as given, which exact clean-up may
    have bettered already, and what limits on latency refer to; `original_bytes` are likewise those of its weights, None
    where that is the graph. `drop` limits the user's own metric.
    """

    graph: Graph
    candidates: tuple[Candidate, ...]
    passes: Mapping[str, Pass]
    context: Context
    evaluator: Evaluator
    base: Cost
    original_s: float
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    drop: DropLimit | None = None
    original_bytes: float | None = None

    @property
    def whole_bytes(self) -> float:
        """Bytes of the weights of the model as given, which shares of size are of."""
        return float(weight_bytes(self.graph.gm)) if self.original_bytes is None else self.original_bytes

    def bytes_over(self, budget: Budget) -> float:
        """Bytes of weights to save for a budget's size; negative where the graph has less, or any size will do."""
        return weight_bytes(self.graph.gm) - budget.bytes_limit(self.whole_bytes)


def search(problem: Problem, budget: Budget) -> Choice:
    """The best choice within the budget.

    Raises:
        BudgetError: the budget cannot be met; the message holds the range that can be.
    """
    pools = _pools(problem, budget)
    for pool in pools:
        if problem.drop is not None:
            choice = _fastest_that_holds(problem, pool, problem.drop, budget.error_limit)
        else:
            choice = _exact(problem, pool) if budget.exact_only else _best(problem, pool, budget.error_limit)
        if choice is not None:
            return replace(choice, relaxed=pool.relaxed)
    if problem.drop is not None:
        return _untouched(problem, pools, problem.drop, budget)
    raise BudgetError(_unreachable_together(problem, pools[-1], budget.error_limit or 0.0))


@dataclass(frozen=True)
class _Pool:
    """Candidates that may be chosen, and the limits on size and latency, which they can meet at some error."""

    candidates: tuple[Candidate, ...]
    limits: Limits
    relaxed: bool


def _pools(problem: Problem, budget: Budget) -> list[_Pool]:
    """What to choose from: the rewrites that are surely faster; then, for a size, all that save anything.

    Raises:
        BudgetError: the limits on latency and size cannot be met at any error.
    """
    base_s, original_s = problem.base.latency_s, problem.original_s
    limit_s, total_bytes = budget.latency_limit_s(original_s), float(weight_bytes(problem.graph.gm))
    limits = Limits(gain_s=base_s - limit_s, bytes_saved=problem.bytes_over(budget))
    allowed = [c for c in problem.candidates if c.exact or not budget.exact_only]
    faster = thin(c for c in allowed if c.p_faster >= budget.confidence and c.gain.latency_s > 0)
    reach = _reach(faster)
    if limits.gain_s > reach.gain_s:
        least_s = base_s - reach.gain_s
        raise LatencyError(
            f"latency of {limit_s * 1e3:.4g} ms (speed-up {_ratio(original_s, limit_s)}) cannot be reached: "
            f"the reachable range is {least_s * 1e3:.4g}–{original_s * 1e3:.4g} ms "
            f"(speed-up 1–{_ratio(original_s, least_s)}) "
            f"{'by exact rewrites alone' if budget.exact_only else 'at any error'}; "
            "ask for less, or try another --target or a larger --batch"
        )
    pools = [_Pool(faster, limits, relaxed=False)]
    if limits.bytes_saved > 0:
        smaller = thin(c for c in allowed if c.gain.latency_s > 0 or c.bytes_saved > 0)
        pools.append(_Pool(smaller, limits, relaxed=True))
    found = [pool for pool in pools if choose(pool.candidates, [0.0] * len(pool.candidates), limits) is not None]
    if found:
        return found
    widest, whole = _reach(pools[-1].candidates).bytes_saved, problem.whole_bytes
    together = " together with the latency asked for" if limits.bytes_saved <= widest else ""
    means = " by exact rewrites alone" if budget.exact_only else ""
    raise BudgetError(
        f"a size of {(total_bytes - limits.bytes_saved) / whole:.3g} of the original cannot be reached{together}"
        f"{means}: the reachable range is {(total_bytes - widest) / whole:.3g}–1; ask for a larger --size"
        f"{', or allow a --max-error' if means else ''}"
    )


def _ratio(before_s: float, after_s: float) -> str:
    return f"{before_s / max(1e-12, after_s):.3g}"


def _reach(candidates: Sequence[Candidate]) -> Limits:
    """The most latency and the most bytes that could be saved, each on its own."""
    nothing = [0.0] * len(candidates)
    most: dict[Objective, list[int]] = {
        aim: choose(candidates, nothing, Limits(), aim) or [] for aim in ("latency", "size")
    }
    return Limits(
        gain_s=max(0.0, sum(candidates[i].gain.latency_s for i in most["latency"])),
        bytes_saved=max(0.0, sum(candidates[i].bytes_saved for i in most["size"])),
    )


def _best(problem: Problem, pool: _Pool, error_limit: float | None) -> Choice | None:
    """The best choice from a pool: the most accurate one if no error is given, else the fastest within the error."""
    sensed = _sensed(problem, pool)
    if error_limit is None:
        return _most_accurate(problem, pool, sensed)
    best: tuple[int, ...] | None = None
    bias = 1.0  # error on all batches over that on those that the loop looks at
    tried = set()
    for _ in range(CONFIRMATIONS):
        picked = _closed_loop(problem, pool, sensed, error_limit / bias)
        if picked is None or tuple(picked) in tried:
            break
        tried.add(tuple(picked))
        error = _at_most(problem, pool, picked)
        if error <= error_limit and (best is None or _gain_s(pool, picked) > _gain_s(pool, best)):
            best = tuple(picked)
        if WELL_SPENT * error_limit <= error <= error_limit:
            break
        least = problem.evaluator.resolution
        before, bias = bias, max(error, least) / max(_measured(problem, pool, picked, quick=True), least)
        bias = min(bias, STEP * before)  # it is infinite where a whole number of an output turned in a later batch
        if bias == before:
            break
    return _exact(problem, pool) if best is None else applied(problem, pool.candidates, best)


def _most_accurate(problem: Problem, pool: _Pool, sensed: Sensitivities) -> Choice | None:
    """The most accurate choice within the limits, as measured.

    How errors of many layers add up is not known beforehand, and far from small ones the sensitivities are a guess. So
    several views of them each give a choice: the model's errors in quadrature and as a plain sum, and the layers' own
    errors likewise. The measurement decides.
    """
    picks = _accurate(problem, pool, sensed)
    return applied(problem, pool.candidates, picks[0]) if picks else None


def _accurate(problem: Problem, pool: _Pool, sensed: Sensitivities) -> list[tuple[int, ...]]:
    """Choices of little error within the limits, one for each view of how errors add up, the most accurate first."""
    _well_judged(problem, pool, sensed, pool.limits, "error")
    found = (choose(pool.candidates, view, pool.limits, "error") for view in _views(pool, sensed.errors))
    picks = dict.fromkeys(tuple(picked) for picked in found if picked is not None)
    return sorted(picks, key=lambda picked: _measured(problem, pool, picked))


def _views(pool: _Pool, errors: Sequence[float]) -> tuple[Sequence[float], ...]:
    """How errors may add up: the model's in quadrature and as a plain sum, and the layers' own likewise."""
    own = [0.0 if candidate.exact else candidate.error for candidate in pool.candidates]
    return errors, [e**0.5 for e in errors], own, [e**0.5 for e in own]


def _fastest_that_holds(problem: Problem, pool: _Pool, drop: DropLimit, error_limit: float | None) -> Choice | None:
    """The fastest choice with which the user's metric, and the error if it is limited, hold as measured.

    Errors order the choices: their limit is bisected between one with which the metric holds and one with which it does
    not, first in terms of the model's errors, then in other views of them, in which only what is faster still is
    evaluated. What is taken has held twice; two evaluations are kept for exact rewrites alone, should nothing else.
    """
    sensed = _sensed(problem, pool)
    _well_judged(problem, pool, sensed, replace(pool.limits, error=error_limit or DEFAULT_MAX_ERROR))
    errors = sensed.errors
    known: dict[tuple[int, ...], bool] = {}

    def fastest() -> tuple[int, ...] | None:
        return max((p for p, held in known.items() if held), key=lambda p: _gain_s(pool, p), default=None)

    def holds(picked: tuple[int, ...]) -> bool:
        best = fastest()
        if best is not None and _gain_s(pool, picked) <= _gain_s(pool, best) + _worth_s(problem):
            return True
        if picked not in known:
            possible = error_limit is None or _within_error(problem, pool, picked, error_limit)
            known[picked] = (
                possible
                and _metric_holds(problem, pool, picked)
                and _within_error(problem, pool, picked, error_limit)  # finite, where it is not limited
            )
        return known[picked]

    views = _views(pool, errors)
    for view in views if max(errors, default=0.0) > EXACT_ERROR else views[2:]:  # no output may tell rewrites apart
        best = fastest()
        start = error_limit or DEFAULT_MAX_ERROR if best is None else math.hypot(*(view[i] for i in best))
        _bisect(problem, pool, view, max(start, EXACT_ERROR), lambda picked: drop.left > CHECKS and holds(picked))
        if fastest() is None:
            break
    vain, steps = 0, _steps(problem, pool, errors, fastest())
    while steps and vain < STEPS_IN_VAIN and drop.left > CHECKS:
        picked = steps.pop(0)
        vain += picked not in known
        if holds(picked):
            vain, steps = 0, _steps(problem, pool, errors, picked)
    last = () if fastest() is not None else (*_accurate(problem, pool, sensed), *_exact_picks(pool))
    for picked in last:
        if drop.left > 1 and holds(picked):
            break
    exact = _exact_picks(pool)
    for picked in sorted((p for p, held in known.items() if held), key=lambda p: -_gain_s(pool, p)):
        if _metric_holds(problem, pool, picked, CHECK):
            return applied(problem, pool.candidates, picked)
        if exact and drop.left <= 2:
            break
    for picked in exact:
        possible = _within_error(problem, pool, picked, error_limit)
        if possible and all(_metric_holds(problem, pool, picked, turn) for turn in (0, CHECK)):
            return applied(problem, pool.candidates, picked)
    return None


def _bisect(
    problem: Problem, pool: _Pool, view: Sequence[float], start: float, holds: Callable[[tuple[int, ...]], bool]
) -> None:
    """Tries choices at limits on the error, in a view of it, closing in on the limit up to which they hold."""
    widest = choose(pool.candidates, view, replace(pool.limits, error=MOST_LIMIT)) or []
    most = 1.001 * math.hypot(*(view[i] for i in widest))
    limit, low, high = start, 0.0, math.inf
    slowest, fastest = -math.inf, math.inf  # gains at the ends of the bracket
    while low < most and EXACT_ERROR < high > low * CLOSE and fastest - slowest > _worth_s(problem):
        found = choose(pool.candidates, view, replace(pool.limits, error=limit), gap=WORTH_A_LOOK / 2)
        picked = None if found is None else tuple(found)
        if picked is not None and not holds(picked):
            high, fastest = min(limit, math.hypot(*(view[i] for i in picked))), _gain_s(pool, picked)
        else:  # the limits on size and latency ask for more than this error allows, or it holds
            low, slowest = limit, slowest if picked is None else _gain_s(pool, picked)
        bracketed = low > 0 and high < math.inf
        limit = (low * high) ** 0.5 if bracketed else min(STEP * low, most) if low else high / STEP


def _steps(
    problem: Problem, pool: _Pool, errors: Sequence[float], best: tuple[int, ...] | None
) -> list[tuple[int, ...]]:
    """Choices that differ from one in a single candidate and are faster, those first that cost the least error."""
    if best is None:
        return []
    found = []
    for i, candidate in enumerate(pool.candidates):
        left = (j for j in best if not candidate.footprint & pool.candidates[j].footprint)
        picked = tuple(sorted((*left, i)))
        saved = sum(pool.candidates[j].bytes_saved for j in picked)
        gain_s = _gain_s(pool, picked) - _gain_s(pool, best)
        if gain_s > WORTH_A_STEP * problem.base.latency_s and saved >= pool.limits.bytes_saved:
            found.append((math.hypot(*(errors[j] for j in picked)), picked))
    return [picked for _, picked in sorted(found)]


def _worth_s(problem: Problem) -> float:
    """The gain in seconds for which an evaluation of the metric is worth its time."""
    return WORTH_A_LOOK * problem.base.latency_s


def _within_error(problem: Problem, pool: _Pool, picked: Sequence[int], error_limit: float | None) -> bool:
    error = _at_most(problem, pool, picked)
    return math.isfinite(error) and (error_limit is None or error <= max(error_limit, EXACT_ERROR))


def _at_most(problem: Problem, pool: _Pool, picked: Sequence[int]) -> float:
    """The measured error, and how much larger a share that was counted may be."""
    exact = all(pool.candidates[i].exact for i in picked)
    return problem.evaluator.at_most(_measured(problem, pool, picked), exact=exact)


def _metric_holds(problem: Problem, pool: _Pool, picked: Sequence[int], turn: int = 0) -> bool:
    return metric_holds(problem, [pool.candidates[i] for i in picked], turn)


def metric_holds(problem: Problem, candidates: Sequence[Candidate], turn: int = CHECK) -> bool:
    """Whether the user's metric is known not to fall too far with candidates applied; it holds where none is given."""
    if problem.drop is None:
        return True
    value = _metric(problem, candidates, turn)
    return value is not None and value.sure >= problem.drop.least


def _metric(problem: Problem, candidates: Sequence[Candidate], turn: int) -> Value | None:
    """The user's metric with candidates applied; None where there is none, or no evaluation of it is left."""
    rewrites = [rewrite for candidate in candidates for rewrite in candidate.rewrites]
    if problem.drop is None:
        return None
    return problem.drop.value(
        rewrites, lambda: rewritten(problem.graph, rewrites, problem.passes, problem.context), turn
    )  # fmt: skip


def _exact_picks(pool: _Pool) -> list[tuple[int, ...]]:
    """The choice of exact candidates alone, where the limits can be met with them, and none at all."""
    exact = [i for i, candidate in enumerate(pool.candidates) if candidate.exact]
    picked = choose([pool.candidates[i] for i in exact], [0.0] * len(exact), pool.limits)
    found = [] if picked is None else [tuple(exact[i] for i in picked)]
    return [*found, ()] if pool.limits.gain_s <= 0 and pool.limits.bytes_saved <= 0 else found


def _untouched(problem: Problem, pools: Sequence[_Pool], drop: DropLimit, budget: Budget) -> Choice:
    """The model as given, whose metric holds; limits that it does not keep cannot be met.

    Raises:
        BudgetError: the size or latency asked for cannot be had within the drop; the message holds what can.
    """
    whole, original_s = problem.whole_bytes, problem.original_s
    if budget.latency_limit_s(original_s) >= original_s and budget.bytes_limit(whole) >= whole:
        why = _why_not_exact(problem, pools[-1], drop, budget.error_limit)
        return Choice((), drop.metric.traced.graph.copy(), 0.0, untouched=why)
    pool, base = pools[-1], drop.metric.base
    falls = "falls too far"
    for picked in _accurate(problem, pool, _sensed(problem, pool))[:1]:
        if not _within_error(problem, pool, picked, budget.error_limit):
            raise BudgetError(_unreachable_together(problem, pool, budget.error_limit or 0.0))
        value = _metric(problem, [pool.candidates[i] for i in picked], 0)
        falls = (
            "could not be evaluated again, as all evaluations are used: it may fall"
            if value is None
            else f"falls from {base:.4g} to {value.number:.4g} with the most accurate choice"
        )
    free = _fastest_that_holds(problem, replace(pools[0], limits=Limits()), drop, budget.error_limit)
    if free is None:
        within = "nothing but the model as it is was found within them"
    else:
        saved = sum(candidate.bytes_saved for candidate in free.candidates)
        left = (weight_bytes(problem.graph.gm) - saved) / whole
        ratio = _ratio(original_s, problem.base.latency_s - free.gain_s)
        within = f"within them a speed-up of {ratio} with a size of {left:.3g} of the original was found"
    raise BudgetError(
        f"the limits cannot be met together: with size and latency as asked the metric {falls}, beyond the --max-drop "
        f"of {drop.max_drop:.4g} and a noise of {drop.metric.noise:.2g}; {within}: allow a larger drop, or ask for less"
    )


def _why_not_exact(problem: Problem, pool: _Pool, drop: DropLimit, error_limit: float | None) -> str:
    """Why not even exact rewrites alone were taken, as it was measured."""
    picks = [picked for picked in _exact_picks(pool) if _within_error(problem, pool, picked, error_limit)]
    if not picks:
        return OVER_THE_ERROR
    made = ([rewrite for i in picked for rewrite in pool.candidates[i].rewrites] for picked in picks)
    seen = [value.number for rewrites in made for value in drop.values_of(rewrites)]
    if not seen:
        return "nothing held the metric twice, and no evaluation was left for exact rewrites alone"
    fell = f"fall from {drop.metric.base:.6g} to {min(seen):.6g}"
    return f"exact rewrites alone let the metric {fell}, further than allowed"


def _exact(problem: Problem, pool: _Pool) -> Choice | None:
    exact = [candidate for candidate in pool.candidates if candidate.exact]
    picked = choose(exact, [0.0] * len(exact), pool.limits)
    return None if picked is None else applied(problem, exact, picked)


def _well_judged(
    problem: Problem, pool: _Pool, sensed: Sensitivities, limits: Limits, aim: Objective = "latency"
) -> list[int] | None:
    """The choice within limits, chosen again as long as candidates in it turn out to cost far more than predicted."""
    for _ in range(LOOKS):
        picked = choose(pool.candidates, sensed.errors, limits, aim)
        if picked is None or not _measured(problem, pool, picked, quick=True) > MISJUDGED * sensed.predicted(picked):
            return picked
        if not sensed.look_closer(picked):
            return picked
    return choose(pool.candidates, sensed.errors, limits, aim)


def _closed_loop(problem: Problem, pool: _Pool, sensed: Sensitivities, error_limit: float) -> list[int] | None:
    """Tightens or relaxes the predicted-error limit until the error on the first batch is just within the limit."""
    best: list[int] | None = None
    seen: set[tuple[int, ...]] = set()
    target, low, high = error_limit, 0.0, math.inf
    for done in range(ROUNDS):
        problem.progress("choose", done, ROUNDS)
        before = sensed.errors
        picked = _well_judged(problem, pool, sensed, replace(pool.limits, error=target))
        if sensed.errors is not before:
            low, high = 0.0, math.inf
        if picked is None:  # the limits ask for more than this error allows
            low = target
            target = (low * high) ** 0.5 if math.isfinite(high) else 4 * target
            continue
        if tuple(picked) in seen:
            break
        seen.add(tuple(picked))
        measured = _measured(problem, pool, picked, quick=True)
        if measured <= error_limit and (best is None or _gain_s(pool, picked) > _gain_s(pool, best)):
            best = picked
        if WELL_SPENT * error_limit <= measured <= error_limit:
            break
        predicted = sensed.predicted(picked)
        low, high = (max(low, target), high) if measured <= error_limit else (low, min(high, predicted))
        # the measured error is taken as proportional to the predicted one, and the answer kept inside the bracket
        target = 0.98 * error_limit * predicted / measured if min(predicted, measured) > 0 else 4 * target
        if not low < target < high:
            finite = math.isfinite(high)
            target = (low * high) ** 0.5 if low and finite else 0.5 * high if finite else 2 * low
    problem.progress("choose", ROUNDS, ROUNDS)
    return best


def applied(problem: Problem, candidates: Sequence[Candidate], picked: Sequence[int]) -> Choice:
    """The choice of some candidates, applied and measured."""
    chosen = tuple(candidates[i] for i in picked)
    rewrites = [rewrite for candidate in chosen for rewrite in candidate.rewrites]
    graph = rewritten(problem.graph, rewrites, problem.passes, problem.context)
    error = problem.evaluator.error_after(problem.graph, chosen, problem.passes, problem.context)
    return Choice(chosen, graph, error)


def _sensed(problem: Problem, pool: _Pool) -> Sensitivities:
    p = problem
    return Sensitivities(p.graph, pool.candidates, p.candidates, p.passes, p.context, p.evaluator, p.progress)


def _measured(problem: Problem, pool: _Pool, picked: Sequence[int], quick: bool = False) -> float:
    chosen = [pool.candidates[i] for i in picked]
    return problem.evaluator.error_after(problem.graph, chosen, problem.passes, problem.context, quick)


def _gain_s(pool: _Pool, picked: Sequence[int]) -> float:
    return sum(pool.candidates[i].gain.latency_s for i in picked)


def _unreachable_together(problem: Problem, pool: _Pool, error_limit: float) -> str:
    candidates = pool.candidates
    picked = choose(candidates, _sensed(problem, pool).errors, pool.limits, "error")
    if picked is None:
        return "the limits cannot be met together; relax one of them"
    measure = problem.evaluator.measure
    measured, limit = measure.value(applied(problem, candidates, picked).error), measure.value(error_limit)
    return (
        f"the limits cannot be met together: size and latency as asked need a {measure.label} of about "
        f"{measured:.3g}, more than the {limit:.3g} that rewrites may take; allow more --max-error, or ask for less"
    )
