"""What the residuals of a CPU with ONNX Runtime depend on: how MLAS and the thread pool divide the work of a shape.

Sizes come as logarithms to the base of two, and so does what is lost to division: the share that is empty in the last
block of channels, rows or pixels, and that in which some threads have nothing left to do. Read off the sources of ONNX
Runtime 1.2x (MLAS: snchwc, convolve, the kernels for AVX-512; the thread pool's cost model) and off graphs that 1.32
optimises; what a kernel takes for a row is our reading.
"""

from __future__ import annotations

import math

from lrcompile.graph.op import AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

Features = list[float]
APART = 3.0  # of another kernel
_SINGLE = 65_536  # multiply-adds up to which a product runs on one thread
_SLICE = 16  # columns of a product that threads divide
_SETS = 4  # blocks of filters that a kernel computes at a time
_TASK = 4096  # elements of a task of the functions that MLAS computes
_BYTE_CYCLES = 11 / 64  # of reading or writing, in the thread pool's cost model
_START_CYCLES = _THREAD_CYCLES = 1e5
_CYCLES = {"sigmoid": 2.0, "copy": 1.0, "binary": 1.0, "bias": 1.0}  # an element, of functions that go by that model
_ARRAYS = {"reduce": 1, "binary": 3, "skip_layer_norm": 3}  # that are read or written, 2 of others
_LONG_RUN = 24  # elements from which a transpose copies runs
_SOFTMAX = 16_384  # values from which a softmax runs on several threads
_BATCHED = 4  # sequences from which an LSTM divides them among threads


def of_gemm(shape: GemmShape, block: int, threads: int) -> Features:
    """Extents, work, what is empty in the last columns and rows, how both are divided; one row is another kernel."""
    m, n, k, batch = shape.m, shape.n, shape.k, shape.batch
    wide = n > m  # columns are divided then, rows otherwise
    return [
        *map(log2, (m, n, k, batch, m * n * k * batch, n * k)),
        empty(n, block), empty(n, 2 * block), empty(m, rows_of(block)),
        uneven(-(-n // _SLICE), threads) if wide and batch == 1 else 0.0,
        empty(-(-m // threads), rows_of(block)) if not wide and batch == 1 else 0.0,
        uneven(batch, threads) if batch > 1 else 0.0,
        float(m == 1), float(m * n * k * batch < _SINGLE),
    ]  # fmt: skip


def of_attention(shape: AttentionShape, block: int, threads: int) -> Features:
    """Sizes, work, what mask there is, and how heads are divided."""
    heads = shape.batch * shape.heads
    scores = heads * shape.queries * shape.keys
    sizes = (shape.batch, shape.heads, shape.heads / shape.heads_kv, shape.queries, shape.keys, shape.head_dim)
    return [
        *map(log2, (*sizes, heads, scores, scores * shape.head_dim)),
        float(shape.mask != "none"), float(shape.mask == "boolean"), float(shape.causal),
        uneven(heads, threads), float(scores < _SOFTMAX),
        empty(shape.keys, 16), empty(shape.head_dim, 16), empty(shape.queries, rows_of(block)),
    ]  # fmt: skip


def of_recurrent(shape: RecurrentShape, threads: int) -> Features:
    """Sizes, work of the inputs and of all steps, and what decides whether sequences or products are divided."""
    calls, hidden = shape.layers * shape.directions, shape.hidden_size
    inputs = calls * shape.batch * shape.steps * hidden * shape.input_size * shape.gates
    states = shape.batch * hidden**2 * shape.gates
    sizes = (shape.batch, shape.steps, shape.input_size, hidden, shape.layers, shape.directions, shape.gates)
    divided = shape.batch > _BATCHED or (shape.batch > 1 and hidden <= 256)
    return [
        *map(log2, (*sizes, shape.steps * calls, states, inputs, inputs + states * shape.steps * calls)),
        float(divided and shape.gates == 4), float(states < _SINGLE), uneven(shape.batch, threads),
    ]  # fmt: skip


def of_function(op: OpDesc, size: float, threads: int) -> Features:
    """Bytes, rows, and whether there is enough for several threads, and how it is divided among them."""
    moved, row = op.weight_bytes + op.activation_bytes, max(1, op.row)
    elements = max(1, round(moved / size / _ARRAYS.get(op.function, 2)))
    if op.function in _CYCLES:
        cycles = elements * ((_ARRAYS.get(op.function, 2)) * size * _BYTE_CYCLES + _CYCLES[op.function])
        several = cycles >= _START_CYCLES + 1.1 * _THREAD_CYCLES
        return [log2(moved), log2(row if op.function == "bias" else 1), APART * (not several)]
    if op.function in ("gelu", "silu"):
        tasks = -(-elements // _TASK)
        return [log2(moved), APART * (tasks == 1), log2(threads * -(-tasks // threads) * _TASK / elements)]
    count = max(1, elements // row)
    if op.function == "transpose":
        several = elements * (2 * size * _BYTE_CYCLES + 1) >= _START_CYCLES + 1.1 * _THREAD_CYCLES
        return [log2(moved), log2(row), log2(count), APART * (row < _LONG_RUN), float(several)]
    return [
        log2(moved), log2(row), log2(count), APART * (count == 1), uneven(count, threads) if count > 1 else 0.0,
        float(row < 8), (row % 8) / row,
    ]  # fmt: skip


def of_conv(shape: ConvShape, block: int, threads: int, kind: str) -> Features:
    """Of images ("pointwise", "conv", "depthwise"): sizes, and how the kernels for blocks or for products divide it."""
    into, out, taps = shape.channels_in, shape.channels_out, math.prod(shape.kernel)
    pixels, (high, row) = math.prod(shape.size_out), shape.size_out
    work = pixels * shape.batch * into * out // shape.groups * taps
    sizes = [
        pixels,
        shape.batch,
        out,
        taps,
        math.prod(shape.stride),
        work,
        row,
        *([into] if kind != "depthwise" else []),
    ]
    blocked = in_blocks(shape, block)
    filters = -(-out // block)
    sets = filters if kind == "depthwise" else -(-filters // _SETS)
    last = 1 if kind == "depthwise" else (filters - 1) % _SETS + 1
    joined = kind == "pointwise" and set(shape.stride) == {1}
    found = [
        *map(log2, sizes),
        float(blocked), float(into < block),
        empty(into, block) if blocked else 0.0, empty(out, block) if blocked else 0.0,
        uneven(shape.batch * sets * high, threads) if blocked else 0.0,
        float(blocked) * last / _SETS,
        log2(_row_cost(shape, filters, block, kind)) if blocked and not joined else 0.0,
        empty(-(-high // threads) * row, 6) if blocked and joined else 0.0,
        log2(min(filters, _SETS) * block * 4 * pixels / threads),
    ]  # fmt: skip
    if kind == "conv":
        found.append(log2(_met(shape)))
    if kind != "depthwise":
        found += [log2(-(-into // 128)), empty(into, 128)]
    return [*found, *(_of_product(shape, block, threads) if not blocked else [0.0] * _PRODUCT)]


def of_unfolded(shape: ConvShape, block: int, threads: int) -> Features:
    """Of volumes and groups: the product that it is, after its windows were unfolded, and how that is divided."""
    filters, inner, columns, parts = product_of(shape)
    sizes = (columns, parts, filters, inner, math.prod(shape.kernel), math.prod(shape.stride), shape.size_out[-1])
    return [
        *map(log2, (*sizes, filters * inner, filters * inner * columns * parts, shape.batch)),
        *_of_product(shape, block, threads),
    ]  # fmt: skip


_PRODUCT = 7


def _of_product(shape: ConvShape, block: int, threads: int) -> Features:
    filters, inner, columns, parts = product_of(shape)
    whole, alone = is_whole(shape), parts == 1
    slices = -(-columns // threads)
    return [
        float(is_product(shape)), float(whole),
        uneven(parts, threads) if not alone and not whole else 0.0,
        log2(threads * padded(slices, _SLICE) / columns) if alone and not whole else 0.0,
        empty(columns, _SLICE), empty(filters, rows_of(block)),
        APART * (filters * inner * columns < _SINGLE),
    ]  # fmt: skip


def product_of(shape: ConvShape) -> tuple[int, int, int, int]:
    """(filters, what each reads, positions, products) of a convolution without blocks."""
    inner = shape.channels_in // shape.groups * math.prod(shape.kernel)
    return shape.channels_out // shape.groups, inner, math.prod(shape.size_out), shape.batch * shape.groups


def _row_cost(shape: ConvShape, filters: int, block: int, kind: str) -> float:
    """What a row takes over what its pixels would take: several at a time inside, one by one at padded edges.

    Cycles of a kernel are those of its products, two at a time, or the four that one has to wait for the last.
    """
    row, reach = shape.size_out[-1], shape.dilation[-1] * (shape.kernel[-1] - 1) + 1
    before, stride = shape.padding[-1][0], shape.stride[-1]
    left = min(row, -(-before // stride))
    inside = max(0, min(row, (shape.size_in[-1] + before - reach) // stride + 1) - left)
    edges = row - inside
    steps = (6, 3, 2, 1) if block > 8 else (3, 2, 1)

    def cycles(f: int) -> float:
        total, rest = edges * max(f / 2, 4.0), inside
        for step in steps:
            total += rest // step * max(step * f / 2, 4.0)
            rest %= step
        return total

    sets = (
        [1] * filters
        if kind == "depthwise"
        else [_SETS] * (filters // _SETS) + [filters % _SETS] * (filters % _SETS > 0)
    )
    return sum(map(cycles, sets)) / (row * filters / 2)


def _met(shape: ConvShape) -> float:
    """The share of a kernel's rows that meet the image, over all rows of the output: others are skipped."""
    (before, _), stride, dilation, taps = shape.padding[0], shape.stride[0], shape.dilation[0], shape.kernel[0]
    met = sum(
        0 <= y * stride - before + t * dilation < shape.size_in[0]
        for y in range(shape.size_out[0])
        for t in range(taps)
    )
    return max(met, 1) / (shape.size_out[0] * taps)


def in_blocks(shape: ConvShape, block: int) -> bool:
    """Whether ONNX Runtime lays the channels out in blocks (read off the graphs that it optimises, 1.32).

    Those that come in fours, and fewer than a block; of groups only whole blocks; of depthwise ones those in fours
    that have one filter each.
    """
    into, out = shape.channels_in // shape.groups, shape.channels_out // shape.groups
    if shape.groups == 1:
        return into % 4 == 0 or into < block
    if into == 1:
        return out == 1 and shape.groups % 4 == 0
    return into % block == 0 and out % block == 0


def runs_unfolded(shape: ConvShape, block: int) -> bool:
    """Whether a convolution runs as a product: all but those of images whose channels are in blocks."""
    return not shape.transposed and (len(shape.kernel) != 2 or not in_blocks(shape, block))


def rows_of(block: int) -> int:
    """Rows of a product that MLAS computes together: 6 with AVX2, 12 with AVX-512; half as many pixels in blocks."""
    return 6 if block <= 8 else 12


def is_product(shape: ConvShape) -> bool:
    """Whether nothing has to be unfolded before a convolution without blocks is a product."""
    return set(shape.kernel) == {1} == set(shape.stride) and not any(map(any, shape.padding))


def is_whole(shape: ConvShape) -> bool:
    """Whether MLAS unfolds each image by one thread, and then multiplies by all: with more filters than pixels."""
    return not is_product(shape) and shape.channels_out // shape.groups > math.prod(shape.size_out)


def uneven(parts: int, threads: int) -> float:
    """What threads could do while the last parts are computed, where each is computed by one."""
    return log2(threads * -(-parts // threads) / max(parts, 1))


def empty(size: int, block: int) -> float:
    """What is empty in the last block."""
    return log2(padded(size, block) / size) if size else 0.0


def padded(size: int, block: int) -> int:
    """A size in whole blocks."""
    return -(-size // block) * block


def log2(size: float) -> float:
    """Of nothing too."""
    return math.log2(max(size, 1e-9))
