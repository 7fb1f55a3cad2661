"""Whether inputs are like those that a model was made for, told by what its layers get to see of them.

A batch norm keeps the mean and variance of what entered it in training, so that a model that has some says itself which
data it knows. Without, two sets of inputs can be told apart, one of which is known to be good. The distance of a
feature is ((m − μ)² + (s − σ)²)^½ / σ, that of two normal distributions (2-Wasserstein) in units of the expected
standard deviation; of a layer it is the median over features, of a model the median over layers and the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.errors import is_out_of_memory
from lrcompile.graph.graph import ALL_CONVS, Graph, feature_axis, rows_of
from lrcompile.memory import in_pieces, samples_in
from lrcompile.planning.calibration import does_not_run

USUAL = 0.6  # the median over layers that data of the same kind stay below, single images too
FAR = 3.0  # the same for the layer that is farthest off
MOST_BATCHES = 4  # that are looked at
LEAST_SPREAD = 1e-3  # of the mean variance of a layer's features: dead ones do not count as far off

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Spread = tuple[Tensor, Tensor]
"""Mean and variance of features, float64 [features] each."""


def entering(graph: Graph, batches: Sequence[Sequence[Any]], divisible: bool = False) -> dict[str, Spread]:
    """What enters each linear, convolution and batch norm layer, by path, on the first few batches of flat inputs.

    Where memory does not last, half of a batch is looked at, if the graph takes that (`divisible`), and so on.
    """
    observer = _Observer(graph)
    left = [tuple(batch) for batch in batches[:MOST_BATCHES]]
    while left:
        batch, before = left.pop(0), dict(observer.sums)
        try:
            with torch.no_grad():
                observer.run(*batch, enable_io_processing=False)
            continue
        except Exception as error:  # whatever an operation raises for values that it does not take
            if not is_out_of_memory(error):
                raise does_not_run(error) from error
            half = samples_in(batch) // 2 if divisible else 0
            if not half:
                raise
        observer.sums = before
        left = [part for whole in (batch, *left) for part in in_pieces(whole, half)[:1]]
    return {path: observer.spread(path) for path in observer.sums}


def known_to_batch_norms(graph: Graph) -> dict[str, Spread]:
    """The running statistics of each batch norm that was trained, by path."""
    found: dict[str, Spread] = {}
    for site in graph.modules_of(*BATCH_NORMS):
        mean, variance = site.module.running_mean, site.module.running_var
        if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)):
            continue
        if bool((mean == 0).all()) and bool((variance == 1).all()):
            continue  # as it was made
        found[site.path] = mean.detach().double(), variance.detach().double()
    return found


@dataclass(frozen=True)
class Distance:
    """How far what enters layers is from what is expected there, in standard deviations; the farthest is `at`."""

    typical: float
    largest: float
    at: str
    layers: int

    @classmethod
    def between(cls, expected: Mapping[str, Spread], got: Mapping[str, Spread]) -> Distance | None:
        """The distance in the layers that both know; None if there are none."""
        found = {path: _distance(expected[path], got[path]) for path in expected if path in got}
        if not found:
            return None
        farthest = max(found, key=lambda path: found[path])
        return cls(float(torch.tensor(list(found.values())).median()), found[farthest], farthest, len(found))

    @property
    def is_usual(self) -> bool:
        """Whether data of one kind may lie so far apart."""
        return self.typical <= USUAL and self.largest <= FAR

    def __str__(self) -> str:
        return (
            f"{self.typical:.2g} standard deviations in the median of {self.layers} layers (usual: up to {USUAL:g}), "
            f"{self.largest:.2g} in {self.at} (up to {FAR:g})"
        )


def unlike_training(graph: Graph, got: Mapping[str, Spread], what: str) -> list[str]:
    """A note if inputs, `what` they are in words, are not like those that the batch norms were trained on."""
    distance = Distance.between(known_to_batch_norms(graph), got)
    if distance is None or distance.is_usual:
        return []
    return [
        f"the {what} are unlike those that the model was trained on: what enters its batch norms is off their running "
        f"statistics by {distance}; check how the inputs are scaled, and that they are real ones"
    ]


def unlike_calibration(expected: Mapping[str, Spread], got: Mapping[str, Spread], what: str) -> list[str]:
    """A note if inputs, `what` they are in words, are not like the calibration data."""
    distance = Distance.between(expected, got)
    if distance is None or distance.is_usual:
        return []
    return [f"the {what} are unlike the calibration data: what enters layers is off by {distance}; check both"]


def _distance(expected: Spread, got: Spread) -> float:
    (mean, variance), (other_mean, other_variance) = expected, got
    scale = variance + LEAST_SPREAD * variance.mean() + 1e-12
    squared = ((other_mean - mean).square() + (other_variance.sqrt() - variance.sqrt()).square()) / scale
    return float(squared.sqrt().median())


class _Observer(fx.Interpreter):
    """Sums up what enters layers: rows, the sums of features and of their squares."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.gm)
        self.extra_traceback = False  # fx would write the node and its traceback into a message for the user
        self.axes = {
            site.path: 1 if isinstance(site.module, BATCH_NORMS) else feature_axis(site.module)
            for site in graph.modules_of(nn.Linear, *ALL_CONVS, *BATCH_NORMS)
        }
        self.sums: dict[str, tuple[float, Tensor, Tensor]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.axes and not args[0].is_complex():
            rows = rows_of(args[0].detach(), self.axes[target])
            variance, mean = (found.double() for found in torch.var_mean(rows, 0, correction=0))
            count, total, squares = self.sums.get(target, (0.0, torch.zeros(()), torch.zeros(())))
            added = len(rows) * mean, len(rows) * (variance + mean.square())
            self.sums[target] = count + len(rows), total + added[0], squares + added[1]
        return super().call_module(target, args, kwargs)

    def spread(self, path: str) -> Spread:
        """The mean and variance of features."""
        count, total, squares = self.sums[path]
        mean = total / count
        return mean, (squares / count - mean.square()).clamp_min(0)
