"""Whole networks, measured: what they take besides the sum of their operations' prices.

A run has to be started, values and weights are not in the caches as those of one operation are that is measured again
and again, and of a model the usual run counts, where of an operation the undisturbed one does. Random networks say how
much that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from torch import fx

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.bench import paired
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device, Pace
from lrcompile.devices.layouts import operations_on
from lrcompile.devices.measure import paced
from lrcompile.devices.onnx_region import UnsupportedRegion, lower_region
from lrcompile.devices.pace import in_step_at
from lrcompile.devices.repeated import encoder, in_a_row
from lrcompile.devices.sampling import encoders, rows
from lrcompile.devices.visits import agree, is_noisy, middle
from lrcompile.errors import DeviceError, InputError, first_line
from lrcompile.graph.op import AttentionShape, ConvShape

NETWORKS = 40  # of convolutions, and as many transformers
FEWEST_NETWORKS = 5
NETWORK_VISITS = 5  # of each at most: two that agree are enough
Measured = tuple["Network", float]
_SECONDS = 0.1  # for a visit
_RUN_S = 1e-5  # of about which size that of a run is: for the solver


@dataclass(frozen=True)
class Network:
    """Convolutions in a row, or a transformer's encoder: its attention, layers, and whether norms stand first."""

    row: tuple[ConvShape, ...] = ()
    encoder: tuple[AttentionShape, int, bool] | None = None

    def graph(self) -> fx.GraphModule:
        """It, on meta tensors."""
        if self.encoder is None:
            return in_a_row(self.row)
        shape, layers, first = self.encoder
        return encoder(shape, layers, first=first)

    def measured(self) -> Cost:
        """Its latency in ONNX Runtime on this machine's CPU, as that of a model is measured: the median of its runs.

        Raises:
            DeviceError: it cannot be measured here.
        """
        try:
            region = lower_region(self.graph())
            model, batch = region.model().SerializeToString(), region.inputs[0].shape[0]
            return paced(lambda: paired(model, model, batch=batch, seconds=_SECONDS, openings=1).median_a_s)
        except (InputError, UnsupportedRegion, MemoryError) as problem:
            raise DeviceError(f"a network cannot be measured here: {first_line(problem)}") from problem


def networks(seed: int) -> Iterator[Network]:
    """Random networks of convolutions and transformers' encoders, in turn."""
    for i, (shapes, (shape, layers)) in enumerate(zip(rows(seed, NETWORKS), encoders(seed, NETWORKS), strict=True)):
        yield Network(row=tuple(shapes))
        yield Network(encoder=(shape, layers, bool(i % 2)))


class NetworkVisits:
    """Networks, and what each visit of them gave; where `measure` fails the visit is left out."""

    def __init__(self, drawn: Iterable[Network], measure: Callable[[Network], Cost]) -> None:
        self.measure = measure
        self.known: dict[Network, list[Cost]] = {network: [] for network in drawn}

    def again(self, pace: Pace | None, in_time: Callable[[], bool]) -> None:
        """Visits each of which no two visits in step with a pace agree, the least visited first.

        The fewest that are needed are visited once, even where there is no time.
        """
        for network, known in sorted(self.known.items(), key=lambda item: len(item[1])):
            if not in_time() and sum(map(bool, self.known.values())) >= FEWEST_NETWORKS:
                return
            if len(known) < NETWORK_VISITS and not agree(known, pace):
                with suppress(DeviceError):  # such as too little memory for it
                    known.append(self.measure(network))

    def measured(self, pace: Pace | None) -> list[Measured]:
        """Networks and their latencies in s, at one pace: what was not measured steadily is left out.

        Where there was no time to visit some a second time, the first visit counts. There are none where fewer than
        half of those that were visited are left: the rest of them was hardly steadier.
        """
        counted = {network: in_step_at(pace, known) for network, known in self.known.items() if known}
        twice = sum(len(costs) > 1 for costs in counted.values()) >= FEWEST_NETWORKS
        found = {network: middle(costs) for network, costs in counted.items() if len(costs) > twice}
        kept = [(network, cost.latency_s) for network, cost in found.items() if not is_noisy(cost)]
        return kept if 2 * len(kept) >= len(counted) else []


def taken_besides(device: Device, measured: Sequence[Measured]) -> dict[str, float]:
    """What a run takes besides the prices of operations, and by which factor these are slower in a network.

    Least squares of logarithms, robustly.
    """
    model = AnalyticCostModel(device)
    sums = [
        sum(model.cost(op).latency_s for op in operations_on(device, network.graph()).values())
        for network, _ in measured
    ]
    summed, latencies = np.array(sums), np.array([latency_s for _, latency_s in measured])
    best = least_squares(
        lambda x: np.log((x[0] * _RUN_S + x[1] * summed) / latencies), [1.0, 1.1], bounds=([0.0, 1.0], np.inf),
        loss="soft_l1", f_scale=0.1,
    ).x  # fmt: skip
    return {"run_s": float(best[0]) * _RUN_S, "slower": float(best[1])}
