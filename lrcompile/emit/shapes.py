"""Shape arithmetic that is known before the model runs: made constant, so that the runtime computes and blocks nothing.

torch.onnx writes the shape of a tensor with an open batch as a chain of Shape, Slice and Concat nodes, though all but
the batch is known; a Reshape needs no more than -1 in its place, an Expand no more than 1, and a recurrent layer no
first state where that is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

Size: TypeAlias = "int | str | None"
"""A length that is a number, an expression in symbols, or not known."""

_RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}  # and which inputs are the first states: zero without them
_MOST = 16  # entries of a shape; longer tensors of integers are data


def fold_shapes(graph: ir.Graph) -> None:
    """Makes constant what is known of the shapes that Reshape and Expand take, and removes what does nothing.

    That is an Expand to the same shape, and a first state of zeros.

    Nodes that this leaves without a user stay; drop them afterwards.
    """
    known: dict[ir.Value, list[Size]] = {}
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _RECURRENT:
            _leave_out_zeros(node)
            _learn(node.outputs[0], _of_recurrent(node))
        elif node.op_type == "Transpose":
            sizes, order = _dims(node.inputs[0]), node.attributes.get("perm")
            _learn(node.outputs[0], _picked(sizes, order.as_ints()) if sizes and order else None)
        elif node.op_type == "Reshape" and len(node.inputs) == 2 and node.inputs[0] not in known:
            _fold_reshape(graph, node, known)
        elif node.op_type == "Expand":
            _fold_expand(graph, node, known)
        elif len(node.outputs) == 1:
            sizes = _evaluated(node, known)
            if sizes is not None:
                known[node.outputs[0]] = sizes


def _leave_out_zeros(node: ir.Node) -> None:
    for i in _RECURRENT[node.op_type]:
        if i < len(node.inputs) and _is_zero(node.inputs[i]):
            node.replace_input_with(i, None)


def _is_zero(value: ir.Value | None) -> bool:
    """Whether a value is made of a constant zero alone."""
    if value is None or value.is_graph_input():
        return False
    if value.const_value is not None:
        return not value.const_value.numpy().any()
    node = value.producer()
    if node is None or node.op_type not in ("Expand", "Slice", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
        return False
    return _is_zero(node.inputs[0])


def _fold_reshape(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, list[Size]]) -> None:
    shape = node.inputs[1]
    sizes = _content(shape, known)
    if sizes is None or shape is None or shape.is_initializer():
        return
    zero = node.attributes.get("allowzero")
    open_axes = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(open_axes) > 1 or 0 in sizes or (zero is not None and zero.as_int()):
        return
    if open_axes and -1 in sizes:
        return
    node.replace_input_with(1, _constant(graph, [size if isinstance(size, int) else -1 for size in sizes]))
    if -1 not in sizes:
        _learn(node.outputs[0], sizes)


def _learn(value: ir.Value, sizes: Sequence[Size] | None) -> None:
    """Notes sizes of a value that the exporter does not know: those of layers that it takes apart itself."""
    if sizes and None in (_dims(value) or [None]):
        value.shape = ir.Shape(sizes)


def _of_recurrent(node: ir.Node) -> list[Size] | None:
    """The sizes of all outputs of a recurrent layer [steps × directions × batch × hidden]."""
    into, recurrence = _dims(node.inputs[0]), _dims(node.inputs[2])
    return [into[0], recurrence[0], into[1], recurrence[2]] if into and recurrence else None


def _fold_expand(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, list[Size]]) -> None:
    x, shape = node.inputs
    sizes, own = _content(shape, known), _dims(x)
    if sizes is None or own is None or shape is None or x is None:
        return
    if len(own) > len(sizes):
        return
    own = [*[1] * (len(sizes) - len(own)), *own]
    asked: list[Size] = [
        1 if size is not None and size == there else size for size, there in zip(sizes, own, strict=True)
    ]
    if all(size == 1 for size in asked) and len(sizes) == len(x.shape or ()) and not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(x)
    elif all(isinstance(size, int) for size in asked) and not shape.is_initializer():
        node.replace_input_with(1, _constant(graph, [size for size in asked if isinstance(size, int)]))


def _evaluated(node: ir.Node, known: dict[ir.Value, list[Size]]) -> list[Size] | None:
    """The content of a small tensor of sizes that a node computes, or None."""
    first = node.inputs[0] if node.inputs else None
    if node.op_type == "Shape":
        sizes = _dims(first)
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        return None if sizes is None else sizes[start.as_int() if start else 0 : end.as_int() if end else None]
    if node.op_type == "Concat":
        parts = [_content(value, known) for value in node.inputs]
        return None if any(part is None for part in parts) else [size for part in parts for size in part or ()]
    sizes = known.get(first) if first is not None else None
    if sizes is None:
        return None
    if node.op_type == "Mul":
        return _product(sizes, _content(node.inputs[1], known))
    if node.op_type == "Reshape":
        return sizes if len(sizes) == 1 and _numbers(node.inputs[1]) in ([1], [-1]) else None
    if node.op_type in ("Identity", "Squeeze", "Unsqueeze"):
        return sizes if len(sizes) == 1 or node.op_type == "Identity" else None
    if node.op_type == "Cast":
        return sizes if node.attributes["to"].as_int() == ir.DataType.INT64 else None
    if node.op_type == "Gather":
        return _picked(sizes, _numbers(node.inputs[1]))
    if node.op_type == "Slice" and 3 <= len(node.inputs) <= 4:
        starts, ends = _numbers(node.inputs[1]), _numbers(node.inputs[2])
        if starts and ends and len(starts) == len(ends) == 1:
            return sizes[starts[0] : ends[0]]
    return None


def _product(sizes: Sequence[Size], others: Sequence[Size] | None) -> list[Size] | None:
    """Of two sizes that are numbers."""
    numbers = [size for size in (*sizes, *(others or ())) if isinstance(size, int)]
    return [math.prod(numbers)] if len(sizes) == len(others or ()) == 1 and len(numbers) == 2 else None


def _picked(sizes: Sequence[Size], where: Sequence[int] | None) -> list[Size] | None:
    if where is None or not all(-len(sizes) <= i < len(sizes) for i in where):
        return None
    return [sizes[i] for i in where]


def _content(value: ir.Value | None, known: dict[ir.Value, list[Size]]) -> list[Size] | None:
    if value in known:
        return known[value]  # type: ignore[index]
    numbers = _numbers(value)
    return None if numbers is None else list(numbers)


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The content of a small constant of integers, or None."""
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > _MOST or len(tensor.shape) > 1:
        return None
    return [int(number) for number in np.atleast_1d(tensor.numpy())]


def _dims(value: ir.Value | None) -> list[Size] | None:
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _constant(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """An initializer with these numbers; equal ones are shared."""
    name = "shape_" + "_".join(str(number).replace("-", "m") for number in numbers)
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
            )
        )
    return graph.initializers[name]
