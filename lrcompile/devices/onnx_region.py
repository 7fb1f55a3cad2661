"""Builds the ONNX graph of a small region directly, because `torch.onnx.export` takes seconds for one.

The operators are those that `torch.onnx.export(dynamo=True)` and its optimizer give for the same modules, so that
ONNX Runtime fuses alike: a linear layer is Gemm on two axes and MatMul + Add on more. The leading axis of every input
is symbolic where the model's batch is dynamic: with static shapes ONNX Runtime turns MatMul + Add + Gelu into Gemm +
Gelu, with a dynamic batch into MatMul + BiasGelu.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrcompile.devices.onnx_graph import (
    DTYPES,
    OPSET,
    Builder,
    LoweredRegion,
    Port,
    UnsupportedRegion,
    Value,
    Weight,
    bind,
)
from lrcompile.devices.onnx_ops import FUNCTIONS, MODULES, UNARY
from lrcompile.graph.graph import attribute
from lrcompile.graph.op import ConvShape, GemmShape, OpDesc

__all__ = ["LoweredRegion", "UnsupportedRegion", "lower_chain", "lower_op", "lower_region", "region_to_onnx"]

_PROTOBUF_BYTES = 2**31 - 2**20  # a serialised model must stay below 2 GiB
_FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}


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
            builder.env[node] = builder.weight(attribute(region, node.target), node)
        elif node.op == "call_module":
            builder.env[node] = _module(builder, node)
        else:
            builder.env[node] = _function(builder, node)
    weight_bytes = builder.region.weight_bytes()
    if weight_bytes > _PROTOBUF_BYTES:
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


def lower_op(op: OpDesc) -> LoweredRegion | None:
    """One described operation on its own, or None where it has no simple form.

    Products and convolutions keep their shapes, and a product with a weight is a linear layer with its bias; what only
    moves data becomes a Relu over as many bytes.
    """
    dtype = _FLOATS.get(op.dtype)
    if op.gemm is not None and dtype is not None:
        return _lower_gemm(op.gemm, dtype, weight=op.weight_bytes > 0)
    if op.conv is not None and dtype is not None:
        return _lower_conv(op.conv, dtype)
    if op.kind in ("normalization", "reduction", "elementwise", "gather", "movement"):
        elements = max(1, round((op.weight_bytes + op.activation_bytes) / 8))
        node = helper.make_node("Relu", ["x0"], ["v0"])
        port = Port("x0", TensorProto.FLOAT, (elements,))
        return LoweredRegion([node], [port], [replace(port, name="v0")], dynamic_batch=False)
    return None


def lower_chain(shapes: Sequence[ConvShape]) -> LoweredRegion:
    """Convolutions in fp32, each of the one before; ONNX Runtime then keeps values in blocks of channels."""
    parts = [_lower_conv(shape, torch.float32) for shape in shapes]
    region = LoweredRegion(list[onnx.NodeProto](), parts[0].inputs, dynamic_batch=False)
    for i, part in enumerate(parts):
        region.weights.append(replace(part.weights[0], name=f"w{i}"))
        node = part.nodes[0]
        del node.input[:], node.output[:]
        node.input.extend([f"v{i - 1}" if i else "x0", f"w{i}"])
        node.output.append(f"v{i}")
        region.nodes.append(node)
    region.outputs.append(replace(parts[-1].outputs[0], name=f"v{len(parts) - 1}"))
    return region


def _lower_gemm(shape: GemmShape, dtype: torch.dtype, *, weight: bool) -> LoweredRegion:
    region = LoweredRegion(dynamic_batch=False)
    batch = (shape.batch,) if shape.batch > 1 else ()
    region.inputs.append(Port("x0", DTYPES[dtype], (*batch, shape.m, shape.k)))
    sizes = (*batch, shape.k, shape.n)
    if weight:
        region.weights.append(Weight("w0", torch.empty(sizes, dtype=dtype, device="meta")))
    else:
        region.inputs.append(Port("w0", DTYPES[dtype], sizes))
    if weight and not batch:  # a linear layer: nearly all have a bias, and adding it takes its time
        region.weights.append(Weight("b0", torch.empty(shape.n, dtype=dtype, device="meta")))
        region.nodes.append(helper.make_node("Gemm", ["x0", "w0", "b0"], ["v0"]))
    else:
        region.nodes.append(helper.make_node("MatMul", ["x0", "w0"], ["v0"]))
    region.outputs.append(Port("v0", DTYPES[dtype], (*batch, shape.m, shape.n)))
    return region


def _lower_conv(shape: ConvShape, dtype: torch.dtype) -> LoweredRegion:
    region = LoweredRegion(dynamic_batch=False)
    first, second = shape.channels_out, shape.channels_in // shape.groups
    if shape.transposed:
        first, second = shape.channels_in, shape.channels_out // shape.groups
    region.inputs.append(Port("x0", DTYPES[dtype], (shape.batch, shape.channels_in, *shape.size_in)))
    region.weights.append(Weight("w0", torch.empty((first, second, *shape.kernel), dtype=dtype, device="meta")))
    region.outputs.append(Port("v0", DTYPES[dtype], (shape.batch, shape.channels_out, *shape.size_out)))
    options: dict[str, Any] = {
        "dilations": list(shape.dilation),
        "group": shape.groups,
        "kernel_shape": list(shape.kernel),
        "pads": [before for before, _ in shape.padding] + [after for _, after in shape.padding],
        "strides": list(shape.stride),
    }
    if shape.transposed:
        reach = [
            (i - 1) * s - sum(p) + d * (k - 1) + 1
            for i, s, p, d, k in zip(
                shape.size_in, shape.stride, shape.padding, shape.dilation, shape.kernel, strict=True
            )
        ]
        options["output_padding"] = [o - r for o, r in zip(shape.size_out, reach, strict=True)]
    region.nodes.append(
        helper.make_node("ConvTranspose" if shape.transposed else "Conv", ["x0", "w0"], ["v0"], **options)
    )
    return region
