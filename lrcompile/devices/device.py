"""What is known of a device: read from a profile in which every figure names where it comes from."""

from __future__ import annotations

import difflib
import importlib.resources
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lrcompile.devices.residual import WIDTHS, Residuals
from lrcompile.errors import DeviceError
from lrcompile.graph.op import DTYPE_BYTES

LAUNCH_CLASSES = ("gemm", "conv", "other")
SIGMA_CLASSES = ("gemm", "conv", "recurrent", "other")
FUSIONS = (
    "conv_normalization", "conv_activation", "conv_addition", "image_addition", "gemm_activation", "gemm_addition",
)  # fmt: skip
FEATURES = ("flash_attention", "grouped_conv", "rank5")
PROVENANCE = ("datasheet", "published measurement", "fitted", "assumed", "measured here")

_KINDS = ("gpu", "npu", "cpu")
_COMPUTE_DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "int8")
# Types that no profile lists: their arithmetic runs on the units of another type.
_COMPUTED_LIKE = {"uint8": "int8", "bool": "int8", "int16": "fp32", "int32": "fp32", "int64": "fp32"}
UNITS: dict[str, dict[str, float]] = {
    "rate": {"TFLOP/s": 1e12, "TOP/s": 1e12, "GFLOP/s": 1e9, "GOP/s": 1e9},
    "bandwidth": {"GB/s": 1e9, "TB/s": 1e12},
    "frequency": {"MHz": 1e6, "GHz": 1e9},
    "time": {"us": 1e-6, "ms": 1e-3},
    "size": {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "count": {"units": 1, "elements": 1},
    "fraction": {"of peak": 1, "of latency": 1},
    "number": {"factor": 1, "exponent": 1},
}
KERNEL_FIGURES: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "efficiency": ("efficiency", "fraction", "of peak", {"most": 1}),
    "tile_exponent": ("tile_exponent", "number", "exponent", {"zero": True}),
    "prologue": ("prologue", "count", "elements", {"zero": True}),
    "overlap": ("overlap", "number", "factor", {"zero": True, "most": 1}),
    "setup": ("setup_s", "time", "us", {"zero": True}),
    "bandwidth": ("bandwidth", "number", "factor", {}),
    "skinny_bandwidth": ("skinny_bandwidth_bytes_s", "bandwidth", "GB/s", {}),
    "few_channels": ("few_channels", "number", "factor", {}),
}
"""Of kernels in a profile: the field that holds a figure, its dimension, the unit it is written in, and its bounds."""
WINOGRAD_RATES = ("transformed", "five", "fused", "filter_bandwidth")


@dataclass(frozen=True)
class Kernels:
    """How an engine's kernels for one kind of operation run.

    The largest tile reaches `efficiency` of a unit's peak rate, others less: by their share of its area to the power
    of `tile_exponent`. A product may be cut along K in as many ways as `split_k` lists. Each wave of tiles takes
    `prologue` steps of K longer than what it computes. `overlap` is the share of an incomplete wave that costs
    nothing: 0 for whole waves, 1 for none at all. `setup_s` comes on top of the launch, and `bandwidth` is the share
    of the sustained bandwidth that is reached. `skinny_bandwidth_bytes_s` limits products with a short side whose
    operands are both stored along K; `few_channels` is the rate of convolutions of less than 8 channels over that of
    others.
    """

    efficiency: float
    tile_exponent: float
    split_k: tuple[int, ...]
    prologue: float = 0.0
    overlap: float = 0.0
    setup_s: float = 0.0
    bandwidth: float = 1.0
    skinny_bandwidth_bytes_s: float = math.inf
    few_channels: float = 1.0


@dataclass(frozen=True)
class Winograd:
    """Rates of Winograd's algorithms over that of an implicit GEMM.

    `transformed` is for the products of F(4×4, 3×3) with transforms as separate kernels, `five` for those of
    F(4×4, 5×5), `fused` for F(2×2, 3×3) in one kernel. The transform of the filter reaches `filter_bandwidth` of the
    sustained bandwidth; the transforms start with `setup_s`.
    """

    transformed: float
    five: float
    fused: float
    filter_bandwidth: float
    setup_s: float


@dataclass(frozen=True)
class Engine:
    """One kind of arithmetic unit with the menu of kernels that libraries have for it.

    A kernel computes m×n outputs at a time, for (m, n) of `tiles`. `conv_data` and `conv_weight` are the gradients of
    a convolution's input and weight. `depthwise_efficiency` is the part of the device's fp32 peak that a depthwise
    kernel reaches, `l2_share` the part of the L2 cache's bandwidth that its kernels do.
    """

    tiles: tuple[tuple[int, int], ...]
    gemm: Kernels
    conv: Kernels
    conv_data: Kernels
    conv_weight: Kernels
    depthwise_efficiency: float
    l2_share: float = 1.0
    winograd: Winograd | None = None


@dataclass(frozen=True)
class Device:
    """A device profile; rates in operations a second, a multiply-add counting as two.

    Mappings over data types hold only types that the hardware computes with; `computed_as` names the substitute
    for the others. `fuses` names what its runtime runs as the last step of the operation before, of `FUSIONS`;
    "image_addition" is that of two maps of 2-D convolutions, where "conv_addition" takes any value.
    `residuals` are what the formula left of measurements, by family of operations, where there are any.
    `provenance` holds the source of each figure under its dotted key in the profile.
    """

    name: str
    description: str
    kind: Literal["gpu", "npu", "cpu"]
    default_dtype: str
    units: int
    clock_hz: float
    bandwidth_peak_bytes_s: float
    bandwidth_bytes_s: float
    l2_bytes: float
    l2_bandwidth_bytes_s: float
    norm_exponent: float
    peak_flops: Mapping[str, float]
    computed_as: Mapping[str, str]
    engine: Mapping[str, str]
    alignment: Mapping[str, int]
    alignment_conv: Mapping[str, int]
    rank_step: Mapping[str, int]
    rank_step_preferred: Mapping[str, int]
    engines: Mapping[str, Engine]
    launch_s: Mapping[str, float]
    recurrent_step_s: float
    sigma_relative: Mapping[str, float]
    lacks: frozenset[str] = frozenset()
    fuses: frozenset[str] = frozenset()
    residuals: Mapping[str, Residuals] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.units, self.clock_hz, self.bandwidth_bytes_s))

    def compute_dtype(self, dtype: str) -> str:
        """The type whose units do the arithmetic of `dtype`; DeviceError for a type that nothing here knows."""
        if dtype in self.peak_flops:
            return dtype
        like = _COMPUTED_LIKE.get(dtype, dtype)
        found = like if like in self.peak_flops else self.computed_as.get(like)
        if found is None:
            raise DeviceError(f"device {self.name}: unknown data type {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
        return found

    def engine_for(self, dtype: str) -> Engine:
        """The units that do the arithmetic of `dtype`; DeviceError for a type that nothing here knows."""
        return self.engines[self.engine[self.compute_dtype(dtype)]]

    def ranks(self, below: int, dtype: str | None = None, count: int = 10) -> tuple[int, ...]:
        """At most `count` ranks worth proposing, ascending, each strictly below `below`.

        They are multiples of the device's rank step, its preferred step where that leaves enough, half of them
        spread evenly and half by equal factors so that small ranks and ranks near the bound are both there. Below
        the first step only CPUs, whose step is soft, get ranks: single integers.
        """
        kind = self.compute_dtype(dtype or self.default_dtype)
        step, preferred = self.rank_step[kind], self.rank_step_preferred[kind]
        if count < 1 or below <= 1:
            return ()
        if below <= step:
            return _spread(range(1, below), range(1, below), count) if self.kind == "cpu" else ()
        return _spread(range(step, below, step), range(preferred, below, preferred), count)


def available_devices() -> tuple[str, ...]:
    """Names of the profiles that come with lrcompile, sorted."""
    return tuple(sorted(path.stem for path in _profile_folder().glob("*.toml")))


def load_device(name_or_path: str) -> Device:
    """The device of a shipped profile's name, or of a profile file (.toml); DeviceError when it cannot be used."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        known = available_devices()
        if name_or_path not in known:
            close = difflib.get_close_matches(name_or_path.lower(), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DeviceError(
                f"unknown device {name_or_path!r}; {hint}available: {', '.join(known)}; or give a path to a .toml file"
            )
        path = _profile_folder() / f"{name_or_path}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceError(f"device profile {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"device profile {path} is not valid TOML: {error}") from error
    return _Reader(path, document).device()


def _profile_folder() -> Path:
    installed = Path(str(importlib.resources.files("lrcompile"))) / "hardware_profiles"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "hardware_profiles"


def _spread(every: range, preferred: range, count: int) -> tuple[int, ...]:
    if len(every) <= count:
        return tuple(every)
    first, last = every[0], preferred[-1] if preferred else every[-1]
    if count == 1:
        return (last,)
    doublings = [first << i for i in range(last.bit_length()) if first << i < (preferred.start if preferred else last)]
    geometric = [first * (last / first) ** (i / (count - 1)) for i in range(0, count, 2)]
    linear = [first + (last - first) * i / (count - 1) for i in range(1, count, 2)]
    chosen = {first, last}
    for target in geometric + linear:
        grid = preferred if preferred and target >= preferred[0] else doublings or every
        if len(chosen) < count:
            chosen.add(min(grid, key=lambda rank: abs(rank - target)))
    for grid in (doublings, preferred, every):
        while len(chosen) < count and (spare := [rank for rank in grid if rank not in chosen]):
            chosen.add(max(spare, key=lambda rank: min(abs(math.log(rank / other)) for other in chosen)))
    return tuple(sorted(chosen))


class _Reader:
    """Turns one parsed profile into a Device and says which key is wrong when it cannot."""

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path = path
        self.document = document
        self.provenance: dict[str, str] = {}

    def device(self) -> Device:
        doc = self.document
        tables = ("hardware", "dtype", "engine", "launch", "sigma")
        self.keys("", doc, ("description", "kind", "default_dtype", *tables), optional=("lacks", "fuses", "residuals"))
        hardware = self.table(doc, "", "hardware")
        keys = ("units", "clock", "bandwidth_peak", "bandwidth_sustained", "l2", "l2_bandwidth", "norm_exponent")
        self.keys("hardware", hardware, keys)
        launch = self.table(doc, "", "launch")
        self.keys("launch", launch, (*LAUNCH_CLASSES, "recurrent_step"))
        sigma = self.table(doc, "", "sigma")
        self.keys("sigma", sigma, SIGMA_CLASSES)
        dtypes = self.table(doc, "", "dtype")
        engines = {name: self.engine(name) for name in self.table(doc, "", "engine")}
        self.keys("dtype", dtypes, _COMPUTE_DTYPES)
        entries = {name: self.table(dtypes, "dtype", name) for name in dtypes}
        native = {name: entry for name, entry in entries.items() if "computed_as" not in entry}
        computed_as = {name: self.substitute(name, native) for name in dtypes if name not in native}
        for name, entry in native.items():
            required = ("peak", "engine", "alignment", "rank_step", "rank_step_preferred")
            self.keys(f"dtype.{name}", entry, required, optional=("alignment_conv",))
            if entry["engine"] not in tuple(engines):
                raise self.error(f"dtype.{name}.engine", f"one of {', '.join(engines)}", repr(entry["engine"]))
        steps = {name: self.whole(entry, f"dtype.{name}", "rank_step") for name, entry in native.items()}
        preferred = {name: self.whole(entry, f"dtype.{name}", "rank_step_preferred") for name, entry in native.items()}
        for name, step in steps.items():
            if preferred[name] % step:
                key = f"dtype.{name}.rank_step_preferred"
                raise self.error(key, f"a multiple of rank_step ({step})", str(preferred[name]))
        alignment = {name: self.whole(entry, f"dtype.{name}", "alignment") for name, entry in native.items()}
        peak_bandwidth = self.figure(hardware, "hardware", "bandwidth_peak", "bandwidth")
        bandwidth = self.figure(hardware, "hardware", "bandwidth_sustained", "bandwidth")
        if bandwidth > peak_bandwidth:
            expected = f"at most bandwidth_peak ({peak_bandwidth:g} B/s)"
            raise self.error("hardware.bandwidth_sustained", expected, f"{bandwidth:g} B/s")
        return Device(
            name=self.path.stem,
            description=self.text("description"),
            kind=self.choice("kind", _KINDS),
            default_dtype=self.choice("default_dtype", tuple(native)),
            units=self.whole(hardware, "hardware", "units"),
            clock_hz=self.figure(hardware, "hardware", "clock", "frequency"),
            bandwidth_peak_bytes_s=peak_bandwidth,
            bandwidth_bytes_s=bandwidth,
            l2_bytes=self.figure(hardware, "hardware", "l2", "size"),
            l2_bandwidth_bytes_s=self.figure(hardware, "hardware", "l2_bandwidth", "bandwidth"),
            norm_exponent=self.figure(hardware, "hardware", "norm_exponent", "number", least=1),
            peak_flops={name: self.figure(entry, f"dtype.{name}", "peak", "rate") for name, entry in native.items()},
            computed_as=computed_as,
            engine={name: entry["engine"] for name, entry in native.items()},
            alignment=alignment,
            alignment_conv={
                name: self.whole(entry, f"dtype.{name}", "alignment_conv")
                if "alignment_conv" in entry
                else alignment[name]
                for name, entry in native.items()
            },
            rank_step=steps,
            rank_step_preferred=preferred,
            engines=engines,
            launch_s={name: self.figure(launch, "launch", name, "time", zero=True) for name in LAUNCH_CLASSES},
            recurrent_step_s=self.figure(launch, "launch", "recurrent_step", "time", zero=True),
            sigma_relative={name: self.figure(sigma, "sigma", name, "fraction") for name in SIGMA_CLASSES},
            lacks=self.named("lacks", FEATURES),
            fuses=self.named("fuses", FUSIONS),
            residuals={name: self.residuals(name) for name in self.document.get("residuals", {})},
            provenance=self.provenance,
        )

    def engine(self, name: str) -> Engine:
        where = f"engine.{name}"
        table = self.table(self.document["engine"], "engine", name)
        required = ("tiles", "depthwise_efficiency", "gemm", "conv")
        self.keys(where, table, required, optional=("conv_data", "conv_weight", "winograd", "l2_share"))
        gemm, conv = (self.kernels(table, where, name, None) for name in ("gemm", "conv"))
        return Engine(
            tiles=self.tiles(table, where),
            gemm=gemm,
            conv=conv,
            conv_data=self.kernels(table, where, "conv_data", conv),
            conv_weight=self.kernels(table, where, "conv_weight", conv),
            depthwise_efficiency=self.figure(table, where, "depthwise_efficiency", "fraction", most=1),
            l2_share=self.figure(table, where, "l2_share", "number", most=1) if "l2_share" in table else 1.0,
            winograd=self.winograd(table, where) if "winograd" in table else None,
        )

    def kernels(self, engine: Mapping[str, Any], where: str, name: str, base: Kernels | None) -> Kernels:
        """The kernels of one kind of operation; what is not given is as in `base`."""
        if base is not None and name not in engine:
            return base
        table, place = self.table(engine, where, name), f"{where}.{name}"
        needed, others = ("efficiency", "tile_exponent", "split_k"), ("prologue", "overlap", "setup", "bandwidth")
        special = {"gemm": "skinny_bandwidth", "conv": "few_channels"}.get(name)
        self.keys(place, table, () if base else needed, optional=(*needed, *others, *((special,) if special else ())))
        given: dict[str, Any] = {"split_k": self.split_k(table, place, "split_k")} if "split_k" in table else {}
        for key in (key for key in KERNEL_FIGURES if key in table):
            field_name, dimension, _, bounds = KERNEL_FIGURES[key]
            given[field_name] = self.figure(table, place, key, dimension, **bounds)
        return replace(base, **given) if base is not None else Kernels(**given)

    def winograd(self, engine: Mapping[str, Any], where: str) -> Winograd:
        table, place = self.table(engine, where, "winograd"), f"{where}.winograd"
        self.keys(place, table, (*WINOGRAD_RATES, "setup"))
        setup_s = self.figure(table, place, "setup", "time", zero=True)
        figures: dict[str, float] = {key: self.figure(table, place, key, "number") for key in WINOGRAD_RATES}
        return Winograd(**figures, setup_s=setup_s)

    def residuals(self, name: str) -> Residuals:
        place = f"residuals.{name}"
        if name not in WIDTHS:
            raise self.error(place, f"one of {', '.join(WIDTHS)}", "an unknown family of operations")
        table = self.table(self.table(self.document, "", "residuals"), "residuals", name)
        self.keys(place, table, ("source", "reach", "spread", "noise", "points"))
        for key in ("reach", "spread", "noise"):
            if not isinstance(table[key], int | float) or not 0 < table[key] < math.inf:
                raise self.error(f"{place}.{key}", "a finite number above 0", repr(table[key]))
        width = WIDTHS[name] + 1
        try:
            rows = np.array(table["points"], dtype=float).reshape(-1, width)
        except (ValueError, TypeError):
            rows = np.array([[math.nan]])
        if not np.isfinite(rows).all():
            raise self.error(f"{place}.points", f"rows of {width} finite numbers", "something else")
        self.source(place, table)
        return Residuals(rows[:, :-1], rows[:, -1], *(float(table[key]) for key in ("reach", "spread", "noise")))

    def tiles(self, table: Mapping[str, Any], where: str) -> tuple[tuple[int, int], ...]:
        key = f"{where}.tiles"
        names = self.sourced(table, where, "tiles", ("value", "source"))["value"]
        listed = names if isinstance(names, list) else []
        matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(name)) for name in listed]
        if not matches or not all(matches):
            raise self.error(key, 'a list of tiles such as ["128x64"]', repr(names))
        return tuple((int(match[1]), int(match[2])) for match in matches if match)

    def split_k(self, table: Mapping[str, Any], where: str, name: str) -> tuple[int, ...]:
        key = f"{where}.{name}"
        ways = self.sourced(table, where, name, ("value", "source"))["value"]
        good = isinstance(ways, list) and all(type(way) is int and way > 0 for way in ways) and 1 in ways
        if not good or sorted(set(ways)) != ways:
            raise self.error(key, "ascending positive integers starting at 1", repr(ways))
        return tuple(ways)

    def substitute(self, name: str, native: Mapping[str, Any]) -> str:
        entry = self.table(self.document["dtype"], "dtype", name)
        where = f"dtype.{name}"
        self.keys(where, entry, ("computed_as",))
        value = self.sourced(entry, where, "computed_as", ("value", "source"))["value"]
        if value not in tuple(native):
            raise self.error(f"{where}.computed_as", f"a type with a peak ({', '.join(native)})", repr(value))
        return str(value)

    def named(self, where: str, known: Sequence[str]) -> frozenset[str]:
        """The entries of a table that may be absent, each with its source."""
        table = self.table(self.document, "", where) if where in self.document else {}
        self.keys(where, table, (), optional=known)
        for name in table:
            self.sourced(table, where, name, ("source",))
        return frozenset(table)

    def figure(
        self,
        table: Mapping[str, Any],
        where: str,
        key: str,
        dimension: str,
        *,
        zero: bool = False,
        least: float = 0.0,
        most: float = math.inf,
    ) -> float:
        entry = self.sourced(table, where, key, ("value", "unit", "source"))
        units = UNITS[dimension]
        if entry["unit"] not in tuple(units):
            raise self.error(f"{where}.{key}.unit", f"one of {', '.join(units)}", repr(entry["unit"]))
        value = entry["value"]
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or number < least or number > most or (number == 0 and not zero):
            bounds = "a finite number " + (f"of at least {least:g}" if zero or least else "above 0")
            limit = f" and at most {most:g}" if most < math.inf else ""
            raise self.error(f"{where}.{key}.value", bounds + limit, repr(value))
        return number * units[entry["unit"]]

    def whole(self, table: Mapping[str, Any], where: str, key: str) -> int:
        value = self.figure(table, where, key, "count")
        if value != int(value):
            raise self.error(f"{where}.{key}.value", "a whole number", repr(value))
        return int(value)

    def sourced(self, table: Mapping[str, Any], where: str, key: str, keys: Sequence[str]) -> Mapping[str, Any]:
        name = f"{where}.{key}"
        entry = table.get(key)
        if not isinstance(entry, dict):
            raise self.error(name, f"a table with {', '.join(keys)}", "nothing" if entry is None else repr(entry))
        self.keys(name, entry, keys)
        self.source(name, entry)
        return entry

    def source(self, name: str, entry: Mapping[str, Any]) -> None:
        """Keeps where an entry comes from, under its dotted key."""
        source = entry["source"]
        if not isinstance(source, str) or not source.startswith(PROVENANCE):
            raise self.error(f"{name}.source", f"text starting with one of: {'; '.join(PROVENANCE)}", repr(source))
        self.provenance[name] = source

    def table(self, parent: Mapping[str, Any], where: str, key: str) -> dict[str, Any]:
        value = parent[key]
        if not isinstance(value, dict) or not value:
            raise self.error(f"{where}.{key}".lstrip("."), "a table with entries", repr(value))
        return value

    def keys(self, where: str, table: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> None:
        prefix = f"{where}." if where else ""
        for key in table:
            if key not in required and key not in optional:
                close = difflib.get_close_matches(key, [*required, *optional], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise self.error(prefix + key, f"one of {', '.join([*required, *optional])}", f"an unknown key{hint}")
        for key in required:
            if key not in table:
                raise self.error(prefix + key, "a value", "nothing")

    def text(self, key: str) -> str:
        value = self.document[key]
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "a text", repr(value))
        return value

    def choice(self, key: str, options: Sequence[str]) -> Any:
        value = self.document[key]
        if value not in options:
            raise self.error(key, f"one of {', '.join(options)}", repr(value))
        return value

    def error(self, key: str, expected: str, got: str) -> DeviceError:
        return DeviceError(f"device profile {self.path}: {key}: expected {expected}, got {got}")
