"""Which values share memory, and which of them are written in place: exported graphs may hold `relu_` and its like."""

from __future__ import annotations

from torch import fx, nn

from lrcompile.graph.graph import Graph

_ALIASING_MODULES = (nn.Dropout, nn.Identity)


class Writes:
    """The writes in place of a graph: which node's memory each goes to, and where in the order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.writers: list[tuple[fx.Node, fx.Node]] = [
            (node, self.memory(target)) for node in graph.nodes for target in _written(node)
        ]

    def memory(self, node: fx.Node) -> fx.Node:
        """The node whose output holds the memory that `node`'s output lies in."""
        while node.all_input_nodes and (_may_alias(node) or isinstance(self.graph.module(node), _ALIASING_MODULES)):
            node = node.all_input_nodes[0]
        return node

    def touch(self, *nodes: fx.Node) -> bool:
        """Whether the memory of one of the nodes is written anywhere."""
        memories = {self.memory(node) for node in nodes}
        return any(memory in memories for _, memory in self.writers)

    def between(self, node: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """What writes to `node`'s memory after `first` and before `last`, or None."""
        start, stop = self.position[first], self.position[last]
        memory = self.memory(node)
        return next((w for w, m in self.writers if m is memory and start < self.position[w] < stop), None)

    def through_view(self, node: fx.Node) -> fx.Node | None:
        """What writes to `node`'s memory by another name than `node` itself, or None."""
        return next((w for w, m in self.writers if m is node and node not in w.all_input_nodes), None)


def _schema_arguments(node: fx.Node) -> list[tuple[object, object]]:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None:
        return []
    values = [*node.args, *(node.kwargs.get(a.name) for a in schema.arguments[len(node.args) :])]
    return list(zip(schema.arguments, values, strict=False))


def _written(node: fx.Node) -> list[fx.Node]:
    return [
        value
        for argument, value in _schema_arguments(node)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node)  # type: ignore[attr-defined]
    ]


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None:
        return node.op == "call_function"  # getitem of a split
    return any(result.alias_info is not None for result in schema.returns)
