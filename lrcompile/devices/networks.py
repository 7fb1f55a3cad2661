"""Whole networks, measured: what they take besides the sum of their operations' prices.

A run has to be started, and values and weights are not in the caches as those of one operation are that is measured
again and again. Random networks say how much that is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.optimize import least_squares
from torch import fx

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device, Pace
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.pace import at, in_step
from lrcompile.devices.repeated import encoder, in_a_row
from lrcompile.devices.sampling import encoders, rows
from lrcompile.errors import DeviceError

NETWORKS = 24  # of convolutions, and as many transformers
FEWEST_NETWORKS = 5
NETWORK_VISITS = 2  # of each, with all others between
_APART = 0.1  # visits that differ by more do not count
_RUN_S = 1e-5  # of about which size that of a run is: for the solver
Measured = tuple[fx.GraphModule, float]


def networks(seed: int) -> Iterator[fx.GraphModule]:
    """Random networks of convolutions and transformers' encoders, in turn."""
    for i, (shapes, (shape, layers)) in enumerate(zip(rows(seed, NETWORKS), encoders(seed, NETWORKS), strict=True)):
        yield in_a_row(shapes)
        yield encoder(shape, layers, first=bool(i % 2))


def measured_networks(
    seed: int,
    measure: Callable[[fx.GraphModule, int], Cost],
    pace: Pace | None,
    in_time: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> list[Measured]:
    """Random networks and their latencies in s, at one pace: what cannot be measured, or not steadily, is left out.

    `measure` takes a network and the number of the visit. Where there is no time for a second one, the first counts.
    There are none where fewer than half of those that were visited are left: the rest of them was hardly steadier.
    """
    graphs = list(networks(seed))
    visits: list[list[float]] = [[] for _ in graphs]
    done, total = 0, NETWORK_VISITS * len(graphs)
    for visit in range(NETWORK_VISITS):
        for graph, known in zip(graphs, visits, strict=True):
            if not in_time() and sum(map(bool, visits)) >= FEWEST_NETWORKS:
                break
            try:
                cost = measure(graph, visit)
                if in_step(pace, cost):
                    known.append(at(pace, cost).latency_s)
            except DeviceError:  # such as too little memory for it
                pass
            done += 1
            progress(done, total)
    times = max(map(len, visits)) if sum(len(known) > 1 for known in visits) >= FEWEST_NETWORKS else 1
    kept = [
        (graph, statistics.median(known))
        for graph, known in zip(graphs, visits, strict=True)
        if len(known) >= times and max(known) <= (1 + _APART) * min(known)
    ]
    return kept if 2 * len(kept) >= min(done, len(graphs)) else []


def taken_besides(device: Device, measured: Sequence[Measured]) -> dict[str, float]:
    """What a run takes besides the prices of operations, and by which factor these are slower in a network.

    Least squares of logarithms, robustly.
    """
    model = AnalyticCostModel(device)
    sums = [
        sum(model.cost(op).latency_s for op in describe_all(gm, device.fuses, device.lacks).values())
        for gm, _ in measured
    ]
    summed, latencies = np.array(sums), np.array([latency_s for _, latency_s in measured])
    best = least_squares(
        lambda x: np.log((x[0] * _RUN_S + x[1] * summed) / latencies), [1.0, 1.1], bounds=([0.0, 1.0], np.inf),
        loss="soft_l1", f_scale=0.1,
    ).x  # fmt: skip
    return {"run_s": float(best[0]) * _RUN_S, "slower": float(best[1])}
