"""The pace of a machine while it is measured: a processor whose clock changes, or is shared, is slower at everything.

A fixed product is measured in turn with each operation. What an operation takes follows it, more or less; by how much
is seen in operations that were measured at two paces. Latencies are then given for one pace, as of an undisturbed
machine (our reading).

What it does not tell is how long threads take to hand work to each other. Where a virtual machine's processors are
moved apart, or stopped for others, that can be so long that small operations take twice or three times as long, for
seconds or minutes, and large ones as long as before. Small operations that threads share, measured in turn too, tell
of it; visits at such times do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Pace

UNDISTURBED = 0.25  # quantile of what the product takes, or of the drift, that latencies are given for
FEWEST = 20  # operations measured twice without which nothing is said
WIDEST = 1.5  # logarithm of a ratio from which two visits say nothing
USUAL = 0.4  # quantile of what handing over takes, against the product: it is late for less than half of the time
LATE = 1.25  # times as long for handing over work as it usually takes, from which a visit does not count


@dataclass(frozen=True)
class Paced(Cost):
    """A measured cost, with what was measured in turn with it, in s: a fixed product, and small operations after it."""

    product_s: float = 0.0
    handed_s: float = 0.0


def in_step(pace: Pace | None, cost: Cost) -> bool:
    """Whether threads handed over work as fast as they usually do while it was measured, as far as that is known."""
    if pace is None or not isinstance(cost, Paced) or cost.product_s <= 0:
        return True
    return cost.handed_s <= LATE * pace.handed * cost.product_s


def at(pace: Pace | None, cost: Cost) -> Cost:
    """A cost as it is at a pace; without one, or where its own was not measured, as it was."""
    if pace is None or not isinstance(cost, Paced) or cost.product_s <= 0:
        return cost
    times = (pace.product_s / cost.product_s) ** pace.follows
    return replace(cost, latency_s=cost.latency_s * times, sigma_s=cost.sigma_s * times, product_s=pace.product_s)


def in_step_at(pace: Pace | None, costs: Sequence[Cost]) -> list[Cost]:
    """The costs in step with a pace, as they are at that."""
    return [at(pace, cost) for cost in costs if in_step(pace, cost)]


def pace_of(visits: Iterable[Sequence[Cost]]) -> Pace | None:
    """The pace of an undisturbed machine, from operations that were measured several times; None where too few were."""
    paced = [[cost for cost in known if isinstance(cost, Paced) and cost.product_s > 0] for known in visits]
    every = [cost for known in paced for cost in known]
    if sum(max(0, len(known) - 1) for known in paced) < FEWEST:
        return None
    product_s = float(np.quantile([cost.product_s for cost in every], UNDISTURBED))
    usual = Pace(product_s, 0.0, float(np.quantile([cost.handed_s / cost.product_s for cost in every], USUAL)))
    pairs = [pair for known in paced for pair in pairwise(cost for cost in known if in_step(usual, cost))]
    slower = np.log([b.product_s / a.product_s for a, b in pairs])
    longer = np.log([b.latency_s / a.latency_s for a, b in pairs])
    told = (np.abs(slower) < WIDEST) & (np.abs(longer) < WIDEST)
    slower, longer = slower[told], longer[told]
    follows = float(slower @ longer / max(float(slower @ slower), 1e-12))
    return replace(usual, follows=min(1.0, max(0.0, follows)))
