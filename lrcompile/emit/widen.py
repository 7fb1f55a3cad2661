"""Copies of graphs in float32, for checking models whose floating-point type the CPU runtime cannot execute."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lrcompile.graph.graph import Graph, rebuild, share

_ONNX_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_TORCH_TYPES = (torch.float16, torch.bfloat16, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


def widen_onnx(model: ir.Model) -> None:
    """Turns every half-precision or double-precision tensor, cast and value of an ONNX graph into float32, in place."""
    for graph in [model.graph, *(function.graph for function in model.functions.values())]:
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen_value(value)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for value in node.outputs:
                _widen_value(value)
            for attribute in list(node.attributes.values()):
                _widen_attribute(node, attribute)


def widen_torch(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a lifted graph that computes in float32 throughout."""
    graph = Graph(gm, FakeTensorMode()).copy().gm.graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies nested graphs by its own deprecated ways
        wide = rebuild(copy.deepcopy(share(gm)), graph)
    for module in wide.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = widen_tensor(parameter.data)
        for name, buffer in module._buffers.items():
            module._buffers[name] = widen_tensor(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                setattr(module, name, widen_tensor(value))
    for node in wide.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _widen_argument)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _widen_argument)
    wide.recompile()
    return wide


def widen_tensor(value: Any) -> Any:
    """A tensor of another floating-point type in float32; anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _TORCH_TYPES else value


def _widen_argument(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _TORCH_TYPES else value
    if isinstance(value, float) and math.isfinite(value):  # a mask filled with float64's least value
        return min(max(value, -_LARGEST), _LARGEST)
    return value


def _widen_value(value: ir.Value) -> None:
    if value.dtype in _ONNX_TYPES:
        value.dtype = ir.DataType.FLOAT
    if value.const_value is not None:
        value.const_value = _widen_constant(value.const_value)


def _widen_constant(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype not in _ONNX_TYPES:
        return tensor
    values = tensor.numpy().astype(np.float64)
    limited = np.where(np.isfinite(values), values.clip(-_LARGEST, _LARGEST), values)
    return ir.tensor(limited.astype(np.float32), name=tensor.name)


def _widen_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    if attribute.type == ir.AttributeType.TENSOR:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _widen_constant(attribute.value))
    elif attribute.name in ("to", "dtype") and attribute.value in _ONNX_TYPES:
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, ir.DataType.FLOAT)
