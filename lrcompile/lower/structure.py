"""Operations that move values and compute nothing: most of them only rename the axes of a folded value."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from lrcompile.graph.graph import aten
from lrcompile.lower.folded import ONE, CannotLowerError, Folded, Lowering, Size, Sizes, Value, merged

Rule = Callable[[Lowering, fx.Node], Value]


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the operator's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, entry in enumerate(schema) if entry.name == name)
    if position < len(node.args):
        return node.args[position]
    return default if schema[position].default_value is None else schema[position].default_value


def regrouped(lower: Lowering, value: Folded, sizes: Sizes) -> Folded:
    """The value read as one of other sizes, in row-major order: what `reshape` returns.

    Axes that are split or merged together have to lie together in memory; the others stay where they are.
    """
    segments = _aligned(value.sizes, sizes)
    order = [axis for axis in value.order if value.sizes[axis] != ONE]
    segment_of = {axis: i for i, (old, _) in enumerate(segments) for axis in old}
    wanted = [axis for i in dict.fromkeys(segment_of[axis] for axis in order) for axis in segments[i][0]]
    cuts = {(group[-1], following[0]) for group, following in _neighbours(value)}
    groups: list[list[int]] = []
    for axis in wanted:
        before = groups[-1][-1] if groups else None
        if before is not None and (segment_of[before] == segment_of[axis] or _joined(value, before, axis, cuts)):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    ones = tuple(axis for axis in range(value.rank) if value.sizes[axis] == ONE)
    old_groups = merged(tuple(tuple(group) for group in groups) or ((),))
    value = lower.refold(value, (*old_groups[:-1], (*old_groups[-1], *ones)))
    new_groups = tuple(_translated(group, segments, segment_of) for group in old_groups)
    placed = {axis for group in new_groups for axis in group}
    return Folded(value.node, sizes, _with_ones(new_groups, [a for a in range(len(sizes)) if a not in placed]))


def _neighbours(value: Folded) -> list[tuple[list[int], list[int]]]:
    long = [[axis for axis in group if value.sizes[axis] != ONE] for group in value.groups]
    filled = [group for group in long if group]
    return list(itertools.pairwise(filled))


def _joined(value: Folded, before: int, axis: int, cuts: set[tuple[int, int]]) -> bool:
    """Whether two axes lie next to each other in one group."""
    order = [a for a in value.order if value.sizes[a] != ONE]
    return order.index(axis) == order.index(before) + 1 and (before, axis) not in cuts


def _translated(
    group: Sequence[int], segments: Sequence[tuple[list[int], list[int]]], segment_of: dict[int, int]
) -> tuple[int, ...]:
    return tuple(axis for i in dict.fromkeys(segment_of[axis] for axis in group) for axis in segments[i][1])


def _with_ones(groups: tuple[tuple[int, ...], ...], ones: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The groups with axes of length 1 put behind the axis that comes before each of them, at no cost."""
    result = [list(group) for group in groups]
    for axis in ones:
        home = next((group for group in result if axis - 1 in group), result[0])
        home.insert(home.index(axis - 1) + 1 if axis - 1 in home else 0, axis)
    return tuple(tuple(group) for group in result)


def _aligned(old: Sizes, new: Sizes) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes, old and new, that hold equally many elements; axes of length 1 left out."""
    left = [axis for axis, size in enumerate(old) if size != ONE]
    right = [axis for axis, size in enumerate(new) if size != ONE]
    segments: list[tuple[list[int], list[int]]] = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        p, q = old[a[0]], new[b[0]]
        while p != q:
            if p < q and left:
                a.append(left.pop(0))
                p = _times(p, old[a[-1]])
            elif right:
                b.append(right.pop(0))
                q = _times(q, new[b[-1]])
            else:
                raise CannotLowerError(f"it cannot be told how {_text(old)} becomes {_text(new)} at every batch size")
        segments.append((a, b))
    if left or right:
        raise CannotLowerError(f"it cannot be told how {_text(old)} becomes {_text(new)} at every batch size")
    return segments


def _times(a: Size, b: Size) -> Size:
    return a[0] * b[0], a[1] * b[1]


def _text(sizes: Sizes) -> str:
    return str([size[0] for size in sizes])


def reshape(lower: Lowering, node: fx.Node) -> Value:
    """Every operator that keeps the elements in row-major order: view, flatten, squeeze, unsqueeze, …"""
    if node.target is aten.view.dtype:
        raise CannotLowerError("it reads the same bytes as another type")
    return regrouped(lower, lower.value(node.args[0]), lower.sizes(node))


def permute(lower: Lowering, node: fx.Node) -> Value:
    """permute: axis i of the result is axis dims[i]."""
    value = lower.value(node.args[0])
    return _permuted(lower, node, value, [dim % value.rank for dim in argument(node, "dims")])


def transpose(lower: Lowering, node: fx.Node) -> Value:
    """transpose: two axes change places."""
    value = lower.value(node.args[0])
    dims = list(range(value.rank))
    a, b = (argument(node, name) % value.rank for name in ("dim0", "dim1"))
    dims[a], dims[b] = dims[b], dims[a]
    return _permuted(lower, node, value, dims)


def last_two(lower: Lowering, node: fx.Node) -> Value:
    """mT: the last two axes change places."""
    value = lower.value(node.args[0])
    dims = list(range(value.rank))
    return _permuted(lower, node, value, [*dims[:-2], dims[-1], dims[-2]])


def movedim(lower: Lowering, node: fx.Node) -> Value:
    """movedim: some axes go to given places, the others keep their order."""
    value = lower.value(node.args[0])
    sources, targets = (listed(argument(node, name)) for name in ("source", "destination"))
    places = dict(zip([t % value.rank for t in targets], [s % value.rank for s in sources], strict=True))
    rest = iter(axis for axis in range(value.rank) if axis not in places.values())
    return _permuted(lower, node, value, [places[i] if i in places else next(rest) for i in range(value.rank)])


def _permuted(lower: Lowering, node: fx.Node, value: Folded, dims: Sequence[int]) -> Folded:
    return lower.settled(value).renamed(lower.sizes(node), {old: new for new, old in enumerate(dims)})


def listed(value: Any) -> list[Any]:
    """An argument that may be one value or several, as several."""
    return list(value) if isinstance(value, list | tuple) else [value]


def same(lower: Lowering, node: fx.Node) -> Value:
    """clone, contiguous, detach: a folded value has no memory format of its own."""
    return lower.value(node.args[0])


def evaluated(lower: Lowering, node: fx.Node) -> Value:
    """Dropout in a model that is not trained."""
    if argument(node, "train"):
        raise CannotLowerError("it draws random numbers")
    return lower.value(node.args[0])


def along(lower: Lowering, node: fx.Node) -> Value:
    """Operators that work along one axis `dim` and leave the others alone: slice, index_select, softmax, cumsum."""
    value = lower.value(node.args[0])
    dim = argument(node, "dim", 0) % value.rank
    value, at = lower.isolated(value, dim)
    position = next(i for i, entry in enumerate(node.target._schema.arguments) if entry.name == "dim")  # type: ignore[union-attr]
    args = list(node.args) + [None] * (position + 1 - len(node.args))
    if "dim" not in node.kwargs:
        args[position] = at
    kwargs = {key: at if key == "dim" else item for key, item in node.kwargs.items()}
    return Folded(lower.call(node.target, value.node, *args[1:], **kwargs), lower.sizes(node), value.groups)


def select(lower: Lowering, node: fx.Node) -> Value:
    """select: one position of an axis, which goes away."""
    value = lower.value(node.args[0])
    dim, index = argument(node, "dim") % value.rank, argument(node, "index")
    return _picked(lower, value, dim, index, lower.sizes(node))


def unbind(lower: Lowering, node: fx.Node) -> Value:
    """unbind: every position of an axis."""
    value = lower.value(node.args[0])
    dim = argument(node, "dim", 0) % value.rank
    (count,) = value.static(dim)
    return tuple(_picked(lower, value, dim, i, lower.lengths[node][i]) for i in range(count))


def _picked(lower: Lowering, value: Folded, dim: int, index: Any, sizes: Sizes) -> Folded:
    value, at = lower.isolated(value, dim)
    names = {axis: axis - (axis > dim) for axis in range(value.rank) if axis != dim}
    groups = tuple(tuple(names[a] for a in group) for group in value.groups if group != (dim,))
    return Folded(lower.call(aten.select.int, value.node, at, index), sizes, groups or ((),))


def split(lower: Lowering, node: fx.Node) -> Value:
    """split, split_with_sizes, chunk: consecutive parts of an axis."""
    value = lower.value(node.args[0])
    dim = argument(node, "dim", 0) % value.rank
    value.static(dim)
    value, at = lower.isolated(value, dim)
    parts, start = [], 0
    for sizes in lower.lengths[node]:
        end = start + sizes[dim][0]
        parts.append(Folded(lower.call(aten.slice.Tensor, value.node, at, start, end), sizes, value.groups))
        start = end
    return tuple(parts)


def pick_item(lower: Lowering, node: fx.Node) -> Value:
    """getitem: one of several outputs."""
    items: Any = lower.values[node.args[0]]  # type: ignore[index]
    item = items[node.args[1]]
    if item is None:
        raise CannotLowerError(f"its output {node.args[1]} is used, which the form of rank 4 does not have")
    return item  # type: ignore[no-any-return]


def cat(lower: Lowering, node: fx.Node) -> Value:
    """cat along an axis."""
    values = [lower.value(source) for source in argument(node, "tensors")]
    values = [value for value in values if value.sizes != ((0, 0),)]  # cat takes, and ignores, an empty tensor
    sizes = lower.sizes(node)
    return concatenated(lower, values, argument(node, "dim", 0) % len(sizes), sizes)


def stack(lower: Lowering, node: fx.Node) -> Value:
    """stack: cat along a new axis."""
    values = [lower.value(source) for source in argument(node, "tensors")]
    sizes = lower.sizes(node)
    dim = argument(node, "dim", 0) % len(sizes)
    part = (*sizes[:dim], ONE, *sizes[dim + 1 :])
    return concatenated(lower, [regrouped(lower, value, part) for value in values], dim, sizes)


def concatenated(lower: Lowering, values: Sequence[Folded], dim: int, sizes: Sizes) -> Folded:
    """The values one after another along an axis, in the groups of the longest of them."""
    longest = max(values, key=lambda value: sum(size != ONE for size in value.sizes))
    first, at = lower.isolated(longest, dim)
    nodes = [lower.refold(value, first.groups).node for value in values]
    return Folded(lower.call(aten.cat.default, nodes, at), sizes, first.groups)


def expand(lower: Lowering, node: fx.Node) -> Value:
    """expand: axes of length 1 repeated."""
    return expanded(lower, lower.value(node.args[0]), lower.sizes(node), argument(node, "size", ()))


def expanded(lower: Lowering, value: Folded, sizes: Sizes, asked: Sequence[Any] = ()) -> Folded:
    """The value with axes of length 1 repeated, and new ones in front; `asked` has the nodes that count open axes."""
    value = padded_rank(value, len(sizes))
    for axis, size in enumerate(sizes):
        if value.sizes[axis] == size:
            continue
        count: Any = asked[axis] if asked else size[0]
        if size[0] != size[1] and not isinstance(count, fx.Node):
            raise CannotLowerError(f"axis {axis} is repeated as often as the batch is large")
        value, at = lower.isolated(value, axis)
        lengths = [count if i == at else -1 for i in range(len(value.groups))]
        grown = (*value.sizes[:axis], size, *value.sizes[axis + 1 :])
        value = Folded(lower.call(aten.expand.default, value.node, lengths), grown, value.groups)
    return value


def padded_rank(value: Folded, rank: int) -> Folded:
    """The value with axes of length 1 in front, as broadcasting reads it."""
    new = rank - value.rank
    if not new:
        return value
    groups = tuple(tuple(axis + new for axis in group) for group in value.groups) or ((),)
    ones = tuple(range(new))
    return Folded(value.node, (ONE,) * new + value.sizes, ((*ones, *groups[0]), *groups[1:]))


def repeat(lower: Lowering, node: fx.Node) -> Value:
    """repeat: the value one after another along some axes."""
    counts = argument(node, "repeats")
    value = padded_rank(lower.value(node.args[0]), len(counts))
    for axis, count in enumerate(counts):
        if not isinstance(count, int):
            raise CannotLowerError(f"axis {axis} is repeated as often as the batch is large")
        if count != 1:
            size = (value.sizes[axis][0] * count, value.sizes[axis][1] * count)
            value = concatenated(lower, [value] * count, axis, (*value.sizes[:axis], size, *value.sizes[axis + 1 :]))
    return value


def flip(lower: Lowering, node: fx.Node) -> Value:
    """flip: some axes backwards."""
    value = lower.value(node.args[0])
    for dim in argument(node, "dims"):
        value, at = lower.isolated(value, dim % value.rank)
        value = Folded(lower.call(aten.flip.default, value.node, [at]), value.sizes, value.groups)
    return value


def roll(lower: Lowering, node: fx.Node) -> Value:
    """roll: some axes shifted, what falls off put back at the other end."""
    value = lower.value(node.args[0])
    dims = argument(node, "dims", [])
    if not dims:
        raise CannotLowerError("it shifts the flattened value")
    for dim, shift in zip(dims, argument(node, "shifts"), strict=True):
        value, at = lower.isolated(value, dim % value.rank)
        value = Folded(lower.call(aten.roll.default, value.node, [shift], [at]), value.sizes, value.groups)
    return value


def pad(lower: Lowering, node: fx.Node) -> Value:
    """pad: axes made longer at both ends, in every mode of `torch.nn.functional.pad`, one axis after another."""
    value = lower.value(node.args[0])
    amounts: list[Any] = list(argument(node, "pad"))
    mode = argument(node, "mode", "constant") if node.target is aten.pad.default else "constant"
    fill = argument(node, "value", 0)
    for i in range(0, len(amounts), 2):
        axis, ends = value.rank - 1 - i // 2, amounts[i : i + 2]
        if ends != [0, 0]:
            value = padded(lower, value, axis, ends[0], ends[1], mode, fill or 0)
    return value


def padded(
    lower: Lowering, value: Folded, axis: int, before: int, after: int, mode: str = "constant", fill: float = 0
) -> Folded:
    """The value with an axis made longer by `before` and `after`."""
    (length,) = value.static(axis)
    total = length + before + after
    sizes = (*value.sizes[:axis], (total, total), *value.sizes[axis + 1 :])
    if mode == "constant":
        value, at = lower.isolated(value, axis)
        places = [0, 0] * (len(value.groups) - 1 - at) + [before, after]
        return Folded(lower.call(aten.constant_pad_nd.default, value.node, places, fill), sizes, value.groups)
    order = lower.settled(value).order
    at = order.index(axis)
    groups = (order[:at], (), (axis,), order[at + 1 :])  # torch pads the last two of four axes in these modes
    value = lower.refold(value, groups)
    return Folded(lower.call(aten.pad.default, value.node, [0, 0, before, after], mode), sizes, groups)


def size_of(lower: Lowering, node: fx.Node) -> Value:
    """sym_size: the length of an axis, which stays a number where the batch does not change it."""
    value = lower.value(node.args[0])
    index: Any = node.args[1]
    dim = index % value.rank
    length = value.sizes[dim]
    if length[0] == length[1]:
        result: Any = length[0]
    else:
        held, at = lower.isolated(value, dim)
        result = lower.call(aten.sym_size.int, held.node, at)
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: result if n is node else n)
    return None


STRUCTURE: dict[Any, Rule] = {
    aten.view: reshape, aten.reshape: reshape, aten._unsafe_view: reshape, aten.flatten: reshape,
    aten.unflatten: reshape, aten.squeeze: reshape, aten.unsqueeze: reshape, aten.view_as: reshape,
    aten.permute: permute, aten.transpose: transpose, aten.swapaxes: transpose, aten.movedim: movedim,
    aten.mT: last_two,
    aten.dropout: evaluated, aten.feature_dropout: evaluated, aten.alpha_dropout: evaluated,
    aten.clone: same, aten.contiguous: same, aten.detach: same, aten.alias: same, aten.lift_fresh_copy: same,
    aten.slice: along, aten.narrow: along, aten.index_select: along, aten.softmax: along, aten._softmax: along,
    aten.log_softmax: along, aten.cumsum: along, aten.select: select, aten.unbind: unbind,
    aten.split: split, aten.split_with_sizes: split, aten.chunk: split,
    aten.cat: cat, aten.concat: cat, aten.stack: stack, aten.expand: expand,
    aten.repeat: repeat, aten.flip: flip, aten.roll: roll, aten.pad: pad, aten.constant_pad_nd: pad,
    aten.sym_size: size_of,
}  # fmt: skip
