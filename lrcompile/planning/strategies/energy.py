"""The same bound on every layer's own error: knows the spectra, not how much a layer matters to the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrcompile.planning.strategies.strategy import Cut, Offer
from lrcompile.planning.strategies.sweep import Sweep, strongest


@dataclass(frozen=True)
class Energy(Sweep):
    """rank_l = what saves most with ‖(W − W_r)X‖ ≤ bound · ‖WX‖, one bound for all layers (spectral energy)."""

    name = "energy"

    def settings(self, offer: Offer) -> Iterator[Sequence[Cut | None]]:
        """One bound after the other, the least first: all values that make a difference."""
        layers = list(offer.choosable())
        for bound in sorted({cut.candidate.error for layer in layers for cut in layer}):
            yield [strongest(offer, (cut for cut in layer if cut.candidate.error <= bound)) for layer in layers]
