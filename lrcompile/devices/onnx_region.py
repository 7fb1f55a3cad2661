"""Builds the ONNX graph of a small region directly, because `torch.onnx.export` takes seconds for one.

The operators are those that `torch.onnx.export(dynamo=True)` and its optimizer give for the same modules, so that
ONNX Runtime fuses alike: a linear layer is Gemm on two axes and MatMul + Add on more. The leading axis of every input
is symbolic where the model's batch is dynamic: with static shapes ONNX Runtime turns MatMul + Add + Gelu into Gemm +
Gelu, with a dynamic batch into MatMul + BiasGelu.
"""

from __future__ import annotations

import operator

import onnx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrcompile.devices.onnx_graph import (
    OPSET,
    PROTOBUF_BYTES,
    Builder,
    LoweredRegion,
    UnsupportedRegion,
    Value,
    bind,
)
from lrcompile.devices.onnx_ops import FUNCTIONS, MODULES, UNARY
from lrcompile.graph.graph import attribute

__all__ = ["LoweredRegion", "UnsupportedRegion", "lower_region", "region_to_onnx"]


def region_to_onnx(region: fx.GraphModule, *, dynamic_batch: bool = True, opset: int = OPSET) -> onnx.ModelProto:
    """The ONNX model of a lifted region whose placeholders carry concrete shapes in `meta["val"]`.

    Parameters without values (fake or meta tensors) become small random ones. With `dynamic_batch` the leading axis
    of the inputs is symbolic, as in the export of a model with a dynamic batch.

    Raises:
        UnsupportedRegion: a node has no ONNX form here.
    """
    return lower_region(region, dynamic_batch=dynamic_batch, opset=opset).model()


def lower_region(region: fx.GraphModule, *, dynamic_batch: bool = True, opset: int = OPSET) -> LoweredRegion:
    """The nodes of `region_to_onnx` before weights are read; raises UnsupportedRegion as that does."""
    builder = Builder(region, dynamic_batch, opset)
    for node in region.graph.nodes:
        if node.op == "placeholder":
            _placeholder(builder, node)
        elif node.op == "output":
            _output(builder, node)
        elif isinstance(node.meta.get("val"), int | float | torch.SymInt):
            continue  # shape arithmetic: users take the value
        elif node.op == "get_attr":
            value = attribute(region, node.target)
            if not isinstance(value, Tensor):
                raise UnsupportedRegion(node, f"{type(value).__name__} {node.target}")
            builder.env[node] = builder.weight(value, node)
        else:
            builder.env[node] = _module(builder, node) if node.op == "call_module" else _function(builder, node)
            builder.say_shape(node)
    weight_bytes = builder.region.weight_bytes()
    if weight_bytes > PROTOBUF_BYTES:
        raise UnsupportedRegion(next(iter(region.graph.nodes)), f"{weight_bytes / 2**30:.1f} GiB of weights do not fit")
    return builder.region


def _placeholder(builder: Builder, node: fx.Node) -> None:
    value = node.meta.get("val")
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    first = len(builder.region.inputs)
    ports = [builder.port(f"x{first + i}", tensor, node) for i, tensor in enumerate(tensors)]
    builder.region.inputs.extend(ports)
    if ports:
        builder.env[node] = ports[0].name if isinstance(value, Tensor) else [port.name for port in ports]


def _output(builder: Builder, node: fx.Node) -> None:
    taken = {port.name for port in builder.region.inputs}
    for result in pytree.tree_leaves(node.args):
        if not isinstance(result, fx.Node) or result not in builder.env:
            continue
        names = builder.env[result]
        values = result.meta["val"]
        for name, value in zip([names] if isinstance(names, str) else names, pytree.tree_leaves(values), strict=True):
            made = any(name in made.output for made in builder.region.nodes)
            output = name if made and name not in taken else builder.emit("Identity", name)
            taken.add(output)
            builder.region.outputs.append(builder.port(output, value, result))


def _module(builder: Builder, node: fx.Node) -> str:
    module = builder.gm.get_submodule(node.target)  # type: ignore[arg-type]
    for kinds, handler in MODULES:
        if isinstance(module, kinds):
            return handler(builder, node, module, builder.name(node.args[0], node))
    raise UnsupportedRegion(node, f"module {type(module).__name__}")


def _function(builder: Builder, node: fx.Node) -> Value:
    if node.target is operator.getitem:
        source, index = node.args
        names = builder.env.get(source)  # type: ignore[arg-type]
        if not isinstance(names, list) or not isinstance(index, int):
            raise UnsupportedRegion(node, "indexes a value that is no list of tensors")
        return names[index]
    if not isinstance(node.target, torch._ops.OpOverload):
        raise UnsupportedRegion(node, f"function {getattr(node.target, '__name__', node.target)}")
    name = node.target._schema.name.removeprefix("aten::")
    if name.endswith("_") and not name.endswith("__"):
        if len(node.all_input_nodes[0].users) > 1:
            raise UnsupportedRegion(node, f"{name} writes into a value that others read")
        name = name.removesuffix("_")
    arguments = bind(node)
    if name in UNARY:
        return builder.emit(UNARY[name], builder.name(node.args[0], node))
    if name not in FUNCTIONS:
        raise UnsupportedRegion(node, f"operator aten.{name}")
    return FUNCTIONS[name](builder, node, arguments)
