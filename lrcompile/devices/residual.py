"""What a formula leaves of measurements, interpolated between shapes: it corrects near them, and not far from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lrcompile.graph.op import ConvShape, GemmShape, OpDesc

ENOUGH = 200  # values to find reach and spread by: the work grows with the cube of their number
WIDTHS = {"gemm": 4, "bmm": 4, "pointwise": 7, "conv": 7, "depthwise": 7, "memory": 1}
"""How many features the families of operations have."""


@dataclass(frozen=True, eq=False)
class Residuals:
    """Logarithms of measured over predicted latency at some shapes, and how far one of them reaches.

    A Gaussian process with the kernel spread² · exp(−distance/reach) and independent noise (Rasmussen and Williams,
    Gaussian Processes for Machine Learning, 2006, eq. 2.23 and 4.18): not smooth, as kernels of libraries are not.
    `points` are [count × features], in log₂ of sizes.
    """

    points: np.ndarray
    values: np.ndarray
    reach: float
    spread: float
    noise: float

    @cached_property
    def _solved(self) -> tuple[np.ndarray, np.ndarray]:
        """(weights of the points, inverse of the covariance's lower factor): inverted once, used for every shape."""
        covariance = self._kernel(self.points, self.points) + self.noise**2 * np.eye(len(self.points))
        inverse = np.linalg.inv(np.linalg.cholesky(covariance))
        return inverse.T @ (inverse @ self.values), inverse

    def at(self, features: Sequence[float]) -> tuple[float, float]:
        """(correction, what is left of the spread) of a shape, in logarithms of latency."""
        if not len(self.points):
            return 0.0, self.spread
        weights, inverse = self._solved
        near = self._kernel(np.asarray([features]), self.points)[0]
        known = inverse @ near
        return float(near @ weights), math.sqrt(max(0.0, self.spread**2 - float(known @ known)) + self.noise**2)

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
        return self.spread**2 * np.exp(-distance / self.reach)

    def left_out(self) -> np.ndarray:
        """The error of each value when it is predicted from all others (ibid., eq. 5.12)."""
        weights, inverse = self._solved
        return weights / (inverse**2).sum(0)

    def log_likelihood(self) -> float:
        """Of the values, given reach, spread and noise."""
        weights, inverse = self._solved
        constant = len(self.values) * math.log(2 * math.pi) / 2
        return float(np.log(np.diag(inverse)).sum() - self.values @ weights / 2 - constant)


def fitted(points: np.ndarray, values: np.ndarray, noise: float) -> Residuals:
    """Reach and spread that explain the values best, of a grid; by some of the values where there are many."""
    some = np.random.default_rng(0).permutation(len(points))[:ENOUGH]
    candidates = (
        Residuals(points[some], values[some], reach, spread, noise)
        for reach in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
        for spread in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)
    )
    best = max(candidates, key=Residuals.log_likelihood)
    return replace(best, points=points, values=values)


def family(op: OpDesc) -> str | None:
    """What an operation's residual is kept with, or None where it has none."""
    if op.conv is not None:
        shape = op.conv
        if len(shape.kernel) != 2 or shape.transposed:
            return None
        if shape.groups > 1:
            return "depthwise" if min(shape.channels_in, shape.channels_out) == shape.groups else None
        return "pointwise" if set(shape.kernel) == {1} else "conv"
    if op.gemm is not None:
        return "gemm" if op.weight_bytes else "bmm"
    if op.kind in ("elementwise", "normalization", "movement", "reduction", "gather"):
        return "memory"
    return None


def features(op: OpDesc) -> list[float]:
    """The sizes of an operation that its residual depends on, as logarithms to the base of two."""
    if op.conv is not None:
        return _of_conv(op.conv)
    if op.gemm is not None:
        return _of_gemm(op.gemm)
    return [_log2(op.weight_bytes + op.activation_bytes)]


def _of_gemm(shape: GemmShape) -> list[float]:
    return [_log2(size) for size in (shape.m, shape.n, shape.k, shape.batch)]


def _of_conv(shape: ConvShape) -> list[float]:
    """Pixels, channels in and out, taps, stride, and how much of the blocks of 16 channels is empty."""
    return [
        _log2(shape.batch * math.prod(shape.size_out)),
        _log2(shape.channels_in),
        _log2(shape.channels_out),
        _log2(math.prod(shape.kernel)),
        _log2(math.prod(shape.stride)),
        4 * _empty(shape.channels_in),
        4 * _empty(shape.channels_out),
    ]


def _empty(channels: int) -> float:
    return _log2(-(-channels // 16) * 16 / channels)


def _log2(size: float) -> float:
    return math.log2(max(size, 1e-9))
