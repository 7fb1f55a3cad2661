"""Beam search over rank vectors: each child lowers one layer by a step, and the measured output error ranks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from lrcompile.errors import InputError
from lrcompile.graph.graph import Graph
from lrcompile.planning.sensitivity import Sensitivities, rewritten
from lrcompile.planning.strategies.strategy import Cut, Layer, Layerwise, Offer, Pick, Saving, gain_s

Ranks = tuple[int, ...]  # the rung of each layer and each group of layers; 0 is as it is


@dataclass(frozen=True)
class Beam(Layerwise):
    """ranks → the `width` best of {ranks − one step in one layer}, until the budget holds.

    The modified beam search of BSR (Eo, Kang and Rhee, arXiv 2111.15179). Our reading: layers that a candidate cuts
    together, as those that read one value, are stepped together too. A step saves one of `levels` equal parts of all
    that can be saved, in latency or, for a size, in bytes, so that children compare by error alone. Of a level's
    children at most `tries` are scored: those whose predicted output error is least.
    `score` takes a rewritten graph, less is better; without it, the relative output error on the first batch counts.
    """

    name = "beam"
    width: int = 4
    levels: int = 32
    tries: int = 16
    score: Callable[[Graph], float] | None = None

    def __post_init__(self) -> None:
        for name in ("width", "levels", "tries"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise InputError(f"Beam {name} is {getattr(self, name)!r}; expected a whole number of at least 1")

    def pick(self, offer: Offer) -> Pick | None:
        """The best of the first level that is fast and small enough; given an error, the fastest within it."""
        limit = offer.limits.error
        if not math.isfinite(limit):
            last = ([self.most(offer, saved)] for saved in [offer.saving])  # where the beam ran into a dead end
            return next((pick for picks in chain(self.beams(offer), last) for pick in picks if offer.holds(pick)), None)
        within: list[Pick] = []
        for picks in self.beams(offer):
            fitting = [pick for pick in picks if offer.error(pick, quick=True) <= limit]
            if not fitting:
                break
            within += fitting
        fastest_first = sorted(filter(offer.holds, within), key=gain_s, reverse=True)
        return next((pick for pick in fastest_first if offer.error(pick) <= limit), None)

    def beams(self, offer: Offer) -> Iterator[list[Pick]]:
        """The picks of one level after the other, those with the best score first; the first level changes nothing."""
        p = offer.problem
        ladders = self._ladders(offer)
        cuts = [cut.candidate for ladder in ladders for cut in ladder]
        alone = Sensitivities(p.graph, cuts, p.candidates, p.passes, p.context, p.evaluator, p.progress).errors
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

    def most(self, offer: Offer, saved: Saving) -> Pick:
        """The pick that saves most, taken greedily among layers and groups."""
        tops = [max(cuts, key=lambda cut: saved((cut.candidate,))) for cuts in _choosable(offer)]
        net = {id(cut): _net(offer, saved, cut) for cut in tops}
        return offer.completed(sorted((cut for cut in tops if net[id(cut)] > 0), key=lambda cut: -net[id(cut)]))

    def _ladders(self, offer: Offer) -> list[Layer]:
        """For each layer and group the cuts of least error that save one, two … steps, and the one that saves most."""
        saved = offer.saving
        step = (saved(self.most(offer, saved)) - saved(offer.completed(()))) / self.levels
        ladders = []
        for cuts in _choosable(offer):
            net = {id(cut): _net(offer, saved, cut) for cut in cuts}
            most = max(net.values())
            if most > 0 and step > 0:
                wanted = [step * i for i in range(1, self.levels + 1) if step * i < most]
                found = [_mildest(cut for cut in cuts if net[id(cut)] >= saving) for saving in (*wanted, most)]
                ladders.append(tuple(dict(zip(map(id, found), found, strict=True)).values()))
        return ladders

    def _score(self, offer: Offer, pick: Pick) -> float:
        if self.score is None:
            return offer.error(pick, quick=True)
        p = offer.problem
        graph = rewritten(
            p.graph, [rewrite for candidate in pick for rewrite in candidate.rewrites], p.passes, p.context
        )
        with torch.no_grad():
            return self.score(graph)


def _mildest(cuts: Iterable[Cut]) -> Cut:
    """The cut of least error; of equals, that which keeps most weights."""
    return min(cuts, key=lambda cut: (cut.candidate.error, -cut.share))


def _choosable(offer: Offer) -> list[Layer]:
    """The layers and groups with the cuts that are admitted."""
    admitted = (tuple(cut for cut in cuts if cut.admitted) for cuts in (*offer.layers, *offer.groups))
    return [cuts for cuts in admitted if cuts]


def _net(offer: Offer, saved: Saving, cut: Cut) -> float:
    """What a cut alone saves beyond the exact rewrites, some of which it may rule out."""
    return saved(offer.completed((cut,))) - saved(offer.completed(()))


def _children(ladders: Sequence[Layer], ranks: Ranks) -> Iterator[Ranks]:
    """One step further in one layer or group, where no other that is cut already has nodes of it."""
    for i, rung in enumerate(ranks):
        taken = {
            node
            for j, (ladder, other) in enumerate(zip(ladders, ranks, strict=True))
            if other and j != i
            for node in ladder[other - 1].candidate.footprint
        }
        if rung < len(ladders[i]) and not taken & ladders[i][rung].candidate.footprint:
            yield (*ranks[:i], rung + 1, *ranks[i + 1 :])
