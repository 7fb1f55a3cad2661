"""What kind of operation the residual of a measurement is kept with, and what of its shape it depends on."""

from __future__ import annotations

import math

from lrcompile.devices.device import Device
from lrcompile.graph.op import FUNCTIONS, AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

WIDTHS: dict[str, int] = {
    "gemm": 9, "bmm": 9, "pointwise": 18, "conv": 18, "depthwise": 18, "grouped": 19, "volume": 12, "attention": 10,
    "recurrent": 8,
    **dict.fromkeys(FUNCTIONS, 2),
}  # fmt: skip
"""How many features the families of operations have on a CPU."""
GPU_WIDTHS: dict[str, int] = {
    **dict.fromkeys(FUNCTIONS, 3),
    **dict.fromkeys(("pointwise", "conv", "depthwise", "grouped", "volume"), 20),
    "gemm": 14, "bmm": 14, "attention": 14, "recurrent": 8,
}  # fmt: skip
"""The same on a GPU."""
PRECISIONS = {"fp32": "", "tf32": "-tf32", "fp16": "-half", "bf16": "-half"}
"""What the names of families end in: the two halves run in the same kernels."""
_WITH_ROWS = ("bias", "layer_norm", "skip_layer_norm", "group_norm", "transpose", "reduce")
_TILE, _HALF_TILE = 128, 64  # extents of a GPU's kernels
_APART = 3.0  # of another kernel for what is not aligned
_ROW_VECTOR = 4  # elements of a row that PyTorch's normalisations read at once


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


def features(op: OpDesc, device: Device) -> list[float]:
    """What an operation's residual depends on, on a CPU or GPU: logarithms of sizes, and conditions that jump."""
    on_gpu = device.kind == "gpu"
    if op.gemm is not None:
        return _of_gemm_on_gpu(op.gemm, _vector(op)) if on_gpu else _of_gemm(op.gemm, _block(device))
    if op.conv is not None:
        if on_gpu:
            return [*_of_conv_on_gpu(op.conv, _vector(op)), float(op.dtype == "fp16")]
        of_conv = _of_volume if len(op.conv.kernel) == 3 else _of_conv
        values = of_conv(op.conv, _block(device), device.units)
        return [*values, _log2(op.conv.groups)] if _base(op) == "grouped" else values
    if op.attention is not None:
        values = _of_attention(op.attention)
        return [*values, *_kernel_of_attention(op.attention, _vector(op))] if on_gpu else values
    if op.recurrent is not None:
        return _of_recurrent(op.recurrent)
    row = op.row if op.function in _WITH_ROWS else 1
    values = [_log2(op.weight_bytes + op.activation_bytes), _log2(row)]
    return [*values, _APART * (row % _ROW_VECTOR > 0)] if on_gpu else values


def sizes(op: OpDesc) -> list[float]:
    """The sizes alone, by which operations of a kind are near to each other; logarithms to the base of two."""
    if op.conv is not None:
        shape = op.conv
        pixels = shape.batch * math.prod(shape.size_out)
        found = (pixels, shape.channels_in, shape.channels_out, math.prod(shape.kernel), math.prod(shape.stride))
        return [_log2(size) for size in found]
    if op.gemm is not None:
        return [_log2(size) for size in (op.gemm.m, op.gemm.n, op.gemm.k, op.gemm.batch)]
    return [_log2(op.weight_bytes + op.activation_bytes)]


def _block(device: Device) -> int:
    """Channels in a block of ONNX Runtime's convolutions, a vector of the CPU; its products are two vectors wide."""
    return device.alignment_conv["fp32"]


def _of_gemm(shape: GemmShape, block: int) -> list[float]:
    """Extents, work, and what is empty in the last columns and rows; one row is another kernel."""
    work = shape.m * shape.n * shape.k * shape.batch
    extents = [_log2(size) for size in (shape.m, shape.n, shape.k, shape.batch, work)]
    empty = [_empty(shape.n, block), _empty(shape.n, 2 * block), _empty(shape.m, _rows(block))]
    return [*extents, *empty, float(shape.m == 1)]


def _of_volume(shape: ConvShape, block: int, threads: int) -> list[float]:
    """Sizes, and how it runs: ONNX Runtime unfolds windows and multiplies."""
    voxels, taps, per_group = math.prod(shape.size_out), math.prod(shape.kernel), shape.channels_in // shape.groups
    work = voxels * shape.batch * shape.channels_out * per_group * taps
    sizes = (voxels, shape.batch, per_group, shape.channels_out, taps, math.prod(shape.stride), shape.groups, work)
    empty = _empty(shape.channels_out // shape.groups, _rows(block))
    return [*map(_log2, sizes), float(_is_product(shape)), float(_is_whole(shape)), _idle(shape, threads), empty]


def _of_attention(shape: AttentionShape) -> list[float]:
    """Sizes, work, and what mask there is."""
    heads = shape.batch * shape.heads
    work = heads * shape.queries * shape.keys * shape.head_dim
    sizes = (shape.batch, shape.heads, shape.heads / shape.heads_kv, shape.queries, shape.keys, shape.head_dim, work)
    return [*map(_log2, sizes), float(shape.mask != "none"), float(shape.mask == "boolean"), float(shape.causal)]


def _of_recurrent(shape: RecurrentShape) -> list[float]:
    """Sizes and work."""
    calls = shape.layers * shape.directions
    work = calls * shape.batch * shape.steps * shape.hidden_size * (shape.input_size + shape.hidden_size) * shape.gates
    sizes = (shape.batch, shape.steps, shape.input_size, shape.hidden_size, shape.layers, shape.directions)
    return [*map(_log2, (*sizes, shape.gates, work))]


def _of_conv(shape: ConvShape, block: int, threads: int) -> list[float]:
    """Sizes, whether channels are laid out in blocks, and what is empty in the last block of channels or pixels.

    Kernels for blocks take up to four of them at a time, and 3, 6 or 14 pixels of a row; without blocks a convolution
    is a product with pixels as its columns.
    """
    into, out, row = shape.channels_in, shape.channels_out, shape.size_out[-1]
    blocked = float(in_blocks(shape, block))
    pixels, taps = math.prod(shape.size_out), math.prod(shape.kernel)
    work = pixels * shape.batch * into * out // shape.groups * taps
    return [
        *map(_log2, (pixels, shape.batch, into, out, taps, math.prod(shape.stride), work)),
        blocked,
        float(into < block),
        blocked * _empty(into, block),
        blocked * _empty(out, block),
        blocked * _log2(_padded(out, 4 * block) / max(_padded(out, block), 1)),
        blocked * _empty(row, 14),
        _empty(row, _rows(block) // 2),
        (1 - blocked) * _empty(pixels, 2 * block),
        (1 - blocked) * _empty(out, _rows(block)),
        (1 - blocked) * float(_is_whole(shape)),
        (1 - blocked) * _idle(shape, threads),
    ]


def _vector(op: OpDesc) -> int:
    """Elements in 16 bytes, which a GPU's kernels read at once where they can."""
    return 8 if PRECISIONS.get(op.dtype) == "-half" else 4


def _of_gemm_on_gpu(shape: GemmShape, vector: int) -> list[float]:
    """Extents, work, what is empty in the last tiles and wave of them, and whether operands come in whole vectors."""
    work = shape.m * shape.n * shape.k * shape.batch
    tiles = shape.batch * _padded(shape.m, _TILE) * _padded(shape.n, _TILE) / _TILE**2
    aligned = min(math.gcd(shape.k, vector), math.gcd(shape.n, vector))
    extents = [_log2(size) for size in (shape.m, shape.n, shape.k, shape.batch, work)]
    empty = [_empty(size, block) for size in (shape.m, shape.n) for block in (_HALF_TILE, _TILE)]
    jumps = [_APART * (aligned < vector), _APART * (aligned == 1), float(shape.layout != "TN")]
    return [*extents, *empty, *jumps, _empty(shape.k, _HALF_TILE), _log2(tiles)]


def _kernel_of_attention(shape: AttentionShape, vector: int) -> list[float]:
    """What decides which of PyTorch's kernels runs: a mask, heads that share keys, both, a width in whole vectors."""
    masked, shared = shape.mask != "none", shape.heads != shape.heads_kv
    return [_APART * masked, _APART * shared, _APART * (masked and shared), _APART * (shape.head_dim % vector > 0)]


def _of_conv_on_gpu(shape: ConvShape, vector: int) -> list[float]:
    """Those of the product that it implies, how much it does with each value, and steps over odd channels."""
    into, out, taps = shape.channels_in, shape.channels_out, math.prod(shape.kernel)
    pixels, per_group = shape.batch * math.prod(shape.size_out), into // shape.groups
    work = pixels * per_group * out * taps
    sizes = (pixels, shape.batch, per_group, out, taps, math.prod(shape.stride), work)
    values = shape.batch * into * math.prod(shape.size_in) + pixels * out + per_group * out * taps
    odd = into % vector > 0
    jumps = [_APART * odd, _APART * (out % vector > 0), float(into < vector), _APART * (odd and max(shape.stride) > 1)]
    tiles = _padded(pixels, _TILE) * _padded(out, _TILE) / _TILE**2
    empty = [_empty(out, _HALF_TILE), _empty(out, _TILE), _empty(into, _HALF_TILE), _empty(into, _HALF_TILE // 2)]
    more = (work / max(values, 1), tiles, shape.groups, math.gcd(into, _HALF_TILE))
    return [*map(_log2, sizes), *empty, *jumps, *map(_log2, more)]


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


def _rows(block: int) -> int:
    """Rows of a product that MLAS computes together: 6 with AVX2, 12 with AVX-512; half as many pixels in blocks."""
    return 6 if block <= 8 else 12


def _is_product(shape: ConvShape) -> bool:
    """Whether nothing has to be unfolded before a convolution without blocks is a product."""
    return set(shape.kernel) == {1} == set(shape.stride) and not any(map(any, shape.padding))


def _is_whole(shape: ConvShape) -> bool:
    """Whether MLAS unfolds each image by one thread, and then multiplies by all: with more filters than pixels."""
    return not _is_product(shape) and shape.channels_out // shape.groups > math.prod(shape.size_out)


def _idle(shape: ConvShape, threads: int) -> float:
    """What the threads could do while the last image or group is computed, where each is computed by one."""
    parts = shape.batch * shape.groups
    return _empty(parts, threads) if parts > 1 and not _is_whole(shape) else 0.0


def _empty(size: int, block: int) -> float:
    return _log2(_padded(size, block) / size) if size else 0.0


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _log2(size: float) -> float:
    return math.log2(max(size, 1e-9))
