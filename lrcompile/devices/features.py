"""What kind of operation the residual of a measurement is kept with, and what of its shape it depends on."""

from __future__ import annotations

import math

import numpy as np

from lrcompile.devices import features_cpu as cpu
from lrcompile.devices import features_gpu as gpu
from lrcompile.devices import mlas, work_cpu
from lrcompile.devices.device import Device
from lrcompile.devices.residual import Residuals
from lrcompile.graph.op import DTYPE_BYTES, FUNCTIONS, OpDesc

WIDTHS: dict[str, int] = {
    "gemm": 14, "bmm": 14, "pointwise": 26, "conv": 27, "depthwise": 23, "grouped": 19, "volume": 17, "attention": 17,
    "recurrent": 14, "transpose": 5,
    **dict.fromkeys(("copy", "binary", "bias", "gelu", "silu", "sigmoid"), 3),
    **dict.fromkeys(("layer_norm", "skip_layer_norm", "group_norm", "reduce", "bias_gelu"), 7),
}  # fmt: skip
"""How many features the families of operations have on a CPU."""
GPU_WIDTHS: dict[str, int] = {
    **dict.fromkeys(FUNCTIONS, 3),
    **dict.fromkeys(("pointwise", "conv", "depthwise", "grouped", "volume"), 20),
    "gemm": 14, "bmm": 14, "attention": 14, "recurrent": 14,
}  # fmt: skip
"""The same on a GPU."""
WORK: dict[str, int] = {
    "gemm": 17, "bmm": 17, "pointwise": 34, "conv": 34, "depthwise": 34, "grouped": 24, "volume": 24, "attention": 30,
    "recurrent": 30, "transpose": 10, "bias": 7,
    **dict.fromkeys(("copy", "binary", "gelu", "silu", "sigmoid"), 5),
    **dict.fromkeys(("layer_norm", "skip_layer_norm", "group_norm", "reduce", "bias_gelu"), 7),
}  # fmt: skip
"""How many amounts of work the families are made of on a CPU (`work_cpu`)."""
PRECISIONS = {"fp32": "", "tf32": "-tf32", "fp16": "-half", "bf16": "-half"}
"""What the names of families end in: the two halves run in the same kernels."""


def width_of(name: str, kind: str) -> int | None:
    """How many features a family has on a CPU or GPU; None where there is no such family."""
    base, dash, precision = name.partition("-")
    if dash + precision not in PRECISIONS.values():
        return None
    return (GPU_WIDTHS if kind == "gpu" else WIDTHS).get(base)


def family(op: OpDesc) -> str | None:
    """What an operation's residual is kept with, such as "gemm" in fp32 and "gemm-half"; None where it has none."""
    base = _base(op)
    return None if base is None or op.dtype not in PRECISIONS else base + PRECISIONS[op.dtype]


def _base(op: OpDesc) -> str | None:
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


def features(op: OpDesc, device: Device, work: np.ndarray | None = None) -> list[float]:
    """What an operation's residual depends on, on a CPU or GPU: logarithms of sizes, and conditions that jump.

    With the prices of its work also what that takes.
    """
    found = _gpu_features(op, device) if device.kind == "gpu" else _cpu_features(op, device)
    return found if work is None else [*found, cpu.log2(work_s(op, device, work) * 1e6)]


def located(op: OpDesc, device: Device, residuals: Residuals) -> list[float] | None:
    """Where an operation lies among its family's residuals; None where it has work that nothing measured had."""
    point = features(op, device, residuals.work)
    return point if np.isfinite(point).all() else None


def work_s(op: OpDesc, device: Device, prices: np.ndarray) -> float:
    """What an operation's work takes in s at so much for each part of it; NaN where a part has no price (NaN)."""
    return math.fsum(price * amount for price, amount in zip(prices, amounts(op, device), strict=True) if amount)


def amounts(op: OpDesc, device: Device) -> list[float]:
    """What an operation's latency on a CPU is made of; empty where that is not known."""
    block, threads, base = device.alignment_conv["fp32"], device.units, _base(op)
    if device.kind == "gpu" or base is None:
        return []
    if op.gemm is not None:
        return work_cpu.of_gemm(op.gemm, block, threads)
    if op.conv is not None:
        if base in ("volume", "grouped"):
            return work_cpu.of_unfolded(op.conv, block, threads)
        return work_cpu.of_conv(op.conv, block, threads, base)
    if op.attention is not None:
        return work_cpu.of_attention(op.attention, block, threads)
    if op.recurrent is not None:
        return work_cpu.of_recurrent(op.recurrent, block, threads)
    return work_cpu.of_function(op, DTYPE_BYTES[op.dtype], threads)


def _cpu_features(op: OpDesc, device: Device) -> list[float]:
    block, threads, base = device.alignment_conv["fp32"], device.units, _base(op)
    if op.gemm is not None:
        return cpu.of_gemm(op.gemm, block, threads)
    if op.conv is not None:
        if base == "volume":
            return cpu.of_unfolded(op.conv, block, threads)
        if base == "grouped":
            found = cpu.of_unfolded(op.conv, block, threads)
            return [*found, float(mlas.in_blocks(op.conv, block)), cpu.log2(op.conv.groups)]
        return cpu.of_conv(op.conv, block, threads, base or "")
    if op.attention is not None:
        return cpu.of_attention(op.attention, block, threads)
    if op.recurrent is not None:
        return cpu.of_recurrent(op.recurrent, threads)
    return cpu.of_function(op, DTYPE_BYTES[op.dtype], threads)


def _gpu_features(op: OpDesc, device: Device) -> list[float]:
    vector = 8 if PRECISIONS.get(op.dtype) == "-half" else 4  # elements in 16 bytes, which its kernels read at once
    if op.gemm is not None:
        return gpu.of_gemm(op.gemm, vector)
    if op.conv is not None:
        return [*gpu.of_conv(op.conv, vector), float(op.dtype == "fp16")]
    if op.recurrent is not None:
        return cpu.of_recurrent(op.recurrent, device.units)
    return gpu.of_function(op) if op.attention is None else gpu.of_attention(op.attention, vector)


def sizes(op: OpDesc) -> list[float]:
    """The sizes alone, by which operations of a kind are near to each other; logarithms to the base of two."""
    if op.conv is not None:
        shape = op.conv
        pixels = shape.batch * math.prod(shape.size_out)
        found = (pixels, shape.channels_in, shape.channels_out, math.prod(shape.kernel), math.prod(shape.stride))
        return [cpu.log2(size) for size in found]
    if op.gemm is not None:
        return [cpu.log2(size) for size in (op.gemm.m, op.gemm.n, op.gemm.k, op.gemm.batch)]
    return [cpu.log2(op.weight_bytes + op.activation_bytes)]
