"""Random operations to measure: sizes that networks have, ranks on and beside the steps of kernels, and some others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrcompile.graph.op import (
    DTYPE_BYTES,
    FUNCTIONS,
    AttentionShape,
    ConvShape,
    OpDesc,
    RecurrentShape,
    attention_op,
    conv_op,
    gemm_op,
    recurrent_op,
)

WEIGHTS: dict[str, int] = {
    "gemm": 8, "bmm": 3, "pointwise": 8, "conv": 10, "depthwise": 5, "grouped": 2, "volume": 5, "attention": 5,
    "recurrent": 2,
    **dict.fromkeys(FUNCTIONS, 1),
}  # fmt: skip
"""How often each family is drawn."""
_NOT_ON_GPU = ("recurrent", "skip_layer_norm", "bias_gelu")  # the one is many kernels, the others two
COMMON = 0.7  # share of sizes that are common ones
BESIDE, ODD = 0.88, 0.94  # of channels: above the first one more or less than a multiple of 8, above the second any
_SIDES = (4, 7, 8, 10, 13, 14, 16, 20, 26, 28, 32, 40, 52, 56, 64, 80, 96, 112, 128)  # of images
_TOKENS = (1, 16, 32, 49, 50, 64, 77, 128, 196, 197, 256, 384, 512, 577, 1024)
_HEADS = (16, 24, 32, 40, 48, 64, 80, 96, 128)  # widths of an attention head


@dataclass(frozen=True)
class Sizes:
    """What a device of some power is asked to run: how large operations are, and how often in which type.

    `batches` are those of images and sequences, `products` the smallest and largest extent of a product's weight,
    `channels` those of a convolution, `values` the most that are moved. What takes more operations than `most_flops`
    of its type, or moves more than `most_bytes`, is left out.
    """

    batches: tuple[int, ...]
    products: tuple[int, int]
    channels: tuple[int, int]
    values: int
    most_flops: Mapping[str, float]
    most_bytes: float
    dtypes: tuple[str, ...]


GPU_WEIGHTS: dict[str, int] = {name: weight for name, weight in WEIGHTS.items() if name not in _NOT_ON_GPU} | {
    "gemm": 14, "conv": 14, "pointwise": 10, "attention": 4, "volume": 3, "depthwise": 4,
}  # fmt: skip
CPU = Sizes((1, 1, 1, 2, 4, 8), (4, 4096), (8, 1024), 1 << 23, {"fp32": 2e9}, 1e8, ("fp32",))
GPU = Sizes(
    (1, 8, 16, 32, 64, 128), (32, 16384), (16, 2048), 1 << 27,
    {"fp32": 1e11, "tf32": 4e11, "fp16": 1e12, "bf16": 1e12}, 1e9,
    ("bf16", "bf16", "bf16", "fp16", "fp16", "fp32", "fp32", "tf32"),
)  # fmt: skip


def operations(seed: int, sizes: Sizes = CPU, weights: Mapping[str, int] = WEIGHTS) -> Iterator[OpDesc]:
    """Operations without end, all families in turn, as often as `weights` says; the same ones for a seed."""
    rng = np.random.default_rng(seed)
    names = [name for name, weight in weights.items() for _ in range(weight)]
    while True:
        for name in rng.permutation(names):
            dtype = str(rng.choice(sizes.dtypes)) if len(sizes.dtypes) > 1 else sizes.dtypes[0]
            op = _drawn(_Dice(rng, sizes, dtype), name)
            if op.flops <= sizes.most_flops[dtype] and op.weight_bytes + op.activation_bytes <= sizes.most_bytes:
                yield op


def rows(seed: int, count: int) -> list[list[ConvShape]]:
    """Convolutions one after the other as networks have them: in four stages of some blocks, each half as large."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        side, batch = int(rng.choice([16, 32, 64, 112, 224])), int(rng.choice([1, 1, 1, 2, 4, 8]))
        width = 8 * _any(rng, 1, 6)
        row = [_square(batch, 3, width, side, 3, 2)]
        for _ in range(4):
            wider = 8 * round(width * rng.uniform(1.2, 2.2) / 8)
            for block in range(int(rng.integers(1, 4))):
                side = row[-1].size_out[0]
                row += _block(rng, i % 3, batch, width if block == 0 else wider, wider, side, 2 if block == 0 else 1)
            width = wider
        found.append(row)
    return found


def encoders(seed: int, count: int) -> list[tuple[AttentionShape, int]]:
    """The attention of transformers and how many layers they have: from tiny ones to a small BERT."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        batch, heads, width = int(rng.choice([1, 1, 2, 4, 8])), _any(rng, 1, 12), int(rng.choice([8, 16, 32, 64]))
        tokens = int(rng.choice(_TOKENS[1:9]))
        found.append((AttentionShape(batch, heads, heads, tokens, tokens, width), int(rng.integers(1, 4))))
    return found


def _block(
    rng: np.random.Generator, kind: int, batch: int, into: int, out: int, side: int, stride: int
) -> list[ConvShape]:
    """One convolution, a bottleneck, or an inverted one with a depthwise convolution."""
    if kind == 0:
        return [_square(batch, into, out, side, 3, stride)]
    inner = max(8, 8 * round(out / 32)) if kind == 1 else 4 * into
    taps = int(rng.choice([3, 5])) if kind == 2 else 3
    inside = _square(batch, inner, inner, side, taps, stride, inner if kind == 2 else 1)
    return [_square(batch, into, inner, side, 1, 1), inside, _square(batch, inner, out, inside.size_out[0], 1, 1)]


def _any(rng: np.random.Generator, least: int, most: int) -> int:
    """Of a log-uniform distribution."""
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def _width(rng: np.random.Generator, least: int, most: int) -> int:
    """Channels: mostly multiples of 8 to 64, one beside them, or any number."""
    width, kind = _any(rng, least, most), rng.random()
    if width <= 8 or kind > ODD:
        return width
    step = int(rng.choice([step for step in (8, 16, 32, 64) if step <= width]))
    return max(least, round(width / step) * step + (int(rng.choice([-1, 1])) if kind > BESIDE else 0))


def _common(rng: np.random.Generator, sizes: tuple[int, ...], least: int, most: int) -> int:
    return int(rng.choice(sizes)) if rng.random() < COMMON else _any(rng, least, most)


@dataclass(frozen=True)
class _Dice:
    """What an operation is drawn with."""

    rng: np.random.Generator
    sizes: Sizes
    dtype: str

    @property
    def batch(self) -> int:
        return int(self.rng.choice(self.sizes.batches))


def _drawn(dice: _Dice, name: str) -> OpDesc:
    if name in _PLAIN:
        return _PLAIN[name](dice)
    return _moving(dice, name) if name in FUNCTIONS else _conv(dice, name)


def _gemm(dice: _Dice) -> OpDesc:
    rng, (least, most) = dice.rng, dice.sizes.products
    rows = int(rng.choice(sorted({1, *dice.sizes.batches}))) * _common(rng, _TOKENS, 1, 2048)
    return gemm_op(rows, _width(rng, least, most), _width(rng, max(8, least), most), dice.dtype)


def _bmm(dice: _Dice) -> OpDesc:
    """The two products of attention: a batch of heads, all tokens by all others."""
    rng = dice.rng
    heads, tokens = _any(rng, 2, 8 * max(dice.sizes.batches)), _common(rng, _TOKENS[1:], 8, 1024)
    width = int(rng.choice(_HEADS))
    scores = rng.random() < 0.5
    n, k = (tokens, width) if scores else (width, tokens)
    return gemm_op(tokens, n, k, dice.dtype, batch=heads, weight=False, layout="TN" if scores else "NN")


def _attention(dice: _Dice) -> OpDesc:
    rng, batch = dice.rng, dice.batch
    heads, tokens = _any(rng, 1, 24), _common(rng, _TOKENS[1:], 4, 1024)
    shared = [count for count in (1, 2, 4, heads) if heads % count == 0]
    kept = heads if rng.random() < 0.75 else int(rng.choice(shared))
    mask = str(rng.choice(["none", "none", "number", "boolean", "boolean"]))
    causal = mask == "none" and rng.random() < 0.2
    width = int(rng.choice((8, *_HEADS)))
    return attention_op(AttentionShape(batch, heads, kept, tokens, tokens, width, causal, mask), dice.dtype)  # type: ignore[arg-type]


def _moving(dice: _Dice, function: Any) -> OpDesc:
    """What moves data or maps elements, in rows of up to 4096; a bias also in runs as long as images."""
    rng, dtype = dice.rng, "fp32" if dice.dtype == "tf32" else dice.dtype
    count = _any(rng, 1 << 7, dice.sizes.values)
    row = min(count, _any(rng, 4, 1 << 16 if function == "bias" else 4096))
    rows = max(1, count // row)
    if function == "transpose":  # rows come in whole runs, and a quarter are of single values, as of images
        row = 1 if row < 24 else row
        rows = max(2, count // row // 8) * 8
    values = {"binary": 3, "skip_layer_norm": 3, "reduce": 1}.get(function, 2) * row * rows
    return OpDesc("elementwise", dtype, row * rows, 0, DTYPE_BYTES[dtype] * values, function=function, row=row)


def _recurrent(dice: _Dice) -> OpDesc:
    rng = dice.rng
    batch, steps = int(rng.choice([1, 1, 2, 4, 8, 16])), _any(rng, 4, 200)
    into, hidden, layers = _any(rng, 4, 512), 4 * _any(rng, 2, 128), int(rng.choice([1, 1, 2]))
    shape = RecurrentShape(batch, steps, into, hidden, layers, int(rng.choice([1, 2])), int(rng.choice([3, 4])))
    return recurrent_op(shape, dice.dtype)


_PLAIN = {"recurrent": _recurrent, "gemm": _gemm, "bmm": _bmm, "attention": _attention}


def _conv(dice: _Dice, name: str) -> OpDesc:
    if name == "volume":
        return _volume(dice)
    rng, channels = dice.rng, dice.sizes.channels
    common = {"pointwise": (1,), "conv": (3, 3, 3, 5, 7), "depthwise": (3, 3, 5), "grouped": (3,)}
    taps = int(rng.choice(common[name]))
    into, out = _width(rng, *channels), _width(rng, *channels)
    if name == "conv" and rng.random() < 0.1:
        into = int(rng.choice([1, 3]))
    if name == "depthwise":
        into = out = max(8, out // 8 * 8)
    groups = into if name == "depthwise" else 1
    if name == "grouped":
        groups = int(rng.choice([2, 4, 8, 16, 32]))
        into, out = (groups * max(2, round(width / groups)) for width in (into, out))
    stride = int(rng.choice([1, 1, 1, 2]))
    size = _common(rng, _SIDES, 4, 128)
    return conv_op(_square(dice.batch, into, out, size, taps, stride, groups), dice.dtype)


def _volume(dice: _Dice) -> OpDesc:
    """A convolution of a cube, or of a few frames."""
    rng = dice.rng
    into, out, side = _any(rng, 1, 256), _any(rng, 4, 256), _any(rng, 2, 48)
    size = (side if rng.random() < 0.5 else _any(rng, 1, 16), side, side)
    kernel = ((1, 1, 1), (3, 3, 3), (3, 3, 3), (1, 3, 3), (3, 1, 1), (5, 5, 5), (7, 7, 7))[int(rng.integers(7))]
    groups = into if rng.random() < 0.1 else 1
    out = out if groups == 1 else into
    pads, stride = tuple(k // 2 for k in kernel), int(rng.choice([1, 1, 1, 2]))
    after = tuple((s + 2 * p - k) // stride + 1 for s, p, k in zip(size, pads, kernel, strict=True))
    return conv_op(
        ConvShape(
            int(rng.choice(sorted({1, 2, 4, min(32, max(dice.sizes.batches))}))), into, out, size, after, kernel,
            (stride,) * 3, tuple((p, p) for p in pads), (1, 1, 1), groups,
        ),
        dice.dtype,
    )  # fmt: skip


def _square(batch: int, into: int, out: int, size: int, taps: int, stride: int, groups: int = 1) -> ConvShape:
    pad = taps // 2
    after = (size + 2 * pad - taps) // stride + 1
    return ConvShape(
        batch, into, out, (size, size), (after, after), (taps, taps), (stride, stride), ((pad, pad),) * 2, (1, 1),
        groups,
    )  # fmt: skip
