"""The price of an operation, and what every cost model must offer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from lrcompile.graph.op import OpDesc


@dataclass(frozen=True)
class Cost:
    """Latency with one standard deviation, and what it buys; adds and subtracts.

    Errors of different operations are taken as independent (our reading: with per-operation errors of 12 %
    for GEMM and 26 % for convolutions this reproduces how often published gains turned out real).
    """

    latency_s: float = 0.0
    sigma_s: float = 0.0
    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.latency_s + other.latency_s,
            math.hypot(self.sigma_s, other.sigma_s),
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.latency_s - other.latency_s,
            math.hypot(self.sigma_s, other.sigma_s),
            self.flops - other.flops,
            self.weight_bytes - other.weight_bytes,
            self.activation_bytes - other.activation_bytes,
        )

    @property
    def p_positive(self) -> float:
        """Probability that the latency is above zero: of a gain, that it is real."""
        if self.sigma_s == 0.0:
            return 1.0 if self.latency_s > 0 else 0.0
        return 0.5 * (1 + math.erf(self.latency_s / self.sigma_s / math.sqrt(2)))


def total(costs: Sequence[Cost]) -> Cost:
    """Sum of costs; the empty sum is the zero cost."""
    result = Cost()
    for cost in costs:
        result = result + cost
    return result


class CostModel(Protocol):
    """Predicts or measures latency."""

    @property
    def kind(self) -> str:
        """Printed beside every figure that comes from the model: "analytic" or "measured"."""
        ...

    def cost(self, op: OpDesc) -> Cost:
        """Price of one operation on its own."""
        ...

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        """Prices of a region before and after a rewrite.

        Both modules take the same inputs, and every node carries `meta["val"]` with a concrete shape.
        Nodes present in both under one name may be left out of both sums.
        """
        ...
