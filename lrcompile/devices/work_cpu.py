"""What latencies on a CPU with ONNX Runtime are made of: amounts of work, each with a price of its own.

A call, cycles of a kernel's arithmetic, rows and blocks that it goes over, values that it moves, bytes from beyond a
cache; of what threads share it is the part of the one that has most. Prices in s are fitted to measurements
(`calibrate`). Which amounts count is our reading of ONNX Runtime's sources (`mlas`).
"""

from __future__ import annotations

import math

from lrcompile.devices import mlas
from lrcompile.devices.mlas import padded, product_cycles, row_cycles
from lrcompile.graph.op import AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

Amounts = list[float]
_NEAR, _CACHE, _MEMORY = 2**15, 2**20, 2**24  # bytes beyond which values come from the next cache, and from memory
_LONG_SUM = 128  # products of a slice, after which partial sums are stored
_WHOLE_ROWS = ("gelu", "silu", "sigmoid", "copy", "binary")  # functions to which rows make no difference


def of_gemm(shape: GemmShape, block: int, threads: int) -> Amounts:
    """Of a product, or of a batch of them."""
    m, n, k, batch = shape.m, shape.n, shape.k, shape.batch
    several = m * n * k * batch >= mlas.SINGLE
    share = threads if several else 1
    products, rows, columns = -(-batch // share), m, n
    if batch == 1 and several:
        rows, columns = (m, min(n, padded(-(-n // threads), mlas.SLICE))) if n > m else (-(-m // threads), n)
    cycles = products * product_cycles(rows, columns, k, block)
    panels = products * -(-rows // mlas.rows_of(block)) * padded(columns, mlas.SLICE)
    weight, slices = n * k * batch, products * -(-k // _LONG_SUM)
    return [
        1.0, float(several), *_either(m > 1, [cycles]), panels, panels * k,
        *_where(batch > 1, [products, weight / share]), *_where(m == 1, [weight / share]),
        *_beyond(4 * weight), *_beyond(4 * m * n * batch), m * k * batch / share, m * n * batch / share,
        rows * columns * slices, *_where(k >= _LONG_SUM, [slices]),
    ]  # fmt: skip


def of_attention(shape: AttentionShape, block: int, threads: int) -> Amounts:
    """Two products a head, of which one has its keys turned, softmax, heads taken apart and put together, masks."""
    heads, queries, keys, width = shape.batch * shape.heads, shape.queries, shape.keys, shape.head_dim
    scores, pairs = heads * queries * keys, shape.batch * queries * keys
    alone = heads == 1 and scores * width < mlas.SINGLE
    rows = -(-queries // threads) if heads == 1 and not alone else queries
    most = -(-heads // threads)  # heads of one thread
    softmax = threads if scores >= mlas.SOFTMAX else 1
    copies = 2 * heads * keys * width
    bound, free = (
        most * (product_cycles(rows, keys, width, block, wait) + product_cycles(rows, width, keys, block, wait))
        for wait in (mlas.WAIT, 0)
    )
    return [
        1.0, most, bound, free, most * keys * width, scores / softmax,
        *_either(keys % 16 > 0, [heads * queries / softmax]), heads * queries * (keys % 16) / softmax,
        shape.batch * width * (queries * shape.heads + 2 * keys * shape.heads_kv),
        heads * keys * width, *_beyond(4 * scores),
        *_where(shape.heads != shape.heads_kv, [1.0, copies]),
        *_where(shape.mask == "number", [1.0, scores, pairs, *_beyond(4 * scores)]),
        *_where(shape.mask == "boolean", [1.0, scores, pairs, *_beyond(4 * scores)]),
        *_where(shape.causal, [1.0, scores, queries * keys, *_beyond(4 * scores)]),
    ]  # fmt: skip


def of_recurrent(shape: RecurrentShape, block: int, threads: int) -> Amounts:
    """All inputs in one product a layer, and then the products of the steps; LSTM and GRU have prices of their own."""
    calls, hidden, gates = shape.layers * shape.directions, shape.hidden_size, shape.gates * shape.hidden_size
    steps, sequences = shape.steps * calls, shape.batch * shape.steps
    widths = [shape.input_size, *[hidden * shape.directions] * (shape.layers - 1)]
    divided = mlas.divides_sequences(shape)
    rows = -(-shape.batch // threads) if divided else shape.batch
    shared = not divided and shape.batch * hidden * gates >= mlas.SINGLE
    share = threads if shared else 1
    products = [2 * hidden, hidden] if shape.gates == 3 else [gates]
    cycles = sum(product_cycles(rows, columns, hidden, block) for columns in products) / share
    weight = 4 * hidden * gates / share
    amounts = [
        1.0, calls, steps, steps * rows, steps * rows * hidden, *_where(shared, [steps]),
        steps * rows * (hidden % 16), steps * cycles,
        steps * max(0.0, weight - _NEAR), steps * max(0.0, weight - _CACHE),
        shape.directions * sequences * gates * sum(widths) / threads, calls * hidden * gates,
        calls * sequences * gates, sequences * shape.input_size,
    ]  # fmt: skip
    return [*_either(shape.gates == 3, amounts), *_where(divided, [steps, calls])]


def of_function(op: OpDesc, size: float, threads: int) -> Amounts:
    """Elements and rows, what is left of a row after whole vectors, and bytes from beyond the caches."""
    row, elements = max(1, op.row), mlas.elements_of(op, size)
    count = max(1, elements // row)
    share = 1.0
    if op.function in ("gelu", "silu"):
        share = _shared(-(-elements // mlas.TASK), threads)
    elif mlas.is_shared(op.function, elements, size):
        whole = op.function in (*_WHOLE_ROWS, "bias", "transpose")
        share = threads if whole else _shared(count, threads)
    near, far = _beyond(op.weight_bytes + op.activation_bytes)
    rows = [count / share, count * (row % 16) / share]
    if op.function == "transpose":  # of single values, or of runs
        return [1.0, float(share > 1), near, far, *_where(row == 1, [elements / share, far]),
                *_where(row > 1, [1.0, elements / share, *rows])]  # fmt: skip
    amounts = [1.0, float(share > 1), elements / share, near, far]
    return amounts if op.function in _WHOLE_ROWS else [*amounts, *rows]


def of_conv(shape: ConvShape, block: int, threads: int, kind: str) -> Amounts:
    """Of images ("pointwise", "conv", "depthwise"): in blocks of channels, or as a product."""
    if not mlas.in_blocks(shape, block):
        return [*[0.0] * _BLOCKED, 1.0, *_unfolded(shape, block, threads)]
    into, out, (high, row) = shape.channels_in, shape.channels_out, shape.size_out
    sets, filters = len(mlas.sets_of(shape, block, kind)), -(-out // block)
    few = into < block and kind != "depthwise"  # these are read as they are, one after the other
    depth = 1 if kind == "depthwise" else into if few else padded(into, block)
    most = -(-shape.batch * sets * high // threads) / sets  # rows of outputs of one thread, all filters counted
    cycles = [most * depth * row_cycles(shape, block, kind, threads, wait) for wait in (mlas.WAIT, 0)]
    strided = max(shape.stride) > 1
    read = math.prod(len(set().union(*mlas.taps_met(shape, axis))) for axis in (0, 1))  # elements of a kernel
    weight = 4 * into * out // shape.groups * read
    inputs, outputs = 4 * shape.batch * into * math.prod(shape.size_in), 4 * shape.batch * out * high * row
    return [
        1.0, *_where(few, cycles), *_where(not few and strided, cycles), *_where(not few and not strided, cycles),
        most * sets, most * filters * shape.kernel[0], most * filters * row,
        outputs, inputs, weight, *_beyond(weight), *_beyond(inputs + outputs), *[0.0] * (1 + _UNFOLDED),
    ]  # fmt: skip


def of_unfolded(shape: ConvShape, block: int, threads: int) -> Amounts:
    """Of volumes and groups: a product, and the unfolding before it; groups of whole blocks run in blocks."""
    inputs, outputs = shape.channels_in * math.prod(shape.size_in), shape.channels_out * math.prod(shape.size_out)
    values = shape.batch * (inputs + outputs)
    if not mlas.runs_unfolded(shape, block):
        sets, high = len(mlas.sets_of(shape, block, "grouped")), shape.size_out[0]
        most = -(-shape.batch * shape.groups * sets * high // threads) / sets
        cycles = most * shape.channels_in // shape.groups * row_cycles(shape, block, "grouped", threads)
        return [1.0, cycles, most * sets, values, *[0.0] * (4 + _UNFOLDED)]
    unfolds = float(not mlas.is_product(shape))
    return [*[0.0] * 4, 1.0, unfolds, *_beyond(4 * values), *_unfolded(shape, block, threads)]


_BLOCKED, _UNFOLDED = 17, 16


def _unfolded(shape: ConvShape, block: int, threads: int) -> Amounts:
    filters, inner, columns, parts = mlas.product_of(shape)
    whole, alone = mlas.is_whole(shape), mlas.is_product(shape)
    several = filters * inner * columns >= mlas.SINGLE
    strided, values = max(shape.stride) > 1, inner * columns * parts
    rows, positions, most = filters, columns, parts
    if parts > 1 and not whole:  # each is computed by one thread
        most, share = -(-parts // threads), _shared(parts, threads)
    else:
        share = threads if several else 1
        if whole or filters > columns:
            rows = -(-filters // int(share))
        else:
            positions = -(-columns // int(share))
    bound, free = (most * product_cycles(rows, positions, inner, block, wait) for wait in (mlas.WAIT, 0))
    unfolded = 0.0 if alone else values / (1 if whole else share)
    outputs = filters * columns * parts / share
    return [
        parts / share, filters * inner * shape.groups,
        *_either(
            filters > 1,
            [bound, free, *_either(strided, [unfolded]), unfolded / shape.size_out[-1], outputs],
            [*_either(strided, [unfolded]), unfolded / shape.size_out[-1], outputs],
        ),
        *_either(alone, [values / share], [parts * inner / share]), *_where(whole, [parts, parts * several]),
    ]  # fmt: skip


def _shared(parts: int, threads: int) -> float:
    """By how much less the thread that has most of some parts has to do than one that has all."""
    return parts / -(-parts // threads) if parts else 1.0


def _beyond(size: float) -> Amounts:
    return [max(0.0, size - _CACHE), max(0.0, size - _MEMORY)]


def _where(condition: bool, amounts: Amounts) -> Amounts:
    return amounts if condition else [0.0] * len(amounts)


def _either(condition: bool, amounts: Amounts, others: Amounts | None = None) -> Amounts:
    """Two sets of amounts, of which one counts."""
    return [*_where(condition, amounts), *_where(not condition, amounts if others is None else others)]
