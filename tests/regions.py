"""Regions as the target `local` gets them, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from lrcompile.graph.graph import propagate


def region(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """A lifted region: modules stay calls, functions become ATen, shapes are filled in."""
    names = [f"x{i}" for i in range(len(inputs))]
    graph, root = fx.Graph(), nn.Module()
    placeholders = [graph.placeholder(name) for name in names]
    graph.output(function(Tape(graph, root), *placeholders))
    gm = fx.GraphModule(root, graph)
    gm.eval()
    return propagate(gm, inputs).gm


class Tape:
    """Writes calls into a graph: `tape(module_or_op, *args)`."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if not isinstance(target, nn.Module):
            return self.graph.call_function(target, args, kwargs)
        known = [name for name, module in self.root.named_children() if module is target]
        name = known[0] if known else f"m{len(list(self.root.children()))}"
        self.root.add_module(name, target)
        return self.graph.call_module(name, args)


def of(target: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """A region of one call: the inputs, then `args`."""
    return lambda tape, *xs: tape(target, *xs, *args, **kwargs)
