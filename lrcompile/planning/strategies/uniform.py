"""The same share of every layer: knows neither the device nor how much a layer matters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrcompile.planning.price import Family
from lrcompile.planning.strategies.strategy import Cut, Layer, Offer
from lrcompile.planning.strategies.sweep import Sweep, strongest


@dataclass(frozen=True)
class Uniform(Sweep):
    """rank_l = share · break-even rank of layer l, the same share for all, in `steps` steps from 1 to 0.

    The share is that of the weights left, which is the share of the break-even rank for a matrix and extends it to
    cores and forms of more than one rank (our reading). Of several forms the fastest at that share is taken.
    """

    name = "uniform"
    steps: int = 100

    def settings(self, offer: Offer) -> Iterator[Sequence[Cut | None]]:
        """All layers at one share after the other, 1 first."""
        forms = [by_form(layer) for layer in offer.layers]
        for step in range(self.steps, -1, -1):
            yield [strongest(offer, (nearest(form, step / self.steps) for form in layer)) for layer in forms]


def by_form(layer: Layer) -> list[Layer]:
    """A layer's cuts apart by form, which leaves ranks alone to tell them apart."""
    forms: dict[Family, list[Cut]] = defaultdict(list)
    for cut in layer:
        forms[cut.candidate.family].append(cut)
    return [tuple(cuts) for cuts in forms.values()]


def nearest(cuts: Layer, share: float) -> Cut:
    """The cut whose share of the weights left is nearest."""
    return min(cuts, key=lambda cut: abs(cut.share - share))
