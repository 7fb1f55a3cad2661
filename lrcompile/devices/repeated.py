"""One described operation several times over, as a graph: measured so, it runs as it does in a network.

Alone in a session an operation also pays for the start of a run, for waking the threads that the last run left asleep,
and a convolution for laying its values out in blocks of channels and back, which a network pays once. Two graphs that
differ by some copies of the operation have all of that in common.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lrcompile.graph.op import AttentionShape, ConvShape, GemmShape, OpDesc, RecurrentShape

aten = torch.ops.aten
COPIES_S = 6e-4  # how long all copies should take
MOST_COPIES = 80
_COMPARED = 8  # copies for each that the graph that others are compared with has too
MOST_BYTES = 3e7  # of all copies together, so that they fit into the caches if one of them does
WAKING = 128  # extents of a product that several threads share
_HANDED = ConvShape(1, 16, 32, (27, 27), (27, 27), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
_HANDS = 24
_DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # fmt: skip
_CONVOLUTIONS: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
_CHANNELLED = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RUNS = 8  # rows that a transpose takes from one place after the other
_OF_TWO = ("binary", "skip_layer_norm")
_RECURRENT: dict[int, Callable[..., Any]] = {4: aten.lstm.input, 3: aten.gru.input}
_CHAINED: dict[str, Callable[..., Any]] = {
    "copy": aten.relu.default, "gelu": aten.gelu.default, "silu": aten.silu.default, "sigmoid": aten.sigmoid.default,
}  # fmt: skip


def copies_for(op: OpDesc, latency_s: float) -> int:
    """How many copies to measure of an operation that takes about so long."""
    fit = MOST_BYTES / max(op.weight_bytes + op.activation_bytes, 1.0)
    least = 2 if op.conv is not None and op.conv.groups > 1 else 1  # of which the blocks take most of the time
    return max(least, round(min(COPIES_S / max(latency_s, 1e-9), fit, MOST_COPIES)))


def least_copies(op: OpDesc, copies: int = 0) -> int:
    """Of the graph that others are compared with, which have so many copies more.

    One convolution lays values out in blocks, and the first of many short operations take longer than those after them.
    """
    return max(int(op.conv is not None and len(op.conv.kernel) == 2), copies // _COMPARED)


def repeated(op: OpDesc, copies: int, *, alone: bool = False) -> fx.GraphModule | None:
    """A graph of `copies` of an operation in a floating-point type, on meta tensors; None where it has no such form.

    It starts with a product that several threads share. Copies have weights of their own, and where they have none,
    inputs of their own or the result of the one before, so that none is computed once for all. With `alone` there is
    nothing but the operation, its operands are stored as it says, and only the last result is kept.
    """
    dtype = _DTYPES.get(op.dtype)
    if dtype is None:
        return None
    make = _Maker(dtype)
    if not alone:
        _wake(make)
    if op.gemm is not None:
        _gemms(make, op.gemm, copies, weight=op.weight_bytes > 0, stored=alone)
    elif op.conv is not None:
        if not _convolutions(make, op.conv, copies, alone=alone):
            return None
    elif op.attention is not None:
        _attentions(make, op.attention, copies)
    elif op.recurrent is not None and op.recurrent.gates in _RECURRENT:
        _recurrents(make, op.recurrent, copies)
    elif op.kind in ("normalization", "reduction", "elementwise", "gather", "movement"):
        _functions(make, op, copies, alone=alone)
    else:
        return None
    if alone:
        make.outputs = make.outputs[-1:]
    return make.done()


def waking(dtype: str) -> fx.GraphModule:
    """The product alone that graphs of a type start with."""
    make = _Maker(_DTYPES[dtype])
    _wake(make)
    return make.done()


def handing_over() -> fx.GraphModule:
    """Small convolutions after that product: threads that share them have to hand over work again and again."""
    make = _Maker(torch.float32)
    _wake(make)
    _convolutions(make, _HANDED, _HANDS, alone=False)
    return make.done()


def in_a_row(shapes: Sequence[ConvShape]) -> fx.GraphModule:
    """Convolutions one after the other, each with a bias and ReLU."""
    make = _Maker(torch.float32)
    x = make.input(shapes[0].batch, shapes[0].channels_in, *shapes[0].size_in)
    for shape in shapes:
        x = make.call(aten.relu.default, make.layer(_convolution(shape), x))
    make.output(x)
    return make.done()


def chain(ops: Sequence[OpDesc]) -> fx.GraphModule:
    """Linear layers and convolutions of one type, without biases, each fed by the one before."""
    make = _Maker(_DTYPES[ops[0].dtype])
    first = ops[0]
    x = make.input(first.conv.batch, first.conv.channels_in, *first.conv.size_in) if first.conv else None
    if first.gemm is not None:
        x = make.input(first.gemm.m, first.gemm.k)
    for op in ops:
        if op.gemm is not None:
            x = make.call(aten.linear.default, x, make.weight(op.gemm.n, op.gemm.k))
        elif op.conv is not None and x is not None:
            x = make.layer(_convolution(op.conv, bias=False), x)
    if x is not None:
        make.output(x)
    return make.done()


def encoder(shape: AttentionShape, layers: int, *, first: bool) -> fx.GraphModule:
    """A transformer's encoder of four times as wide hidden layers; norms stand first in each half, or at its end."""
    make, width = _Maker(torch.float32), shape.heads * shape.head_dim
    x = make.input(shape.batch, shape.queries, width)

    def norm(x: fx.Node) -> fx.Node:
        return make.layer(nn.LayerNorm(width, device="meta"), x)

    def linear(x: fx.Node, out: int) -> fx.Node:
        return make.layer(nn.Linear(x.meta["val"].shape[-1], out, device="meta"), x)

    for _ in range(layers):
        for half in (0, 1):
            y = norm(x) if first else x
            if half:
                y = linear(make.call(aten.gelu.default, linear(y, 4 * width)), width)
            else:
                y = linear(_attended(make, shape, [linear(y, width) for _ in range(3)], None), width)
            x = make.call(aten.add.Tensor, x, y)
            x = x if first else norm(x)
    make.output(x)
    return make.done()


def _wake(make: _Maker) -> None:
    make.output(make.call(aten.matmul.default, make.input(WAKING, WAKING), make.weight(WAKING, WAKING)))


class _Maker:
    """A graph under construction, every node with its shape."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.outputs: list[fx.Node] = []
        self.inputs = self.weights = 0
        self._results: dict[tuple[Any, str], Any] = {}

    def input(self, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        node = self.graph.placeholder(f"x{self.inputs}")
        self.inputs += 1
        node.meta["val"] = torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return node

    def weight(self, *shape: int) -> fx.Node:
        name = f"w{self.weights}"
        self.weights += 1
        self.root.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta")))
        node = self.graph.get_attr(name)
        node.meta["val"] = self.root.get_parameter(name)
        return node

    def layer(self, module: nn.Module, x: fx.Node) -> fx.Node:
        name = f"m{self.weights}"
        self.weights += 1
        self.root.add_module(name, module.to(self.dtype).eval())
        node = self.graph.call_module(name, (x,))
        node.meta["val"] = self._result((repr(module), _described(x)), partial(module, x.meta["val"]))
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        key = (target, repr(fx.node.map_arg((args, kwargs), _described)))
        return self.known(self._result(key, lambda: target(*values[0], **values[1])), target, *args, **kwargs)

    def known(self, result: Any, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose result is known, on meta tensors."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = result
        return node

    def _result(self, key: tuple[Any, str], make: Callable[[], Any]) -> Any:
        """What a call gives, on meta tensors: copies of an operation give the same, and it takes long to find out."""
        if key not in self._results:
            self._results[key] = make()
        return self._results[key]

    def output(self, node: fx.Node) -> None:
        self.outputs.append(node)

    def done(self) -> fx.GraphModule:
        self.graph.output(tuple(self.outputs))
        return fx.GraphModule(self.root, self.graph)


def _described(node: fx.Node) -> str:
    """Shapes, types and strides of a value."""
    return str([(x.shape, x.dtype, x.stride()) for x in tree_leaves(node.meta["val"])])


def _gemms(make: _Maker, shape: GemmShape, copies: int, *, weight: bool, stored: bool) -> None:
    """With `stored`, operands lie in memory as the shape's layout says; else along their rows."""
    batch = (shape.batch,) if shape.batch > 1 else ()
    first_turned, second_turned = (shape.layout == "NT", shape.layout == "TN") if stored else (False, False)

    def operand(made: Callable[..., fx.Node], rows: int, columns: int, turned: bool) -> fx.Node:
        if not turned:
            return made(*batch, rows, columns)
        return make.call(aten.transpose.int, made(*batch, columns, rows), -2, -1)

    x = operand(make.input, shape.m, shape.k, first_turned) if copies else None
    for _ in range(copies):
        second = operand(make.weight if weight else make.input, shape.k, shape.n, second_turned)
        make.output(make.call(aten.matmul.default, x, second))


def _convolutions(make: _Maker, shape: ConvShape, copies: int, *, alone: bool) -> bool:
    """Of images, each adds what the one before gave: values stay in blocks of channels. With bias and ReLU."""
    if _conv_options(shape) is None:
        return False
    if not copies:
        return True
    x, last, images = make.input(shape.batch, shape.channels_in, *shape.size_in), None, len(shape.kernel) == 2
    for _ in range(copies):
        y = make.layer(_convolution(shape, bias=not alone), x)
        if alone:
            make.output(y)
            continue
        if images and last is not None:
            y = make.call(aten.add.Tensor, y, last)
        last = make.call(aten.relu.default, y)
        if not images:
            make.output(last)
    if images and last is not None:
        make.output(last)
    return True


def _convolution(shape: ConvShape, *, bias: bool = True) -> nn.Module:
    kind = _CONVOLUTIONS[len(shape.kernel), shape.transposed]
    with torch.device("meta"):
        module: nn.Module = kind(
            shape.channels_in, shape.channels_out, shape.kernel, shape.stride, dilation=shape.dilation,
            groups=shape.groups, bias=bias, **(_conv_options(shape) or {}),
        )  # fmt: skip
    return module


def _conv_options(shape: ConvShape) -> dict[str, Any] | None:
    if any(before != after for before, after in shape.padding):
        return None
    padding = tuple(before for before, _ in shape.padding)
    if not shape.transposed:
        return {"padding": padding}
    reach = (
        (i - 1) * s - 2 * p + d * (k - 1) + 1
        for i, s, p, d, k in zip(shape.size_in, shape.stride, padding, shape.dilation, shape.kernel, strict=True)
    )
    return {"padding": padding, "output_padding": tuple(o - r for o, r in zip(shape.size_out, reach, strict=True))}


def _attentions(make: _Maker, shape: AttentionShape, copies: int) -> None:
    """With heads taken out of the width before, and put back after."""
    mask, wide = None, [(shape.queries, shape.heads), (shape.keys, shape.heads_kv), (shape.keys, shape.heads_kv)]
    if shape.mask != "none" and copies:
        kind = torch.bool if shape.mask == "boolean" else make.dtype
        mask = make.input(shape.batch, 1, shape.queries, shape.keys, dtype=kind)
    for _ in range(copies):
        values = [make.input(shape.batch, length, count * shape.head_dim) for length, count in wide]
        make.output(_attended(make, shape, values, mask))


def _attended(make: _Maker, shape: AttentionShape, values: Sequence[fx.Node], mask: fx.Node | None) -> fx.Node:
    split = []
    for x, count in zip(values, (shape.heads, shape.heads_kv, shape.heads_kv), strict=True):
        x = make.call(aten.view.default, x, [shape.batch, -1, count, shape.head_dim])
        split.append(make.call(aten.transpose.int, x, 1, 2))
    options: dict[str, Any] = {"enable_gqa": True} if shape.heads != shape.heads_kv else {}
    causal = shape.causal and mask is None
    y = make.call(aten.scaled_dot_product_attention.default, *split, mask, 0.0, causal, **options)
    y = make.call(aten.transpose.int, y, 1, 2)
    return make.call(aten.reshape.default, y, [shape.batch, shape.queries, shape.heads * shape.head_dim])


def _recurrents(make: _Maker, shape: RecurrentShape, copies: int) -> None:
    """With biases, from a state that is given, over the batch first."""
    if not copies:
        return
    x, gates = make.input(shape.batch, shape.steps, shape.input_size), shape.gates * shape.hidden_size
    states = [make.input(shape.layers * shape.directions, shape.batch, shape.hidden_size) for _ in range(2)]
    for _ in range(copies):
        weights = []
        for layer in range(shape.layers):
            width = shape.input_size if layer == 0 else shape.hidden_size * shape.directions
            for _ in range(shape.directions):
                sizes = ((gates, width), (gates, shape.hidden_size), (gates,), (gates,))
                weights += [make.weight(*size) for size in sizes]
        state = states if shape.gates == 4 else states[0]
        given = (state, weights, True, shape.layers, 0.0, False, shape.directions == 2, True)
        # not found out: on meta tensors, too, all steps are computed
        outputs = torch.empty(
            shape.batch, shape.steps, shape.hidden_size * shape.directions, dtype=make.dtype, device="meta"
        )
        result = (outputs, *(node.meta["val"] for node in states[: shape.gates - 2]))
        y = make.known(result, _RECURRENT[shape.gates], x, *given)
        make.output(make.known(outputs, operator.getitem, y, 0))


def _functions(make: _Maker, op: OpDesc, copies: int, *, alone: bool) -> None:
    """Whatever only moves data or maps elements, over as many bytes; one takes the result of the one before.

    A transpose is an operator of its own in ONNX; with `alone` a copy of the view that it is in PyTorch. Of one row
    there is none that moves anything: both of its axes have more.
    """
    size = make.dtype.itemsize
    arrays = 1 if op.function == "reduce" else 3 if op.function in _OF_TWO else 2
    elements = max(1, round((op.weight_bytes + op.activation_bytes) / size / arrays))
    row = min(max(1, op.row), elements)
    rows = max(1, elements // row)
    if not copies:
        return
    if op.function == "transpose":
        few = _RUNS if rows >= 2 * _RUNS else 2
        for _ in range(copies):
            x = make.call(aten.transpose.int, make.input(few, max(2, rows // few), row), 0, 1)
            if alone:
                x = make.call(aten.clone.default, x, memory_format=torch.contiguous_format)
            make.output(x)
    elif op.function == "reduce":
        for _ in range(copies):
            make.output(make.call(aten.mean.dim, make.input(max(1, rows), row), [-1]))
    else:
        shape = {
            "group_norm": (1, 2 * rows, max(1, row // 2)),
            "copy": (elements,),
            "skip_layer_norm": (1, rows, row),
        }.get(op.function, (rows, row))
        x = make.input(*shape)
        other = make.input(*shape) if op.function in _OF_TWO else None
        for _ in range(copies):
            x = _function(make, op.function, x, other, row)
        make.output(x)


def _function(make: _Maker, name: str, x: fx.Node, other: fx.Node | None, row: int) -> fx.Node:
    shape = x.meta["val"].shape
    match name:
        case "binary":
            return make.call(aten.add.Tensor, x, other)
        case "bias":
            return make.call(aten.add.Tensor, x, make.weight(row if x.meta["val"].shape[0] > 1 else 1))
        case "bias_gelu":
            return make.call(aten.gelu.default, make.call(aten.add.Tensor, x, make.weight(row)))
        case "skip_layer_norm":
            x = make.call(aten.add.Tensor, x, other)
            return make.call(aten.layer_norm.default, x, [row], make.weight(row), make.weight(row))
        case "layer_norm":
            return make.call(aten.layer_norm.default, x, [row], make.weight(row), make.weight(row))
        case "group_norm":
            weights = make.weight(shape[1]), make.weight(shape[1])
            return make.call(aten.group_norm.default, x, max(1, shape[1] // 2), *weights)
    return make.call(_CHAINED[name], x)


def call_of(
    gm: fx.GraphModule, *, compiled: bool = False, device: str = "cpu", channels_last: bool = False
) -> Callable[[], Any]:
    """A call that runs the graph once in PyTorch, on random values; it was run once when this returns.

    With `compiled` it is what torch.compile makes of it for these shapes alone. With `channels_last`, maps of images
    and volumes and the weights over them are laid out so.
    """
    gm = gm.to_empty(device=device)
    for parameter in gm.parameters():
        nn.init.normal_(parameter, std=0.02)
    values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = [_random(value, device) for value in values]
    if channels_last:
        for module in gm.modules():
            if isinstance(module, _CHANNELLED):
                module.weight.data = _channels_last(module.weight.data)
        inputs = [_channels_last(value) for value in inputs]
    run = torch.inference_mode()(lambda: gm(*inputs))
    if compiled:
        torch.compiler.reset()  # it compiles only so many shapes of what it takes for one function
        graph: Any = torch.compile(gm, dynamic=False)
        run = torch.no_grad()(lambda: graph(*inputs))
    run()
    return run


def _channels_last(x: Tensor) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x if layout is None else x.to(memory_format=layout)


def _random(value: Tensor, device: str) -> Tensor:
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool, device=device)
    return torch.randn(value.shape, device=device).to(value.dtype)
