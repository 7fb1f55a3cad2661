"""Convolutions over time and space on tensors of at most four axes: frames as samples, or positions as one axis.

A value [B × C × T × H × W] is written as [B × C × T × HW], where a (k, 1) kernel runs over time, or as
[BT × C × H × W], where frames count as samples and a 2-D kernel runs over space. Only the input and the output
have five axes. Wherever the order in memory changes there is a copy in the graph, so that it has a price.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.graph.graph import TRANSPOSED_CONVS, aten, shape
from lrcompile.graph.rewrite import Rewriter
from lrcompile_passes.layers import Conv, ConvTranspose, conv, conv_transpose


@dataclass(frozen=True)
class Taps:
    """Which frames the taps of a kernel read.

    The input is first padded by `before` and `after` frames of zeros. Output frames fall into as many phases as a
    transposed convolution has steps (else one); a phase is [(tap, first frame), …], and each of its `count` outputs
    reads, for each tap, the frame `step` after the one of the output before.
    """

    before: int
    after: int
    phases: tuple[tuple[tuple[int, int], ...], ...]
    step: int
    count: int

    @classmethod
    def of(cls, module: Any, node: fx.Node) -> Taps:
        """The taps of a 3-D convolution, or of a transposed one, at one of its calls."""
        frames, frames_out = shape(node.args[0])[2], shape(node)[2]  # type: ignore[arg-type]
        taps, stride, dilation = module.kernel_size[0], module.stride[0], module.dilation[0]
        padding = time_padding(module)
        if not isinstance(module, TRANSPOSED_CONVS):
            last = (frames_out - 1) * stride + (taps - 1) * dilation
            phase = tuple((tap, tap * dilation) for tap in range(taps))
            return cls(padding, max(0, last + 1 - frames - padding), (phase,), stride, frames_out)
        count = -(-frames_out // stride)
        lags = [[(tap, first + padding - tap * dilation) for tap in range(taps)] for first in range(stride)]
        phases = [[(tap, lag // stride) for tap, lag in phase if lag % stride == 0] for phase in lags]
        firsts = [first for phase in phases for _, first in phase]
        before, after = max(0, -min(firsts)), max(0, max(firsts) + count - frames)
        shifted = tuple(tuple((tap, first + before) for tap, first in phase) for phase in phases)
        return cls(before, after, shifted, 1, count)


def time_padding(module: Any) -> int:
    """Frames of zeros before the first one; "same" pads an odd number of frames with the larger half behind."""
    if module.padding == "same":
        return module.dilation[0] * (module.kernel_size[0] - 1) // 2
    return 0 if module.padding == "valid" else module.padding[0]


def spatial_options(module: Any) -> dict[str, Any]:
    """The options of a 3-D convolution as those of a 2-D one on its frames."""
    named = isinstance(module.padding, str)
    padding = module.padding if named else module.padding[1:]
    if named and set(module.kernel_size[1:]) == {1}:
        padding = 0
    options = {"stride": module.stride[1:], "padding": padding, "dilation": module.dilation[1:]}
    transposed = isinstance(module, TRANSPOSED_CONVS)
    return {**options, "output_padding": module.output_padding[1:]} if transposed else options


def time_options(module: Any) -> dict[str, Any]:
    """The options of a 3-D convolution as those of a (k, 1) one on [B × C × T × HW]."""
    named = isinstance(module.padding, str)
    padding = module.padding if named else (module.padding[0], 0)
    if named and module.kernel_size[0] == 1:
        padding = 0
    return {"stride": (module.stride[0], 1), "padding": padding, "dilation": (module.dilation[0], 1)}


def looks_at_one_position(module: Any) -> bool:
    """Whether a kernel runs over time alone and every position of a frame stays where it is."""
    placed = module.padding in ("same", "valid") or not any(module.padding[1:])
    return set(module.kernel_size[1:]) == {1} and set(module.stride[1:]) == {1} and placed


def frame_conv(module: Any, weight: Tensor, bias: Tensor | None) -> Conv | ConvTranspose:
    """A 2-D layer with the spatial options and the groups of a 3-D one; both transposed, or neither."""
    make: Any = conv_transpose if isinstance(module, TRANSPOSED_CONVS) else conv
    return make(module, weight.contiguous(), bias, groups=module.groups, **spatial_options(module))


@dataclass(frozen=True)
class Writer:
    """Writes the nodes that take the place of one call. The batch size stays open throughout."""

    rewriter: Rewriter
    before: fx.Node

    def call(self, path: str, x: fx.Node) -> fx.Node:
        """A layer's output."""
        return self.rewriter.call_module(path, x, before=self.before)

    def add(self, values: Sequence[fx.Node]) -> fx.Node:
        """The sum of values of one shape."""
        total, *rest = values
        for value in rest:
            total = self._node(aten.add.Tensor, total, value)
        return total

    def cat(self, values: Sequence[fx.Node], axis: int) -> fx.Node:
        """The values one after the other on an axis."""
        return self._node(aten.cat.default, list(values), axis) if len(values) > 1 else values[0]

    def reshape(self, x: fx.Node, *sizes: int) -> fx.Node:
        """[B × sizes], or with the batch taking up what the sizes leave."""
        return self._node(aten.reshape.default, x, [-1, *sizes])

    def flat(self, x: fx.Node) -> fx.Node:
        """[B × C × T × H × W] → [B × C × T × HW]."""
        _, channels, frames, high, wide = shape(x)
        return self.reshape(x, channels, frames, high * wide)

    def pad_frames(self, x: fx.Node, before: int, after: int) -> fx.Node:
        """[B × C × T × HW] with frames of zeros at both ends."""
        return self._node(aten.pad.default, x, [0, 0, before, after]) if before or after else x

    def turn(self, x: fx.Node) -> fx.Node:
        """[B × C × T × HW] → [B × T × C × HW] and back; a view."""
        return self._node(aten.transpose.int, x, 1, 2)

    def copy(self, x: fx.Node) -> fx.Node:
        """The same value in the order of its axes: what a reshape would do unseen by the price."""
        return self._node(aten.clone.default, x, memory_format=torch.contiguous_format)

    def take(self, x: fx.Node, axis: int, first: int, count: int, step: int = 1) -> fx.Node:
        """`count` elements of an axis."""
        if first == 0 and step == 1 and count == shape(x)[axis]:
            return x
        return self._node(aten.slice.Tensor, x, axis, first, first + (count - 1) * step + 1, step)

    def split(self, x: fx.Node, axis: int, parts: int) -> list[fx.Node]:
        """Equal parts of an axis."""
        if parts == 1:
            return [x]
        pieces = self._node(aten.split_with_sizes.default, x, [shape(x)[axis] // parts] * parts, axis)
        return [self._node(operator.getitem, pieces, i) for i in range(parts)]

    def clips(self, x: fx.Node, frames: int) -> fx.Node:
        """[BT × C × H × W] → [B × T × C × HW]."""
        _, channels, high, wide = shape(x)
        return self.reshape(x, frames, channels, high * wide)

    def finish(self, x: fx.Node) -> None:
        """Puts [B × C × T × HW] in the place of the call."""
        self.rewriter.replace(self.before, self.reshape(x, *shape(self.before)[1:]))

    def _node(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.call_function(target, *args, before=self.before, **kwargs)


def source(node: fx.Node) -> fx.Node:
    """What a layer's call reads."""
    return node.args[0]  # type: ignore[return-value]
