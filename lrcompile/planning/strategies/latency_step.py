"""Rank quantization: within a window of compressions, the rank just below the steepest step of the latency curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from lrcompile.planning.strategies.strategy import Cut, Layer, Offer
from lrcompile.planning.strategies.sweep import Sweep, strongest
from lrcompile.planning.strategies.uniform import by_form, nearest


@dataclass(frozen=True)
class LatencyStep(Sweep):
    """r = argmax_r t(r+1) − t(r) for r from R_min (compression α + 1) to R (compression α), the same α for all layers.

    "Rank quantization" of Hajimolahoseini et al. (arXiv 2309.03824), which fixes α. Here α goes from 1 up to `highest`,
    `steps` times per doubling, and the budget picks the setting; latencies are fitted by a rising curve first, so that
    noise makes no step (both our reading). A layer that is not faster at that rank is kept.
    """

    name = "latency-step"
    highest: float = 64.0
    steps: int = 8

    def settings(self, offer: Offer) -> Iterator[Sequence[Cut | None]]:
        """All layers at one compression after the other, 1 first."""
        forms = [by_form(layer) for layer in offer.layers]
        for i in range(round(self.steps * np.log2(self.highest)) + 1):
            compression = 2 ** (i / self.steps)
            yield [strongest(offer, (below_step(form, compression) for form in layer)) for layer in forms]


def below_step(cuts: Layer, compression: float) -> Cut:
    """The cut below the steepest step between `compression` and one more; the nearest cut if none lies there."""
    window = [cut for cut in reversed(cuts) if 1 / (compression + 1) <= cut.share <= 1 / compression]
    if not window:
        return nearest(cuts, 1 / compression)
    return window[steepest([cut.candidate.after.latency_s for cut in window])]


def steepest(latencies: Sequence[float]) -> int:
    """The position before the largest rise of a rising curve fitted to latencies of ascending ranks.

    Of equal rises the last counts; where nothing rises, it is the last position: the highest rank at that latency.
    """
    rises = np.diff(isotonic_regression(latencies).x)
    if not rises.size or rises.max() <= 0:
        return len(latencies) - 1
    return int(np.flatnonzero(rises >= rises.max() * (1 - 1e-9))[-1])
