"""How much slower or faster a machine was while operations were measured, as all of them together tell.

From minute to minute, and from process to process, all operations take some percent more or less, and neither a fixed
product nor threads that hand over work tell of it (`pace`). What operations take against what all others say of them
does: its median over some visits in a row. Latencies are then given as of an undisturbed machine (our reading).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrcompile.devices.cost import Cost
from lrcompile.devices.pace import UNDISTURBED

WINDOW = 200  # visits in a row: a median of so many is known to half a percent
FEWEST = 50  # of a window, without which it says nothing


@dataclass(frozen=True)
class Drift:
    """By window, the logarithm of what operations took over what they take on an undisturbed machine."""

    slower: tuple[float, ...] = ()

    def undone(self, turn: int, cost: Cost) -> Cost:
        """What was measured at a turn, counted over all visits, as it is on an undisturbed machine."""
        if not self.slower:
            return cost
        times = math.exp(-self.slower[min(turn // WINDOW, len(self.slower) - 1)])
        return replace(cost, latency_s=cost.latency_s * times, sigma_s=cost.sigma_s * times)


def drift_of(turns: Sequence[int], errors: Sequence[float]) -> Drift:
    """The drift that errors tell, as logarithms of measured over expected, at turns; none where they are too few.

    Windows of which too few visits count are taken for what lies between their neighbours.
    """
    windows = np.asarray(turns, dtype=int) // WINDOW
    values = np.asarray(errors, dtype=float)
    told = [window for window in np.unique(windows) if (windows == window).sum() >= FEWEST]
    if len(told) < 2:
        return Drift()
    medians = [float(np.median(values[windows == window])) for window in told]
    slower = np.interp(np.arange(windows.max() + 1), told, medians)
    return Drift(tuple((slower - np.quantile(slower, UNDISTURBED)).tolist()))
