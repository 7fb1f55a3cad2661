"""Random operations to measure: sizes that networks have, ranks on and beside the steps of kernels, and some others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from lrcompile.graph.op import ConvShape, OpDesc, conv_op, gemm_op

WEIGHTS = {"gemm": 4, "bmm": 2, "pointwise": 4, "conv": 5, "depthwise": 2, "memory": 1}
"""How often each family is drawn."""
MOST_FLOPS, MOST_BYTES = 4e9, 2e8
COMMON = 0.7  # share of sizes that are common ones
BESIDE, ODD = 0.88, 0.94  # of channels: above the first one more or less than a multiple of 8, above the second any
CHAIN = 5
_SIDES = (4, 7, 8, 10, 13, 14, 16, 20, 26, 28, 32, 40, 52, 56, 64, 80, 96, 112, 128)  # of images
_TOKENS = (1, 16, 32, 49, 50, 64, 77, 128, 196, 197, 256, 384, 512, 577, 1024)
_HEADS = (16, 24, 32, 40, 48, 64, 80, 96, 128)  # widths of an attention head


def operations(seed: int) -> Iterator[OpDesc]:
    """Operations in fp32 without end, all families in turn; the same ones for a seed."""
    rng = np.random.default_rng(seed)
    names = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
    while True:
        for name in rng.permutation(names):
            op = {"gemm": _gemm, "bmm": _bmm, "memory": _memory}[name](rng) if name in _PLAIN else _conv(rng, name)
            if op.flops <= MOST_FLOPS and op.weight_bytes + op.activation_bytes <= MOST_BYTES:
                yield op


def chains(seed: int, count: int) -> list[list[ConvShape]]:
    """Convolutions in a row, as networks have them: plain ones, or depthwise ones with 1×1 after each."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        side, batch = int(rng.choice(_SIDES[1:15])), int(rng.choice([1, 1, 2, 4]))
        widths = [8 * _any(rng, 2, 32) for _ in range(CHAIN + 1)]
        chain = []
        for into, out in pairwise(widths):
            if i % 2:
                chain += [_square(batch, into, into, side, 3, 1, into), _square(batch, into, out, side, 1, 1)]
            else:
                chain.append(_square(batch, into, out, side, int(rng.choice([1, 3])), 1))
        found.append(chain)
    return found


_PLAIN = ("gemm", "bmm", "memory")


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


def _memory(rng: np.random.Generator) -> OpDesc:
    count = _any(rng, 1 << 8, 1 << 24)
    return OpDesc("elementwise", "fp32", count, 0, 8.0 * count)


def _conv(rng: np.random.Generator, name: str) -> OpDesc:
    taps = {"pointwise": 1, "conv": int(rng.choice([3, 3, 3, 5, 7])), "depthwise": int(rng.choice([3, 3, 5]))}[name]
    into, out = _width(rng, 8, 1024), _width(rng, 8, 1024)
    if name == "conv" and rng.random() < 0.1:
        into = int(rng.choice([1, 3]))
    if name == "depthwise":
        into = out = max(8, out // 8 * 8)
    stride = int(rng.choice([1, 1, 1, 2]))
    size, batch = _common(rng, _SIDES, 4, 128), int(rng.choice([1, 1, 1, 2, 4, 8]))
    return conv_op(_square(batch, into, out, size, taps, stride, into if name == "depthwise" else 1), "fp32")


def _square(batch: int, into: int, out: int, size: int, taps: int, stride: int, groups: int = 1) -> ConvShape:
    pad = taps // 2
    after = (size + 2 * pad - taps) // stride + 1
    return ConvShape(
        batch, into, out, (size, size), (after, after), (taps, taps), (stride, stride), ((pad, pad),) * 2, (1, 1),
        groups,
    )  # fmt: skip
