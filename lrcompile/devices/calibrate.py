"""Calibrates the profile of this machine: measures operations, fits the formula's figures, and keeps what it leaves."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch import fx

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import KERNEL_FIGURES, UNFOLD_FIGURES, Device, Pace
from lrcompile.devices.features import amounts, family, features, located
from lrcompile.devices.fit import figure, fit, prices, with_figures
from lrcompile.devices.networks import FEWEST_NETWORKS, Measured, measured_networks, taken_besides
from lrcompile.devices.pace import at, in_step, pace_of
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.residual import Residuals, fitted
from lrcompile.devices.runtimes import VISITS, runtime_here
from lrcompile.devices.sampling import operations
from lrcompile.errors import DeviceError
from lrcompile.graph.op import FUNCTIONS, OpDesc

Progress = Callable[[str, int, int], None]
FIRST, CHUNK = 60, 240  # operations between two visits of one: at first, and once it is known how long they take
REMEMBERED_S = 1e-3  # what an operation's visits take at least, where they are remembered
NOISY = 0.1  # relative error above which a measurement does not count
MOST_NOISY = 1 / 3  # share of such measurements above which the machine is called too busy
LOOKED = 0.25  # share of the time after which that is looked at, and again at the end
TRUSTED = 0.8  # share of operations within 10 % below which a calibration of a CPU says that it is poor
LEAST, MOST = 40, 16000  # measurements without which nothing is fitted, and that are enough
EXPLORED = 0.6  # share of the time for operations at random; the next goes where they are known least, in rounds
ENDED = 0.94  # share of the time after which networks are measured
ROUNDS, POOL = 3, 6000
AGREE = 0.03  # difference of two visits up to which there is no third
ENOUGH_FOR_A_PRICE = 2  # measurements of a family for each part of its work
FIT_TO = 600  # operations of a family that the formula's figures are fitted to
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
ROBUST = 1.4826  # of the median of absolute errors, for a normal distribution to have its standard deviation
FEWEST = 5  # measurements of some families without which their figures stay as they are
SIGMAS: dict[str, tuple[str, ...]] = {  # families in every type
    "gemm": ("gemm", "bmm", "attention"),
    "conv": ("pointwise", "conv", "depthwise", "grouped", "volume"),
    "recurrent": ("recurrent",),
    "other": FUNCTIONS,
}


@dataclass(frozen=True)
class Measurement:
    """An operation and what it takes here."""

    op: OpDesc
    cost: Cost

    @classmethod
    def of(cls, op: OpDesc, costs: Sequence[Cost]) -> Measurement:
        """The median of some visits, and how far they are apart, or their own deviation if that is larger.

        Two of three that agree are believed: the robust deviation counts.
        """
        latencies = [cost.latency_s for cost in costs]
        middle = statistics.median(latencies)
        spread = statistics.stdev(latencies) if len(costs) == 2 else 0.0
        if len(costs) > 2:
            spread = ROBUST * statistics.median(abs(latency_s - middle) for latency_s in latencies)
        return cls(op, replace(costs[0], latency_s=middle, sigma_s=max(spread, min(cost.sigma_s for cost in costs))))

    @property
    def is_noisy(self) -> bool:
        """Whether it says too little to be fitted to."""
        return self.cost.sigma_s > NOISY * self.cost.latency_s


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
        rows = []
        for name, errors in self.held_out.items():
            formula = _log_errors(self.device, [m for m in self.measurements if family(m.op) == name])
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
            "machine came to 87 % in 15 minutes: stop other programs, or give it more time, and calibrate again"
        )

    def predicted_without(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By family: latencies measured, and predicted from all other operations, in s."""
        found = {}
        for name, errors in self.held_out.items():
            latencies = np.array([m.cost.latency_s for m in self.measurements if family(m.op) == name])
            found[name] = (latencies, latencies * np.exp(-errors))
        return found

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
    found = calibrate(
        with_starts(here.device), here.measure, seconds, forget=here.forget, drawn=here.drawn(seed),
        network=here.network, seed=seed, progress=progress,
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
    network: Callable[[fx.GraphModule, int], Cost] | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Measures operations until the time is spent, and fits the device to them.

    `measure` takes an operation and the number of the visit: each is measured two or three times with others between,
    so that what disturbs the machine for a while does not decide; those that fail are left out. The last part of the
    time goes where predictions of operations left out are worst; they come from `drawn`. `network` measures whole
    graphs at a visit. What is remembered costs no time, so that a calibration goes on where it was stopped; what is
    too noisy is handed to `forget`, so that another calibration measures it again.

    Raises:
        DeviceError: there was time for too few measurements, too many of them were noisy, or all failed.
    """
    start, visited, failed = clock(), list[tuple[OpDesc, list[Cost]]](), list[DeviceError]()

    def add(ops: Sequence[OpDesc], end: float) -> None:
        costs: list[list[Cost]] = [[] for _ in ops]
        pace = pace_of(known for _, known in visited)
        for visit in range(VISITS):
            for op, known in zip(ops, costs, strict=True):
                if clock() - start < end and len(known) == visit and not (visit > 1 and _agree(known, pace)):
                    try:
                        known.append(measure(op, visit))
                    except DeviceError as problem:  # such as too little memory for it
                        failed.append(problem)
                    progress("measure", min(round(clock() - start), round(seconds)), round(seconds))
        visited.extend((op, known) for op, known in zip(ops, costs, strict=True) if len(known) > 1)

    def chunk(end: float) -> int:
        """How many operations to visit in turn: time is left for all visits of them, and for as many again or none.

        Many, so that visits are far apart: a machine that others share can be slower for half a minute.
        """
        taken = clock() - start
        if not visited:
            return FIRST
        fit = (end - taken) / max(taken / len(visited), REMEMBERED_S)
        return max(1, round(fit / max(1, round(fit / CHUNK))))

    drawn = drawn or operations(seed)
    looked = False
    while clock() - start < seconds * EXPLORED and len(visited) < MOST * EXPLORED:
        add(list(islice(drawn, chunk(seconds * EXPLORED))), seconds * EXPLORED)
        if not looked and clock() - start > seconds * LOOKED:
            _quiet(measurements(visited), forget)
            looked = True
    pool = list(islice(drawn, POOL)) if len(visited) >= LEAST else []
    for i in range(ROUNDS):
        share = EXPLORED + (ENDED - EXPLORED) * (i + 1) / ROUNDS
        worst = iter(_worst(device, measurements(visited), pool))
        while clock() - start < seconds * share and len(visited) < MOST * share:
            ops = list(islice(worst, chunk(seconds * share)))
            if not ops:
                break
            taken = set(ops)
            pool = [op for op in pool if op not in taken]
            add(ops, seconds * share)
    pace = pace_of(known for _, known in visited)
    measured = list[Measured]()
    if network and visited:
        measured = measured_networks(
            seed, network, pace, lambda: clock() - start <= seconds, partial(progress, "networks")
        )
    if failed and not visited:
        raise failed[-1]
    found = measurements(visited)
    in_time = {m.op for m in found}
    for op, _ in visited:
        if op not in in_time:
            forget(op)
    good = _quiet(found, forget)
    if len(good) < LEAST:
        raise DeviceError(
            f"{len(good)} operations were measured in {seconds:.0f} s, at least {LEAST} are needed: give more time"
        )
    progress("fit", 0, 1)
    found_here = replace(fitted_to(device, good, len(visited) - len(good)), pace=pace)
    if len(measured) < FEWEST_NETWORKS:
        return found_here
    fitted_device = replace(found_here.device, residuals=found_here.residuals)
    return replace(found_here, network=taken_besides(fitted_device, measured), networks=len(measured))


def measurements(visited: Sequence[tuple[OpDesc, Sequence[Cost]]]) -> list[Measurement]:
    """Operations with what their visits say, all at one pace of the machine; two of them in step at least."""
    pace = pace_of(known for _, known in visited)
    found = ((op, [at(pace, cost) for cost in known if in_step(pace, cost)]) for op, known in visited)
    return [Measurement.of(op, known) for op, known in found if len(known) > 1]


def _quiet(found: Sequence[Measurement], forget: Callable[[OpDesc], None]) -> list[Measurement]:
    """The measurements that count, the others forgotten; DeviceError where too few of them do."""
    good = [m for m in found if not m.is_noisy]
    noisy = len(found) - len(good)
    for m in found:
        if m.is_noisy:
            forget(m.op)
    if noisy > MOST_NOISY * len(found):
        raise DeviceError(
            f"{noisy} of {len(found)} measurements have an error above {NOISY:.0%}: the machine is too busy to "
            "calibrate; stop other programs and start again: what was measured well is kept"
        )
    return good


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


def _worst(device: Device, found: Sequence[Measurement], pool: Sequence[OpDesc]) -> list[OpDesc]:
    """The pool by lot, in which an operation has the more tickets the less is known of it.

    That is what is left of its family's spread, as its errors are. By lot, and not the worst first, so that all
    families become better as often as they are drawn (Efraimidis and Spirakis, 2006).
    """
    good = [m for m in found if not m.is_noisy]
    if not pool or len(good) < LEAST:
        return []
    now = fitted_to(device, good, 0)

    def doubt(op: OpDesc) -> float:
        name = family(op)
        if name not in now.residuals:
            return math.inf
        residuals = now.residuals[name]
        point = located(op, device, residuals)
        if point is None:
            return math.inf
        return now.sigma(name) * residuals.at(point)[1] / residuals.spread

    lots = np.random.default_rng(len(good)).exponential(size=len(pool))
    return [op for _, op in sorted(zip(lots, pool, strict=True), key=lambda pair: float(pair[0] / doubt(pair[1])))]


def fitted_to(device: Device, good: Sequence[Measurement], noisy: int) -> Calibration:
    """The figures that fit, the residuals they leave, and the errors of each where it is left out of these."""
    places: list[str] = []
    for families, figures in FITTED[device.kind]:
        mine = _some([m for m in good if family(m.op) in families], FIT_TO * len(families))
        found = {name: place for name, place in figures.items() if figure(device, name) > 0}
        if len(mine) >= FEWEST:
            device = fit(device, tuple(found), lambda candidate, mine=mine: -_log_errors(candidate, mine))  # type: ignore[misc]
            places += found.values()
    residuals = _residuals(device, good)
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


def _agree(costs: Sequence[Cost], pace: Pace | None) -> bool:
    """Whether two visits of an operation make a third one superfluous."""
    latencies = [at(pace, cost).latency_s for cost in costs if in_step(pace, cost)]
    return len(latencies) > 1 and max(latencies) - min(latencies) < AGREE * min(latencies)


def _some(measurements: Sequence[Measurement], most: int) -> list[Measurement]:
    chosen = np.random.default_rng(0).permutation(len(measurements))[:most]
    return [measurements[i] for i in sorted(chosen)]


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
    return {name: _residuals_of(device, mine) for name, mine in found.items()}


def _residuals_of(device: Device, mine: Sequence[Measurement]) -> Residuals:
    """What is left of a family, by the formula or by the work that it is made of, whichever is nearer."""
    values, work = _log_errors(device, mine), None
    parts = np.array([amounts(m.op, device) for m in mine])
    if len(mine) >= ENOUGH_FOR_A_PRICE * parts.shape[1] > 0:
        latencies = np.array([m.cost.latency_s for m in mine])
        found = prices(parts, latencies)
        left = np.log(latencies / (parts @ np.nan_to_num(found)))
        if left @ left < values @ values:
            values, work = left, found
    return fitted(np.array([features(m.op, device, work) for m in mine]), values, work)
