"""Pools and resizes of volumes: one over each frame, then one over time. All of them separate along the axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from lrcompile.graph.graph import aten
from lrcompile.lower.folded import FRAMES, ONE, CannotLowerError, Folded, Lowering, Size, Sizes, Value
from lrcompile.lower.structure import Rule, argument, concatenated, listed
from lrcompile.lower.values import reducible
from lrcompile.lower.volumes import finished, unbatched

ROUNDED = 1e-6  # of a position: what is left of a scale factor that was computed from two sizes


def _triple(value: Any, default: Any = None) -> list[Any]:
    if value is None or (isinstance(value, list | tuple) and not value):
        value = default
    values = listed(value)
    return values * 3 if len(values) == 1 else values


def _in_two_steps(
    lower: Lowering, node: fx.Node, target: Any, over_time: Sequence[Any] | None, over_frames: Sequence[Any] | None
) -> Folded:
    """An operator of two axes over [T, C·H·W] and then over [H, W]; None leaves a step out.

    Over time, the frames of a sample are the rows of one picture, which is as wide as a frame has elements.
    """
    value, alone = unbatched(lower, node)
    channels, time, height, width = value.static(1, 2, 3, 4)
    sizes = lower.sizes(node)
    sizes = (ONE, *sizes) if alone else sizes
    held = lower.refold(value, FRAMES).node
    if over_frames is not None:
        held = lower.call(target, held, *over_frames)
        height, width = held.meta["val"].shape[2:]
    if over_time is not None:
        picture = lower.reshape(held, -1, 1, time, channels * height * width)
        held = lower.reshape(lower.call(target, picture, *over_time), -1, channels, height, width)
    return finished(lower, Folded(held, sizes, FRAMES), alone)


def max_pool(lower: Lowering, node: fx.Node) -> Value:
    """max_pool3d, without the indices that it may return."""
    kernel = _triple(argument(node, "kernel_size"))
    stride = _triple(argument(node, "stride"), kernel)
    padding, dilation = _triple(argument(node, "padding", 0)), _triple(argument(node, "dilation", 1))
    ceil = bool(argument(node, "ceil_mode", False))
    sizes = list(zip(kernel, stride, padding, dilation, strict=True))
    over_time = [[a, b] for a, b in zip(sizes[0], (1, 1, 0, 1), strict=True)]
    over_frames = [[a, b] for a, b in zip(sizes[1], sizes[2], strict=True)]
    trivial = [(1, 1, 0, 1), (1, 1, 0, 1)]
    several = node.target is aten.max_pool3d_with_indices.default
    if several:
        lower.lengths[node], whole = lower.lengths[node][0], lower.lengths[node]
    result = _in_two_steps(
        lower, node, aten.max_pool2d.default,
        None if kernel[0] == stride[0] == 1 and padding[0] == 0 else [*over_time, ceil],
        None if sizes[1:] == trivial else [*over_frames, ceil],
    )  # fmt: skip
    if not several:
        return result
    lower.lengths[node] = whole
    return result, None


def avg_pool(lower: Lowering, node: fx.Node) -> Value:
    """avg_pool3d: the count of what is averaged is the product of the counts along the axes."""
    kernel = _triple(argument(node, "kernel_size"))
    stride, padding = _triple(argument(node, "stride"), kernel), _triple(argument(node, "padding", 0))
    ceil, whole = bool(argument(node, "ceil_mode", False)), bool(argument(node, "count_include_pad", True))
    divisor = argument(node, "divisor_override")
    one = [1] if divisor is not None else []
    over_time = [[kernel[0], 1], [stride[0], 1], [padding[0], 0], ceil, whole, *one]
    over_frames = [kernel[1:], stride[1:], padding[1:], ceil, whole, *one]
    result = _in_two_steps(
        lower, node, aten.avg_pool2d.default,
        None if (kernel[0], stride[0], padding[0]) == (1, 1, 0) else over_time,
        None if (*kernel[1:], *stride[1:], *padding[1:]) == (1, 1, 1, 1, 0, 0) else over_frames,
    )  # fmt: skip
    if divisor is None:
        return result
    return Folded(lower.call(aten.div.Tensor, result.node, divisor), result.sizes, result.groups)


def adaptive_pool(reduce: Any) -> Rule:
    """Adaptive pools to any size: for each output the mean or the maximum over its own stretch of an axis.

    torch.onnx writes windows of unequal length as a tensor of rank 6, also for pictures; slices keep the rank.
    """

    def pool(lower: Lowering, node: fx.Node) -> Value:
        value = lower.settled(lower.value(node.args[0]))
        wanted = list(argument(node, "output_size"))
        first = value.rank - len(wanted)
        counts = {first + i: n for i, n in enumerate(wanted) if n is not None}
        value.static(*counts)
        whole = [axis for axis, n in counts.items() if n == 1 and value.sizes[axis] != ONE]
        if whole:
            value, at = reducible(lower, value, whole)
            sizes = tuple(ONE if axis in whole else size for axis, size in enumerate(value.sizes))
            value = Folded(lower.call(reduce, value.node, at, True), sizes, value.groups)
        for axis, count in counts.items():
            if count not in (1, value.sizes[axis][0]):
                value = _stretched(lower, value, axis, count, reduce)
        return (value, None) if isinstance(node.meta["val"], tuple) else value

    return pool


def _stretched(lower: Lowering, value: Folded, axis: int, count: int, reduce: Any) -> Folded:
    (length,) = value.static(axis)
    value, at = lower.isolated(value, axis)

    def sized(size: Size) -> Sizes:
        return (*value.sizes[:axis], size, *value.sizes[axis + 1 :])

    ends = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
    parts = []
    for start, end in ends:
        part = lower.call(aten.slice.Tensor, value.node, at, start, end)
        parts.append(Folded(lower.call(reduce, part, [at], True), sized(ONE), value.groups))
    return concatenated(lower, parts, axis, sized((count, count)))


def resize(target: Any) -> Rule:
    """Nearest and trilinear interpolation: over time by the same rule as over a frame."""

    def interpolate(lower: Lowering, node: fx.Node) -> Value:
        value = lower.value(node.args[0])
        channels, time, height, width = value.static(1, 2, 3, 4)
        after = [size[0] for size in lower.sizes(node)[2:]]
        names = [entry.name for entry in node.target._schema.arguments]  # type: ignore[union-attr]
        if "scale_factors" in names:
            factors = argument(node, "scale_factors")
        else:
            given = [argument(node, f"scales_{axis}") for axis in "dhw"]
            factors = None if None in given else given
        for before, there, factor in zip((time, height, width), after, factors or (), strict=factors is not None):
            odd = before == there if "align_corners" in names else True  # where torch's kernels disagree
            if odd and abs(before * factor - there) > ROUNDED:
                raise CannotLowerError(f"its scale factor {factor:g} does not make {there} of {before}: give the size")
        corners = [argument(node, "align_corners")] if "align_corners" in names else []

        def options(sizes: list[int], scales: list[float]) -> list[Any]:
            return [None, *corners, scales] if factors is not None else [sizes, *corners, None]

        held = lower.refold(value, FRAMES).node
        if after[0] != time:  # first over time, where the frames are still small
            picture = lower.reshape(held, -1, 1, time, channels * height * width)
            over_time = options([after[0], channels * height * width], [factors[0], 1.0] if factors else [])
            held = lower.reshape(lower.call(target, picture, *over_time), -1, channels, height, width)
        if after[1:] != [height, width]:
            held = lower.call(target, held, *options(after[1:], factors[1:] if factors else []))
        return Folded(held, lower.sizes(node), FRAMES)

    return interpolate


def _no_indices(lower: Lowering, node: fx.Node) -> Value:
    raise CannotLowerError("it unpools by indices into a volume")


WINDOWS: dict[Any, Rule] = {
    aten.max_pool3d: max_pool,
    aten.max_pool3d_with_indices: max_pool,
    aten.avg_pool3d: avg_pool,
    aten.adaptive_avg_pool3d: adaptive_pool(aten.mean.dim),
    aten.adaptive_avg_pool2d: adaptive_pool(aten.mean.dim),
    aten.adaptive_max_pool3d: adaptive_pool(aten.amax.default),
    aten.upsample_nearest3d: resize(aten.upsample_nearest2d.vec),
    aten._upsample_nearest_exact3d: resize(aten._upsample_nearest_exact2d.vec),
    aten.upsample_trilinear3d: resize(aten.upsample_bilinear2d.vec),
    aten.max_unpool3d: _no_indices,
}
