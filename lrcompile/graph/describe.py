"""From a node of a lifted graph to what it asks of a device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.graph.graph import submodule
from lrcompile.graph.op import (
    AttentionShape,
    ConvShape,
    Function,
    Kind,
    Layout,
    OpDesc,
    RecurrentShape,
    conv_op,
    gemm_op,
    recurrent_op,
)

aten = torch.ops.aten

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def describe(gm: fx.GraphModule, node: fx.Node) -> OpDesc:
    """The operation of a node whose inputs and output carry concrete shapes in `meta["val"]`.

    An operator that is not known is described as elementwise over what it reads and writes.
    """
    if node.op == "call_module":
        return _describe_module(submodule(gm, node.target), node)
    if node.op != "call_function":
        return _plain("view", node, 0.0)
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return _plain("view", node, 0.0)
    packet = node.target.overloadpacket
    if packet in _SPECIAL:
        return _SPECIAL[packet](node)
    if packet in _TRANSPOSES:
        return _transpose(node)
    if packet in (aten.to, aten._to_copy) and dtype_name(_value(node.args[0])) == dtype_name(_value(node)):
        return _plain("view", node, 0.0)
    if packet in _RESHAPES and _is_copied(node):
        return _plain("movement", node, 0.0)
    kind, per_element = _KINDS.get(packet, ("elementwise", 1.0))
    return replace(_plain(kind, node, per_element), function=_function(packet, node), row=_row(packet, node))


def _function(packet: Any, node: fx.Node) -> Function:
    """What an operation that is priced by its traffic computes."""
    if packet in _FUNCTIONS:
        return _FUNCTIONS[packet]
    if packet not in (aten.add, aten.sub, aten.mul, aten.div):
        return "copy"
    shapes = [tuple(v.shape) for v in map(_value, node.all_input_nodes) if isinstance(v, Tensor)]
    if len(shapes) < 2:
        return "copy"
    return "binary" if shapes[0] == shapes[1] else "bias"


def _row(packet: Any, node: fx.Node) -> int:
    """Over how many elements it does so: the last axis where nothing else is known."""
    x, y = (_value(node.args[0]) if node.args else None), node.meta.get("val")
    function = _function(packet, node)
    if function == "bias":
        return _run(node)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.dim():
        return 1
    if function == "reduce":
        return max(1, x.numel() // max(1, y.numel()))
    if packet in (aten.group_norm, aten.instance_norm):
        groups: Any = node.args[1] if packet is aten.group_norm else x.shape[1]
        return max(1, x.numel() // max(1, x.shape[0] * groups))
    if packet is aten.layer_norm:
        return math.prod(x.shape[-len(node.args[1]) :])  # type: ignore[arg-type]
    return max(1, y.shape[-1] if y.dim() else 1)


def _run(node: fx.Node) -> int:
    """Elements in a row for which each operand has as many values, or one for all: so kernels go over them."""
    result: Tensor = _value(node)
    shapes = [v.shape for v in map(_value, node.all_input_nodes) if isinstance(v, Tensor)]
    padded = [(1,) * (result.dim() - len(shape)) + tuple(shape) for shape in shapes]
    axes = [(size, once) for size, *once in zip(result.shape, *padded, strict=True) if size > 1]
    run = 1
    for size, once in reversed(axes):
        if [n == 1 for n in once] != [n == 1 for n in axes[-1][1]]:
            break
        run *= size
    return run


def _transpose(node: fx.Node) -> OpDesc:
    """A view with other strides, described by what a runtime moves that has to write it out."""
    y: Tensor = node.target(torch.empty(_value(node.args[0]).shape, device="meta"), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    run = 1
    for size, step in zip(reversed(y.shape), reversed(y.stride()), strict=True):
        if size > 1 and step != run:
            break
        run *= size
    moved = 2.0 * _bytes(_value(node)) if run < y.numel() else 0.0
    return replace(_plain("view", node, 0.0), activation_bytes=moved, function="transpose", row=max(1, run))


def _is_copied(node: fx.Node) -> bool:
    """Whether a new shape needs the values written out: no steps through the memory of the input give it.

    What comes out of attention lies as its readers want it (our reading: fused kernels write the heads side by side).
    """
    x, y, source = _value(node.args[0]), _value(node), node.args[0]
    if x.is_contiguous():
        return False
    while getattr(getattr(source, "target", None), "overloadpacket", None) in _TRANSPOSES:
        source = source.args[0]  # type: ignore[union-attr]
    if getattr(getattr(source, "target", None), "overloadpacket", None) is aten.scaled_dot_product_attention:
        return False
    if node.target.overloadpacket is aten.contiguous:  # type: ignore[union-attr]
        return True
    try:
        torch.empty_strided(x.shape, x.stride(), device="meta").view(y.shape)
    except RuntimeError:
        return True
    return False


def _describe_module(module: nn.Module, node: fx.Node) -> OpDesc:
    x, y, label = _value(node.args[0]), _value(node), type(module).__name__
    weight_bytes = float(sum(map(_bytes, module.parameters() if module._modules else module._parameters.values())))
    match module:
        case nn.Linear():
            rows = x.numel() // max(1, x.shape[-1])
            op = gemm_op(rows, module.out_features, module.in_features, dtype_name(y), label="Linear")
            return replace(op, weight_bytes=weight_bytes)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            op = conv_op(_conv_shape(module, x, y, transposed=False), dtype_name(y), label=label)
            return replace(op, weight_bytes=weight_bytes)
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            op = conv_op(_conv_shape(module, x, y, transposed=True), dtype_name(y), label=label)
            return replace(op, weight_bytes=weight_bytes)
        case nn.Embedding():
            return replace(_plain("gather", node, 0.0), weight_bytes=0.0, activation_bytes=2.0 * _bytes(y), label=label)
        case nn.Dropout() | nn.Identity():
            return replace(_plain("view", node, 0.0), label=label)
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            return replace(_plain("normalization", node, 2.0), weight_bytes=weight_bytes, label=label)
        case nn.LayerNorm():
            row = math.prod(module.normalized_shape)
            op = replace(_plain("normalization", node, 8.0), weight_bytes=weight_bytes, label=label)
            return replace(op, function="layer_norm", row=row)
    return replace(_plain("elementwise", node, 1.0), weight_bytes=weight_bytes, label=label)


def _conv_shape(module: Any, x: Tensor, y: Tensor, *, transposed: bool) -> ConvShape:
    axes = len(module.kernel_size)
    if isinstance(module.padding, str):
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple((span // 2, span - span // 2) if module.padding == "same" else (0, 0) for span in spans)
    else:
        padding = tuple((p, p) for p in module.padding)
    return ConvShape(
        batch=x.shape[0] if x.dim() == axes + 2 else 1,
        channels_in=module.in_channels,
        channels_out=module.out_channels,
        size_in=tuple(x.shape[-axes:]),
        size_out=tuple(y.shape[-axes:]),
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=padding,
        dilation=tuple(module.dilation),
        groups=module.groups,
        transposed=transposed,
    )


def _matmul(node: fx.Node) -> OpDesc:
    arguments = node.args[1:3] if node.target.overloadpacket in (aten.addmm, aten.baddbmm) else node.args[:2]  # type: ignore[union-attr]
    a, b = (_value(argument) for argument in arguments)
    y = _value(node)
    if a.dim() < 2 or b.dim() < 2:
        return _plain("reduction", node, 2.0)
    k, n = a.shape[-1], b.shape[-1]
    m = a.shape[-2] if b.dim() > 2 else max(1, y.numel() // max(1, n))  # one matrix for all of a batch is one product
    batch = max(1, y.numel() // max(1, m * n))
    weight = _is_weight(arguments[1])
    layout: Layout = "TN" if b.stride()[-2] == 1 and n > 1 else "NN"
    return gemm_op(m, n, k, dtype_name(y), batch=batch, weight=weight, label=_name(node), layout=layout)


def _linear(node: fx.Node) -> OpDesc:
    x, weight, y = _value(node.args[0]), _value(node.args[1]), _value(node)
    if weight.dim() < 2:
        return _plain("reduction", node, 2.0)
    rows = x.numel() // max(1, x.shape[-1])
    return gemm_op(rows, weight.shape[0], weight.shape[1], dtype_name(y), label=_name(node))


def _attention(node: fx.Node) -> OpDesc:
    q, k, y = _value(node.args[0]), _value(node.args[1]), _value(node)
    batch = 1
    for size in q.shape[:-3]:
        batch *= size
    heads, heads_kv = (q.shape[-3], k.shape[-3]) if q.dim() > 2 else (1, 1)
    causal = bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
    width = (q.shape[-1] + y.shape[-1]) // 2  # of the two products, where values are not as wide as keys
    shape = AttentionShape(batch, heads, heads_kv, q.shape[-2], k.shape[-2], width, causal)
    products = 4.0 * batch * heads * q.shape[-2] * k.shape[-2] * width
    inputs = sum(_bytes(v) for v in (q, k, _value(node.args[2])))
    given: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if given is not None:
        shape = replace(shape, mask="boolean" if dtype_name(_value(given)) == "bool" else "number")
    return OpDesc("attention", dtype_name(y), products, 0.0, inputs + _bytes(y), attention=shape, label="attention")


def _recurrent(gates: int) -> Callable[[fx.Node], OpDesc]:
    def describe_recurrent(node: fx.Node) -> OpDesc:
        x = _value(node.args[0])
        inner = _value(pytree.tree_leaves(node.args[2])[0]).shape[0] // gates  # a projection makes the state narrower
        layers: Any = node.args[4]
        bidirectional, batch_first = bool(node.args[7]), bool(node.args[8])
        directions = 2 if bidirectional else 1
        batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        shape = RecurrentShape(batch, steps, x.shape[-1], inner, layers, directions, gates)
        weights = [_value(w) for w in pytree.tree_leaves(node.args[2])]
        macs = sum(w.numel() for w in weights if w.dim() == 2) * batch * steps
        outputs = sum(_bytes(v) for v in pytree.tree_leaves(node.meta["val"]))
        return OpDesc(
            "recurrent", dtype_name(x), 2.0 * macs, sum(_bytes(w) for w in weights), _bytes(x) + outputs,
            recurrent=shape, label=_name(node),
        )  # fmt: skip

    return describe_recurrent


def _cell(gates: int) -> Callable[[fx.Node], OpDesc]:
    def describe_cell(node: fx.Node) -> OpDesc:
        x, recurrent = _value(node.args[0]), _value(node.args[3])
        batch = x.numel() // max(1, x.shape[-1])
        shape = RecurrentShape(batch, 1, x.shape[-1], recurrent.shape[-1], 1, 1, gates)
        return replace(recurrent_op(shape, dtype_name(x)), label=_name(node))

    return describe_cell


def _tensordot(node: fx.Node) -> OpDesc:
    """The product over the axes that both lose."""
    a, b, lost = _value(node.args[0]), _value(node.args[1]), node.args[2]
    k = math.prod(a.shape[axis] for axis in lost)  # type: ignore[union-attr, index, misc]
    m, n = a.numel() // max(1, k), b.numel() // max(1, k)
    return gemm_op(m, n, k, dtype_name(a), weight=_is_weight(node.args[1]), label=_name(node), layout="NN")


def _bilinear(node: fx.Node) -> OpDesc:
    """Its larger product: of all rows of the first input by the weight [out × first × second]."""
    x, weight = _value(node.args[0]), _value(node.args[2])
    out, first, second = weight.shape
    return gemm_op(x.numel() // max(1, first), out * second, first, dtype_name(x), label=_name(node), layout="NN")


def _einsum(node: fx.Node) -> OpDesc:
    """Of two operands: a product over what the output lacks, batched over what all have; else by its traffic."""
    equation, operands = str(node.args[0]).replace(" ", ""), tuple(map(_value, node.args[1]))  # type: ignore[arg-type]
    y = _value(node)
    inputs, _, output = equation.partition("->")
    names = inputs.split(",")
    is_product = len(operands) == 2 and bool(set(names[0]) & set(names[1]) - set(output))  # something is summed over
    if not is_product or not output or "." in equation or any(map(_repeats, names)):
        return _plain("elementwise", node, 1.0)
    sizes = [dict(zip(name, x.shape, strict=True)) for name, x in zip(names, operands, strict=True)]
    a, b = sizes
    batch = math.prod(size for name, size in a.items() if name in b and name in output)
    k = math.prod(size for name, size in a.items() if name in b and name not in output)
    m = math.prod(size for name, size in a.items() if name not in b and name in output)
    n = math.prod(size for name, size in b.items() if name not in a and name in output)
    return gemm_op(m, n, k, dtype_name(y), batch=batch, weight=False, label="einsum", layout="NN")


def _repeats(name: str) -> bool:
    return len(set(name)) < len(name)


def _convolution(node: fx.Node) -> OpDesc:
    """A convolution on a computed weight: priced as the product of its window matrix."""
    if node.target.overloadpacket is aten.convolution and node.args[6]:  # type: ignore[union-attr]
        return _transposed_convolution(node)
    weight, y = _value(node.args[1]), _value(node)
    out, positions = weight.shape[0], y.numel() // max(1, weight.shape[0])
    return gemm_op(positions, out, weight.numel() // max(1, out), dtype_name(y), weight=False, label=_name(node))


def _transposed_convolution(node: fx.Node) -> OpDesc:
    """The product that gives every input position its window of the output."""
    x, weight, y = _value(node.args[0]), _value(node.args[1]), _value(node)
    into = max(1, weight.shape[0])
    groups = max(1, y.shape[1 - weight.dim()] // max(1, weight.shape[1]))
    window = weight.numel() // into
    rows, dtype = x.numel() // into, dtype_name(y)
    return gemm_op(rows, window, into // groups, dtype, batch=groups, weight=False, label=_name(node))


def _bag(node: fx.Node) -> OpDesc:
    """Rows of a table, added up: what is read is as many rows as there are indices."""
    table, indices, y = _value(node.args[0]), _value(node.args[1]), pytree.tree_leaves(node.meta["val"])[0]
    moved = float(indices.numel() * table.shape[-1] * table.element_size()) + _bytes(y)
    return OpDesc("gather", dtype_name(y), 0.0, 0.0, moved, function="copy", row=y.shape[-1], label=_name(node))


_SPECIAL: dict[Any, Callable[[fx.Node], OpDesc]] = {
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.matmul: _matmul,
    aten.addmm: _matmul,
    aten.baddbmm: _matmul,
    aten.linear: _linear,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten.lstm: _recurrent(4),
    aten.gru: _recurrent(3),
    aten.rnn_tanh: _recurrent(1),
    aten.rnn_relu: _recurrent(1),
    aten.lstm_cell: _cell(4),
    aten.gru_cell: _cell(3),
    aten.rnn_tanh_cell: _cell(1),
    aten.rnn_relu_cell: _cell(1),
    aten.tensordot: _tensordot,
    aten.bilinear: _bilinear,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.convolution: _convolution,
    aten.conv_transpose1d: _transposed_convolution,
    aten.conv_transpose2d: _transposed_convolution,
    aten.conv_transpose3d: _transposed_convolution,
    aten.embedding_bag: _bag,
    aten._embedding_bag: _bag,
    aten._embedding_bag_forward_only: _bag,
}

_RESHAPES = (aten.reshape, aten.flatten, aten.contiguous, aten.clone)
_VIEWS = [
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "slice", "select", "alias",
    "detach", "sym_size", "sym_numel", "sym_stride", "split", "split_with_sizes", "chunk", "unbind", "narrow",
    "view_as", "expand_as", "_unsafe_view", "arange", "zeros", "ones", "full", "empty", "lift_fresh_copy",
    "lift_fresh", "scalar_tensor", "item", "_local_scalar_dense", "contiguous", "dropout", "zeros_like",
    "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
]  # fmt: skip
_MOVEMENTS = [
    "cat", "stack", "pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "roll", "flip", "clone",
    "repeat", "im2col", "unfold",
]  # fmt: skip
_REDUCTIONS = [
    "sum", "mean", "max", "min", "amax", "amin", "var", "var_mean", "std", "argmax", "argmin", "cumsum", "all",
    "any", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "topk", "norm", "linalg_vector_norm",
]  # fmt: skip
_NORMALIZATIONS = [
    "softmax", "_softmax", "log_softmax", "layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm",
    "native_layer_norm",
]  # fmt: skip
_GATHERS = ["embedding", "index", "index_select", "gather", "scatter", "index_put", "take_along_dim"]
_TRANSPOSES = {aten.t, aten.mT, aten.numpy_T, aten.transpose, aten.permute, aten.movedim, aten.swapaxes}
_FUNCTIONS: dict[Any, Function] = {
    aten.gelu: "gelu",
    aten.silu: "silu",
    **dict.fromkeys((aten.sigmoid, aten.tanh, aten.exp, aten.erf), "sigmoid"),
    **dict.fromkeys((aten.softmax, aten._softmax, aten.log_softmax, aten.layer_norm, aten.rms_norm), "layer_norm"),
    **dict.fromkeys((aten.group_norm, aten.instance_norm), "group_norm"),
    **dict.fromkeys((aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.adaptive_avg_pool2d), "reduce"),
    **dict.fromkeys((aten.adaptive_avg_pool1d, aten.adaptive_avg_pool3d), "reduce"),
}
_HEAVY = {
    "gelu": 12.0, "tanh": 8.0, "sigmoid": 6.0, "silu": 6.0, "exp": 6.0, "erf": 8.0, "sin": 8.0, "cos": 8.0, "pow": 6.0,
}  # fmt: skip


def _table() -> dict[Any, tuple[Kind, float]]:
    groups: list[tuple[Kind, float, list[str]]] = [
        ("view", 0.0, _VIEWS),
        ("movement", 0.0, _MOVEMENTS),
        ("reduction", 1.0, _REDUCTIONS),
        ("normalization", 5.0, _NORMALIZATIONS),
        ("gather", 0.0, _GATHERS),
    ]
    table: dict[Any, tuple[Kind, float]] = {}
    for kind, per_element, names in groups:
        table.update({getattr(aten, name): (kind, per_element) for name in names if hasattr(aten, name)})
    table.update({getattr(aten, name): ("elementwise", cost) for name, cost in _HEAVY.items()})
    return table


_KINDS = _table()


def _plain(kind: Kind, node: fx.Node, per_element: float) -> OpDesc:
    """An operation priced by its traffic, with `per_element` operations for each input element."""
    outputs = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    constants = [n for n in node.all_input_nodes if n.op == "get_attr"]
    weights = [_value(n) for n in constants if isinstance(n.meta.get("val"), Tensor)]
    inputs = [
        v
        for n in node.all_input_nodes
        if n.op != "get_attr"
        for v in pytree.tree_leaves(n.meta.get("val"))
        if isinstance(v, Tensor)
    ]
    name = dtype_name(outputs[0]) if outputs else "int64"
    if kind == "view":
        return OpDesc("view", name, 0.0, 0.0, 0.0, label=_name(node))
    elements = max([v.numel() for v in [*inputs, *outputs]], default=0)
    traffic = float(sum(_bytes(v) for v in [*inputs, *outputs]))
    if kind == "gather":  # of a table only what is looked up is read
        weights, traffic = [], 2.0 * sum(_bytes(v) for v in outputs)
    return OpDesc(kind, name, per_element * elements, float(sum(map(_bytes, weights))), traffic, label=_name(node))


def _is_weight(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _value(argument: Any) -> Tensor:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _bytes(value: Any) -> float:
    return float(value.numel() * value.element_size()) if isinstance(value, Tensor) else 0.0


def dtype_name(value: Tensor) -> str:
    """The precision that a value is priced in."""
    return DTYPE_NAMES.get(value.dtype, "fp32")


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else node.op
