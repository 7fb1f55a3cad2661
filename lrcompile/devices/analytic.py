"""Predicts the latency of an operation from its shape and a device profile, without running anything.

    t = launch + min over (tile, split-K) of ‖compute, DRAM, L2‖ₚ
    compute = waves(tiles/units) · (K/split + prologue) · flops a step of K / (peak per unit · efficiency(tile))

A roofline with the quantisation that libraries show: they pick a kernel from a menu of tiles, tiles run in waves on
the device's units, and extents round up to the alignment. A convolution is the GEMM it implies. How well it fits
published measurements: docs/cost-model.md; the constants are the profile's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from torch import fx

from lrcompile.devices.correlation import difference_sigma_s
from lrcompile.devices.cost import Cost, total
from lrcompile.devices.device import Device, Engine, Kernels, Winograd
from lrcompile.devices.features import family, located, work_s
from lrcompile.devices.layouts import operations_on
from lrcompile.devices.mlas import is_product, is_whole, product_of, runs_unfolded
from lrcompile.devices.residual import Residuals
from lrcompile.graph.op import DTYPE_BYTES, AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

Direction = Literal["forward", "data", "weight"]
_MIRRORED: dict[Direction, Direction] = {"forward": "data", "data": "forward", "weight": "weight"}
_ACCUMULATOR_BYTES = 4  # partial sums of a split-K product are exchanged in fp32 or int32
_SKINNY = 64  # the short side up to which kernels that stream both operands along K are slow
_FEW_CHANNELS = 8
_QUERIES, _KEYS, _HEAD = 128, 64, 64  # of a block of fused attention: our reading of what fits best on an H200
_POINTS = {3: 36, 5: 64}  # products of Winograd's F(4×4, k×k)
_FUSED_POINTS, _FUSED_TILE, _TILE = 16, 2, 4


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

        Nodes are the same when name and description are equal, so that the error bars come from what differs. They
        are those of the difference, shared between the sides: errors of similar operations are alike, and cancel
        between them (`correlation.py`).
        """
        ops_before, ops_after = (operations_on(self.device, gm, training=self.training) for gm in (before, after))
        same = {name for name, op in ops_before.items() if ops_after.get(name) == op}
        old, new = (
            [(op, self.cost(op)) for name, op in ops.items() if name not in same and op.kind != "view"]
            for ops in (ops_before, ops_after)
        )
        sum_before, sum_after = total([cost for _, cost in old]), total([cost for _, cost in new])
        if self.training:
            return sum_before, sum_after
        sigma_s = difference_sigma_s(self.device, old, new) / math.sqrt(2)
        return replace(sum_before, sigma_s=sigma_s), replace(sum_after, sigma_s=sigma_s)

    def _price(self, op: OpDesc) -> Cost:
        self.device.compute_dtype(op.dtype)
        if op.kind == "view":
            return Cost()
        slower = 1.0 if self.training else self.device.network.get("slower", 1.0)
        if op.kind == "fused":
            latency_s = slower * op.activation_bytes / self.device.bandwidth_bytes_s
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
        sigma = self.device.sigma_relative[_op_class(op)]
        residuals = None if self.training else self.device.residuals.get(family(op) or "")
        if residuals is not None:
            latency_s, sigma = corrected(self.device, residuals, op, latency_s, sigma)
        latency_s *= slower
        sigma_s = sigma * latency_s
        flops = op.flops * len(directions)
        return Cost(latency_s, sigma_s, flops, op.weight_bytes, op.activation_bytes)


def corrected(device: Device, residuals: Residuals, op: OpDesc, latency_s: float, sigma: float) -> tuple[float, float]:
    """Latency in s and relative error of an operation of a measured family; the formula's where that cannot say."""
    point = located(op, device, residuals)
    if point is None:
        return latency_s, sigma
    correction, sigma = residuals.at(point)
    base_s = latency_s if residuals.work is None else work_s(op, device, residuals.work)
    return base_s * math.exp(correction), sigma


def eager_latency_s(device: Device, ops: Iterable[OpDesc]) -> float:
    """Latency in s of a network in an eager framework: nothing is fused, and the host takes its time for each call."""
    costs = [AnalyticCostModel(device).cost(op).latency_s for op in ops if op.kind != "view"]
    return max(sum(costs), device.host_s * len(costs))


def turned(shape: GemmShape, direction: Direction) -> GemmShape:
    """The product that a GEMM's backward pass computes: `data` for the input's gradient, `weight` for the weight's."""
    if direction == "forward":
        return shape
    if direction == "data":
        return replace(shape, n=shape.k, k=shape.n, layout="NN")
    return replace(shape, m=shape.k, k=shape.m, layout="NT")


def gemm_latency_s(device: Device, shape: GemmShape, dtype: str) -> float:
    """Latency in s of `batch` products [m×k]·[k×n] with their launch."""
    setup_s = device.engine_for(dtype).products(shape.batch).setup_s
    return device.launch_s["gemm"] + setup_s + _gemm_s(device, shape, dtype, DTYPE_BYTES[dtype] * shape.elements)


def conv_latency_s(device: Device, shape: ConvShape, dtype: str, direction: Direction = "forward") -> float:
    """Latency in s of a convolution, or of the gradient of its input (`data`) or weight, with its launch.

    A device that lacks grouped convolution runs it as a dense one, with zeros between the groups. Blocks of channels
    that convolutions of images are laid out in do not hold for volumes, which run as products of unfolded windows.
    """
    kind = device.compute_dtype(dtype)
    engine = device.engine_for(dtype)
    element = DTYPE_BYTES[dtype]
    step = (device.alignment if len(shape.kernel) == 3 else device.alignment_conv)[kind]
    wanted = replace(shape, groups=1) if "grouped_conv" in device.lacks else shape
    has_few_channels = wanted.channels_in // wanted.groups < _FEW_CHANNELS
    shape = _aligned(wanted, wanted.groups, step)
    is_aligned, shape = shape == wanted, _plain(shape)
    direction = _MIRRORED[direction] if shape.transposed else direction
    traffic = element * sum(_elements(shape))
    product = _implied_gemm(shape, direction)
    launch_s = device.launch_s["conv"]
    if engine.unfold is not None and direction == "forward" and runs_unfolded(wanted, device.alignment_conv["fp32"]):
        return launch_s + _unfolded_s(device, engine, wanted, dtype)
    if shape.groups > 1 and min(shape.channels_in, shape.channels_out) == shape.groups:
        flops = 2.0 * product.m * product.n * product.k * product.batch
        vector_flops = device.peak_flops[device.compute_dtype("fp32")] * engine.depthwise_efficiency
        return launch_s + _norm(device, flops / vector_flops, traffic / device.bandwidth_bytes_s)
    kernels = {"forward": engine.conv, "data": engine.conv_data, "weight": engine.conv_weight}[direction]
    kernels = kernels if is_aligned else kernels.slower
    latency_s = _product_s(device, kernels, product, dtype, traffic)
    if has_few_channels:
        latency_s /= kernels.few_channels
    if engine.winograd is not None and _has_winograd(shape):
        latency_s = min(latency_s, _winograd_s(device, engine.winograd, kernels, shape, dtype, direction))
    return launch_s + kernels.setup_s + latency_s


def _unfolded_s(device: Device, engine: Engine, shape: ConvShape, dtype: str) -> float:
    """A convolution as MLAS runs it without blocks: windows are unfolded, by each thread its own, and multiplied.

    With more filters than positions, one thread unfolds all of an image first.
    """
    assert engine.unfold is not None
    filters, inner, positions, parts = product_of(shape)
    product = GemmShape(filters, positions, inner, parts, "NN")
    latency_s = _product_s(device, engine.gemm, product, dtype, DTYPE_BYTES[dtype] * sum(_elements(shape)))
    if is_product(shape) or not filters * inner * positions * parts:
        return latency_s
    each_s = engine.unfold.strided_s if max(shape.stride) > 1 else engine.unfold.each_s
    threads = 1 if is_whole(shape) else device.units
    return latency_s + inner * positions * parts * (each_s + engine.unfold.row_s / shape.size_out[-1]) / threads


def attention_latency_s(device: Device, shape: AttentionShape, dtype: str) -> float:
    """Latency in s of softmax(QKᵀ)V: one fused kernel, or two products and a softmax where the device has none."""
    kernels, fused = device.engine_for(dtype).attention, "flash_attention" not in device.lacks
    if kernels is not None and fused:
        return device.launch_s["gemm"] + kernels.setup_s + _fused_attention_s(device, kernels, shape, dtype)
    element = DTYPE_BYTES[dtype]
    batch = shape.batch * shape.heads
    keys = math.ceil(shape.keys / 2) if shape.causal and fused else shape.keys  # apart, all are computed
    scores = GemmShape(shape.queries, keys, shape.head_dim, batch)
    values = GemmShape(shape.queries, shape.head_dim, keys, batch, "NN")
    rows = 2 * shape.queries * shape.heads + 2 * shape.keys * shape.heads_kv
    operand_bytes = element * shape.batch * shape.head_dim * rows
    if fused:
        products = (replace(product, layout="NN") for product in (scores, values))  # nothing is streamed in one kernel
        return device.launch_s["gemm"] + sum(_gemm_s(device, product, dtype, operand_bytes / 2) for product in products)
    score_bytes = element * batch * shape.queries * shape.keys
    return sum(gemm_latency_s(device, product, dtype) for product in (scores, values)) + memory_latency_s(
        device, 2 * score_bytes
    )


def _fused_attention_s(device: Device, kernels: Kernels, shape: AttentionShape, dtype: str) -> float:
    """One kernel without its launch: blocks of queries run in waves, each over all keys; the head's width is padded."""
    rows = _QUERIES if shape.queries > _QUERIES // 2 else _QUERIES // 2
    keys = _round_up(math.ceil(shape.keys / 2) if shape.causal else shape.keys, _KEYS)
    waves = shape.batch * shape.heads * math.ceil(shape.queries / rows) / device.units
    waves = (1 - kernels.overlap) * math.ceil(waves) + kernels.overlap * max(waves, 1.0)
    flops = 4.0 * rows * keys * _round_up(shape.head_dim, _HEAD) * device.units
    compute_s = waves * flops / (device.peak_flops[device.compute_dtype(dtype)] * kernels.efficiency)
    operands = 2 * shape.head_dim * (shape.queries * shape.heads + shape.keys * shape.heads_kv)
    masks = shape.queries * shape.keys if shape.mask != "none" else 0
    traffic = DTYPE_BYTES[dtype] * shape.batch * (operands + masks)
    return _norm(device, compute_s, traffic / (device.bandwidth_bytes_s * kernels.bandwidth))


def recurrent_latency_s(device: Device, shape: RecurrentShape, dtype: str) -> float:
    """Latency in s of a recurrent call: a layer takes one product for all its inputs, then one a step, in sequence."""
    gates = shape.gates * shape.hidden_size
    state_bytes = DTYPE_BYTES[dtype] * shape.batch * (shape.hidden_size + gates)  # the weight stays in cache
    step = _gemm_s(device, GemmShape(shape.batch, gates, shape.hidden_size, layout="NN"), dtype, state_bytes)
    latency_s = 0.0
    for layer in range(shape.layers):
        width = shape.input_size if layer == 0 else shape.hidden_size * shape.directions
        inputs = gemm_latency_s(device, GemmShape(shape.batch * shape.steps, gates, width), dtype)
        latency_s += shape.directions * (inputs + shape.steps * (device.recurrent_step_s + step))
    return latency_s


def memory_latency_s(device: Device, traffic_bytes: float) -> float:
    """Latency in s of an operation that only moves data, with its launch."""
    return device.launch_s["other"] + traffic_bytes / device.bandwidth_bytes_s


def _gemm_s(device: Device, shape: GemmShape, dtype: str, traffic_bytes: float) -> float:
    """A product without its launch, extents rounded up to the alignment."""
    kernels = device.engine_for(dtype).products(shape.batch)
    step = device.alignment[device.compute_dtype(dtype)]
    aligned = replace(shape, n=_round_up(shape.n, step), k=_round_up(shape.k, step))
    if aligned != shape:
        kernels = kernels.slower
    skinny_s = 0.0
    if shape.layout == "TN" and 0 not in (shape.m, shape.n):
        skinny_s = traffic_bytes / kernels.skinny_bandwidth_bytes_s / (1 + (min(shape.m, shape.n) / _SKINNY) ** 4)
    return _product_s(device, kernels, aligned, dtype, traffic_bytes, skinny_s)


def _product_s(
    device: Device, kernels: Kernels, shape: GemmShape, dtype: str, traffic_bytes: float, other_s: float = 0.0
) -> float:
    """The smooth maximum of what units, caches, memory and anything else need, with the best kernel of the menu."""
    dram_s = traffic_bytes / (device.bandwidth_bytes_s * kernels.bandwidth)
    if 0 in (shape.m, shape.n, shape.k, shape.batch):
        return dram_s
    engine = device.engine_for(dtype)
    m, n, k, batch = (float(extent) for extent in (shape.m, shape.n, shape.k, shape.batch))
    menu = _menu(kernels.tiles or engine.tiles, kernels, device.units)
    rows, columns = np.ceil(m / menu.tile_m), np.ceil(n / menu.tile_n)
    waves = batch * rows * columns * menu.split_per_unit
    waves = (1 - kernels.overlap) * np.ceil(waves) + kernels.overlap * np.maximum(waves, 1.0)
    steps = np.ceil(k / menu.split) + kernels.prologue
    compute_s = waves * steps * (menu.flops_over_efficiency * device.units)
    compute_s /= device.peak_flops[device.compute_dtype(dtype)]
    operand_bytes = (DTYPE_BYTES[dtype] * batch * k) * (columns * m + rows * n)
    l2_s = (operand_bytes + menu.partial_bytes * (batch * m * n)) / (device.l2_bandwidth_bytes_s * engine.l2_share)
    p, longer_s = device.norm_exponent, np.maximum(compute_s, l2_s)
    on_chip_s = longer_s * ((compute_s / longer_s) ** p + (l2_s / longer_s) ** p) ** (1 / p)
    on_chip_s += kernels.split_setup_s * (menu.split > 1)
    return _norm(device, float(on_chip_s.min()), dram_s, other_s)


def _norm(device: Device, *parts_s: float) -> float:
    """Smooth maximum: parts that overlap hide each other, except near a tie."""
    p, longest_s = device.norm_exponent, max(parts_s)
    if not longest_s:
        return 0.0
    powers: float = sum((part_s / longest_s) ** p for part_s in parts_s)  # of seconds they would be too small
    return longest_s * powers ** (1 / p)


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
def _menu(tiles: tuple[tuple[int, int], ...], kernels: Kernels, units: int) -> _Menu:
    largest = max(m * n for m, n in tiles)
    menu = [
        (m, n, split, kernels.efficiency * (m * n / largest) ** kernels.tile_exponent)
        for m, n in tiles
        for split in kernels.split_k
    ]
    tile_m, tile_n, split, efficiency = np.array(menu, dtype=float).T
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


def _elements(shape: ConvShape) -> tuple[float, int, int]:
    """How many of the input, the output and the weight are moved: rows that a stride skips are not read."""
    skipped = math.prod(min(1.0, k / s) for k, s in zip(shape.kernel[:-1], shape.stride[:-1], strict=True))
    return (
        shape.batch * shape.channels_in * math.prod(shape.size_in) * skipped,
        shape.batch * shape.channels_out * math.prod(shape.size_out),
        shape.channels_in // shape.groups * shape.channels_out * math.prod(shape.kernel),
    )


def _has_winograd(shape: ConvShape) -> bool:
    return shape.kernel in ((3, 3), (5, 5)) and {*shape.stride, *shape.dilation, shape.groups} == {1}


def _winograd_s(
    device: Device, rates: Winograd, kernels: Kernels, shape: ConvShape, dtype: str, direction: Direction
) -> float:
    """The faster of Winograd's algorithms for a kernel: in one kernel, or with transforms before and after.

    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016; what is kept between the steps is our
    reading of cuDNN's fused and non-fused algorithms.
    """
    size = shape.size_in if direction == "data" else shape.size_out
    inputs, outputs = shape.channels_in, shape.channels_out
    element = DTYPE_BYTES[dtype]

    def products(tile: int, points: int) -> GemmShape:
        patches = shape.batch * math.prod(math.ceil(extent / tile) for extent in size)
        if direction == "weight":
            return GemmShape(outputs, inputs, patches, points)
        n, k = (outputs, inputs) if direction == "forward" else (inputs, outputs)
        return GemmShape(patches, n, k, points)

    read, written, weight = _elements(shape)
    points = _POINTS[shape.kernel[0]]
    product = products(_TILE, points)
    operands = product.elements
    filters = weight + points * inputs * outputs
    maps = read + written + operands - points * inputs * outputs
    rate = rates.transformed if shape.kernel == (3, 3) else rates.five
    filter_rate = 1.0 if direction == "weight" else rates.filter_bandwidth
    transforms_s = element * (filters / filter_rate + maps) / device.bandwidth_bytes_s + rates.setup_s
    faster = replace(kernels, efficiency=kernels.efficiency * rate)
    latency_s = transforms_s + _product_s(device, faster, product, dtype, element * operands)
    if shape.kernel == (3, 3):
        faster = replace(kernels, efficiency=kernels.efficiency * rates.fused)
        fused = products(_FUSED_TILE, _FUSED_POINTS)
        latency_s = min(latency_s, _product_s(device, faster, fused, dtype, element * (read + written + weight)))
    return latency_s


def _op_class(op: OpDesc) -> str:
    if op.conv is not None:
        return "conv"
    if op.recurrent is not None:
        return "recurrent"
    return "gemm" if op.gemm or op.attention else "other"
