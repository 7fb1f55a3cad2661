"""Fits figures of a device profile to measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from lrcompile.devices.device import Device

PRIOR = 0.1  # how strongly a figure is held to that of the profile, in a logarithm's standard deviations
SHARES = ("efficiency", "overlap", "depthwise_efficiency", "misaligned", "few_channels")  # figures that are at most 1
EXPONENTS = ("norm_exponent",)  # and at least 1
_ALONE = 0.1  # quantile of what a part would cost if it were all, where searches for prices start
_BELOW, _ABOVE = 25.0, 8.0  # how far from there a price may be, in logarithms: almost nothing, and much more


def fit(
    device: Device, names: Sequence[str], differences: Callable[[Device], np.ndarray], prior: float = PRIOR
) -> Device:
    """The device with figures that fit best: robustly, and near those that it has.

    `names` are paths of positive figures, such as `engines.cuda_core.gemm.efficiency`; `differences` gives the
    logarithms of predicted over measured latency for a device, weighted.
    """
    start = np.array([figure(device, name) for name in names])
    last = [name.rpartition(".")[2] for name in names]
    least = [1 - math.log(value) if name in EXPONENTS else -np.inf for name, value in zip(last, start, strict=True)]
    most = np.array([1.0 if name in SHARES else np.inf for name in last])

    def changed(x: np.ndarray) -> Device:
        return with_figures(device, dict(zip(names, map(float, start * np.exp(x - 1)), strict=True)))

    found = least_squares(
        lambda x: np.concatenate([differences(changed(x)), prior * (x - 1)]), np.ones(len(names)),
        bounds=(least, 1 + np.log(most / start)), loss="soft_l1", f_scale=0.1, diff_step=1e-3, max_nfev=40,
    )  # fmt: skip
    return changed(found.x)


def prices(amounts: np.ndarray, latencies_s: np.ndarray) -> np.ndarray:
    """Prices in s, [parts], by which the latency of some work is the sum of its parts; NaN of parts that none has.

    They are at least 0, and fit best: the least squares of logarithms, robustly. `amounts` are [measurements × parts].
    """
    seen = np.asarray((amounts > 0).any(axis=0))
    largest = np.where(seen, amounts.max(0), 1.0)
    shares, logs = (amounts / largest)[:, seen], np.log(latencies_s)
    least = np.array([np.quantile(logs[part > 0] - np.log(part[part > 0]), _ALONE) for part in shares.T])
    fits = [
        least_squares(
            lambda x: np.log(shares @ np.exp(x)) - logs, least + start, bounds=(least - _BELOW, least + _ABOVE),
            loss="soft_l1", f_scale=0.3, max_nfev=200,
        )
        for start in (0.0, -2.0)
    ]  # fmt: skip
    found = np.full(len(seen), np.nan)
    found[seen] = np.exp(min(fits, key=lambda fit: float(fit.cost)).x) / largest[seen]
    return found


def figure(holder: Any, name: str) -> float:
    """A device's figure by its path; 0 of a type that it computes as another."""
    for key in name.split("."):
        holder = holder.get(key, 0.0) if isinstance(holder, Mapping) else getattr(holder, key)
    return float(holder)


def with_figures(device: Device, figures: Mapping[str, float]) -> Device:
    """The device with other figures, by their paths."""
    for name, value in figures.items():
        device = _changed(device, name.split("."), value)
    return device


def _changed(holder: Any, path: Sequence[str], value: float) -> Any:
    if not path:
        return value
    key, *rest = path
    if isinstance(holder, Mapping):
        return {**holder, key: _changed(holder[key], rest, value)}
    return replace(holder, **{key: _changed(getattr(holder, key), rest, value)})
