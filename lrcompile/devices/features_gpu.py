"""What the residuals of a GPU depend on: sizes, what is empty in its kernels' tiles, and what is no whole vector."""

from __future__ import annotations

import math

from lrcompile.devices.features_cpu import APART, Features, empty, log2
from lrcompile.devices.mlas import padded
from lrcompile.graph.op import AttentionShape, ConvShape, GemmShape, OpDesc

_TILE, _HALF_TILE = 128, 64  # extents of kernels
_ROW_VECTOR = 4  # elements of a row that PyTorch's normalisations read at once
_WITH_ROWS = ("bias", "layer_norm", "skip_layer_norm", "bias_gelu", "group_norm", "transpose", "reduce")


def of_gemm(shape: GemmShape, vector: int) -> Features:
    """Extents, work, what is empty in the last tiles and wave of them, and whether operands come in whole vectors."""
    work = shape.m * shape.n * shape.k * shape.batch
    tiles = shape.batch * padded(shape.m, _TILE) * padded(shape.n, _TILE) / _TILE**2
    aligned = min(math.gcd(shape.k, vector), math.gcd(shape.n, vector))
    extents = [log2(size) for size in (shape.m, shape.n, shape.k, shape.batch, work)]
    unused = [empty(size, block) for size in (shape.m, shape.n) for block in (_HALF_TILE, _TILE)]
    jumps = [APART * (aligned < vector), APART * (aligned == 1), float(shape.layout != "TN")]
    return [*extents, *unused, *jumps, empty(shape.k, _HALF_TILE), log2(tiles)]


def of_conv(shape: ConvShape, vector: int) -> Features:
    """Those of the product that it implies, how much it does with each value, and steps over odd channels."""
    into, out, taps = shape.channels_in, shape.channels_out, math.prod(shape.kernel)
    pixels, per_group = shape.batch * math.prod(shape.size_out), into // shape.groups
    work = pixels * per_group * out * taps
    sizes = (pixels, shape.batch, per_group, out, taps, math.prod(shape.stride), work)
    values = shape.batch * into * math.prod(shape.size_in) + pixels * out + per_group * out * taps
    odd = into % vector > 0
    jumps = [APART * odd, APART * (out % vector > 0), float(into < vector), APART * (odd and max(shape.stride) > 1)]
    tiles = padded(pixels, _TILE) * padded(out, _TILE) / _TILE**2
    unused = [empty(out, _HALF_TILE), empty(out, _TILE), empty(into, _HALF_TILE), empty(into, _HALF_TILE // 2)]
    more = (work / max(values, 1), tiles, shape.groups, math.gcd(into, _HALF_TILE))
    return [*map(log2, sizes), *unused, *jumps, *map(log2, more)]


def of_attention(shape: AttentionShape, vector: int) -> Features:
    """Sizes, work, what mask there is, and what decides which of PyTorch's kernels runs.

    That is a mask, heads that share keys, both, and a width in whole vectors.
    """
    work = shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim
    shared = shape.heads / max(shape.heads_kv, 1)
    sizes = (shape.batch, shape.heads, shared, shape.queries, shape.keys, shape.head_dim, work)
    masked, is_shared = shape.mask != "none", shape.heads != shape.heads_kv
    return [
        *map(log2, sizes), float(masked), float(shape.mask == "boolean"), float(shape.causal),
        APART * masked, APART * is_shared, APART * (masked and is_shared), APART * (shape.head_dim % vector > 0),
    ]  # fmt: skip


def of_function(op: OpDesc) -> Features:
    """Bytes, rows, and whether rows are whole vectors."""
    row = op.row if op.function in _WITH_ROWS else 1
    return [log2(op.weight_bytes + op.activation_bytes), log2(row), APART * (row % _ROW_VECTOR > 0)]
