"""Replaces in-place operators, so that every value of the graph keeps what it held when it was made.

A rewrite moves and replaces values; an operator that changes one behind the others' back would make that wrong.
Nor does a compiled model write to its inputs, or keep state from one call to the next: no output format can say either.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, ops
from torch._ops import OpOverload
from torch.export import ExportedProgram, default_decompositions
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError

aten = ops.aten


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators, but for a last `copy_` into each input or buffer that it changes.

    Where no change can be seen but in the operator's own result, the operators of the given program are renamed to
    their functional forms; else torch's own functionalisation is run, which takes about as long as another export.
    """
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    mutating = [node for gm in graphs for node in gm.graph.nodes if _mutates(node)]
    if not all(_is_simple(node) for node in mutating):
        for gm in graphs:
            _drop_dropout(gm)
        table = {op: make for op, make in default_decompositions().items() if op.overloadpacket in _MAY_RETURN_INPUT}
        return program.run_decompositions(table)
    for node in mutating:
        node.target = _functional(node.target)
    for gm in graphs:
        gm.recompile()
    return program


def drop_last_writes(gm: fx.GraphModule) -> list[str]:
    """Erases the writes to inputs and buffers that end a functional graph; returns a note for each.

    Raises:
        InputError: the outputs depend on a buffer that is written, so that the next call would give others.
    """
    written = []
    for node in reversed(gm.graph.find_nodes(op="call_function", target=aten.copy_.default)):
        stored, value = node.args[:2]
        written.append(stored)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    notes = []
    for stored in reversed(written):
        name = stored.target
        if stored.op == "placeholder":
            notes.append(f"the model writes to its input {name}; the compiled model leaves it as it is")
        elif gm.graph.find_nodes(op="get_attr", target=name):
            raise InputError(
                f"the model keeps state: it reads its buffer {name} and changes it for the next call, which no "
                "compiled model can do; make it an input and an output"
            )
        else:
            notes.append(f"the model writes to its buffer {name}, which it does not read; the compiled one does not")
    return notes


def _drop_dropout(gm: fx.GraphModule) -> None:
    """Makes inactive dropout the alias that it is: torch takes its result for new memory, even where it is written."""
    for node in gm.graph.nodes:
        if node.target in _DROPOUTS and node.args[2] is False:
            node.target, node.args = aten.alias.default, node.args[:1]


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _functional(target: Any) -> Any:
    """add_.Tensor → add.Tensor, or None where there is no such operator."""
    name = target.overloadpacket.__name__
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _is_simple(node: fx.Node) -> bool:
    """Whether nothing but this node's own result can see the change."""
    if _functional(node.target) is None or not isinstance(node.args[0], fx.Node):
        return False
    shared = _sharing_memory(node.args[0], node)
    if not all(_is_known(value) for value in shared):
        return False
    return all(user <= node for value in shared for user in value.users) and _keeps_type(node)


def _sharing_memory(value: fx.Node, writer: fx.Node) -> set[fx.Node]:
    """The values that may lie in the same memory as `value`, but for those that the writer leads to."""
    found, pending = {value}, [value]
    while pending:
        node = pending.pop()
        views = [user for user in node.users if user is not writer and node in _sources(user)]
        for other in (*_sources(node), *views):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def _is_known(value: fx.Node) -> bool:
    """Whether the value is computed here, and by an operator whose schema says what it does."""
    return value.op == "call_function" and (isinstance(value.target, OpOverload) or value.target is operator.getitem)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory the node's result may lie in."""
    target = node.target
    if node.op != "call_function":
        return []
    if not isinstance(target, OpOverload) or target.overloadpacket in _MAY_RETURN_INPUT:
        return node.all_input_nodes
    schema = target._schema
    if all(result.alias_info is None for result in schema.returns):
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    aliased = [given.get(argument.name) for argument in schema.arguments if argument.alias_info is not None]
    return [value for value in pytree.tree_leaves(aliased) if isinstance(value, fx.Node)]


_DROPOUTS = {
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default
}  # fmt: skip
# Their schemas promise new memory, which they do not always give.
_MAY_RETURN_INPUT = {dropout.overloadpacket for dropout in _DROPOUTS} | {
    aten.type_as, aten.sum_to_size, aten.conj_physical, aten.einsum, aten.meshgrid, aten.broadcast_tensors,
    aten.atleast_1d, aten.atleast_2d, aten.atleast_3d,
}  # fmt: skip


def _keeps_type(node: fx.Node) -> bool:
    """Whether the functional form gives the type that was written to: `half.add_(single)` is half, the sum is not."""
    if any("val" not in source.meta for source in node.all_input_nodes):
        return False
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    args, kwargs = values
    with args[0].fake_mode:
        return _functional(node.target)(*args, **kwargs).dtype == args[0].dtype
