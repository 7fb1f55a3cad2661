"""Writes what torch.onnx cannot take, or takes in a roundabout way, as operations that it writes well."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lrcompile.emit.structure import keep_outputs
from lrcompile.graph.graph import Graph

ATTENTION_OPSET = 23
"""The first opset in which attention is one operator, with heads that share keys."""

aten = torch.ops.aten
_ATTENTION, _INDEX = aten.scaled_dot_product_attention.default, aten.index.Tensor
_CHUNK, _SPLIT = aten.chunk.default, aten.split.Tensor


def expressible(gm: fx.GraphModule, opset: int) -> fx.GraphModule:
    """The graph as torch.onnx can take it: attention with an axis of heads, tensors as outputs; a copy if need be."""
    outputs = pytree.tree_leaves(list(gm.graph.output_node().args))
    tensors = [i for i, node in enumerate(outputs) if isinstance(node, fx.Node) and is_tensor(node)]
    kinds = (_ATTENTION, _INDEX, _CHUNK, _SPLIT)
    special = [n for kind in kinds for n in gm.graph.find_nodes(op="call_function", target=kind)]
    if len(tensors) == len(outputs) and not special:
        return gm
    result = Graph(gm, FakeTensorMode()).copy().gm
    if len(tensors) < len(outputs):
        keep_outputs(result.graph, tensors)
    for node in filter(_is_stacked, result.graph.find_nodes(op="call_function", target=_INDEX)):
        _express_index(result.graph, node)
    for kind in (_CHUNK, _SPLIT):
        for node in filter(_is_open_cut, result.graph.find_nodes(op="call_function", target=kind)):
            _express_cut(result.graph, node)
    for node in result.graph.find_nodes(op="call_function", target=_ATTENTION):
        _fold_leading(result.graph, node)
        if opset < ATTENTION_OPSET:
            _repeat_heads(result.graph, node)
        _express_attention(result.graph, node)
    result.recompile()
    return result


def _fold_leading(graph: fx.Graph, node: fx.Node) -> None:
    """Gives attention with several axes before its heads one in their place: torch.onnx takes no other."""
    arguments: Any = node.args
    values, mask = arguments[:3], (*arguments[3:4], node.kwargs.get("attn_mask"))[0]
    leading = _sizes(values[0])[:-3]
    is_one_open = sum(not size.isdigit() for size in leading) < 2
    if len(leading) < 2 or not is_one_open or any(_sizes(value)[:-3] != leading for value in values):
        return
    folds_mask = isinstance(mask, fx.Node) and mask.meta["val"].dim() > 3
    if folds_mask and not _leads_with(mask, leading):
        return
    wanted = [int(size) if size.isdigit() else -1 for size in leading]
    whole = node.meta["val"]
    with graph.inserting_before(node):
        for value in dict.fromkeys(values):
            node.replace_input_with(value, _folded(graph, value))
        if folds_mask:
            wide = mask
            if set(_sizes(mask)[:-3]) != {"1"}:
                wide = graph.call_function(aten.expand.default, (mask, [*wanted, -1, -1, -1]))
                wide.meta["val"] = mask.meta["val"].expand(*whole.shape[:-3], -1, -1, -1)
            node.replace_input_with(mask, _folded(graph, wide))
    node.meta = {"val": whole.flatten(0, -4)}
    users = list(node.users)
    with graph.inserting_after(node):
        unfolded = graph.call_function(aten.unflatten.int, (node, 0, wanted))
    unfolded.meta["val"] = whole
    for user in users:
        user.replace_input_with(node, unfolded)


def _folded(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """[…, heads, length, size] with one axis in the place of the first ones."""
    folded = graph.call_function(aten.flatten.using_ints, (value, 0, -4))
    folded.meta["val"] = value.meta["val"].flatten(0, -4)
    folded.meta["sizes"] = ("batch", *_sizes(value)[-3:])
    return folded


def _leads_with(mask: fx.Node, leading: Sequence[str]) -> bool:
    """Whether a mask can be folded as queries are: it has their open size, or is the same for all of them."""
    sizes = _sizes(mask)[:-3]
    if set(sizes) == {"1"}:
        return True
    own = ["1"] * (len(leading) - len(sizes)) + list(sizes)
    return all(a == b or (a == "1" and b.isdigit()) for a, b in zip(own, leading, strict=True))


def _repeat_heads(graph: fx.Graph, node: fx.Node) -> None:
    """Gives attention whose heads share keys a copy of them for each: torch.onnx does so too, on five axes."""
    arguments: Any = node.args
    heads = arguments[0].meta["val"].shape[1]
    if not node.kwargs.get("enable_gqa") or not all(_is_fixed(value, heads) for value in arguments[1:3]):
        return
    with graph.inserting_before(node):
        for i in (1, 2):
            value = arguments[i].meta["val"]
            batch, groups, length, size = value.shape
            head = length * size
            one = graph.call_function(aten.reshape.default, (arguments[i], [-1, groups, 1, head]))
            many = graph.call_function(aten.expand.default, (one, [-1, groups, heads // groups, head]))
            repeated = graph.call_function(aten.reshape.default, (many, [-1, heads, length, size]))
            repeated.meta["val"] = value.new_empty((batch, heads, length, size), device="meta")
            node.update_arg(i, repeated)
    node.kwargs = {name: option for name, option in node.kwargs.items() if name != "enable_gqa"}


def _is_fixed(value: Any, heads: int) -> bool:
    """Whether keys or values have fewer heads, and no open size but the batch."""
    sizes = _sizes(value)
    return len(sizes) == 4 and 0 < value.meta["val"].shape[1] < heads and all(size.isdigit() for size in sizes[1:])


def _express_attention(graph: fx.Graph, node: fx.Node) -> None:
    """Gives attention heads where it has none, and its output one layout: torch.onnx traces it to two."""
    has_heads = node.args[0].meta["val"].dim() != 3  # type: ignore[union-attr]
    if not has_heads:
        with graph.inserting_before(node):
            node.args = tuple(
                graph.call_function(aten.unsqueeze.default, (value, 1))
                if isinstance(value, fx.Node) and value.meta["val"].dim() == 3
                else value
                for value in node.args
            )
    users = list(node.users)
    with graph.inserting_after(node):
        last = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    if not has_heads:
        with graph.inserting_after(last):
            last = graph.call_function(aten.squeeze.dim, (last, 1))
    for user in users:
        user.replace_input_with(node, last)


def _express_index(graph: fx.Graph, node: fx.Node) -> None:
    """Reads by several tensors of positions as by one: torch.onnx stacks them along one more axis, for GatherND.

    The positions of all axes but the first are counted from 0, where they may be counted from the end.
    """
    arguments: Any = node.args
    value, positions = arguments
    sizes = [int(size) for size in _sizes(value)[1:]]
    with graph.inserting_before(node):
        flat = graph.call_function(aten.reshape.default, (value, [-1, *sizes[len(positions) - 1 :]]))
        place = positions[0]
        for size, position in zip(sizes, positions[1:], strict=False):
            counted = graph.call_function(aten.remainder.Scalar, (position, size))
            place = graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Scalar, (place, size)), counted))
        wanted = [int(size) if size.isdigit() else -1 for size in _sizes(node)]
        row = graph.call_function(aten.reshape.default, (place, [-1]))
        read = graph.call_function(aten.index_select.default, (flat, 0, row))
        shaped = graph.call_function(aten.reshape.default, (read, wanted))
    shaped.meta = dict(node.meta)
    node.replace_all_uses_with(shaped)
    graph.erase_node(node)


def _express_cut(graph: fx.Graph, node: fx.Node) -> None:
    """Cuts parts of an open size out one by one: over what torch.onnx makes of them its optimizer stumbles."""
    value, size, *given = node.args
    dim: Any = given[0] if given else 0
    if node.target is _CHUNK:
        with graph.inserting_before(node):
            whole = graph.call_function(aten.sym_size.int, (value, dim))
            above = graph.call_function(operator.add, (whole, size - 1))  # type: ignore[operator]
            size = graph.call_function(operator.floordiv, (above, size))
    for part in list(node.users):
        number: Any = part.args[1]
        with graph.inserting_before(part):
            ends = [graph.call_function(operator.mul, (size, i)) for i in (number, number + 1)]
            cut = graph.call_function(aten.slice.Tensor, (value, dim, *ends))
        cut.meta = dict(part.meta)
        part.replace_all_uses_with(cut)
        graph.erase_node(part)
    graph.erase_node(node)


def _is_open_cut(node: fx.Node) -> bool:
    """Whether an axis is cut into parts whose size is open."""
    value, size, *given = node.args
    dim: Any = given[0] if given else 0
    return isinstance(size, fx.Node) or (node.target is _CHUNK and not _sizes(value)[dim].isdigit())  # type: ignore[arg-type]


def _is_stacked(node: fx.Node) -> bool:
    """Whether the first axes of a value, and at least two, are read by tensors of positions, with at most one open."""
    arguments: Any = node.args
    value, positions = arguments
    tensors = all(isinstance(p, fx.Node) and p.meta["val"].dtype in (torch.int64, torch.int32) for p in positions)
    fixed = all(size.isdigit() and size != "0" for size in _sizes(value)[1:])
    return tensors and len(positions) > 1 and fixed and sum(not size.isdigit() for size in _sizes(node)) < 2


def _sizes(value: fx.Node) -> Sequence[str]:
    """The sizes of a value as export knew them: a name where one is open."""
    return value.meta.get("sizes", tuple(map(str, value.meta["val"].shape)))


def is_tensor(node: fx.Node) -> bool:
    """Whether a node has one tensor as its value."""
    return isinstance(node.meta.get("val"), torch.Tensor)
