"""Predicts the latency of an operation from its shape and a device profile, without running anything.

    t = launch + min over (tile, split-K) of ‖compute, DRAM, L2‖ₚ
    compute = ⌈tiles/units⌉ · flops(tile) / (peak per unit · efficiency(tile))

A roofline with the quantisation that libraries show: they pick a kernel from a menu of tiles, whole tiles run in
whole waves on the device's units, and extents round up to the alignment. A convolution is the GEMM it implies. The
form and how well it fits published measurements: ../shared/latency/README.md; the constants are the profile's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from torch import fx

from lrcompile.devices.cost import Cost, total
from lrcompile.devices.device import Device, Tile
from lrcompile.devices.fusion import describe_all
from lrcompile.graph.op import DTYPE_BYTES, AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

Direction = Literal["forward", "data", "weight"]
_MIRRORED: dict[Direction, Direction] = {"forward": "data", "data": "forward", "weight": "weight"}
_ACCUMULATOR_BYTES = 4  # partial sums of a split-K product are exchanged in fp32 or int32


@dataclass(frozen=True)
class AnalyticCostModel:
    """Prices operations on `device`: a forward pass, or with `training` the forward and backward passes."""

    kind = "analytic"
    device: Device
    training: bool = False
    _known: dict[OpDesc, Cost] = field(default_factory=dict, init=False, repr=False, compare=False)

    def cost(self, op: OpDesc) -> Cost:
        """Price of one operation: latency in s with the profile's relative error; DeviceError for an unknown dtype."""
        found = self._known.get(op)
        if found is None:
            found = self._known[op] = self._price(op)
        return found

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        """Prices of a region before and after a rewrite, without the nodes that are the same in both.

        Nodes are the same when name and description are equal, so that the error bars come from what differs.
        """
        fuses = frozenset() if self.training else self.device.fuses
        ops_before, ops_after = describe_all(before, fuses), describe_all(after, fuses)
        same = {name for name, op in ops_before.items() if ops_after.get(name) == op}
        return (
            total([self.cost(op) for name, op in ops_before.items() if name not in same]),
            total([self.cost(op) for name, op in ops_after.items() if name not in same]),
        )

    def _price(self, op: OpDesc) -> Cost:
        self.device.compute_dtype(op.dtype)
        if op.kind == "view":
            return Cost()
        if op.kind == "fused":
            latency_s = op.activation_bytes / self.device.bandwidth_bytes_s
            sigma_s = self.device.sigma_relative["other"] * latency_s
            return Cost(latency_s, sigma_s, op.flops, 0.0, op.activation_bytes)
        directions: tuple[Direction, ...] = ("forward", "data", "weight") if self.training else ("forward",)
        if op.gemm is not None:
            latency_s = sum(gemm_latency_s(self.device, turned(op.gemm, way), op.dtype) for way in directions)
        elif op.conv is not None:
            latency_s = sum(conv_latency_s(self.device, op.conv, op.dtype, way) for way in directions)
        elif op.attention is not None:
            latency_s = attention_latency_s(self.device, op.attention, op.dtype) * (3.5 if self.training else 1)
        elif op.recurrent is not None:
            latency_s = recurrent_latency_s(self.device, op.recurrent, op.dtype) * len(directions)
        else:
            traffic = op.weight_bytes + op.activation_bytes
            latency_s = memory_latency_s(self.device, traffic)
            if self.training:
                latency_s += memory_latency_s(self.device, 2 * traffic)
        sigma_s = self.device.sigma_relative[_op_class(op)] * latency_s
        flops = op.flops * len(directions)
        return Cost(latency_s, sigma_s, flops, op.weight_bytes, op.activation_bytes)


def turned(shape: GemmShape, direction: Direction) -> GemmShape:
    """The product that a GEMM's backward pass computes: `data` for the input's gradient, `weight` for the weight's."""
    if direction == "forward":
        return shape
    if direction == "data":
        return replace(shape, n=shape.k, k=shape.n)
    return replace(shape, m=shape.k, k=shape.m)


def gemm_latency_s(device: Device, shape: GemmShape, dtype: str) -> float:
    """Latency in s of `batch` products [m×k]·[k×n] with their launch."""
    element = DTYPE_BYTES[dtype]
    traffic = element * shape.batch * (shape.m * shape.k + shape.k * shape.n + shape.m * shape.n)
    return device.launch_s["gemm"] + _product_s(device, shape, dtype, traffic)


def conv_latency_s(device: Device, shape: ConvShape, dtype: str, direction: Direction = "forward") -> float:
    """Latency in s of a convolution, or of the gradient of its input (`data`) or weight, with its launch.

    A device that lacks grouped convolution runs it as a dense one, with zeros between the groups. Blocks of channels
    that convolutions of images are laid out in do not hold for volumes, which run as products of unfolded windows.
    """
    kind = device.compute_dtype(dtype)
    engine = device.engines[device.engine[kind]]
    element = DTYPE_BYTES[dtype]
    step = (device.alignment if len(shape.kernel) == 3 else device.alignment_conv)[kind]
    shape = _plain(_aligned(shape, 1 if "grouped_conv" in device.lacks else shape.groups, step))
    direction = _MIRRORED[direction] if shape.transposed else direction
    maps = shape.channels_in * math.prod(shape.size_in) + shape.channels_out * math.prod(shape.size_out)
    weights = shape.channels_in // shape.groups * shape.channels_out * math.prod(shape.kernel)
    traffic = element * (shape.batch * maps + weights)
    product = _implied_gemm(shape, direction)
    launch_s = device.launch_s["conv"]
    if shape.groups > 1 and min(shape.channels_in, shape.channels_out) == shape.groups:
        flops = 2.0 * product.m * product.n * product.k * product.batch
        vector_flops = device.peak_flops[device.compute_dtype("fp32")] * engine.depthwise_efficiency
        return launch_s + _norm(device, flops / vector_flops, traffic / device.bandwidth_bytes_s)
    speed = engine.conv_efficiency * (1.0 if direction == "forward" else engine.gradient_efficiency)
    split_k = engine.split_k if direction == "weight" else engine.conv_split_k
    latency_s = _product_s(device, product, dtype, traffic, speed, split_k)
    if engine.winograd and _has_winograd(shape):
        product, more = _winograd_gemm(shape, direction)
        speed *= engine.winograd
        latency_s = min(latency_s, _product_s(device, product, dtype, traffic + element * more, speed, split_k))
    return launch_s + engine.conv_setup_s + latency_s


def attention_latency_s(device: Device, shape: AttentionShape, dtype: str) -> float:
    """Latency in s of softmax(QKᵀ)V: one fused kernel, or two products and a softmax where the device has none."""
    element = DTYPE_BYTES[dtype]
    batch = shape.batch * shape.heads
    keys = math.ceil(shape.keys / 2) if shape.causal else shape.keys
    scores = GemmShape(shape.queries, keys, shape.head_dim, batch)
    values = GemmShape(shape.queries, shape.head_dim, keys, batch)
    rows = 2 * shape.queries * shape.heads + 2 * shape.keys * shape.heads_kv
    operand_bytes = element * shape.batch * shape.head_dim * rows
    if "flash_attention" not in device.lacks:
        parts = (_product_s(device, product, dtype, operand_bytes / 2) for product in (scores, values))
        return device.launch_s["gemm"] + sum(parts)
    score_bytes = element * batch * shape.queries * shape.keys
    products = (gemm_latency_s(device, product, dtype) for product in (scores, values))
    return sum(products) + memory_latency_s(device, 2 * score_bytes)


def recurrent_latency_s(device: Device, shape: RecurrentShape, dtype: str) -> float:
    """Latency in s of a recurrent call: a layer takes one product for all its inputs, then one a step, in sequence."""
    gates = shape.gates * shape.hidden_size
    state_bytes = DTYPE_BYTES[dtype] * shape.batch * (shape.hidden_size + gates)  # the weight stays in cache
    step = _product_s(device, GemmShape(shape.batch, gates, shape.hidden_size), dtype, state_bytes)
    latency_s = 0.0
    for layer in range(shape.layers):
        width = shape.input_size if layer == 0 else shape.hidden_size * shape.directions
        inputs = gemm_latency_s(device, GemmShape(shape.batch * shape.steps, gates, width), dtype)
        latency_s += shape.directions * (inputs + shape.steps * (device.recurrent_step_s + step))
    return latency_s


def memory_latency_s(device: Device, traffic_bytes: float) -> float:
    """Latency in s of an operation that only moves data, with its launch."""
    return device.launch_s["other"] + traffic_bytes / device.bandwidth_bytes_s


def _product_s(
    device: Device,
    shape: GemmShape,
    dtype: str,
    traffic_bytes: float,
    speed: float = 1.0,
    split_k: tuple[int, ...] | None = None,
) -> float:
    kind = device.compute_dtype(dtype)
    dram_s = traffic_bytes / device.bandwidth_bytes_s
    if 0 in (shape.m, shape.n, shape.k, shape.batch):
        return dram_s
    align = device.alignment[kind] if split_k is None else 1
    n, k = (float(_round_up(extent, align)) for extent in (shape.n, shape.k))
    m, batch = float(shape.m), float(shape.batch)
    engine = device.engines[device.engine[kind]]
    menu = _menu(engine.tiles, split_k or engine.split_k, device.units)
    rows, columns = np.ceil(m / menu.tile_m), np.ceil(n / menu.tile_n)
    waves = np.ceil(batch * rows * columns * menu.split_per_unit)
    compute_s = waves * np.ceil(k / menu.split) * (menu.flops_over_efficiency * device.units)
    compute_s /= device.peak_flops[kind] * speed
    operand_bytes = (DTYPE_BYTES[dtype] * batch * k) * (columns * m + rows * n)
    l2_s = (operand_bytes + menu.partial_bytes * (batch * m * n)) / device.l2_bandwidth_bytes_s
    p = device.norm_exponent
    return (float((compute_s**p + l2_s**p).min()) + dram_s**p) ** (1 / p)


def _norm(device: Device, *parts_s: float) -> float:
    """Smooth maximum: parts that overlap hide each other, except near a tie."""
    p = device.norm_exponent
    return sum(part**p for part in parts_s) ** (1 / p)


@dataclass(frozen=True)
class _Menu:
    """An engine's kernels, one a (tile, split-K) pair, as arrays."""

    tile_m: np.ndarray
    tile_n: np.ndarray
    split: np.ndarray
    split_per_unit: np.ndarray
    flops_over_efficiency: np.ndarray  # of one tile and one step of K
    partial_bytes: np.ndarray  # written and read again for each output


@lru_cache(maxsize=64)
def _menu(tiles: tuple[Tile, ...], split_k: tuple[int, ...], units: int) -> _Menu:
    kernels = [(tile.m, tile.n, split, tile.efficiency) for tile in tiles for split in split_k]
    tile_m, tile_n, split, efficiency = np.array(kernels, dtype=float).T
    partial_bytes = np.where(split > 1, 2 * _ACCUMULATOR_BYTES * split, 0)
    return _Menu(tile_m, tile_n, split, split / units, 2 * tile_m * tile_n / efficiency, partial_bytes)


def _round_up(extent: int, step: int) -> int:
    return -(-extent // step) * step


def _aligned(shape: ConvShape, groups: int, step: int) -> ConvShape:
    """`shape` in `groups` groups, the channels of each padded to whole vectors; depthwise kernels need no padding."""
    if groups > 1 and min(shape.channels_in, shape.channels_out) == groups:
        return shape
    inputs, outputs = (_round_up(width // groups, step) * groups for width in (shape.channels_in, shape.channels_out))
    return replace(shape, channels_in=inputs, channels_out=outputs, groups=groups)


def _plain(shape: ConvShape) -> ConvShape:
    """A transposed convolution as the plain one whose input gradient it computes; still marked as transposed."""
    if not shape.transposed:
        return shape
    return replace(
        shape,
        channels_in=shape.channels_out,
        channels_out=shape.channels_in,
        size_in=shape.size_out,
        size_out=shape.size_in,
    )


def _implied_gemm(shape: ConvShape, direction: Direction) -> GemmShape:
    taps = math.prod(shape.kernel)
    size_in, size_out = math.prod(shape.size_in), math.prod(shape.size_out)
    inputs, outputs = shape.channels_in // shape.groups, shape.channels_out // shape.groups
    if direction == "forward":
        return GemmShape(shape.batch * size_out, outputs, inputs * taps, shape.groups)
    if direction == "weight":
        return GemmShape(outputs, inputs * taps, shape.batch * size_out, shape.groups)
    # With a stride only size_out/size_in of the taps meet an output. Kernels differ in how many of the others they
    # skip; half of them, on a log scale, fits DeepBench V100 best over both precisions.
    reach = math.ceil(outputs * taps * math.sqrt(min(1.0, size_out / max(size_in, 1))))
    return GemmShape(shape.batch * size_in, inputs, reach, shape.groups)


def _has_winograd(shape: ConvShape) -> bool:
    return shape.kernel == (3, 3) and {*shape.stride, *shape.dilation, shape.groups} == {1}


def _winograd_gemm(shape: ConvShape, direction: Direction) -> tuple[GemmShape, int]:
    """The products of F(4×4, 3×3), one for each of 36 points, and how many elements the transforms move besides.

    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016; transforms as separate kernels (our reading
    of cuDNN's non-fused algorithm).
    """
    points = 36
    inputs, outputs = shape.channels_in, shape.channels_out
    size = shape.size_in if direction == "data" else shape.size_out
    patches = shape.batch * math.prod(math.ceil(extent / 4) for extent in size)
    moved = 2 * points * (patches * (inputs + outputs) + inputs * outputs)
    if direction == "forward":
        return GemmShape(patches, outputs, inputs, points), moved
    if direction == "data":
        return GemmShape(patches, inputs, outputs, points), moved
    return GemmShape(outputs, inputs, patches, points), moved


def _op_class(op: OpDesc) -> str:
    if op.conv is not None:
        return "conv"
    if op.recurrent is not None:
        return "recurrent"
    return "gemm" if op.gemm or op.attention else "other"
