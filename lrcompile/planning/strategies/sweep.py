"""Strategies with one number for the whole model: settings from mild to strong, judged by price and measured error."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from lrcompile.planning.strategies.strategy import Cut, Layerwise, Offer, Pick, gain_s


class Sweep(Layerwise):
    """Picks the mildest setting that is fast and small enough or, given an error, the fastest up to it."""

    @abstractmethod
    def settings(self, offer: Offer) -> Iterator[Sequence[Cut | None]]:
        """A cut, or None, for each of the offer's layers, from the mildest setting to the strongest."""

    def pick(self, offer: Offer) -> Pick | None:
        """The setting within the limits; how strong one the error allows is found by halving, as if it only rose."""
        picks = {tuple(map(id, pick)): pick for pick in self._picks(offer)}
        distinct = list(picks.values())
        if not math.isfinite(offer.limits.error):
            return next(filter(offer.holds, distinct), None)
        beyond = bisect_left(distinct, True, key=lambda pick: not offer.error(pick) <= offer.limits.error)
        fastest_first = sorted(filter(offer.holds, distinct[:beyond]), key=gain_s, reverse=True)
        return next((pick for pick in fastest_first if offer.error(pick) <= offer.limits.error), None)

    def _picks(self, offer: Offer) -> Iterator[Pick]:
        yield offer.completed(())
        for cuts in self.settings(offer):
            yield offer.completed(cuts)


def strongest(offer: Offer, cuts: Iterable[Cut]) -> Cut | None:
    """The cut that is admitted and saves most of what the budget asks for; of equals, that which keeps most weights."""
    admitted = [cut for cut in cuts if cut.admitted]
    return max(admitted, key=lambda cut: (offer.saving((cut.candidate,)), cut.share), default=None)
