"""How ONNX Runtime's kernels for CPUs (MLAS) divide a shape: blocks of channels, rows and columns, and threads.

Read off the sources of ONNX Runtime 1.2x (MLAS: snchwc, convolve, the kernels for AVX-512; the thread pool's cost
model) and off graphs that 1.32 optimises; how long a short kernel waits is our reading.
"""

from __future__ import annotations

import math
from functools import lru_cache

from lrcompile.graph.op import ConvShape, OpDesc, RecurrentShape

SINGLE = 65_536  # multiply-adds up to which a product runs on one thread
SLICE = 16  # columns of a product that threads divide
SETS = 4  # blocks of filters that a kernel computes at a time
TASK = 4096  # elements of a task of the functions that MLAS computes
LONG_RUN = 24  # elements from which a transpose copies runs
SOFTMAX = 16_384  # values from which a softmax runs on several threads
WAIT = 4  # cycles after which a product can be added to the one before: short kernels wait for it
_BYTE_CYCLES = 11 / 64  # of reading or writing, in the thread pool's cost model
_SHARED_CYCLES = 2.1e5  # from which threads share: what it takes to start two
_CYCLES = {  # an element
    "sigmoid": 2.0, "copy": 1.0, "binary": 1.0, "bias": 1.0, "transpose": 1.0, "reduce": 6.0,
}  # fmt: skip
_ARRAYS = {"reduce": 1, "binary": 3, "skip_layer_norm": 3}  # that are read or written, 2 of others
_BATCHED = 4  # sequences from which an LSTM divides them among threads


def elements_of(op: OpDesc, size: float) -> int:
    """Elements that a function maps, of so many bytes each."""
    return max(1, round((op.weight_bytes + op.activation_bytes) / size / _ARRAYS.get(op.function, 2)))


def is_shared(function: str, elements: int, size: float) -> bool:
    """Whether there is enough of a function for several threads, by the thread pool's cost model; others are shared."""
    if function not in _CYCLES:
        return True
    cycles = _ARRAYS.get(function, 2) * size * _BYTE_CYCLES + _CYCLES[function]
    return elements * cycles >= _SHARED_CYCLES


def divides_sequences(shape: RecurrentShape) -> bool:
    """Whether threads divide the sequences of an LSTM, and not its products."""
    divided = shape.batch > _BATCHED or (shape.batch > 1 and shape.hidden_size <= 256)
    return divided and shape.gates == 4


def product_of(shape: ConvShape) -> tuple[int, int, int, int]:
    """(filters, what each reads, positions, products) of a convolution without blocks."""
    inner = shape.channels_in // shape.groups * math.prod(shape.kernel)
    return shape.channels_out // shape.groups, inner, math.prod(shape.size_out), shape.batch * shape.groups


def taps_met(shape: ConvShape, axis: int) -> list[list[int]]:
    """For each output along an axis, the elements of the kernel that meet the image: in blocks others are skipped."""
    (before, _), stride, dilation = shape.padding[axis], shape.stride[axis], shape.dilation[axis]
    return [
        [tap for tap in range(shape.kernel[axis]) if 0 <= out * stride - before + tap * dilation < shape.size_in[axis]]
        for out in range(shape.size_out[axis])
    ]


def met_rows(shape: ConvShape) -> float:
    """The share of a kernel's rows that meet the image, over all rows of the output."""
    return max(sum(map(len, taps_met(shape, 0))), 1) / (shape.size_out[0] * shape.kernel[0])


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


def padded(size: int, block: int) -> int:
    """A size in whole blocks."""
    return -(-size // block) * block


def sets_of(shape: ConvShape, block: int, kind: str) -> tuple[int, ...]:
    """The blocks of filters (of a group) that a kernel computes at a time; one at a time of a depthwise convolution."""
    filters = -(-shape.channels_out // (1 if kind == "depthwise" else shape.groups) // block)
    if kind == "depthwise":
        return (1,) * filters
    return (SETS,) * (filters // SETS) + (filters % SETS,) * (filters % SETS > 0)


def product_cycles(m: int, n: int, k: int, block: int, wait: int = WAIT) -> float:
    """Cycles of a product's kernel: rows in full, then by half as many, then what is left; columns by two vectors.

    A step takes as many cycles as it has products of two vectors, or those that one has to wait for the last.
    """
    rows = rows_of(block)
    two, one = divmod(-(-n // block), 2)

    def of(count: int) -> float:
        return two * max(count, wait) + one * max(count / 2, wait) if count else 0.0

    full, rest = divmod(m, rows)
    half = rows // 2
    return k * (full * of(rows) + (of(half) + of(rest - half) if rest > half else of(rest)))


@lru_cache(maxsize=4096)
def row_cycles(shape: ConvShape, block: int, kind: str, threads: int, wait: int = WAIT) -> float:
    """Cycles of all filters for one row of outputs and one channel: pixels at padded edges are computed one by one.

    Of a kernel only what meets the image is computed.
    """
    row, sets = shape.size_out[1], sets_of(shape, block, kind)
    steps = (6, 3, 2, 1) if block > 8 else (3, 2, 1)

    def run(pixels: int, filters: int) -> float:
        total = 0.0
        for step in steps:
            total += pixels // step * max(step * filters / 2, wait)
            pixels %= step
        return total

    if kind == "pointwise" and set(shape.stride) == {1}:  # a thread's rows are one
        high = -(-shape.size_out[0] // threads)
        return sum(run(high * row, filters) for filters in sets) / high
    taps, met = shape.kernel[1], [len(window) for window in taps_met(shape, 1)]
    inside = met.count(taps)
    edges = sum(met) - inside * taps
    across = sum(edges * max(filters / 2, wait) + taps * run(inside, filters) for filters in sets)
    return across * met_rows(shape) * shape.kernel[0]
