"""Replaces in-place operators, so that every value of the graph keeps what it held when it was made.

A rewrite moves and replaces values; an operator that changes one behind the others' back would make that wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators.

    One whose target is not read again is renamed to its functional form in place; where views are written to, torch's
    own functionalisation is run, which takes about as long as another export.
    """
    mutating = [node for node in program.graph.nodes if _mutates(node)]
    if all(_is_simple(node) for node in mutating):
        for node in mutating:
            node.target = _functional(node.target)
        program.graph_module.recompile()
        return program
    return program.run_decompositions({})


def _mutates(node: fx.Node) -> bool:
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _functional(target: Any) -> Any:
    """add_.Tensor → add.Tensor, or None where there is no such operator."""
    name = target.overloadpacket.__name__
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _is_simple(node: fx.Node) -> bool:
    """Whether nothing but this node's own result can see the change."""
    changed = node.args[0]
    if _functional(node.target) is None or not isinstance(changed, fx.Node) or changed.op != "call_function":
        return False
    if isinstance(changed.target, torch._ops.OpOverload):
        aliases = any(returned.alias_info is not None for returned in changed.target._schema.returns)
        if aliases and not _mutates(changed) and _functional(changed.target) is None:
            return False  # a view of another value
    else:
        return False
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    return all(order[user] <= order[node] for user in changed.users)
