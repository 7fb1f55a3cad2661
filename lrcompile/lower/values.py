"""Operations that compute on values of any rank: elementwise ones, reductions, products, norms, embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from lrcompile.graph.graph import aten
from lrcompile.lower.folded import (
    CLIPS,
    FRAMES,
    ONE,
    RANK,
    CannotLowerError,
    Folded,
    Groups,
    Lowering,
    Sizes,
    Value,
    identity,
    merged,
)
from lrcompile.lower.structure import Rule, argument, expanded, listed, padded_rank, regrouped


def pointwise(lower: Lowering, node: fx.Node) -> Value:
    """An operator on each element, or on tensors that broadcast: in the groups in which its operands lie already."""
    sizes = lower.sizes(node)
    nodes = [source for source in node.all_input_nodes if isinstance(lower.lengths.get(source), tuple)]
    values = {
        source: lower.settled(padded_rank(lower.value(source), len(sizes))) for source in nodes if lower.sizes(source)
    }
    groups = _common(sizes, list(values.values()))
    if groups is None:  # the operands are short on too many axes in turn: repeat them along all but the batch
        for source, value in values.items():
            values[source] = expanded(lower, value, _filled(value, sizes))
        groups = _common(sizes, list(values.values()))
    if groups is None:
        raise CannotLowerError("its operands broadcast along the batch and other axes in turn")
    held = {source: lower.refold(value, groups).node for source, value in values.items()}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: held.get(n, n))
    kwargs = {key: item for key, item in kwargs.items() if key != "memory_format"}
    result = lower.call_module(str(node.target), *args) if node.op == "call_module" else None
    return Folded(lower.call(node.target, *args, **kwargs) if result is None else result, sizes, groups)


def _common(sizes: Sizes, values: Sequence[Folded]) -> Groups | None:
    """Groups in which every value is, on each group, either as long as the result or of length 1."""
    full = [value for value in values if value.sizes == sizes]
    full.sort(key=lambda value: value.node.op == "get_attr")  # a stored tensor is refolded for nothing
    orders = [value.order for value in full[:1]] + [tuple(range(len(sizes)))]
    for value in full[:1]:
        if all(_fits(sizes, value.groups, other) for other in values):
            return value.groups
    for order in orders:
        groups = _runs(order, sizes, values)
        if len(groups) <= RANK:
            return groups
    return None


def _runs(order: Iterable[int], sizes: Sizes, values: Sequence[Folded]) -> Groups:
    """Axes in this order, grouped as long as the same values are of length 1 where the result is not."""
    groups: list[list[int]] = []
    pattern: list[bool] = []
    for axis in order:
        short = [value.sizes[axis] == ONE and sizes[axis] != ONE for value in values]
        if groups and (short == pattern or sizes[axis] == ONE):
            groups[-1].append(axis)
            continue
        groups.append([axis])
        pattern = short
    return tuple(tuple(group) for group in groups)


def _filled(value: Folded, sizes: Sizes) -> Sizes:
    """The sizes of a value that is repeated wherever the batch does not say how often."""
    return tuple(new if new[0] == new[1] else old for old, new in zip(value.sizes, sizes, strict=True))


def _fits(sizes: Sizes, groups: Groups, value: Folded) -> bool:
    return all(len({value.sizes[axis] == ONE for axis in group if sizes[axis] != ONE}) <= 1 for group in groups)


def reduction(lower: Lowering, node: fx.Node) -> Value:
    """mean, sum, amax, …: over some axes, which are first brought into groups of their own."""
    value = lower.settled(lower.value(node.args[0]))
    names = [entry.name for entry in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, "dim") if "dim" in names else None
    if dims is None and node.target in (aten.argmax.default, aten.argmin.default):
        raise CannotLowerError("it counts positions of the flattened value")
    axes = list(range(value.rank)) if dims is None or dims == [] else [d % value.rank for d in listed(dims)]
    value, at = reducible(lower, value, axes)
    given = [name for i, name in enumerate(names) if i < len(node.args) or name in node.kwargs]
    options = {name: argument(node, name) for name in given[1:] if name not in ("dim", "keepdim")}
    if "dim" not in names:
        return Folded(lower.call(node.target, value.node, **options), (), ())
    single = dims is not None and not isinstance(dims, list | tuple)
    reduced = lower.call(node.target, value.node, at[0] if single else at, keepdim=True, **options)
    return shortened(lower, value, reduced, axes, lower.sizes(node))


def reducible(lower: Lowering, value: Folded, axes: Sequence[int]) -> tuple[Folded, list[int]]:
    """(the value with these axes in groups without others, the positions of those groups)."""
    groups: list[list[int]] = []
    for axis in value.order:
        if groups and (groups[-1][-1] in axes) == (axis in axes):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    if len(groups) > RANK or (len(axes) == 1 and sum(group[0] in axes for group in groups) > 1):
        kept = [axis for axis in range(value.rank) if axis not in axes]
        groups = [kept, sorted(axes)]
    value = lower.refold(value, tuple(tuple(group) for group in groups))
    return value, [i for i, group in enumerate(groups) if group and group[0] in axes]


def shortened(lower: Lowering, value: Folded, node: fx.Node, axes: Sequence[int], sizes: Sizes) -> Folded:
    """What a reduction that kept its axes returned, read as a value without them where it should not keep them."""
    held = tuple(ONE if axis in axes else size for axis, size in enumerate(value.sizes))
    result = Folded(node, held, value.groups)
    return result if len(sizes) == len(held) else regrouped(lower, result, sizes)


def channels_second(lower: Lowering, value: Folded) -> Folded:
    """The value with axis 1 in the second of four groups and the batch in the first, as norms over channels take it."""
    value = lower.settled(value)
    if len(value.groups) == RANK and value.groups[1] == (1,) and 0 in value.groups[0]:
        return value
    return lower.refold(value, FRAMES if value.rank == len(FRAMES) + 1 else merged(identity(value.rank)))


def prelu(lower: Lowering, node: fx.Node) -> Value:
    """prelu: a slope for each channel."""
    value = channels_second(lower, lower.value(node.args[0]))
    return Folded(lower.call(node.target, value.node, node.args[1]), value.sizes, value.groups)


def over_clips(lower: Lowering, node: fx.Node) -> Value:
    """group_norm, instance_norm, batch_norm by operator: statistics over all positions of a sample's channels."""
    value = lower.value(node.args[0])
    groups = CLIPS if value.rank == len(CLIPS) + 1 else ((0,), (1,), tuple(range(2, value.rank)))
    value = lower.refold(value, groups)
    return Folded(lower.call(node.target, value.node, *node.args[1:], **node.kwargs), value.sizes, groups)


def last_axes(lower: Lowering, node: fx.Node, value: Folded, count: int) -> Folded:
    """The value with its last axes as they are, and all before them in one group."""
    if count >= RANK:
        raise CannotLowerError(f"it works on the last {count} axes together")
    kept = value.rank - count
    return lower.refold(value, (tuple(range(kept)), *((axis,) for axis in range(kept, value.rank))))


def layer_norm_op(lower: Lowering, node: fx.Node) -> Value:
    """layer_norm on computed weights."""
    value = last_axes(lower, node, lower.value(node.args[0]), len(argument(node, "normalized_shape")))
    return Folded(lower.call(node.target, value.node, *node.args[1:], **node.kwargs), value.sizes, value.groups)


def on_last_axes(lower: Lowering, node: fx.Node) -> Value:
    """Linear layers and layer norms: rows of features."""
    module = lower.module(node)
    count = len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else 1
    value = last_axes(lower, node, lower.value(node.args[0]), count)
    return Folded(lower.call_module(str(node.target), value.node), lower.sizes(node), value.groups)


def linear_op(lower: Lowering, node: fx.Node) -> Value:
    """linear on a computed weight."""
    value = last_axes(lower, node, lower.value(node.args[0]), 1)
    return Folded(lower.call(node.target, value.node, *node.args[1:]), lower.sizes(node), value.groups)


def matmul(lower: Lowering, node: fx.Node) -> Value:
    """matmul of stacks of matrices: leading axes in at most two groups, along which the operands may broadcast."""
    sizes = lower.sizes(node)
    a, b = (lower.value(source) for source in node.args[:2])
    if b.rank <= 2:
        value = last_axes(lower, node, a, 1)
        kept = value.groups if b.rank == 2 else value.groups[:1]
        return Folded(lower.call(node.target, value.node, lower.plain(b)), sizes, kept)
    if a.rank == 1:
        raise CannotLowerError("a vector is multiplied by a stack of matrices")
    rank = len(sizes)
    values = [padded_rank(value, rank) for value in (a, b)]
    stacks = _runs(range(rank - 2), sizes, values)
    if len(stacks) > RANK - 2:
        values = [expanded(lower, value, (*_filled(value, sizes)[:-2], *value.sizes[-2:])) for value in values]
        stacks = _runs(range(rank - 2), sizes, values)
    if len(stacks) > RANK - 2:
        raise CannotLowerError("its operands broadcast along the batch and other axes in turn")
    groups: Groups = (*stacks, (rank - 2,), (rank - 1,))
    nodes = [lower.refold(value, groups).node for value in values]
    return Folded(lower.call(node.target, *nodes), sizes, groups)


def attention(lower: Lowering, node: fx.Node) -> Value:
    """Scaled dot-product attention: all axes before the heads in one group."""
    sizes = lower.sizes(node)
    rank = len(sizes)
    groups: Groups = (tuple(range(rank - 3)), (rank - 3,), (rank - 2,), (rank - 1,))
    held = [lower.refold(lower.value(source), groups).node for source in node.args[:3]]
    mask = argument(node, "attn_mask")
    if mask is not None:
        value = padded_rank(lower.value(mask), rank)
        leading = {value.sizes[axis] == ONE for axis in range(rank - 3) if sizes[axis] != ONE}
        if len(leading) > 1:
            value = expanded(lower, value, (*sizes[: rank - 3], *value.sizes[rank - 3 :]))
        mask = lower.refold(value, groups).node
    options = {key: item for key, item in node.kwargs.items() if key != "attn_mask"}
    names = [entry.name for entry in node.target._schema.arguments]  # type: ignore[union-attr]
    options |= dict(zip(names[4:], node.args[4:], strict=False))
    return Folded(lower.call(node.target, *held, mask, **options), sizes, groups)


def embedding(lower: Lowering, node: fx.Node) -> Value:
    """An embedding of indices of any rank: looked up as one list."""
    value = lower.value(node.args[0])
    value = lower.refold(value, (tuple(range(value.rank)),))
    groups: Groups = (tuple(range(value.rank)), (value.rank,))
    return Folded(lower.call_module(str(node.target), value.node), lower.sizes(node), groups)


VALUES: dict[Any, Rule] = {
    **dict.fromkeys((aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.logsumexp), reduction),
    **dict.fromkeys((aten.argmax, aten.argmin, aten.prod, aten.any, aten.all), reduction),
    aten.prelu: prelu, aten.group_norm: over_clips, aten.instance_norm: over_clips, aten.batch_norm: over_clips,
    aten.layer_norm: layer_norm_op, aten.linear: linear_op, aten.matmul: matmul,
    aten.scaled_dot_product_attention: attention,
    aten.to: pointwise, aten._to_copy: pointwise, aten.zeros_like: pointwise, aten.ones_like: pointwise,
    aten.full_like: pointwise,
}  # fmt: skip
"""By operator; whatever else torch says works on each element is `pointwise`."""
