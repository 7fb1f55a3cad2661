"""What a prediction leaves of measurements, interpolated between shapes: it corrects near them, not far from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

ENOUGH = 600  # values to find reach, spread and noise by: the work grows with the cube of their number
NEAREST = 160  # values that say something about a shape
_REACH, _SPREAD, _NOISE = 16.0, 0.4, 0.03
Distance = Literal["euclidean", "cityblock"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
_STARTS: tuple[tuple[Distance, float, float], ...] = (  # reach and noise where the searches start: some end badly
    ("euclidean", _REACH, _NOISE),
    ("euclidean", 4 * _REACH, 4 * _NOISE),
    ("cityblock", _REACH, _NOISE),
)
_BOUNDS = ((0.05, 1e3), (0.01, 3.0), (0.01, 0.3))  # of each
_HELD = 0.04  # how strongly reaches are held to `_REACH`, in a logarithm's variance


@dataclass(frozen=True, eq=False)
class Residuals:
    """Logarithms of measured over predicted latency at some shapes, and how far one of them reaches.

    A Gaussian process with the kernel spread² · exp(−‖difference/reach‖) and independent noise (Rasmussen and Williams,
    Gaussian Processes for Machine Learning, 2006, eq. 2.23 and 4.18): not smooth, as kernels of libraries are not. The
    length is Euclidean, or the sum over the features ("cityblock"), where each makes jumps of its own. A prediction
    uses the nearest values. `points` are [count × features], `reach` is one a feature. What is corrected is the sum of
    an operation's work at the prices `work` in s; without them it is the formula.
    """

    points: np.ndarray
    values: np.ndarray
    reach: np.ndarray
    spread: float
    noise: float
    distance: Distance = "euclidean"
    work: np.ndarray | None = None

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
        own = self.spread**2 * np.exp(-cdist(scaled, scaled, self.distance))
        if not len(known):
            return np.zeros(len(scaled)), own
        away = cdist(scaled, self._scaled[known], self.distance)
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
        return self.spread**2 * np.exp(-cdist(scaled, scaled, self.distance)) + self.noise**2 * np.eye(len(scaled))


def fitted(points: np.ndarray, values: np.ndarray, work: np.ndarray | None = None, enough: int = ENOUGH) -> Residuals:
    """Distance, reach, spread and noise that explain the values best; found by `enough` where there are more."""
    some = np.random.default_rng(0).permutation(len(points))[:enough]
    width = points.shape[1]
    held = np.log([_REACH] * width + [_SPREAD, _NOISE])
    bounds = np.log([_BOUNDS[0]] * width + list(_BOUNDS[1:]))
    tried = [
        (distance, minimize(
            partial(_surprise, distance=distance, held=held, points=points[some], values=values[some]),
            np.log([reach] * width + [_SPREAD, noise]), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": 40},
        ))
        for distance, reach, noise in _STARTS
    ]  # fmt: skip
    distance, best = min(tried, key=lambda one: float(one[1].fun))
    reach, (spread, noise) = np.exp(best.x[:width]), np.exp(best.x[width:])
    return Residuals(points, values, reach, float(spread), float(noise), distance, work)


def _surprise(
    x: np.ndarray, *, distance: Distance, held: np.ndarray, points: np.ndarray, values: np.ndarray
) -> tuple[float, np.ndarray]:
    """Minus the logarithm of the likelihood and its gradient (ibid., eq. 2.30 and 5.9), by the logarithms of all."""
    width = points.shape[1]
    scaled, spread, noise = points / np.exp(x[:width]), math.exp(x[-2]), math.exp(x[-1])
    distances = cdist(scaled, scaled, distance)
    kernel = spread**2 * np.exp(-distances)
    factor = cho_factor(kernel + noise**2 * np.eye(len(values)), lower=True)
    inverse = cho_solve(factor, np.eye(len(values)))
    weights = inverse @ values
    slope = np.outer(weights, weights) - inverse  # of twice the likelihood, by the covariance
    pulled = slope * kernel
    if distance == "euclidean":
        moved = pulled / np.maximum(distances, 1e-12)
        np.fill_diagonal(moved, 0.0)
        by_reach = (scaled**2 * moved.sum(0)[:, None]).sum(0) - (scaled * (moved @ scaled)).sum(0)
    else:
        by_reach = np.array([(pulled * np.abs(np.subtract.outer(one, one))).sum() for one in scaled.T]) / 2
    gradient = -np.append(by_reach, [pulled.sum(), noise**2 * np.trace(slope)])
    away = np.append(x[:width] - held[:width], [0.0, 0.0])
    surprise = float(values @ weights / 2 + np.log(np.diag(factor[0])).sum() + _HELD * (away @ away) / 2)
    return surprise, gradient + _HELD * away
