"""Beam search over rank vectors: each child lowers one layer by a step, and the measured output error ranks them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lrcompile.graph.graph import Graph
from lrcompile.planning.sensitivity import model_errors, rewritten
from lrcompile.planning.strategies.strategy import Cut, Layer, Layerwise, Offer, Pick, bytes_saved, gain_s

Ranks = tuple[int, ...]  # each layer's rung; 0 is the layer as it is


@dataclass(frozen=True)
class Beam(Layerwise):
    """ranks → the `width` best of {ranks − one step in one layer}, until the budget holds.

    The modified beam search of BSR (Eo, Kang and Rhee, arXiv 2111.15179). A step saves about one of `levels` equal
    parts of all that can be saved, in latency or, for a size, in bytes, so that children compare by error alone. Of a
    level's children at most `tries` are scored: those whose predicted output error is least (both our reading).
    `score` takes a rewritten graph, less is better; without it, the relative output error on the first batch counts.
    """

    name = "beam"
    width: int = 4
    levels: int = 32
    tries: int = 16
    score: Callable[[Graph], float] | None = None

    def pick(self, offer: Offer) -> Pick | None:
        """The best of the first level that is fast and small enough; given an error, the fastest within it."""
        limit = offer.limits.error
        if not math.isfinite(limit):
            return next((pick for picks in self.beams(offer) for pick in picks if offer.holds(pick)), None)
        within: list[Pick] = []
        for picks in self.beams(offer):
            fitting = [pick for pick in picks if offer.error(pick, first=1) <= limit]
            if not fitting:
                break
            within += fitting
        fastest_first = sorted(filter(offer.holds, within), key=gain_s, reverse=True)
        return next((pick for pick in fastest_first if offer.error(pick) <= limit), None)

    def beams(self, offer: Offer) -> Iterator[list[Pick]]:
        """The picks of one level after the other, those with the best score first; the first level changes nothing."""
        p = offer.problem
        sized = offer.limits.bytes_saved > 0 and offer.limits.gain_s <= 0
        ladders = _ladders(offer, bytes_saved if sized else gain_s, self.levels)
        cuts = [cut.candidate for ladder in ladders for cut in ladder]
        alone = model_errors(p.graph, cuts, p.candidates, p.passes, p.context, p.evaluator, p.progress)
        harm = dict(zip(map(id, cuts), alone, strict=True))

        def chosen(ranks: Ranks) -> list[Cut]:
            return [ladder[rung - 1] for ladder, rung in zip(ladders, ranks, strict=True) if rung]

        def predicted(ranks: Ranks) -> float:
            return math.hypot(*(harm[id(cut.candidate)] for cut in chosen(ranks)))

        beam: list[Ranks] = [(0,) * len(ladders)]
        deepest = sum(map(len, ladders))
        for level in range(deepest + 1):
            p.progress("choose", level, deepest)
            yield [offer.completed(chosen(ranks)) for ranks in beam]
            children = dict.fromkeys(child for ranks in beam for child in _children(ladders, ranks))  # a set in order
            tried = sorted(children, key=predicted)[: max(self.tries, self.width)]
            scores = {ranks: self._score(offer, offer.completed(chosen(ranks))) for ranks in tried}
            beam = sorted(tried, key=lambda ranks: scores[ranks])[: self.width]

    def _score(self, offer: Offer, pick: Pick) -> float:
        if self.score is None:
            return offer.error(pick, first=1)
        p = offer.problem
        return self.score(rewritten(p.graph, [r for c in pick for r in c.rewrites], p.passes, p.context))


def _ladders(offer: Offer, saved: Callable[[Pick], float], levels: int) -> list[Layer]:
    """For each layer the cuts that save one, two … steps, the mildest that do; the strongest one last."""
    useful = [[cut for cut in layer if saved((cut.candidate,)) > 0] for layer in offer.choosable()]
    layers = [sorted(layer, key=lambda cut: saved((cut.candidate,))) for layer in useful if layer]
    step = sum(saved((layer[-1].candidate,)) for layer in layers) / levels
    ladders = []
    for layer in layers:
        savings = [saved((cut.candidate,)) for cut in layer]
        wanted = [step * (i + 1) for i in range(int(savings[-1] / step))]
        rungs = {bisect_left(savings, save) for save in wanted if save <= savings[-1]} | {len(layer) - 1}
        ladders.append(tuple(layer[i] for i in sorted(rungs)))
    return ladders


def _children(ladders: Sequence[Layer], ranks: Ranks) -> Iterator[Ranks]:
    for i, rung in enumerate(ranks):
        if rung < len(ladders[i]):
            yield (*ranks[:i], rung + 1, *ranks[i + 1 :])
