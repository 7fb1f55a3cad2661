"""Reads device profiles: files in which every figure names where it comes from."""

from __future__ import annotations

import difflib
import importlib.resources
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.devices.device import (
    FEATURES,
    FUSIONS,
    KERNEL_FIGURES,
    LAUNCH_CLASSES,
    OPTIONAL_KERNELS,
    PROVENANCE,
    SIGMA_CLASSES,
    UNFOLD_FIGURES,
    UNITS,
    WINOGRAD_RATES,
    Device,
    Engine,
    Kernels,
    Pace,
    Unfold,
    Winograd,
)
from lrcompile.devices.features import WIDTHS, WORK, width_of
from lrcompile.devices.residual import DISTANCES, Residuals
from lrcompile.errors import DeviceError

_KINDS = ("gpu", "npu", "cpu")
_COMPUTE_DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "int8")


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
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DeviceError(f"device profile {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"device profile {path} is not valid TOML: {error}") from error
    return _Reader(path, document).device()


def _profile_folder() -> Path:
    installed = Path(str(importlib.resources.files("lrcompile"))) / "hardware_profiles"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "hardware_profiles"


def _number(value: Any) -> float:
    """A number of a profile; infinite where it has no float, NaN where it is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


_OPTIONAL = ("lacks", "fuses", "residuals", "network", "pace")


class _Reader:
    """Turns one parsed profile into a Device and says which key is wrong when it cannot."""

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path = path
        self.document = document
        self.provenance: dict[str, str] = {}

    def device(self) -> Device:
        doc = self.document
        tables = ("hardware", "dtype", "engine", "launch", "sigma")
        self.keys("", doc, ("description", "kind", "default_dtype", *tables), optional=_OPTIONAL)
        hardware = self.table(doc, "", "hardware")
        keys = ("units", "clock", "bandwidth_peak", "bandwidth_sustained", "l2", "l2_bandwidth", "norm_exponent")
        self.keys("hardware", hardware, keys)
        launch = self.table(doc, "", "launch")
        self.keys("launch", launch, (*LAUNCH_CLASSES, "recurrent_step"), optional=("host",))
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
            host_s=self.figure(launch, "launch", "host", "time") if "host" in launch else 0.0,
            sigma_relative={name: self.figure(sigma, "sigma", name, "fraction") for name in SIGMA_CLASSES},
            lacks=self.named("lacks", FEATURES),
            fuses=self.named("fuses", FUSIONS),
            residuals={name: self.residuals(name) for name in self.optional("residuals")},
            network=self.network() if "network" in self.document else {},
            pace=self.pace() if "pace" in self.document else None,
            provenance=self.provenance,
        )

    def optional(self, name: str) -> Mapping[str, Any]:
        return self.table(self.document, "", name) if name in self.document else {}

    def pace(self) -> Pace:
        table = self.table(self.document, "", "pace")
        self.keys("pace", table, ("product", "follows", "handed"))
        return Pace(
            self.figure(table, "pace", "product", "time"),
            self.figure(table, "pace", "follows", "number", zero=True),
            self.figure(table, "pace", "handed", "number"),
        )

    def network(self) -> dict[str, float]:
        table = self.table(self.document, "", "network")
        self.keys("network", table, ("run", "slower"))
        return {
            "run_s": self.figure(table, "network", "run", "time", zero=True),
            "slower": self.figure(table, "network", "slower", "number", least=1),
        }

    def engine(self, name: str) -> Engine:
        where = f"engine.{name}"
        table = self.table(self.document["engine"], "engine", name)
        required = ("tiles", "depthwise_efficiency", "gemm", "conv")
        self.keys(where, table, required, optional=(*OPTIONAL_KERNELS, "winograd", "l2_share", "unfold"))
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
            attention=self.kernels(table, where, "attention", gemm) if "attention" in table else None,
            batched=self.kernels(table, where, "batched", gemm) if "batched" in table else None,
            unfold=self.unfold(table, where) if "unfold" in table else None,
        )

    def kernels(self, engine: Mapping[str, Any], where: str, name: str, base: Kernels | None) -> Kernels:
        """The kernels of one kind of operation; what is not given is as in `base`."""
        if base is not None and name not in engine:
            return base
        table, place = self.table(engine, where, name), f"{where}.{name}"
        needed = ("efficiency", "tile_exponent", "split_k")
        others = ("prologue", "overlap", "setup", "bandwidth", "misaligned", "split_setup")
        special = {"gemm": "skinny_bandwidth", "conv": "few_channels", "batched": "tiles"}.get(name)
        self.keys(place, table, () if base else needed, optional=(*needed, *others, *((special,) if special else ())))
        given: dict[str, Any] = {"split_k": self.split_k(table, place, "split_k")} if "split_k" in table else {}
        if "tiles" in table:
            given["tiles"] = self.tiles(table, place)
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

    def unfold(self, engine: Mapping[str, Any], where: str) -> Unfold:
        table, place = self.table(engine, where, "unfold"), f"{where}.unfold"
        self.keys(place, table, UNFOLD_FIGURES)
        return Unfold(**{f"{key}_s": self.figure(table, place, key, "time") for key in UNFOLD_FIGURES})

    def residuals(self, name: str) -> Residuals:
        place = f"residuals.{name}"
        width = width_of(name, self.document["kind"])
        if width is None:
            raise self.error(place, f"one of {', '.join(WIDTHS)}", "an unknown family of operations")
        table = self.table(self.table(self.document, "", "residuals"), "residuals", name)
        priced = "work" in table and self.document["kind"] == "cpu"
        self.keys(place, table, ("source", "distance", "reach", "spread", "noise", "points", *["work"] * priced))
        work = self.prices(place, table, WORK[name]) if priced else None
        width += priced
        if table["distance"] not in DISTANCES:
            raise self.error(f"{place}.distance", f"one of {', '.join(DISTANCES)}", repr(table["distance"]))
        spread, noise = (_number(table[key]) for key in ("spread", "noise"))
        for key, value in (("spread", spread), ("noise", noise)):
            if not 0 < value < math.inf:
                raise self.error(f"{place}.{key}", "a finite number above 0", repr(table[key]))
        reach, rows = (self.rows(place, table, key, n) for key, n in (("reach", width), ("points", width + 1)))
        if len(reach) != 1 or not (reach > 0).all():
            raise self.error(f"{place}.reach", f"{width} finite numbers above 0", "something else")
        self.source(place, table)
        return Residuals(rows[:, :-1], rows[:, -1], reach[0], spread, noise, table["distance"], work)

    def prices(self, place: str, table: Mapping[str, Any], count: int) -> np.ndarray:
        """Of work, in s; NaN of what was not measured."""
        found = table["work"]
        good = isinstance(found, list) and all(type(price) in (int, float) for price in found)
        if not good or len(found) != count or not all(0 <= price < math.inf or math.isnan(price) for price in found):
            got = "something else"
            if isinstance(found, list) and len(found) != count:
                got = f"{len(found)}; if another version of lrcompile calibrated it, calibrate again"
            raise self.error(f"{place}.work", f"{count} finite numbers of at least 0, or nan", got)
        return np.array(found, dtype=float)

    def rows(self, place: str, table: Mapping[str, Any], key: str, width: int) -> np.ndarray:
        try:
            found = np.array(table[key], dtype=float).reshape(-1, width)
        except (ValueError, TypeError, OverflowError):
            found = np.array([[math.nan]])
        if not np.isfinite(found).all():
            raise self.error(f"{place}.{key}", f"rows of {width} finite numbers", "something else")
        return found

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
        number = _number(value)
        scaled = number * units[entry["unit"]]
        if not math.isfinite(scaled) or number < least or number > most or (number == 0 and not zero):
            bounds = "a finite number " + (f"of at least {least:g}" if zero or least else "above 0")
            limit = f" and at most {most:g}" if most < math.inf else ""
            raise self.error(f"{where}.{key}.value", bounds + limit, repr(value))
        return scaled

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
