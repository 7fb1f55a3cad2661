"""Random operations to measure: sizes that networks have, ranks on and beside the steps of kernels, and some others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lrcompile.graph.op import (
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
MOST_FLOPS, MOST_BYTES = 2e9, 1e8
COMMON = 0.7  # share of sizes that are common ones
BESIDE, ODD = 0.88, 0.94  # of channels: above the first one more or less than a multiple of 8, above the second any
_SIDES = (4, 7, 8, 10, 13, 14, 16, 20, 26, 28, 32, 40, 52, 56, 64, 80, 96, 112, 128)  # of images
_TOKENS = (1, 16, 32, 49, 50, 64, 77, 128, 196, 197, 256, 384, 512, 577, 1024)
_HEADS = (16, 24, 32, 40, 48, 64, 80, 96, 128)  # widths of an attention head


def operations(seed: int) -> Iterator[OpDesc]:
    """Operations in fp32 without end, all families in turn; the same ones for a seed."""
    rng = np.random.default_rng(seed)
    names = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
    while True:
        for name in rng.permutation(names):
            op = _PLAIN[name](rng) if name in _PLAIN else _moving(rng, name) if name in FUNCTIONS else _conv(rng, name)
            if op.flops <= MOST_FLOPS and op.weight_bytes + op.activation_bytes <= MOST_BYTES:
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


def _gemm(rng: np.random.Generator) -> OpDesc:
    rows = int(rng.choice([1, 1, 2, 4, 8])) * _common(rng, _TOKENS, 1, 2048)
    return gemm_op(rows, _width(rng, 4, 4096), _width(rng, 8, 4096), "fp32")


def _bmm(rng: np.random.Generator) -> OpDesc:
    """The two products of attention: a batch of heads, all tokens by all others."""
    heads, tokens = _any(rng, 2, 64), _common(rng, _TOKENS[1:], 8, 1024)
    width = int(rng.choice(_HEADS))
    n, k = (tokens, width) if rng.random() < 0.5 else (width, tokens)
    return gemm_op(tokens, n, k, "fp32", batch=heads, weight=False)


def _attention(rng: np.random.Generator) -> OpDesc:
    batch, heads, tokens = int(rng.choice([1, 1, 1, 2, 4, 8, 16])), _any(rng, 1, 24), _common(rng, _TOKENS[1:], 4, 1024)
    shared = [count for count in (1, 2, 4, heads) if heads % count == 0]
    kept = heads if rng.random() < 0.75 else int(rng.choice(shared))
    mask = str(rng.choice(["none", "none", "number", "boolean", "boolean"]))
    causal = mask == "none" and rng.random() < 0.2
    width = int(rng.choice((8, *_HEADS)))
    return attention_op(AttentionShape(batch, heads, kept, tokens, tokens, width, causal, mask), "fp32")  # type: ignore[arg-type]


def _moving(rng: np.random.Generator, function: Any) -> OpDesc:
    """What moves data or maps elements, in rows of up to 4096."""
    count = _any(rng, 1 << 7, 1 << 23)
    row = min(count, _any(rng, 4, 4096))
    rows = max(1, count // row)
    values = {"binary": 3, "skip_layer_norm": 3, "reduce": 1}.get(function, 2) * row * rows
    return OpDesc("elementwise", "fp32", row * rows, 0, 4.0 * values, function=function, row=row)


def _recurrent(rng: np.random.Generator) -> OpDesc:
    batch, steps = int(rng.choice([1, 1, 2, 4, 8, 16])), _any(rng, 4, 200)
    into, hidden, layers = _any(rng, 4, 512), 4 * _any(rng, 2, 128), int(rng.choice([1, 1, 2]))
    shape = RecurrentShape(batch, steps, into, hidden, layers, int(rng.choice([1, 2])), int(rng.choice([3, 4])))
    return recurrent_op(shape, "fp32")


_PLAIN = {"recurrent": _recurrent, "gemm": _gemm, "bmm": _bmm, "attention": _attention}


def _conv(rng: np.random.Generator, name: str) -> OpDesc:
    if name == "volume":
        return _volume(rng)
    common = {"pointwise": (1,), "conv": (3, 3, 3, 5, 7), "depthwise": (3, 3, 5), "grouped": (3,)}
    taps = int(rng.choice(common[name]))
    into, out = _width(rng, 8, 1024), _width(rng, 8, 1024)
    if name == "conv" and rng.random() < 0.1:
        into = int(rng.choice([1, 3]))
    if name == "depthwise":
        into = out = max(8, out // 8 * 8)
    groups = into if name == "depthwise" else 1
    if name == "grouped":
        groups = int(rng.choice([2, 4, 8, 16, 32]))
        into, out = (groups * max(2, round(width / groups)) for width in (into, out))
    stride = int(rng.choice([1, 1, 1, 2]))
    size, batch = _common(rng, _SIDES, 4, 128), int(rng.choice([1, 1, 1, 2, 4, 8]))
    return conv_op(_square(batch, into, out, size, taps, stride, groups), "fp32")


def _volume(rng: np.random.Generator) -> OpDesc:
    """A convolution of a cube, or of a few frames."""
    into, out, side = _any(rng, 1, 256), _any(rng, 4, 256), _any(rng, 2, 48)
    size = (side if rng.random() < 0.5 else _any(rng, 1, 16), side, side)
    kernel = ((1, 1, 1), (3, 3, 3), (3, 3, 3), (1, 3, 3), (3, 1, 1), (5, 5, 5), (7, 7, 7))[int(rng.integers(7))]
    groups = into if rng.random() < 0.1 else 1
    out = out if groups == 1 else into
    pads, stride = tuple(k // 2 for k in kernel), int(rng.choice([1, 1, 1, 2]))
    after = tuple((s + 2 * p - k) // stride + 1 for s, p, k in zip(size, pads, kernel, strict=True))
    return conv_op(
        ConvShape(
            int(rng.choice([1, 1, 2, 4])), into, out, size, after, kernel, (stride,) * 3, tuple((p, p) for p in pads),
            (1, 1, 1), groups,
        ),
        "fp32",
    )  # fmt: skip


def _square(batch: int, into: int, out: int, size: int, taps: int, stride: int, groups: int = 1) -> ConvShape:
    pad = taps // 2
    after = (size + 2 * pad - taps) // stride + 1
    return ConvShape(
        batch, into, out, (size, size), (after, after), (taps, taps), (stride, stride), ((pad, pad),) * 2, (1, 1),
        groups,
    )  # fmt: skip
