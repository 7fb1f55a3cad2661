"""What a formula leaves of measurements, interpolated between shapes: it corrects near them, and not far from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from lrcompile.graph.op import FUNCTIONS, AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

ENOUGH = 600  # values to find reach, spread and noise by: the work grows with the cube of their number
NEAREST = 160  # values that say something about a shape
BLOCK = 16  # channels in a block of ONNX Runtime's convolutions on AVX-512, and a width of its products
WIDTHS: dict[str, int] = {
    "gemm": 9, "bmm": 9, "pointwise": 16, "conv": 16, "depthwise": 16, "grouped": 17, "volume": 9, "attention": 10,
    "recurrent": 8,
    **dict.fromkeys(FUNCTIONS, 2),
}  # fmt: skip
"""How many features the families of operations have."""
_WITH_ROWS = ("bias", "layer_norm", "skip_layer_norm", "group_norm", "transpose", "reduce")
_REACH, _SPREAD, _NOISE = 16.0, 0.4, 0.03  # where the search starts
_BOUNDS = ((0.05, 1e3), (0.01, 3.0), (0.01, 0.3))  # of each
_HELD = 0.04  # how strongly reaches are held to where the search starts, in a logarithm's variance


@dataclass(frozen=True, eq=False)
class Residuals:
    """Logarithms of measured over predicted latency at some shapes, and how far one of them reaches.

    A Gaussian process with the kernel spread² · exp(−‖difference/reach‖) and independent noise (Rasmussen and Williams,
    Gaussian Processes for Machine Learning, 2006, eq. 2.23 and 4.18): not smooth, as kernels of libraries are not. A
    prediction uses the nearest values. `points` are [count × features], `reach` is one a feature.
    """

    points: np.ndarray
    values: np.ndarray
    reach: np.ndarray
    spread: float
    noise: float

    @cached_property
    def _scaled(self) -> np.ndarray:
        return self.points / self.reach

    @cached_property
    def _factor(self) -> tuple[np.ndarray, bool]:
        return self._factor_of(np.arange(len(self.points)))

    def at(self, features: Sequence[float]) -> tuple[float, float]:
        """(correction, standard deviation of a measurement from it) of a shape, in logarithms of latency."""
        correction, covariance = self.joint([features])
        return float(correction[0]), math.sqrt(covariance[0, 0] + self.noise**2)

    def joint(self, features: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
        """Corrections of some shapes, and the covariance of what is not known of them, without noise."""
        return self._predicted(np.asarray(features, float) / self.reach, np.arange(len(self.points)))

    def left_out(self) -> np.ndarray:
        """The error of each value when it is predicted from all others."""
        every = np.arange(len(self.points))
        return np.array(
            [self.values[i] - self._predicted(self._scaled[i : i + 1], np.delete(every, i))[0][0] for i in every]
        )

    def _predicted(self, scaled: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = self.spread**2 * np.exp(-cdist(scaled, scaled))
        if not len(known):
            return np.zeros(len(scaled)), own
        away = cdist(scaled, self._scaled[known])
        if len(known) > NEAREST:
            some = np.unique(np.argpartition(away, NEAREST, axis=1)[:, :NEAREST])
            known, away = known[some], away[:, some]
        near = self.spread**2 * np.exp(-away)
        factor = self._factor if len(known) == len(self.points) else self._factor_of(known)
        weights = cho_solve(factor, near.T, check_finite=False).T
        return weights @ self.values[known], own - weights @ near.T

    def _factor_of(self, known: np.ndarray) -> tuple[np.ndarray, bool]:
        """What `cho_solve` takes, of the covariance of some values."""
        return cho_factor(self._covariance(self._scaled[known]), check_finite=False)

    def _covariance(self, scaled: np.ndarray) -> np.ndarray:
        return self.spread**2 * np.exp(-cdist(scaled, scaled)) + self.noise**2 * np.eye(len(scaled))


def fitted(points: np.ndarray, values: np.ndarray) -> Residuals:
    """Reach, spread and noise that explain the values best; found by some of the values where there are many."""
    some = np.random.default_rng(0).permutation(len(points))[:ENOUGH]
    width = points.shape[1]
    start = np.log([_REACH] * width + [_SPREAD, _NOISE])
    bounds = np.log([_BOUNDS[0]] * width + list(_BOUNDS[1:]))
    found = minimize(
        lambda x: _surprise(x, start, points[some], values[some]), start, jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 40},
    ).x  # fmt: skip
    reach, (spread, noise) = np.exp(found[:width]), np.exp(found[width:])
    return Residuals(points, values, reach, float(spread), float(noise))


def _surprise(x: np.ndarray, start: np.ndarray, points: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray]:
    """Minus the logarithm of the likelihood and its gradient (ibid., eq. 2.30 and 5.9), by the logarithms of all."""
    width = points.shape[1]
    scaled, spread, noise = points / np.exp(x[:width]), math.exp(x[-2]), math.exp(x[-1])
    distances = cdist(scaled, scaled)
    kernel = spread**2 * np.exp(-distances)
    factor = cho_factor(kernel + noise**2 * np.eye(len(values)), lower=True)
    inverse = cho_solve(factor, np.eye(len(values)))
    weights = inverse @ values
    slope = np.outer(weights, weights) - inverse  # of twice the likelihood, by the covariance
    moved = slope * kernel / np.maximum(distances, 1e-12)
    np.fill_diagonal(moved, 0.0)
    by_reach = (scaled**2 * moved.sum(0)[:, None]).sum(0) - (scaled * (moved @ scaled)).sum(0)
    gradient = -np.append(by_reach, [(slope * kernel).sum(), noise**2 * np.trace(slope)])
    away = np.append(x[:width] - start[:width], [0.0, 0.0])
    surprise = float(values @ weights / 2 + np.log(np.diag(factor[0])).sum() + _HELD * (away @ away) / 2)
    return surprise, gradient + _HELD * away


def family(op: OpDesc) -> str | None:
    """What an operation's residual is kept with, or None where it has none: what is measured is in fp32."""
    if op.dtype != "fp32":
        return None
    if op.conv is not None:
        shape = op.conv
        if shape.transposed or len(shape.kernel) == 1:
            return None
        if len(shape.kernel) == 3:
            return "volume"
        if shape.groups > 1:
            return "depthwise" if min(shape.channels_in, shape.channels_out) == shape.groups else "grouped"
        return "pointwise" if set(shape.kernel) == {1} else "conv"
    if op.gemm is not None:
        return "gemm" if op.weight_bytes else "bmm"
    if op.attention is not None:
        return "attention"
    if op.recurrent is not None:
        return "recurrent"
    if op.kind in ("elementwise", "normalization", "movement", "reduction", "gather"):
        return op.function
    return None


def features(op: OpDesc) -> list[float]:
    """What an operation's residual depends on: logarithms of sizes to the base of two, and conditions that jump."""
    if op.conv is not None:
        if len(op.conv.kernel) == 3:
            return _of_volume(op.conv)
        return [*_of_conv(op.conv), _log2(op.conv.groups)] if family(op) == "grouped" else _of_conv(op.conv)
    if op.gemm is not None:
        return _of_gemm(op.gemm)
    if op.attention is not None:
        return _of_attention(op.attention)
    if op.recurrent is not None:
        return _of_recurrent(op.recurrent)
    return [_log2(op.weight_bytes + op.activation_bytes), _log2(op.row) if op.function in _WITH_ROWS else 0.0]


def sizes(op: OpDesc) -> list[float]:
    """The sizes alone, by which operations of a kind are near to each other; logarithms to the base of two."""
    if op.conv is not None:
        shape = op.conv
        pixels = shape.batch * math.prod(shape.size_out)
        found = (pixels, shape.channels_in, shape.channels_out, math.prod(shape.kernel), math.prod(shape.stride))
        return [_log2(size) for size in found]
    if op.gemm is not None:
        return [_log2(size) for size in (op.gemm.m, op.gemm.n, op.gemm.k, op.gemm.batch)]
    return [_log2(op.weight_bytes + op.activation_bytes)]


def _of_gemm(shape: GemmShape) -> list[float]:
    """Extents, work, and what is empty in the last of 16 and 32 columns and 12 rows; vectors are another kernel."""
    work = shape.m * shape.n * shape.k * shape.batch
    extents = [_log2(size) for size in (shape.m, shape.n, shape.k, shape.batch, work)]
    return [*extents, _empty(shape.n, BLOCK), _empty(shape.n, 2 * BLOCK), _empty(shape.m, 12), float(shape.m == 1)]


def _of_volume(shape: ConvShape) -> list[float]:
    """Sizes alone: ONNX Runtime unfolds windows and multiplies."""
    voxels, taps, per_group = math.prod(shape.size_out), math.prod(shape.kernel), shape.channels_in // shape.groups
    work = voxels * shape.batch * shape.channels_out * per_group * taps
    sizes = (voxels, shape.batch, per_group, shape.channels_out, taps, math.prod(shape.stride), shape.groups, work)
    return [*map(_log2, sizes), float(taps == 1)]


def _of_attention(shape: AttentionShape) -> list[float]:
    """Sizes, work, and what mask there is."""
    heads = shape.batch * shape.heads
    work = heads * shape.queries * shape.keys * shape.head_dim
    sizes = (shape.batch, shape.heads, shape.heads / shape.heads_kv, shape.queries, shape.keys, shape.head_dim, work)
    return [*map(_log2, sizes), float(shape.mask != "none"), float(shape.mask == "boolean"), float(shape.causal)]


def _of_recurrent(shape: RecurrentShape) -> list[float]:
    """Sizes and work."""
    calls = shape.layers * shape.directions
    work = calls * shape.batch * shape.steps * shape.hidden_size * (shape.input_size + shape.hidden_size) * shape.gates
    sizes = (shape.batch, shape.steps, shape.input_size, shape.hidden_size, shape.layers, shape.directions)
    return [*map(_log2, (*sizes, shape.gates, work))]


def _of_conv(shape: ConvShape) -> list[float]:
    """Sizes, whether channels are laid out in blocks, and what is empty in the last block of channels or pixels.

    Kernels for blocks take up to four of them at a time, and 6 or 14 pixels of a row; without blocks a convolution is a
    product with pixels as its columns.
    """
    into, out = shape.channels_in, shape.channels_out
    blocked = float(in_blocks(shape))
    pixels, taps = math.prod(shape.size_out), math.prod(shape.kernel)
    return [
        _log2(pixels),
        _log2(shape.batch),
        _log2(into),
        _log2(out),
        _log2(taps),
        math.log2(math.prod(shape.stride)),
        blocked,
        float(into < BLOCK),
        blocked * _empty(into, BLOCK),
        blocked * _empty(out, BLOCK),
        blocked * _log2(_padded(out, 4 * BLOCK) / max(_padded(out, BLOCK), 1)),
        blocked * _empty(shape.size_out[-1], 14),
        (1 - blocked) * _empty(pixels, BLOCK),
        (1 - blocked) * _empty(out, 12),
        _empty(shape.size_out[-1], 6),
        _log2(pixels * shape.batch * into * out // shape.groups * taps),
    ]


def in_blocks(shape: ConvShape) -> bool:
    """Whether ONNX Runtime lays the channels out in blocks: those that come in fours, and few (found by measuring)."""
    return shape.channels_in % 4 == 0 or shape.channels_in < BLOCK


def _empty(size: int, block: int) -> float:
    return _log2(_padded(size, block) / size) if size else 0.0


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _log2(size: float) -> float:
    return math.log2(max(size, 1e-9))
