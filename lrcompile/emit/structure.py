"""The structure of a model's outputs in plain dictionaries, tuples and lists, which need no library to be read."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


def plain_outputs(graph: fx.Graph, leaves: Iterator[Any]) -> Any:
    """The outputs of an exported graph with the given flat values, a library's own output classes as dictionaries."""
    return _plain(graph._codegen.pytree_info.out_spec, leaves)  # type: ignore[attr-defined]


def set_plain_outputs(graph: fx.Graph) -> None:
    """Lets the graph return plain dictionaries, tuples and lists, in place."""
    count = graph._codegen.pytree_info.out_spec.num_leaves  # type: ignore[attr-defined]
    _set_structure(graph, plain_outputs(graph, iter(range(count))))


def keep_outputs(graph: fx.Graph, indices: Sequence[int]) -> None:
    """Lets the graph return only those of its flat outputs, as a tuple, in place."""
    node = graph.output_node()
    outputs = pytree.tree_leaves(list(node.args))
    node.args = (tuple(outputs[i] for i in indices),)
    _set_structure(graph, tuple(indices))


def _set_structure(graph: fx.Graph, outputs: Any) -> None:
    codegen: Any = copy.copy(graph._codegen)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(outputs))
    graph.set_codegen(codegen)


def _plain(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    if spec.is_leaf():
        return next(leaves)
    values = [_plain(child, leaves) for child in spec.children()]
    keys = _keys(spec)
    if keys is not None:
        return dict(zip(keys, values, strict=True))
    return values if spec.type is list else tuple(values)


def _keys(spec: pytree.TreeSpec) -> list[Any] | None:
    """The keys of a dictionary or the field names of a class; None for what is a sequence."""
    if spec.type in (dict, OrderedDict):
        return list(spec.context)
    if spec.type in (list, tuple) or not isinstance(spec.context, list | tuple):
        return None
    for candidate in (spec.context, *spec.context):  # classes differ in what they keep beside the names
        is_complete = isinstance(candidate, list | tuple) and len(candidate) == spec.num_children > 0
        if is_complete and all(isinstance(key, str) for key in candidate):
            return list(candidate)
    return None
