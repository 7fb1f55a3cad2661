"""Writes a device as the text of a profile file, from which `load_device` makes an equal device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lrcompile.devices.device import (
    KERNEL_FIGURES,
    OPTIONAL_KERNELS,
    UNFOLD_FIGURES,
    UNITS,
    WINOGRAD_RATES,
    Device,
    Engine,
    Kernels,
)
from lrcompile.devices.residual import Residuals


def profile_text(device: Device, comment: str) -> str:
    """The profile, with the device's own sources; `comment` is its first line."""
    return "\n".join((f"# {comment}", *_lines(device))) + "\n"


def _lines(device: Device) -> Iterator[str]:
    source = device.provenance

    def figure(place: str, key: str, value: float, unit: str) -> str:
        return (
            f"{key} = {{ value = {value:.6g}, unit = {_quoted(unit)}, source = {_quoted(source[f'{place}.{key}'])} }}"
        )

    yield f"description = {_quoted(device.description)}"
    yield f"kind = {_quoted(device.kind)}"
    yield f"default_dtype = {_quoted(device.default_dtype)}"
    yield "\n[hardware]"
    for key, value, unit in (
        ("units", device.units, "units"),
        ("clock", device.clock_hz / 1e6, "MHz"),
        ("bandwidth_peak", device.bandwidth_peak_bytes_s / 1e9, "GB/s"),
        ("bandwidth_sustained", device.bandwidth_bytes_s / 1e9, "GB/s"),
        ("l2", device.l2_bytes / 2**20, "MiB"),
        ("l2_bandwidth", device.l2_bandwidth_bytes_s / 1e9, "GB/s"),
        ("norm_exponent", device.norm_exponent, "exponent"),
    ):
        yield figure("hardware", key, value, unit)
    for name, peak in device.peak_flops.items():
        place = f"dtype.{name}"
        yield f"\n[{place}]"
        yield figure(place, "peak", peak / 1e12, "TOP/s" if name == "int8" else "TFLOP/s")
        yield f"engine = {_quoted(device.engine[name])}"
        yield figure(place, "alignment", device.alignment[name], "elements")
        if f"{place}.alignment_conv" in source:
            yield figure(place, "alignment_conv", device.alignment_conv[name], "elements")
        yield figure(place, "rank_step", device.rank_step[name], "elements")
        yield figure(place, "rank_step_preferred", device.rank_step_preferred[name], "elements")
    for name, other in device.computed_as.items():
        yield f"\n[dtype.{name}]"
        yield f"computed_as = {{ value = {_quoted(other)}, source = {_quoted(source[f'dtype.{name}.computed_as'])} }}"
    for name, engine in device.engines.items():
        yield from _engine(f"engine.{name}", engine, source, figure)
    yield "\n[launch]"
    for key, seconds in device.launch_s.items():
        yield figure("launch", key, seconds * 1e6, "us")
    yield figure("launch", "recurrent_step", device.recurrent_step_s * 1e6, "us")
    if device.host_s:
        yield figure("launch", "host", device.host_s * 1e6, "us")
    yield "\n[sigma]"
    for key, sigma in device.sigma_relative.items():
        yield figure("sigma", key, sigma, "of latency")
    for table, names in (("lacks", device.lacks), ("fuses", device.fuses)):
        if names:
            yield f"\n[{table}]"
            yield from (f"{key} = {{ source = {_quoted(source[f'{table}.{key}'])} }}" for key in sorted(names))
    if device.pace:
        yield "\n[pace]"
        yield figure("pace", "product", device.pace.product_s * 1e6, "us")
        yield figure("pace", "follows", device.pace.follows, "factor")
        yield figure("pace", "handed", device.pace.handed, "factor")
    if device.network:
        yield "\n[network]"
        yield figure("network", "run", device.network["run_s"] * 1e6, "us")
        yield figure("network", "slower", device.network["slower"], "factor")
    for name, residuals in device.residuals.items():
        yield from _residuals(name, residuals, source[f"residuals.{name}"])


def _engine(place: str, engine: Engine, source: Mapping[str, str], figure: Any) -> Iterator[str]:
    def listed(key: str, values: Sequence[Any]) -> str:
        return f"{key.rpartition('.')[2]} = {{ value = {json.dumps(list(values))}, source = {_quoted(source[key])} }}"

    yield f"\n[{place}]"
    yield listed(f"{place}.tiles", [f"{m}x{n}" for m, n in engine.tiles])
    yield figure(place, "depthwise_efficiency", engine.depthwise_efficiency, "of peak")
    if f"{place}.l2_share" in source:
        yield figure(place, "l2_share", engine.l2_share, "factor")
    for name in ("gemm", "conv", *OPTIONAL_KERNELS):
        kernels: Kernels | None = getattr(engine, name)
        if kernels is None:
            continue
        table = f"{place}.{name}"
        keys = [key for key in (*KERNEL_FIGURES, "split_k") if f"{table}.{key}" in source]
        if keys or kernels.tiles is not None:
            yield f"\n[{table}]"
        if kernels.tiles is not None:
            yield listed(f"{table}.tiles", [f"{m}x{n}" for m, n in kernels.tiles])
        for key in keys:
            if key == "split_k":
                yield listed(f"{table}.{key}", kernels.split_k)
            else:
                field, dimension, unit, _ = KERNEL_FIGURES[key]
                yield figure(table, key, getattr(kernels, field) / UNITS[dimension][unit], unit)
    if engine.winograd is not None:
        yield f"\n[{place}.winograd]"
        for key in WINOGRAD_RATES:
            yield figure(f"{place}.winograd", key, getattr(engine.winograd, key), "factor")
        yield figure(f"{place}.winograd", "setup", engine.winograd.setup_s * 1e6, "us")
    if engine.unfold is not None:
        yield f"\n[{place}.unfold]"
        for key in UNFOLD_FIGURES:
            yield figure(f"{place}.unfold", key, getattr(engine.unfold, f"{key}_s") * 1e9, "ns")


def _residuals(name: str, residuals: Residuals, source: str) -> Iterator[str]:
    yield f"\n[residuals.{name}]"
    yield f"source = {_quoted(source)}"
    yield f"distance = {_quoted(residuals.distance)}"
    if residuals.work is not None:
        yield f"work = [{', '.join(f'{x:.6g}' for x in residuals.work)}]"
    yield f"reach = [{', '.join(f'{x:.5g}' for x in residuals.reach)}]"
    yield from (f"{key} = {getattr(residuals, key):.6g}" for key in ("spread", "noise"))
    yield "points = ["
    for point, value in zip(residuals.points, residuals.values, strict=True):
        yield f"    [{', '.join(f'{x:.5g}' for x in (*point, value))}],"
    yield "]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
