"""Finds the share at which a peer's model takes the time that is asked for, in few tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

LEAST, MOST = 0.03, 0.98  # shares that are tried
TOLERANCE = 0.03  # of the time
TRIES = 6

Point = tuple[float, float]
"""(share, time over the original's)."""


def nearest(attempt: Callable[[float], float], wanted: float, tries: int = TRIES) -> list[Point]:
    """What was tried, (share, time) each, nearest to the wanted time first.

    `attempt` makes a model of a share and measures its time over the original's. The time is taken to grow with the
    share, roughly in a line; a try that is within `TOLERANCE` is the last.
    """
    points: list[Point] = []
    share = min(MOST, max(LEAST, wanted))
    while len(points) < tries:
        points.append((share, attempt(share)))
        if abs(points[-1][1] / wanted - 1) <= TOLERANCE:
            break
        following = proposed(points, wanted)
        if any(math.isclose(following, done, rel_tol=1e-2) for done, _ in points):
            break
        share = following
    return sorted(points, key=lambda point: abs(math.log(point[1] / wanted)))


def proposed(points: Sequence[Point], wanted: float) -> float:
    """The next share: between the nearest points on both sides of the wanted time, or beyond all of them."""
    slow = min((p for p in points if p[1] > wanted), default=None)
    fast = max((p for p in points if p[1] <= wanted), default=None)
    if slow and fast and fast[0] < slow[0]:
        part = (wanted - fast[1]) / (slow[1] - fast[1])
        return fast[0] + min(0.9, max(0.1, part)) * (slow[0] - fast[0])
    if slow:
        return max(LEAST, slow[0] * min(0.8, max(0.25, wanted / slow[1])))
    assert fast
    return min(MOST, max(fast[0] * 1.15, fast[0] * wanted / fast[1]))
