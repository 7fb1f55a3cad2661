"""Values of any rank held in tensors of rank 4 or less, and the one way to get from one such form to another.

A value of more than four axes is kept as a tensor whose axes are *groups* of the value's axes, in any order: video
[B, C, T, H, W] as frames [B·T, C, H, W] is the groups ((0, 2), (1,), (3,), (4,)). Reshapes and permutes of the value
then only rename axes. An operation asks for the groups that it can work on, and `Lowering.refold` emits the reshapes
and permutes that lead there, none of them of rank above four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.graph import Graph, aten, attribute, infer, set_tensor
from lrcompile.graph.rewrite import set_module

RANK = 4
Size: TypeAlias = tuple[int, int]
"""The length of an axis at the traced batch size and at another one; two different numbers mean an open axis."""
Sizes: TypeAlias = tuple[Size, ...]
Groups: TypeAlias = tuple[tuple[int, ...], ...]

ONE: Size = (1, 1)
FRAMES: Groups = ((0, 2), (1,), (3,), (4,))
"""[B, C, T, H, W] as [B·T, C, H, W]: what convolutions and pools over each frame work on."""
CLIPS: Groups = ((0,), (1,), (2,), (3, 4))
"""[B, C, T, H, W] as [B, C, T, H·W]: what convolutions over time alone and norms over (T, H, W) work on."""


class CannotLowerError(Exception):
    """Says why an operation has no form of rank 4; the caller names the operation."""


@dataclass(frozen=True)
class Folded:
    """A value of `sizes`, held by `node`, whose axes are `groups` of the value's axes, each of them in one group."""

    node: fx.Node
    sizes: Sizes
    groups: Groups

    @property
    def rank(self) -> int:
        """Number of axes of the value."""
        return len(self.sizes)

    @property
    def order(self) -> tuple[int, ...]:
        """The value's axes in the order in which memory holds them."""
        return tuple(axis for group in self.groups for axis in group)

    def renamed(self, sizes: Sizes, names: Mapping[int, int]) -> Folded:
        """The same tensor read as a value of other sizes, whose axis `names[i]` is axis i of this one."""
        return Folded(self.node, sizes, tuple(tuple(names[axis] for axis in group) for group in self.groups))

    def static(self, *axes: int) -> list[int]:
        """The lengths of axes that must not depend on the batch size.

        Raises:
            CannotLowerError: one of them does.
        """
        for axis in axes:
            if self.sizes[axis][0] != self.sizes[axis][1]:
                raise CannotLowerError(f"the length of axis {axis} depends on the batch size")
        return [self.sizes[axis][0] for axis in axes]


Value: TypeAlias = "Folded | tuple[Value, ...] | None"


def identity(rank: int) -> Groups:
    """The groups of a value held as it is."""
    return tuple((axis,) for axis in range(rank))


def product(sizes: Sequence[Size]) -> Size:
    """The length of a group of axes."""
    return math.prod(size[0] for size in sizes), math.prod(size[1] for size in sizes)


def merged(groups: Groups, count: int = RANK) -> Groups:
    """The groups with neighbours joined, from the second on, until there are at most `count`."""
    surplus = max(0, len(groups) - count)
    joined = tuple(axis for group in groups[1 : 2 + surplus] for axis in group)
    return (groups[0], joined, *groups[2 + surplus :]) if surplus else groups


@dataclass(eq=False)
class Lowering:
    """A graph while it is lowered in place: which values are folded, and how new nodes come in before the current one.

    `values` holds what replaces each old node whose value is not, or was not made, a plain tensor; `lengths` the sizes
    of the old nodes' values, in the structure of their outputs; `modules` the modules of the graph as it was.
    """

    graph: Graph
    lengths: dict[fx.Node, Any]
    modules: Mapping[str, nn.Module]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    layers: dict[Any, list[str]] = field(default_factory=dict)
    made: set[fx.Node] = field(default_factory=set)
    before: fx.Node | None = None

    def sizes(self, node: fx.Node) -> Sizes:
        """The sizes of an old node's value."""
        return self.lengths[node]  # type: ignore[no-any-return]

    def module(self, node: fx.Node) -> Any:
        """The module that an old node calls, None for one that calls none: another one may be in its place by now."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def value(self, node: Any) -> Folded:
        """The value of an argument, folded or plain.

        Raises:
            CannotLowerError: it is no single tensor.
        """
        value = self.values.get(node) if node in self.values else None
        if isinstance(value, Folded):
            return value
        if node in self.values or not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            raise CannotLowerError("an argument is no single tensor")
        return Folded(node, self.sizes(node), identity(len(self.sizes(node))))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call of an ATen operator."""
        with self.graph.gm.graph.inserting_before(self.before):
            return self._finish(self.graph.gm.graph.call_function(target, args, kwargs))

    def call_module(self, path: str, *args: Any) -> fx.Node:
        """A new call of a module."""
        with self.graph.gm.graph.inserting_before(self.before):
            return self._finish(self.graph.gm.graph.call_module(path, args))

    def put(self, key: Any, path: str, make: Callable[[], Sequence[nn.Module]]) -> list[str]:
        """The paths of the modules that take a module's place, made once: its own, or `path.0`, `path.1`, …"""
        if key not in self.layers:
            made = make()
            set_module(self.graph.gm, path, made[0] if len(made) == 1 else nn.ModuleList(made))
            self.layers[key] = [path] if len(made) == 1 else [f"{path}.{i}" for i in range(len(made))]
        return self.layers[key]

    def reshape(self, node: fx.Node, *sizes: int) -> fx.Node:
        """The node with other sizes, -1 for an open one; itself if it has them. What is reshaped twice is so once."""
        while node.target is aten.reshape.default and node in self.made:
            node = node.args[0]  # type: ignore[assignment]
        shape = node.meta["val"].shape
        count = math.prod(shape)
        known = math.prod(size for size in sizes if size != -1)
        if known == 0 and -1 in sizes:
            raise CannotLowerError(f"a value of {list(shape)} holds nothing that would tell its open size")
        if tuple(shape) == tuple(count // known if size == -1 else size for size in sizes):
            return node
        return self.call(aten.reshape.default, node, list(sizes))

    def permute(self, node: fx.Node, *axes: int) -> fx.Node:
        """The node with its axes in another order."""
        return node if list(axes) == sorted(axes) else self.call(aten.permute.default, node, list(axes))

    def refold(self, value: Folded, groups: Groups) -> Folded:
        """The value in other groups. Only a graph's outputs may have more than four."""
        target = Folded(value.node, value.sizes, groups)
        now, wanted = _long(value), _long(target)
        if [product([value.sizes[a] for a in group]) for group in value.groups] == [
            product([value.sizes[a] for a in group]) for group in groups
        ] and now == wanted:
            return target
        if value.node.op == "get_attr":
            return self._refolded_constant(value, target)
        node, order = value.node, now
        while order != wanted:
            blocks = list(_blocks(order, wanted))
            if len(blocks) <= RANK:
                axes = sorted(range(len(blocks)), key=lambda i: wanted.index(blocks[i][0]))
            else:  # too many for one permute: bring the block that is next in the wanted order to its place
                place = next(i for i, axis in enumerate(order) if axis != wanted[i])
                (found,) = (block for block in blocks if block[0] == wanted[place])
                start = order.index(found[0])
                blocks = [order[:place], order[place:start], found, order[start + len(found) :]]
                axes = [0, 2, 1, 3]
            node = self.permute(self._grouped(node, value.sizes, blocks), *axes)
            order = [axis for i in axes for axis in blocks[i]]
        return Folded(self._grouped(node, value.sizes, groups), value.sizes, groups)

    def settled(self, value: Folded) -> Folded:
        """The value in at most four groups: a graph's input of higher rank is first read as one of rank four."""
        return self.refold(value, merged(value.groups))

    def isolated(self, value: Folded, axis: int) -> tuple[Folded, int]:
        """(the value with an axis in a group of its own, the position of that group); memory stays as it is."""
        value = self.settled(value)
        if (axis,) not in value.groups:
            order = value.order
            at = order.index(axis)
            parts = (order[:at], (axis,), order[at + 1 :])
            value = self.refold(value, tuple(part for part in parts if part))
        return value, value.groups.index((axis,))

    def plain(self, value: Folded) -> fx.Node:
        """The node that holds the value as it is."""
        return self.refold(value, identity(value.rank)).node

    def _grouped(self, node: fx.Node, sizes: Sizes, groups: Sequence[Sequence[int]]) -> fx.Node:
        lengths = [product([sizes[axis] for axis in group]) for group in groups]
        if sum(a != b for a, b in lengths) > 1:
            raise CannotLowerError("more than one axis depends on the batch size")
        return self.reshape(node, *(a if a == b else -1 for a, b in lengths))

    def _refolded_constant(self, value: Folded, target: Folded) -> Folded:
        """A stored tensor in other groups, stored in that form under a name of its own."""
        path = str(value.node.target)
        key = (path, value.groups, target.groups)
        if key not in self.layers:
            tensor = attribute(self.graph.gm, path)
            full = tensor.detach().reshape([value.sizes[axis][0] for axis in value.order])
            full = full.permute([value.order.index(axis) for axis in target.order])
            lengths = [product([value.sizes[axis] for axis in group])[0] for group in target.groups]
            stored: Tensor = full.reshape(lengths).clone(memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                stored = nn.Parameter(stored, tensor.requires_grad)
            count = sum(1 for known in self.layers if isinstance(known, tuple) and known[:1] == (path,))
            name = f"{path}_rank4" + (f"_{count + 1}" if count else "")
            set_tensor(self.graph.gm, name, stored)
            self.layers[key] = [name]
        with self.graph.gm.graph.inserting_before(self.before):
            node = self.graph.gm.graph.get_attr(self.layers[key][0])
        node.meta["val"] = self.graph.fake_mode.from_tensor(attribute(self.graph.gm, self.layers[key][0]))
        return Folded(node, value.sizes, target.groups)

    def _finish(self, node: fx.Node) -> fx.Node:
        node.meta["val"] = infer(self.graph, node)
        node.meta["provenance"] = "the lowering to rank 4"
        self.made.add(node)
        return node


def _long(value: Folded) -> list[int]:
    """The axes in memory order without those of length 1, whose place means nothing."""
    return [axis for axis in value.order if value.sizes[axis] != ONE]


def _blocks(order: Sequence[int], wanted: Sequence[int]) -> Iterator[list[int]]:
    """The longest runs of `order` that also follow each other in `wanted`."""
    block: list[int] = []
    for axis in order:
        if block and wanted.index(axis) == wanted.index(block[-1]) + 1:
            block.append(axis)
            continue
        if block:
            yield block
        block = [axis]
    if block:
        yield block
