"""Calibrates the profile of this machine: measures operations, fits the formula's figures, and keeps what it leaves."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.fit import fit
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.residual import Residuals, family, features, fitted
from lrcompile.errors import DeviceError
from lrcompile.graph.op import ConvShape, OpDesc, conv_op, gemm_op

Progress = Callable[[str, int, int], None]
MOST_FLOPS, MOST_BYTES = 4e9, 2e8
NOISY = 0.1  # relative error above which a measurement does not count
MOST_NOISY = 1 / 3  # share of such measurements above which the machine is called too busy
LEAST, MOST = 40, 2000  # measurements without which nothing is fitted, and that are enough
EXPLORED = 0.6  # share of the time for operations at random; the rest goes where they are known least, in rounds
ROUNDS, POOL = 4, 1500
WEIGHTS = {"gemm": 4, "bmm": 1, "pointwise": 4, "conv": 4, "depthwise": 2, "memory": 1}
FITTED = (  # in turn: families of operations, and the figures that are fitted to them with their places in a profile
    (("memory",), {"launch_s.other": "launch.other", "bandwidth_bytes_s": "hardware.bandwidth_sustained"}),
    (
        ("gemm", "bmm"),
        {
            "launch_s.gemm": "launch.gemm",
            "peak_flops.fp32": "dtype.fp32.peak",
            "engines.avx2.gemm.tile_exponent": "engine.avx2.gemm.tile_exponent",
            "l2_bandwidth_bytes_s": "hardware.l2_bandwidth",
        },
    ),
    (
        ("pointwise", "conv"),
        {
            "launch_s.conv": "launch.conv",
            "engines.avx2.conv.efficiency": "engine.avx2.conv.efficiency",
            "engines.avx2.conv.tile_exponent": "engine.avx2.conv.tile_exponent",
        },
    ),
    (("depthwise",), {"engines.avx2.depthwise_efficiency": "engine.avx2.depthwise_efficiency"}),
)
FEWEST = 5  # measurements of some families without which their figures stay as they are
SIGMAS = {"gemm": ("gemm", "bmm"), "conv": ("pointwise", "conv", "depthwise"), "other": ("memory",)}


@dataclass(frozen=True)
class Measurement:
    """An operation and what it takes here."""

    op: OpDesc
    cost: Cost

    @property
    def is_noisy(self) -> bool:
        """Whether its error is too large to learn from."""
        return self.cost.sigma_s > NOISY * self.cost.latency_s


@dataclass(frozen=True)
class Calibration:
    """A device that was fitted, with residuals; what was measured; errors on operations left out, by family.

    `places` are those of the fitted figures in a profile.
    """

    device: Device
    places: tuple[str, ...]
    residuals: dict[str, Residuals]
    measurements: tuple[Measurement, ...]
    noisy: int
    held_out: dict[str, np.ndarray] = field(repr=False)

    def summary(self) -> list[dict[str, Any]]:
        """By family: count, mean error on operations left out, share within 10 %, error of the formula alone."""
        rows = []
        for name, errors in self.held_out.items():
            formula = _log_errors(self.device, [m for m in self.measurements if family(m.op) == name])
            rows.append(
                {
                    "family": name,
                    "count": len(errors),
                    "error": float(np.abs(np.expm1(-errors)).mean()),
                    "within_10": float((np.abs(np.expm1(-errors)) <= 0.1).mean()),
                    "formula": float(np.abs(np.expm1(-formula)).mean()),
                }
            )
        return rows

    def sigma(self, name: str) -> float:
        """The raw standard deviation of a family's errors, in a logarithm."""
        return float(np.sqrt(np.mean(self.held_out[name] ** 2)))


def calibrate_here(name: str, seconds: float, seed: int, progress: Progress) -> tuple[Calibration, str]:
    """(the calibration of this machine's CPU with ONNX Runtime, the text of its profile).

    Raises:
        DeviceError: see `calibrate`.
    """
    import onnxruntime

    from lrcompile.devices.measure import LocalCostModel, cpu_name, local_device

    found = calibrate(local_device(), LocalCostModel().cost, seconds, seed=seed, progress=progress)
    runtime = f"{cpu_name()}, ONNX Runtime {onnxruntime.__version__}, {found.device.units} threads"
    source = f"measured here ({date.today().isoformat()}, {runtime}, {len(found.measurements)} operations)"
    device = calibrated(found, name, runtime, source)
    return found, profile_text(device, f"Made by lrcompile calibrate --minutes {seconds / 60:g} --seed {seed}.")


def operations(seed: int) -> Iterator[OpDesc]:
    """Random operations without end, all families in turn: what networks have, and ranks around the steps."""
    rng = np.random.default_rng(seed)
    names = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
    while True:
        for name in rng.permutation(names):
            op = _drawn(rng, str(name))
            if op.flops <= MOST_FLOPS and op.weight_bytes + op.activation_bytes <= MOST_BYTES:
                yield op


def _size(rng: np.random.Generator, least: int, most: int) -> int:
    """Of a log-uniform distribution; most of them multiples of 8, or one beside them."""
    size = round(math.exp(rng.uniform(math.log(least), math.log(most))))
    if size > 16 and rng.random() < 0.75:
        size = max(8, round(size / 8) * 8 + int(rng.choice([0, 0, 0, 1, -1])))
    return max(least, size)


def _drawn(rng: np.random.Generator, name: str) -> OpDesc:
    if name in ("gemm", "bmm"):
        m, n, k = _size(rng, 1, 4096), _size(rng, 4, 4096), _size(rng, 4, 4096)
        batch = _size(rng, 2, 96) if name == "bmm" else 1
        return gemm_op(m, n, k, "fp32", batch=batch, weight=name == "gemm")
    if name == "memory":
        count = _size(rng, 1 << 8, 1 << 24)
        return OpDesc("elementwise", "fp32", count, 0, 8.0 * count)
    taps = {"pointwise": 1, "conv": int(rng.choice([3, 3, 3, 5, 7])), "depthwise": int(rng.choice([3, 3, 5]))}[name]
    into, out = _size(rng, 3, 1024), _size(rng, 4, 1024)
    if name == "depthwise":
        into = out = max(8, out // 8 * 8)
    stride = int(rng.choice([1, 1, 1, 2]))
    size, batch = _size(rng, 4, 128), int(rng.choice([1, 1, 2, 4, 8]))
    pad = taps // 2
    after = (size + 2 * pad - taps) // stride + 1
    return conv_op(
        ConvShape(
            batch, into, out, (size, size), (after, after), (taps, taps), (stride, stride), ((pad, pad),) * 2, (1, 1),
            into if name == "depthwise" else 1,
        ),
        "fp32",
    )  # fmt: skip


def calibrate(
    device: Device,
    measure: Callable[[OpDesc], Cost],
    seconds: float,
    *,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Measures operations until the time is spent, and fits the device to them.

    The last part goes where predictions of operations left out are worst. What `measure` remembers costs no time, so
    that a calibration goes on where it was stopped.

    Raises:
        DeviceError: there was time for too few measurements, or too many of them were noisy.
    """
    start, found = clock(), list[Measurement]()

    def add(op: OpDesc) -> None:
        found.append(Measurement(op, measure(op)))
        progress("measure", min(round(clock() - start), round(seconds)), round(seconds))

    drawn = operations(seed)
    while clock() - start < seconds * EXPLORED and len(found) < MOST * EXPLORED:
        add(next(drawn))
    pool = [next(drawn) for _ in range(POOL)] if len(found) >= LEAST else []
    for i in range(ROUNDS):
        end = seconds * (EXPLORED + (1 - EXPLORED) * (i + 1) / ROUNDS)
        for op in _worst(device, found, pool):
            if clock() - start >= end or len(found) >= MOST:
                break
            pool.remove(op)
            add(op)
    good = [m for m in found if not m.is_noisy]
    noisy = len(found) - len(good)
    if noisy > MOST_NOISY * len(found):
        raise DeviceError(
            f"{noisy} of {len(found)} measurements have an error above {NOISY:.0%}: the machine is too busy to "
            "calibrate; stop other programs and start again: what was measured well is kept"
        )
    if len(good) < LEAST:
        raise DeviceError(
            f"{len(good)} operations were measured in {seconds:.0f} s, at least {LEAST} are needed: give more time"
        )
    progress("fit", 0, 1)
    return fitted_to(device, good, noisy)


def calibrated(found: Calibration, name: str, description: str, source: str) -> Device:
    """The device as a profile of its own: fitted figures, residuals and error bars, with where they come from."""
    device = found.device
    sigma = {
        key: math.sqrt(float(np.mean(np.concatenate(errors) ** 2)))
        for key, families in SIGMAS.items()
        if (errors := [found.held_out[family] for family in families if family in found.held_out])
    }
    sources = dict.fromkeys(found.places, source)
    if device.bandwidth_bytes_s > device.bandwidth_peak_bytes_s:
        device = replace(device, bandwidth_peak_bytes_s=device.bandwidth_bytes_s)
        sources["hardware.bandwidth_peak"] = source
    sources |= {f"sigma.{key}": f"{source}; on operations left out" for key in sigma}
    sources |= {f"residuals.{key}": source for key in found.residuals}
    return replace(
        device,
        name=name,
        description=description,
        sigma_relative={**device.sigma_relative, **sigma},
        residuals=found.residuals,
        provenance={**device.provenance, **sources},
    )


def _worst(device: Device, found: Sequence[Measurement], pool: Sequence[OpDesc]) -> list[OpDesc]:
    """The pool with those first that are known least: what is left of their family's spread, as its errors are."""
    good = [m for m in found if not m.is_noisy]
    if not pool or len(good) < LEAST:
        return []
    now = fitted_to(device, good, 0)

    def doubt(op: OpDesc) -> float:
        name = family(op)
        if name not in now.residuals:
            return math.inf
        residuals = now.residuals[name]
        return now.sigma(name) * residuals.at(features(op))[1] / residuals.spread

    return sorted(pool, key=doubt, reverse=True)


def fitted_to(device: Device, good: Sequence[Measurement], noisy: int) -> Calibration:
    """The figures that fit, the residuals they leave, and the errors of each where it is left out of these."""
    places: list[str] = []
    for families, figures in FITTED:
        mine = [m for m in good if family(m.op) in families]
        if len(mine) >= FEWEST:
            device = fit(device, tuple(figures), lambda candidate, mine=mine: -_log_errors(candidate, mine))  # type: ignore[misc]
            places += figures.values()
    residuals = _residuals(device, good)
    held_out = {name: found.left_out() for name, found in residuals.items()}
    return Calibration(device, tuple(places), residuals, tuple(good), noisy, held_out)


def _log_errors(device: Device, measurements: Sequence[Measurement]) -> np.ndarray:
    """Logarithms of measured over predicted latency."""
    model = AnalyticCostModel(device)
    return np.array([math.log(m.cost.latency_s / model.cost(m.op).latency_s) for m in measurements])


def _residuals(device: Device, good: Sequence[Measurement]) -> dict[str, Residuals]:
    found: dict[str, list[Measurement]] = defaultdict(list)
    for m in good:
        name = family(m.op)
        if name is not None:
            found[name].append(m)
    result = {}
    for name, mine in found.items():
        noise = max(0.02, float(np.median([m.cost.sigma_s / m.cost.latency_s for m in mine])))
        result[name] = fitted(np.array([features(m.op) for m in mine]), _log_errors(device, mine), noise)
    return result
