"""Calibrates the profile of this machine: measures operations, fits the formula's figures, and keeps what it leaves."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import islice
from typing import Any

import numpy as np

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import KERNEL_FIGURES, UNFOLD_FIGURES, Device, Pace
from lrcompile.devices.features import amounts, family, features, located
from lrcompile.devices.fit import figure, fit, prices, with_figures
from lrcompile.devices.networks import (
    FEWEST_NETWORKS,
    NETWORK_VISITS,
    Network,
    NetworkVisits,
    networks,
    taken_besides,
)
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.residual import ENOUGH, Residuals, fitted
from lrcompile.devices.runtimes import runtime_here
from lrcompile.devices.sampling import operations
from lrcompile.devices.visits import ROBUST, TOLD, Measurement, Visits
from lrcompile.errors import DeviceError
from lrcompile.graph.op import FUNCTIONS, OpDesc

Progress = Callable[[str, int, int], None]
CHUNK = 240  # operations that are visited in a row before some of them are visited again
LOOKED = 0.25  # share of the time after which it is looked whether the machine is too busy, and again at the end
TRUSTED = 0.8  # share of operations within 10 % below which a calibration of a CPU says that it is poor
LEAST, MOST = 40, 16000  # measurements without which nothing is fitted, and that are enough
EXPLORED = 0.5  # share of the time for operations at random; the next goes where they are known least
ROUNDS = (0.63, 0.76, 0.88, 0.94)  # of which so many rounds end at these shares, the last one short: it looks again
POOL = 4000  # operations of which a round chooses
NETWORKS_LAST = 0.02  # share of the time for networks before each round; what is left after the last is theirs
SURPRISES = 2.0  # error where it is left out, in those of its family, from which an operation is visited again
ENOUGH_FOR_A_PRICE = 2  # measurements of a family for each part of its work
FIT_TO = 600  # operations of a family that the formula's figures are fitted to
ROUGHLY = 250  # and that say how far residuals reach, while it is measured
Fits = tuple[tuple[tuple[str, ...], dict[str, str]], ...]


def _kernels(engine: str, name: str, *figures: str) -> dict[str, str]:
    """Figures of an engine's kernels, with their places in a profile."""
    return {f"engines.{engine}.{name}.{KERNEL_FIGURES[key][0]}": f"engine.{engine}.{name}.{key}" for key in figures}


_MENU = ("efficiency", "tile_exponent", "prologue", "overlap")
_FUSED = ("efficiency", "overlap", "setup", "bandwidth")
FITTED: dict[str, Fits] = {  # in turn: families of operations, and the figures that are fitted to them
    "cpu": (
        (("copy",), {"launch_s.other": "launch.other", "bandwidth_bytes_s": "hardware.bandwidth_sustained"}),
        (
            ("gemm", "bmm"),
            {
                "launch_s.gemm": "launch.gemm",
                "peak_flops.fp32": "dtype.fp32.peak",
                **_kernels("avx2", "gemm", "tile_exponent"),
                "l2_bandwidth_bytes_s": "hardware.l2_bandwidth",
            },
        ),
        (
            ("pointwise", "conv"),
            {"launch_s.conv": "launch.conv", **_kernels("avx2", "conv", "efficiency", "tile_exponent")},
        ),
        (("depthwise",), {"engines.avx2.depthwise_efficiency": "engine.avx2.depthwise_efficiency"}),
        (
            ("volume", "grouped"),
            {f"engines.avx2.unfold.{key}_s": f"engine.avx2.unfold.{key}" for key in UNFOLD_FIGURES},
        ),
        (("recurrent",), {"recurrent_step_s": "launch.recurrent_step"}),
    ),
    "gpu": (
        (
            ("copy-half", "binary-half", "gelu-half", "copy", "binary", "gelu"),
            {"launch_s.other": "launch.other", "bandwidth_bytes_s": "hardware.bandwidth_sustained"},
        ),
        (
            ("gemm-half",),
            {
                "launch_s.gemm": "launch.gemm",
                "norm_exponent": "hardware.norm_exponent",
                "l2_bandwidth_bytes_s": "hardware.l2_bandwidth",
                **_kernels("tensor_core", "gemm", *_MENU, "misaligned", "split_setup"),
            },
        ),
        (
            ("pointwise-half", "conv-half"),
            {"launch_s.conv": "launch.conv", **_kernels("tensor_core", "conv", *_MENU, "few_channels", "misaligned")},
        ),
        (
            ("depthwise-half",),
            {"engines.tensor_core.depthwise_efficiency": "engine.tensor_core.depthwise_efficiency"},
        ),
        (("attention-half",), _kernels("tensor_core", "attention", *_FUSED)),
        (("gemm-tf32",), {"peak_flops.tf32": "dtype.tf32.peak"}),
        (("gemm",), _kernels("cuda_core", "gemm", *_MENU, "setup", "split_setup")),
        (("pointwise", "conv"), _kernels("cuda_core", "conv", *_MENU, "setup")),
        (("attention",), _kernels("cuda_core", "attention", *_FUSED)),
        (("depthwise",), {"engines.cuda_core.depthwise_efficiency": "engine.cuda_core.depthwise_efficiency"}),
    ),
}
STARTS = {  # of kernels on a GPU, where a profile has none
    "gemm": {"misaligned": 0.5, "split_setup": 2e-6},
    "conv": {"misaligned": 0.5, "split_setup": 2e-6},
    "attention": {"efficiency": 0.3, "overlap": 0.7, "setup": 6e-6, "bandwidth": 0.3},
}
FEWEST = 5  # measurements of some families without which their figures stay as they are
SIGMAS: dict[str, tuple[str, ...]] = {  # families in every type
    "gemm": ("gemm", "bmm", "attention"),
    "conv": ("pointwise", "conv", "depthwise", "grouped", "volume"),
    "recurrent": ("recurrent",),
    "other": FUNCTIONS,
}


@dataclass(frozen=True)
class Calibration:
    """A device that was fitted, with residuals; what was measured; errors on operations left out, by family.

    `places` are those of the fitted figures in a profile, `network` is what networks take besides, as so many
    `networks` say, `pace` that at which latencies are given, where it was measured.
    """

    device: Device
    places: tuple[str, ...]
    residuals: dict[str, Residuals]
    measurements: tuple[Measurement, ...]
    noisy: int
    held_out: dict[str, np.ndarray] = field(repr=False)
    network: dict[str, float] = field(default_factory=dict)
    networks: int = 0
    pace: Pace | None = None

    def summary(self) -> list[dict[str, Any]]:
        """By family: count, mean error on operations left out, share within 10 %, deviations, error of the formula.

        Deviations are those of the errors' logarithms: the raw one, and a robust one that does not mind a few outliers.
        """
        rows, mine = [], _by_family(self.measurements)
        for name, errors in self.held_out.items():
            formula = _log_errors(self.device, mine[name])
            rows.append(
                {
                    "family": name,
                    "count": len(errors),
                    "error": float(np.abs(np.expm1(-errors)).mean()),
                    "within_10": _within_10(errors),
                    "sigma": self.sigma(name),
                    "sigma_robust": ROBUST * float(np.median(np.abs(errors))),
                    "formula": float(np.abs(np.expm1(-formula)).mean()),
                }
            )
        return rows

    @property
    def within_10(self) -> float:
        """The share of all operations that are predicted within 10 % from all others."""
        return _within_10(np.concatenate(list(self.held_out.values())))

    @property
    def doubt(self) -> str | None:
        """Why a profile of a CPU should not be trusted, if that is so."""
        if self.device.kind != "cpu" or self.within_10 >= TRUSTED:
            return None
        return (
            f"only {self.within_10:.0%} of the operations are predicted within 10 % from the others, where a quiet "
            "machine came to 87 to 91 % in 15 minutes: stop other programs, or give it more time, and calibrate again"
        )

    def predicted_without(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By family: latencies measured, and predicted from all other operations, in s."""
        found = {}
        for name, mine in _by_family(self.measurements).items():
            latencies = np.array([m.cost.latency_s for m in mine])
            found[name] = (latencies, latencies * np.exp(-self.held_out[name]))
        return found

    def expected(self) -> dict[OpDesc, float]:
        """What each operation takes in s as predicted from all others."""
        predicted, mine = self.predicted_without(), _by_family(self.measurements)
        return {
            m.op: float(latency_s)
            for name, (_, latencies) in predicted.items()
            for m, latency_s in zip(mine[name], latencies, strict=True)
        }

    def sigma(self, name: str) -> float:
        """The raw standard deviation of a family's errors, in a logarithm."""
        return float(np.sqrt(np.mean(self.held_out[name] ** 2)))


def _within_10(errors: np.ndarray) -> float:
    """The share of errors, as logarithms of measured over predicted, that are within 10 % of what was measured."""
    return float((np.abs(np.expm1(-errors)) <= 0.1).mean())


def calibrate_here(
    name: str, seconds: float, seed: int, progress: Progress, runtime: str = "onnxruntime"
) -> tuple[Calibration, str]:
    """(the calibration of a runtime on this machine, the text of its profile).

    Raises:
        InputError: there is no such runtime here.
        DeviceError: see `calibrate`.
    """
    here = runtime_here(runtime)
    with closing(here):
        found = calibrate(
            with_starts(here.device), here.measure, seconds, forget=here.forget, drawn=here.drawn(seed),
            network=here.elsewhere.network if here.elsewhere else None, seed=seed, progress=progress,
        )  # fmt: skip
    # a calibration that goes on where it was stopped holds older measurements too, so it says by when
    source = f"measured here (by {date.today().isoformat()}, {here.described}, {len(found.measurements)} operations)"
    made = f"Made by lrcompile calibrate --runtime {runtime} --minutes {seconds / 60:g} --seed {seed}."
    return found, profile_text(calibrated(found, name, here.described, source), made)


def calibrate(
    device: Device,
    measure: Callable[[OpDesc, int], Cost],
    seconds: float,
    *,
    forget: Callable[[OpDesc], None] = lambda op: None,
    drawn: Iterator[OpDesc] | None = None,
    network: Callable[[Network], Cost] | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Measures operations until the time is spent, and fits the device to them.

    `measure` takes an operation and the number of the visit: each is measured once, and again with others between
    where it surprises, so that what disturbs the machine for a while does not decide; those that fail are left out.
    They come from `drawn`, the last part of them from where predictions of operations left out are worst. `network`
    measures whole networks. What is remembered costs no time, so that a calibration goes on where it was stopped; what
    is too noisy is handed to `forget`, so that another calibration measures it again.

    Raises:
        DeviceError: there was time for too few measurements, too many of them were noisy, or all failed.
    """
    start = clock()

    def report() -> None:
        progress("measure", min(round(clock() - start), round(seconds)), round(seconds))

    def measured(op: OpDesc, visit: int) -> Cost:
        report()
        return measure(op, visit)

    def whole(one: Network) -> Cost:
        assert network is not None
        report()
        return network(one)

    def until(share: float) -> Callable[[], bool]:
        return lambda: clock() - start < seconds * share

    visits = Visits(measured, forget)
    wholes = NetworkVisits(networks(seed) if network else (), whole)
    drawn, exploring, looked = drawn or operations(seed), until(EXPLORED), False
    while exploring() and len(visits.known) < MOST * EXPLORED:
        visits.add(islice(drawn, CHUNK if visits.known else TOLD), exploring)
        if not looked and not until(LOOKED)():
            visits.good()
            looked = True
    if visits.failure and not visits.known:
        raise visits.failure
    begun = EXPLORED
    for share in ROUNDS:
        wholes.again(visits.pace, until(begun + NETWORKS_LAST))
        chosen = _look_again(device, visits, drawn, until(share))
        while until(share)() and len(visits.known) < MOST * share and (ops := list(islice(chosen, CHUNK))):
            visits.add(ops, until(share))
        begun = share
    pace = visits.pace
    for _ in range(NETWORK_VISITS):
        wholes.again(pace, until(1))
    good = visits.good()
    if len(good) < LEAST:
        raise DeviceError(
            f"{len(good)} operations were measured in {seconds:.0f} s, at least {LEAST} are needed: give more time"
        )
    progress("fit", 0, 1)
    visits.follow(fitted_to(device, good, 0, ROUGHLY).expected())
    good = visits.good()
    found_here = replace(fitted_to(device, good, len(visits.known) - len(good)), pace=pace)
    latencies = wholes.measured(pace)
    if len(latencies) < FEWEST_NETWORKS:
        return found_here
    fitted_device = replace(found_here.device, residuals=found_here.residuals)
    return replace(found_here, network=taken_besides(fitted_device, latencies), networks=len(latencies))


def _look_again(
    device: Device, visits: Visits, drawn: Iterator[OpDesc], in_time: Callable[[], bool]
) -> Iterator[OpDesc]:
    """Visits again what surprises, or says too little as it is; the next ones drawn, in the order of `_by_doubt`."""
    good = [m for m in visits.measurements() if not m.is_noisy]
    if len(good) < LEAST or not in_time():
        return iter(())
    now = fitted_to(device, good, 0, ROUGHLY)
    expected, counted = now.expected(), {m.op for m in good}
    visits.follow(expected)
    visits.again([*(op for op in visits.known if op not in counted), *_surprising(visits, expected)], in_time)
    return iter(_by_doubt(now, list(islice(drawn, POOL))))


def _surprising(visits: Visits, expected: Mapping[OpDesc, float]) -> list[OpDesc]:
    """Operations that took another time than all others say, those first that are the furthest from it."""
    found: dict[OpDesc, float] = {}
    for mine in _by_family([m for m in visits.measurements() if m.op in expected]).values():
        errors = {m.op: math.log(m.cost.latency_s / expected[m.op]) for m in mine}
        middle = statistics.median(errors.values())
        off = {op: abs(error - middle) for op, error in errors.items()}
        usual = ROBUST * statistics.median(off.values()) + 1e-12
        found |= {op: error / usual for op, error in off.items() if error > SURPRISES * usual}
    return sorted(found, key=lambda op: -found[op])


def calibrated(found: Calibration, name: str, description: str, source: str) -> Device:
    """The device as a profile of its own: fitted figures, residuals and error bars, with where they come from.

    Bars of `[sigma]` are those of the formula, since it stands alone wherever they count: for what has no residuals.
    At most they are as long as a latency: there is none below 0.
    """
    device = found.device
    sigma = {
        key: min(1.0, math.sqrt(float(np.mean(_log_errors(device, mine) ** 2))))
        for key, families in SIGMAS.items()
        if len(mine := [m for m in found.measurements if (family(m.op) or "").partition("-")[0] in families])
    }
    sources = dict.fromkeys(found.places, source)
    if device.bandwidth_bytes_s > device.bandwidth_peak_bytes_s:
        device = replace(device, bandwidth_peak_bytes_s=device.bandwidth_bytes_s)
        sources["hardware.bandwidth_peak"] = source
    sources |= {f"sigma.{key}": f"{source}; what the formula leaves" for key in sigma}
    sources |= {f"residuals.{key}": source for key in found.residuals}
    if found.pace:
        sources |= dict.fromkeys(("pace.product", "pace.follows", "pace.handed"), source)
    if found.network:
        sources |= {"network.run": source, "network.slower": f"{source}; on {found.networks} networks"}
    return replace(
        device,
        name=name,
        description=description,
        sigma_relative={**device.sigma_relative, **sigma},
        residuals=found.residuals,
        network=found.network,
        pace=found.pace,
        provenance={**device.provenance, **sources},
    )


def _by_doubt(now: Calibration, pool: Sequence[OpDesc]) -> list[OpDesc]:
    """The pool by lot, in which an operation has the more tickets the less is known of it.

    That is what is left of its family's spread, as its errors are. By lot, and not the worst first, so that all
    families become better as often as they are drawn (Efraimidis and Spirakis, 2006).
    """

    def doubt(op: OpDesc) -> float:
        name = family(op)
        if name not in now.residuals:
            return math.inf
        residuals = now.residuals[name]
        point = located(op, now.device, residuals)
        if point is None:
            return math.inf
        return now.sigma(name) * residuals.at(point)[1] / residuals.spread

    lots = np.random.default_rng(len(now.measurements)).exponential(size=len(pool))
    return [op for _, op in sorted(zip(lots, pool, strict=True), key=lambda pair: float(pair[0] / doubt(pair[1])))]


def fitted_to(device: Device, good: Sequence[Measurement], noisy: int, enough: int = ENOUGH) -> Calibration:
    """The figures that fit, the residuals they leave, and the errors of each where it is left out of these.

    `enough` operations of a family say how far its residuals reach.
    """
    places: list[str] = []
    for families, figures in FITTED[device.kind]:
        mine = _some([m for m in good if family(m.op) in families], FIT_TO * len(families))
        found = {name: place for name, place in figures.items() if figure(device, name) > 0}
        if len(mine) >= FEWEST:
            device = fit(device, tuple(found), lambda candidate, mine=mine: -_log_errors(candidate, mine))  # type: ignore[misc]
            places += found.values()
    residuals = _residuals(device, good, enough)
    held_out = {name: found.left_out() for name, found in residuals.items()}
    return Calibration(device, tuple(places), residuals, tuple(good), noisy, held_out)


def with_starts(device: Device) -> Device:
    """A GPU's profile with figures where it has none that a fit can start from: others stay as they are."""
    if device.kind != "gpu":
        return device
    given, sources = {}, {}
    engines = {
        name: engine if engine.attention else replace(engine, attention=replace(engine.gemm, setup_s=0.0))
        for name, engine in device.engines.items()
    }
    for name in engines:
        for kind, figures in STARTS.items():
            for key, value in figures.items():
                place, path = f"engine.{name}.{kind}.{key}", f"engines.{name}.{kind}.{KERNEL_FIGURES[key][0]}"
                if place not in device.provenance and not (key == "misaligned" and name != "tensor_core"):
                    given[path], sources[place] = value, "assumed (where a fit starts)"
    started = replace(device, engines=engines, provenance={**device.provenance, **sources})
    return with_figures(started, given)


def _some(measurements: Sequence[Measurement], most: int) -> list[Measurement]:
    chosen = np.random.default_rng(0).permutation(len(measurements))[:most]
    return [measurements[i] for i in sorted(chosen)]


def _log_errors(device: Device, measurements: Sequence[Measurement]) -> np.ndarray:
    """Logarithms of measured over predicted latency."""
    model = AnalyticCostModel(device)
    return np.array([math.log(m.cost.latency_s / model.cost(m.op).latency_s) for m in measurements])


def _by_family(measurements: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The measurements of each family, in their order."""
    found: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        name = family(m.op)
        if name is not None:
            found[name].append(m)
    return found


def _residuals(device: Device, good: Sequence[Measurement], enough: int) -> dict[str, Residuals]:
    return {name: _residuals_of(device, mine, enough) for name, mine in _by_family(good).items()}


def _residuals_of(device: Device, mine: Sequence[Measurement], enough: int) -> Residuals:
    """What is left of a family, by the formula or by the work that it is made of, whichever is nearer."""
    values, work = _log_errors(device, mine), None
    parts = np.array([amounts(m.op, device) for m in mine])
    if len(mine) >= ENOUGH_FOR_A_PRICE * parts.shape[1] > 0:
        latencies = np.array([m.cost.latency_s for m in mine])
        found = prices(parts, latencies)
        left = np.log(latencies / (parts @ np.nan_to_num(found)))
        if left @ left < values @ values:
            values, work = left, found
    return fitted(np.array([features(m.op, device, work) for m in mine]), values, work, enough)
