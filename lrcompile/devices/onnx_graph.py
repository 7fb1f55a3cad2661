"""An ONNX graph under construction: nodes named by structure alone, and weights that are read only when needed."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

OPSET = 20
PROTOBUF_BYTES = 2**31 - 2**20  # a serialised model must stay below 2 GiB
ATTENTION_OPSET = 23  # the first in which attention is one operator
GELU_OPSET, GROUP_NORM_OPSET, RMS_NORM_OPSET = 20, 21, 23  # the same of these
_IR_VERSION = 10
_SCALE = 0.02
_POOL = 65537

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

Value = str | list[str]
Arguments = Mapping[str, Any]


class UnsupportedRegion(Exception):  # noqa: N818 (the caller always catches it and predicts instead)
    """A node of a region has no ONNX form here; `reason` says why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name}: {reason}")
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class Port:
    """An input or output of a region: its ONNX element type and concrete shape."""

    name: str
    elem_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored tensor of a region; without values (fake, meta) it stands for its shape."""

    name: str
    tensor: Tensor
    transposed: bool = False
    positive: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as ONNX stores it."""
        shape = tuple(int(size) for size in self.tensor.shape)
        return shape[::-1] if self.transposed else shape

    def proto(self) -> TensorProto:
        """The initializer with its values."""
        elem_type = DTYPES[self.tensor.dtype]
        return TensorProto(name=self.name, data_type=elem_type, dims=self.shape, raw_data=self._data())

    def _data(self) -> bytes:
        if self.tensor.is_meta or isinstance(self.tensor, FakeTensor):
            return _substitute(self.name, self.shape, DTYPES[self.tensor.dtype], self.positive)
        value = self.tensor.detach().cpu()
        value = (value.t() if self.transposed else value).contiguous()
        return value.reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, eq=False)
class LoweredRegion:
    """A region as ONNX nodes whose names depend on its structure alone; weights are read only by `model`."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    values: dict[str, Port] = field(default_factory=dict)  # in between, that start with a dynamic batch
    constants: list[TensorProto] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    dynamic_batch: bool = True
    opset: int = OPSET

    def signature(self) -> str:
        """SHA-256 of operators, attributes, shapes and dtypes: neither weight values nor names of nodes count."""
        digest = hashlib.sha256(f"{self.opset} {self.dynamic_batch} {self.inputs} {self.outputs}".encode())
        digest.update("".join(map(str, self.values.values())).encode())
        for constant in self.constants:
            digest.update(constant.SerializeToString(deterministic=True))
        for node in self.nodes:
            digest.update(node.SerializeToString(deterministic=True))
        for weight in self.weights:
            digest.update(f"{weight.name} {weight.shape} {weight.tensor.dtype}".encode())
        return digest.hexdigest()

    def weight_bytes(self) -> int:
        """Bytes of the weights, each counted once."""
        return sum(math.prod(weight.shape) * weight.tensor.element_size() for weight in self.weights)

    def model(self) -> onnx.ModelProto:
        """The ONNX model, with the real weights, or small random ones where the region has only their shapes."""
        outputs = {port.name for port in self.outputs}
        graph = helper.make_graph(
            self.nodes,
            "region",
            [self._info(port, "n") for port in self.inputs],
            [self._info(port, f"{port.name}_n") for port in self.outputs],
            [*self.constants, *(weight.proto() for weight in self.weights)],
            value_info=[self._info(port, "n") for name, port in self.values.items() if name not in outputs],
        )
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=max(_IR_VERSION, self.opset - 12))

    def _info(self, port: Port, symbol: str) -> onnx.ValueInfoProto:
        shape: list[int | str] = list(port.shape)
        if self.dynamic_batch and shape:
            shape[0] = f"{symbol}{shape[0]}"
        return helper.make_tensor_value_info(port.name, port.elem_type, shape)


class Builder:
    """Collects the nodes of one region; `env` holds the ONNX name of every value, or names where there are several."""

    def __init__(self, gm: fx.GraphModule, dynamic_batch: bool, opset: int = OPSET) -> None:
        self.gm = gm
        self.region = LoweredRegion(dynamic_batch=dynamic_batch, opset=opset)
        self.env: dict[fx.Node, Value] = {}
        self._known: dict[Any, str] = {}
        self._made: dict[str, None] = {}  # a set in order

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        return self.emit_many(op, inputs, 1, **attributes)[0]

    def emit_many(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Adds a node with several outputs."""
        names = [f"v{len(self._made) + i}" for i in range(outputs)]
        self._made |= dict.fromkeys(names)
        self.region.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def constant(self, value: Any, dtype: torch.dtype, node: fx.Node) -> str:
        """A small constant that is part of the region's structure."""
        array = np.asarray(value, helper.tensor_dtype_to_np_dtype(self.elem_type(dtype, node)))
        key = (array.shape, dtype, array.tobytes())
        if key not in self._known:
            self._known[key] = f"c{len(self.region.constants)}"
            self.region.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def integers(self, values: Sequence[int], node: fx.Node) -> str:
        """A vector of int64: axes, a shape or lengths."""
        return self.constant(list(values), torch.int64, node)

    def weight(self, tensor: Tensor, node: fx.Node, *, transposed: bool = False, positive: bool = False) -> str:
        """A stored tensor; the same one used twice is stored once."""
        self.elem_type(tensor.dtype, node)
        key = (id(tensor), transposed)
        if key not in self._known:
            weight = Weight(f"w{len(self.region.weights)}", tensor, transposed, positive)
            self._known[key] = weight.name
            self.region.weights.append(weight)
        return self._known[key]

    def name(self, argument: Any, node: fx.Node) -> str:
        """The ONNX name of a tensor argument."""
        found = self.env.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(found, str):
            raise UnsupportedRegion(node, f"takes {argument!r} as a tensor")
        return found

    def operand(self, argument: Any, node: fx.Node, dtype: torch.dtype | None = None) -> str:
        """A tensor or number as a tensor of `dtype`, by default of the node's own."""
        dtype = tensor_of(node).dtype if dtype is None else dtype
        argument = concrete(argument)
        if isinstance(argument, bool | int | float):
            return self.constant(argument, dtype, node)
        name = self.name(argument, node)
        if tensor_of(argument).dtype == dtype:
            return name
        return self.emit("Cast", name, to=self.elem_type(dtype, node))

    def reshape(self, name: str, shape: Sequence[int], node: fx.Node) -> str:
        """`name` with another shape; the leading size is left to ONNX Runtime where the batch is dynamic."""
        target = list(shape)
        if self.region.dynamic_batch and target and 0 not in target:
            target[0] = -1
        return self.emit("Reshape", name, self.integers(target, node), allowzero=int(0 in target))

    def repeat_heads(self, name: str, value: Tensor, heads: int, node: fx.Node) -> str:
        """Keys or values [batch, groups, length, size] as each of so many heads reads them, in runs."""
        batch, groups, length, size = value.shape
        name = self.reshape(name, [batch, groups, 1, length * size], node)
        name = self.emit("Expand", name, self.integers([batch, groups, heads // groups, length * size], node))
        return self.reshape(name, [batch, heads, length, size], node)

    def say_shape(self, node: fx.Node) -> None:
        """Notes that a node's value starts with the batch: without it ONNX Runtime fuses less after a Reshape.

        Of other values nothing is said: the batch can be one of their other axes, which would be a number then.
        """
        name, value = self.env[node], node.meta.get("val")
        if not self.region.dynamic_batch or not isinstance(value, Tensor) or name not in self._made:
            return
        if value.dim() and value.shape[0] in {port.shape[0] for port in self.region.inputs if port.shape}:
            self.region.values[str(name)] = self.port(str(name), value, node)

    def port(self, name: str, value: Tensor, node: fx.Node) -> Port:
        """An input or output with the type and shape of a node's value."""
        return Port(name, self.elem_type(value.dtype, node), tuple(int(size) for size in value.shape))

    def elem_type(self, dtype: torch.dtype, node: fx.Node) -> int:
        """ONNX's number for a data type; UnsupportedRegion where it has none."""
        if dtype not in DTYPES:
            raise UnsupportedRegion(node, f"data type {dtype}")
        return DTYPES[dtype]


def tensor_of(node: Any) -> Tensor:
    """The fake tensor that a node computes; UnsupportedRegion when its shape is not known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise UnsupportedRegion(node, "has no shape")
    return value


def concrete(argument: Any) -> Any:
    """An argument in which nodes that compute a number are replaced by it, lists included."""
    if isinstance(argument, list | tuple):
        return [concrete(item) for item in argument]
    if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), int | float | torch.SymInt):
        value = argument.meta["val"]
        return int(value) if isinstance(value, torch.SymInt) else value
    return argument


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in."""
    bound: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            bound[argument.name] = concrete(node.args[i])
        elif argument.name in node.kwargs:
            bound[argument.name] = concrete(node.kwargs[argument.name])
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _substitute(name: str, shape: tuple[int, ...], elem_type: int, positive: bool) -> bytes:
    """Deterministic values for a tensor without any: of one small size, so that none is zero or denormal.

    They differ from name to name: ONNX Runtime computes only once what is done with equal weights.
    """
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    if elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return np.zeros(shape, dtype).tobytes()
    pool, size, key = _pool(elem_type, positive), math.prod(shape), zlib.crc32(name.encode())
    start = key % _POOL
    values = np.resize(pool[start : start + min(size, _POOL)], size)
    values[:1] = _SCALE * (0.5 + key / 2**32)  # of two that start alike
    return values.tobytes()


@lru_cache(maxsize=8)
def _pool(elem_type: int, positive: bool) -> np.ndarray:
    """Values of a type, all of them twice in a row: making them anew takes longer than most operations."""
    rng = np.random.default_rng(0)
    pool = rng.uniform(_SCALE / 2, 1.5 * _SCALE, _POOL)
    if not positive:
        pool *= rng.choice([-1.0, 1.0], pool.shape)
    return np.tile(pool, 2).astype(helper.tensor_dtype_to_np_dtype(elem_type))
