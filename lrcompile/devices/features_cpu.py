"""What the residuals of a CPU with ONNX Runtime depend on: sizes, and how its kernels and threads divide the work.

Sizes come as logarithms to the base of two, and so does what is lost to division: the share that is empty in the last
block of channels, rows or pixels, and that in which some threads have nothing left to do.
"""

from __future__ import annotations

import math

from lrcompile.devices import mlas
from lrcompile.devices.mlas import padded
from lrcompile.graph.op import AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

Features = list[float]
APART = 3.0  # of another kernel


def of_gemm(shape: GemmShape, block: int, threads: int) -> Features:
    """Extents, work, what is empty in the last columns and rows, how both are divided; one row is another kernel."""
    m, n, k, batch = shape.m, shape.n, shape.k, shape.batch
    wide = n > m  # columns are divided then, rows otherwise
    return [
        *map(log2, (m, n, k, batch, m * n * k * batch, n * k)),
        empty(n, block), empty(n, 2 * block), empty(m, mlas.rows_of(block)),
        uneven(-(-n // mlas.SLICE), threads) if wide and batch == 1 else 0.0,
        empty(-(-m // threads), mlas.rows_of(block)) if not wide and batch == 1 else 0.0,
        uneven(batch, threads) if batch > 1 else 0.0,
        float(m == 1), float(m * n * k * batch < mlas.SINGLE),
    ]  # fmt: skip


def of_attention(shape: AttentionShape, block: int, threads: int) -> Features:
    """Sizes, work, what mask there is, and how heads are divided."""
    heads = shape.batch * shape.heads
    scores = heads * shape.queries * shape.keys
    sizes = (shape.batch, shape.heads, shape.heads / max(shape.heads_kv, 1), shape.queries, shape.keys, shape.head_dim)
    return [
        *map(log2, (*sizes, heads, scores, scores * shape.head_dim)),
        float(shape.mask != "none"), float(shape.mask == "boolean"), float(shape.causal),
        uneven(heads, threads), float(scores < mlas.SOFTMAX),
        empty(shape.keys, 16), empty(shape.head_dim, 16), empty(shape.queries, mlas.rows_of(block)),
    ]  # fmt: skip


def of_recurrent(shape: RecurrentShape, threads: int) -> Features:
    """Sizes, work of the inputs and of all steps, and what decides whether sequences or products are divided."""
    calls, hidden = shape.layers * shape.directions, shape.hidden_size
    inputs = calls * shape.batch * shape.steps * hidden * shape.input_size * shape.gates
    states = shape.batch * hidden**2 * shape.gates
    sizes = (shape.batch, shape.steps, shape.input_size, hidden, shape.layers, shape.directions, shape.gates)
    return [
        *map(log2, (*sizes, shape.steps * calls, states, inputs, inputs + states * shape.steps * calls)),
        float(mlas.divides_sequences(shape)), float(states < mlas.SINGLE), uneven(shape.batch, threads),
    ]  # fmt: skip


def of_function(op: OpDesc, size: float, threads: int) -> Features:
    """Bytes, rows, and whether there is enough for several threads, and how it is divided among them."""
    moved, row = op.weight_bytes + op.activation_bytes, max(1, op.row)
    elements = mlas.elements_of(op, size)
    alone = not mlas.is_shared(op.function, elements, size)
    if op.function in ("sigmoid", "copy", "binary", "bias"):
        return [log2(moved), log2(row if op.function == "bias" else 1), APART * alone]
    if op.function in ("gelu", "silu"):
        tasks = -(-elements // mlas.TASK)
        return [log2(moved), APART * (tasks == 1), log2(threads * -(-tasks // threads) * mlas.TASK / elements)]
    count = max(1, elements // row)
    if op.function == "transpose":
        return [log2(moved), log2(row), log2(count), APART * (row < mlas.LONG_RUN), float(not alone)]
    return [
        log2(moved), log2(row), log2(count), APART * (count == 1), uneven(count, threads) if count > 1 else 0.0,
        float(row < 8), (row % 8) / row,
    ]  # fmt: skip


def of_conv(shape: ConvShape, block: int, threads: int, kind: str) -> Features:
    """Of images ("pointwise", "conv", "depthwise"): sizes, and how the kernels for blocks or for products divide it."""
    into, out, taps = shape.channels_in, shape.channels_out, math.prod(shape.kernel)
    pixels, (high, row) = math.prod(shape.size_out), shape.size_out
    work = pixels * shape.batch * into * out // shape.groups * taps
    sizes = [pixels, shape.batch, out, taps, math.prod(shape.stride), work, row]
    found = [*map(log2, sizes if kind == "depthwise" else [*sizes, into]), float(into < block)]
    if kind == "conv":
        found.append(log2(mlas.met_rows(shape)))
    if kind != "depthwise":
        found += [log2(-(-into // 128)), empty(into, 128)]
    if not mlas.in_blocks(shape, block):
        return [*found, *[0.0] * _BLOCKED, *_of_product(shape, block, threads)]
    sets, filters = mlas.sets_of(shape, block, kind), -(-out // block)
    joined = kind == "pointwise" and set(shape.stride) == {1}
    return [
        *found,
        1.0, empty(into, block), empty(out, block), uneven(shape.batch * len(sets) * high, threads),
        sets[-1] / mlas.SETS, 0.0 if joined else log2(_row_cost(shape, block, kind)),
        empty(-(-high // threads) * row, 6) if joined else 0.0,
        log2(min(filters, mlas.SETS) * block * 4 * pixels / threads),
        *[0.0] * _PRODUCT,
    ]  # fmt: skip


def of_unfolded(shape: ConvShape, block: int, threads: int) -> Features:
    """Of volumes and groups: the product that it is, after its windows were unfolded, and how that is divided."""
    filters, inner, columns, parts = mlas.product_of(shape)
    sizes = (columns, parts, filters, inner, math.prod(shape.kernel), math.prod(shape.stride), shape.size_out[-1])
    return [
        *map(log2, (*sizes, filters * inner, filters * inner * columns * parts, shape.batch)),
        *_of_product(shape, block, threads),
    ]  # fmt: skip


_BLOCKED, _PRODUCT = 8, 7


def _of_product(shape: ConvShape, block: int, threads: int) -> Features:
    filters, inner, columns, parts = mlas.product_of(shape)
    whole, alone = mlas.is_whole(shape), parts == 1
    slices = -(-columns // threads)
    return [
        float(mlas.is_product(shape)), float(whole),
        uneven(parts, threads) if not alone and not whole else 0.0,
        log2(threads * padded(slices, mlas.SLICE) / columns) if alone and not whole else 0.0,
        empty(columns, mlas.SLICE), empty(filters, mlas.rows_of(block)),
        APART * (filters * inner * columns < mlas.SINGLE),
    ]  # fmt: skip


def _row_cost(shape: ConvShape, block: int, kind: str) -> float:
    """What a row takes over what it would take if nothing waited and nothing was at an edge."""
    filters, met = -(-shape.channels_out // block), mlas.met_rows(shape) * math.prod(shape.kernel)
    return mlas.row_cycles(shape, block, kind, 1) / (shape.size_out[1] * met * filters / 2)


def uneven(parts: int, threads: int) -> float:
    """What threads could do while the last parts are computed, where each is computed by one."""
    return log2(threads * -(-parts // threads) / max(parts, 1))


def empty(size: int, block: int) -> float:
    """What is empty in the last block."""
    return log2(padded(size, block) / size) if size else 0.0


def log2(size: float) -> float:
    """Of nothing too."""
    return math.log2(max(size, 1e-9))
