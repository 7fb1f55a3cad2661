"""What every strategy answers, and what those that decide layer by layer share: an offer, and the judging of picks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from lrcompile.errors import BudgetError, LatencyError
from lrcompile.graph.graph import weight_bytes
from lrcompile.planning.budget import Budget
from lrcompile.planning.choose import Limits, choose, thin
from lrcompile.planning.price import Candidate
from lrcompile.planning.search import Choice, Problem, applied
from lrcompile.planning.search import search as search_whole

Pick = tuple[Candidate, ...]
Saving = Callable[[Iterable[Candidate]], float]


class Strategy(ABC):
    """A way to choose among priced candidates; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    @abstractmethod
    def search(self, problem: Problem, budget: Budget) -> Choice:
        """The choice within the budget, applied and measured.

        Raises:
            BudgetError: the strategy cannot meet the budget.
        """

    def reach_s(self, problem: Problem, budget: Budget) -> float:
        """The least predicted latency in s at any error; of exact rewrites alone if the budget wants only those."""
        faster = thin(c for c in problem.candidates if _admitted(c, budget) and (c.exact or not budget.exact_only))
        picked = choose(faster, [0.0] * len(faster), Limits()) or []
        return problem.base.latency_s - sum(faster[i].gain.latency_s for i in picked)


@dataclass(frozen=True, eq=False)
class Cut:
    """A lossy candidate of one layer: the share of the layer's weights that is left, and whether it may be chosen."""

    candidate: Candidate
    share: float
    admitted: bool


Layer = tuple[Cut, ...]


@dataclass(frozen=True, eq=False)
class Offer:
    """What a strategy picks from: for each layer the cuts of it alone, mildest first, and the exact rewrites.

    A cut that is not admitted is there to be seen (its share, its latency); a layer for which it is picked is kept.
    `groups` has the same for sets of layers that a candidate cuts together.
    """

    problem: Problem
    layers: tuple[Layer, ...]
    groups: tuple[Layer, ...]
    exact: tuple[Candidate, ...]
    limits: Limits
    relaxed: bool

    def completed(self, cuts: Iterable[Cut | None]) -> Pick:
        """The cuts that are admitted, with the exact rewrites that they leave room for, those that gain most first."""
        taken: set[str] = set()
        picked = []
        for candidate in (*(cut.candidate for cut in cuts if cut and cut.admitted), *self.exact):
            if not taken & candidate.footprint:
                taken |= candidate.footprint
                picked.append(candidate)
        return tuple(sorted(picked, key=lambda candidate: self._places[id(candidate)]))

    @cached_property
    def _places(self) -> dict[int, int]:
        return {id(candidate): i for i, candidate in enumerate(self.problem.candidates)}

    def error(self, pick: Pick, quick: bool = False) -> float:
        """The measured output error of a pick, on the first few batches, or on all with a margin for chance."""
        p = self.problem
        error = p.evaluator.error_after(p.graph, pick, p.passes, p.context, quick)
        return error if quick else p.evaluator.at_most(error, exact=all(one.exact for one in pick))

    def holds(self, pick: Pick) -> bool:
        """Whether a pick is as fast and as small as asked."""
        return gain_s(pick) >= self.limits.gain_s and bytes_saved(pick) >= self.limits.bytes_saved

    @property
    def saving(self) -> Saving:
        """What the budget asks to save: bytes where nothing but a size is asked for, else seconds."""
        return bytes_saved if self.limits.bytes_saved > 0 and self.limits.gain_s <= 0 else gain_s

    def choosable(self) -> Iterator[Layer]:
        """The layers with the cuts that are admitted."""
        for layer in self.layers:
            if admitted := tuple(cut for cut in layer if cut.admitted):
                yield admitted


class Layerwise(Strategy):
    """A strategy that goes layer by layer, and makes the exact rewrites that the cuts leave room for."""

    @abstractmethod
    def pick(self, offer: Offer) -> Pick | None:
        """The pick within the offer's limits; None if there is none.

        With a finite error limit the fastest within it is meant, as measured; without, the most accurate.
        """

    def most(self, offer: Offer, saved: Saving) -> Pick:
        """The pick that saves most at any error: each layer at what saves most in it."""
        return offer.completed(max(layer, key=lambda cut: saved((cut.candidate,))) for layer in offer.choosable())

    def search(self, problem: Problem, budget: Budget) -> Choice:
        """The strategy's pick among cuts that are surely faster; for a size, then among all that save anything.

        Raises:
            BudgetError: the strategy cannot meet the budget; the message says what it reaches.
        """
        if budget.exact_only:
            return search_whole(problem, budget)
        offers = [offered(problem, budget)]
        if budget.size is not None:
            offers.append(offered(problem, budget, relaxed=True))
        for offer in offers:
            picked = self.pick(offer)
            if picked is not None:
                return replace(applied(problem, picked, range(len(picked))), relaxed=offer.relaxed)
        if offers[0].holds(()):  # nothing but the error is asked for, and even exact rewrites round above it
            exact = tuple(candidate for candidate in problem.candidates if candidate.exact)
            return search_whole(replace(problem, candidates=exact), budget)
        error = LatencyError if budget.size is None else BudgetError
        raise error(self._unreachable(offers[-1], budget))

    def reach_s(self, problem: Problem, budget: Budget) -> float:
        """The least predicted latency in s that the strategy has a pick for."""
        if budget.exact_only:
            return super().reach_s(problem, budget)
        return problem.base.latency_s - gain_s(self.most(offered(problem, budget), gain_s))

    def _unreachable(self, offer: Offer, budget: Budget) -> str:
        p = offer.problem
        fastest_s = p.base.latency_s - gain_s(self.most(offer, gain_s))
        size = (weight_bytes(p.graph.gm) - bytes_saved(self.most(offer, bytes_saved))) / max(1.0, p.whole_bytes)
        limit = budget.whole_limit if budget.max_error is None else budget.max_error
        within = "" if budget.error_limit is None else f" within an error of {limit:g}"
        return (
            f"--strategy {self.name} does not meet the budget{within}: at any error it reaches at most a speed-up of "
            f"{p.original_s / max(fastest_s, 1e-12):.3g} ({fastest_s * 1e3:.4g} ms) or a size of {size:.3g}; "
            "ask for less, or use --strategy milp, which has more to choose from"
        )


def offered(problem: Problem, budget: Budget, relaxed: bool = False) -> Offer:
    """A problem layer by layer; `relaxed` admits cuts that are not surely faster but save bytes or time."""
    limits = Limits(
        error=math.inf if budget.error_limit is None else budget.error_limit,
        gain_s=problem.base.latency_s - budget.latency_limit_s(problem.original_s),
        bytes_saved=problem.bytes_over(budget),
    )
    sites = problem.graph.sites()
    cuts: dict[tuple[str, ...], list[Cut]] = defaultdict(list)
    exact = []
    for candidate in problem.candidates:
        saves = candidate.gain.latency_s > 0 or candidate.bytes_saved > 0
        admitted = _admitted(candidate, budget) or (relaxed and saves)
        modules = [sites[path].module for path in candidate.sites if path in sites]
        if candidate.exact and admitted:
            exact.append(candidate)
        elif modules and not candidate.exact:
            held = {id(t): t.numel() * t.element_size() for module in modules for t in module.parameters()}
            share = 1 - candidate.bytes_saved / max(1, sum(held.values()))
            cuts[candidate.sites].append(Cut(candidate, share, admitted))
    exact.sort(key=lambda candidate: (-candidate.gain.latency_s, -candidate.bytes_saved))
    ordered = {paths: tuple(sorted(found, key=lambda cut: -cut.share)) for paths, found in cuts.items()}
    layers = tuple(ordered[(path,)] for path in sites if (path,) in ordered)
    groups = tuple(found for paths, found in ordered.items() if len(paths) > 1)
    return Offer(problem, layers, groups, tuple(exact), limits, relaxed)


def gain_s(pick: Iterable[Candidate]) -> float:
    """Predicted latency saved, s."""
    return sum(candidate.gain.latency_s for candidate in pick)


def bytes_saved(pick: Iterable[Candidate]) -> float:
    """Weight bytes saved."""
    return sum(candidate.bytes_saved for candidate in pick)


def _admitted(candidate: Candidate, budget: Budget) -> bool:
    return candidate.p_faster >= budget.confidence and candidate.gain.latency_s > 0
