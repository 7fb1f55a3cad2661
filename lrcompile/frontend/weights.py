"""Weights that a model computes of others in every run, as `weight_norm` and `spectral_norm` do: computed once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from lrcompile.frontend.lift import LAYERS, calling_module
from lrcompile.graph.graph import attribute, has_attribute, packet_of, set_tensor


def compute_weights(gm: fx.GraphModule) -> None:
    """Stores what layers get that depends on stored tensors alone, at the paths of the layers.

    What it was computed of is dropped. Where something else uses that too, the computation is left in the graph: a
    tied weight stays one.
    """
    computed = _computed(gm)
    if not computed:
        return
    before, numbers = _read(gm), _numbered(gm)
    known: dict[fx.Node, Any] = {}
    paths: dict[int, str] = {}  # by computation
    values: dict[str, nn.Parameter] = {}
    for node, wanted in computed.items():
        path = paths.get(numbers[node])
        if path is None:
            path, own = wanted, _sources(node)
            while path in values or (has_attribute(gm, path) and path not in own):
                path += "_"
            paths[numbers[node]], values[path] = path, _value(gm, node, known)
    for node in computed:
        path = paths[numbers[node]]
        with gm.graph.inserting_before(node):
            stored = gm.graph.create_node("get_attr", path)
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored)
    for path, value in values.items():
        set_tensor(gm, path, value)
    gm.graph.eliminate_dead_code()
    for path in before - _read(gm):
        _drop(gm, path)


def _read(gm: fx.GraphModule) -> set[str]:
    """The paths of the stored tensors that the graph reads."""
    return {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}


def _computed(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The values to compute, each with the path that names it as an argument of the first layer that gets it."""
    constant: set[fx.Node] = set()
    found: dict[fx.Node, str] = {}
    reads = defaultdict(list)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            reads[node.target].append(node)
        if node.op == "get_attr" or (_is_repeatable(node) and set(node.all_input_nodes) <= constant):
            constant.add(node)
        elif packet_of(node) in LAYERS:
            names = [argument.name for argument in node.target._schema.arguments]
            for name, value in [*zip(names, node.args, strict=False), *node.kwargs.items()]:
                if isinstance(value, fx.Node) and value in constant and value.op != "get_attr":
                    layer, _ = calling_module(node)
                    found.setdefault(value, f"{layer}.{name}" if layer else name)
    inside = {node for value in found for node in _behind(value)}

    def alone(value: fx.Node) -> bool:
        return all(user in inside for path in _sources(value) for read in reads[path] for user in read.users)

    return {value: path for value, path in found.items() if alone(value)}


def _is_repeatable(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    values = node.meta.get("val")
    values = values if isinstance(values, list | tuple) and values else [values]  # pieces of a split
    computes = node.op == "call_function" and all(isinstance(value, torch.Tensor) for value in values)
    return computes and torch.Tag.nondeterministic_seeded not in tags


def _behind(value: fx.Node) -> set[fx.Node]:
    """A value and all that it is computed of."""
    found = {value}
    left = [value]
    while left:
        new = set(left.pop().all_input_nodes) - found
        found |= new
        left += new
    return found


def _sources(value: fx.Node) -> set[str]:
    """The paths of the stored tensors that a value is computed of."""
    return {str(node.target) for node in _behind(value) if node.op == "get_attr"}


def _numbered(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """A number for each node, the same for the same computation of the same stored tensors."""
    numbers: dict[str, int] = {}
    found: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        given = fx.node.map_arg((node.args, node.kwargs), lambda argument: f"value {found[argument]}")
        computation = str(node.target) if node.op == "get_attr" else f"{node.target} {given}"
        found[node] = numbers.setdefault(computation, len(numbers))
    return found


def _value(gm: fx.GraphModule, value: fx.Node, known: dict[fx.Node, Any]) -> nn.Parameter:
    """The value of a node that depends on stored tensors alone, trainable if one of those is; `known` holds steps."""
    behind = _behind(value)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node not in behind or node in known:
                continue
            if node.op == "get_attr":
                known[node] = attribute(gm, str(node.target))
                continue
            kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
            known[node] = node.target(*fx.node.map_arg(node.args, known.__getitem__), **kwargs)
    is_trained = any(attribute(gm, path).requires_grad for path in _sources(value))
    return nn.Parameter(known[value].detach().clone(), requires_grad=is_trained)


def _drop(gm: fx.GraphModule, path: str) -> None:
    """Removes a stored tensor, and the containers that hold nothing more."""
    parent, _, leaf = path.rpartition(".")
    holder = gm.get_submodule(parent)
    delattr(holder, leaf)
    while parent and not (holder._parameters or holder._buffers or holder._modules):
        parent, _, leaf = parent.rpartition(".")
        holder = gm.get_submodule(parent)
        delattr(holder, leaf)
