"""Graphs inside of a graph: what runs under `torch.autocast`, and the branches of `torch.cond`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrcompile.graph.graph import attribute

aten = torch.ops.aten
_LAYERS = (aten.linear, aten.addmm, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.embedding)


def nested(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Copies of the graphs that a node runs, their values with the sizes of what it gives them."""
    graphs = _graphs(gm, node)
    if not graphs:
        return []
    arguments = pytree.tree_leaves((node.args, node.kwargs))
    given = [x for x in arguments[max(graphs) + 1 :] if isinstance(x, fx.Node)]
    return [_with_sizes(graph, given) for graph in graphs.values()]


def out_of_reach(gm: fx.GraphModule) -> list[str]:
    """A sentence on each node that runs graphs of its own, whose layers no pass is shown."""
    found = []
    for node in gm.graph.nodes:
        inner = [target for graph in _graphs(gm, node).values() for target in (n.target for n in graph.graph.nodes)]
        layers = sum(getattr(target, "overloadpacket", None) in _LAYERS for target in inner)
        if layers:
            kind = "under torch.autocast" if "autocast" in str(node.target) else f"inside of {node.target}"
            found.append(f"{layers} layer(s) {kind} are priced, and left as they are: passes see the outer graph alone")
    return found


def _graphs(gm: fx.GraphModule, node: fx.Node) -> dict[int, fx.GraphModule]:
    """The graphs that a node runs, by their places among its flat arguments."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return {}
    arguments = enumerate(pytree.tree_leaves((node.args, node.kwargs)))
    return {i: found for i, argument in arguments if (found := _graph(gm, argument)) is not None}


def _graph(gm: fx.GraphModule, argument: Any) -> fx.GraphModule | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value = attribute(gm, str(argument.target))
    return value if isinstance(value, fx.GraphModule) else None


def _with_sizes(inner: fx.GraphModule, given: list[fx.Node]) -> fx.GraphModule:
    """A copy whose symbols have the values that they have in what is given."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(inner.graph, {}))
    copy = fx.GraphModule(inner, graph)
    symbols: dict[Any, int] = {}
    for placeholder, outer in zip(copy.graph.find_nodes(op="placeholder"), given, strict=False):
        own, value = placeholder.meta.get("val"), outer.meta.get("val")
        if isinstance(own, Tensor) and isinstance(value, Tensor):
            sizes: list[Any] = list(own.shape)
            pairs = zip(sizes, value.shape, strict=True)
            symbols |= {size.node.expr: int(known) for size, known in pairs if isinstance(size, torch.SymInt)}
    for node in copy.graph.nodes:
        node.meta["val"] = pytree.tree_map(lambda value: _with(value, symbols), node.meta.get("val"))
    return copy


def _with(value: Any, symbols: dict[Any, int]) -> Any:
    if not isinstance(value, Tensor) or not any(isinstance(size, torch.SymInt) for size in value.shape):
        return value
    sizes: list[Any] = list(value.shape)
    shape = [int(size.node.expr.subs(symbols)) if isinstance(size, torch.SymInt) else size for size in sizes]
    return torch.empty(shape, dtype=value.dtype, device="meta")
