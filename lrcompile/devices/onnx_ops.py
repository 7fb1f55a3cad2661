"""How each module and ATen operator is written in ONNX: as `torch.onnx.export(dynamo=True)` writes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lrcompile.devices.onnx_attention import lower_attention
from lrcompile.devices.onnx_graph import (
    GELU_OPSET,
    GROUP_NORM_OPSET,
    RMS_NORM_OPSET,
    Arguments,
    Builder,
    UnsupportedRegion,
    Value,
    tensor_of,
)
from lrcompile.devices.onnx_recurrent import lower_gru, lower_lstm
from lrcompile.graph.graph import ALL_CONVS, TRANSPOSED_CONVS

ModuleHandler = Callable[[Builder, fx.Node, Any, str], str]
FunctionHandler = Callable[[Builder, fx.Node, Arguments], Value]

_POOL_AXES = {"1d": 1, "2d": 2, "3d": 3}


def _linear(b: Builder, node: fx.Node, module: nn.Linear, x: str) -> str:
    bias = [] if module.bias is None else [b.weight(module.bias, node)]
    if tensor_of(node).dim() == 2:
        return b.emit("Gemm", x, b.weight(module.weight, node), *bias, alpha=1.0, beta=1.0, transA=0, transB=1)
    product = b.emit("MatMul", x, b.weight(module.weight, node, transposed=True))
    return b.emit("Add", product, *bias) if bias else product


def _convolution(b: Builder, node: fx.Node, module: Any, x: str) -> str:
    if module.padding_mode != "zeros":
        raise UnsupportedRegion(node, f"padding mode {module.padding_mode}")
    if tensor_of(node).dim() != len(module.kernel_size) + 2:
        raise UnsupportedRegion(node, "convolution without a batch axis")
    inputs = [b.weight(t, node) for t in (module.weight, module.bias) if t is not None]
    options: dict[str, Any] = {
        "auto_pad": "NOTSET",
        "dilations": list(module.dilation),
        "group": module.groups,
        "kernel_shape": list(module.kernel_size),
        "pads": _pads(module),
        "strides": list(module.stride),
    }
    if not isinstance(module, TRANSPOSED_CONVS):
        return b.emit("Conv", x, *inputs, **options)
    return b.emit("ConvTranspose", x, *inputs, output_padding=list(module.output_padding), **options)


def _pads(module: Any) -> list[int]:
    if module.padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [span // 2 for span in spans] + [span - span // 2 for span in spans]
    if module.padding == "valid":
        return [0] * 2 * len(module.kernel_size)
    return [*module.padding, *module.padding]


def _batch_norm(b: Builder, node: fx.Node, module: Any, x: str) -> str:
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        raise UnsupportedRegion(node, "batch norm without running statistics")
    dtype = mean.dtype
    scale = b.constant([1.0] * mean.numel(), dtype, node) if module.weight is None else b.weight(module.weight, node)
    shift = b.constant([0.0] * mean.numel(), dtype, node) if module.bias is None else b.weight(module.bias, node)
    statistics = (b.weight(mean, node), b.weight(variance, node, positive=True))
    return b.emit("BatchNormalization", x, scale, shift, *statistics, epsilon=module.eps)


def _layer_norm_module(b: Builder, node: fx.Node, module: nn.LayerNorm, x: str) -> str:
    weight, bias = (None if t is None else b.weight(t, node) for t in (module.weight, module.bias))
    return _normalize_layer(b, node, x, module.normalized_shape, weight, bias, module.eps)


def _normalize_layer(
    b: Builder, node: fx.Node, x: str, shape: Sequence[int], weight: str | None, bias: str | None, eps: float
) -> str:
    if weight is None:
        weight = b.constant(torch.ones(list(shape)).numpy(), tensor_of(node).dtype, node)
    inputs = [weight] if bias is None else [weight, bias]
    return b.emit("LayerNormalization", x, *inputs, axis=-len(shape), epsilon=eps, stash_type=1)


def _embedding_module(b: Builder, node: fx.Node, module: nn.Embedding, x: str) -> str:
    if module.max_norm is not None:
        raise UnsupportedRegion(node, "embedding with max_norm")
    return b.emit("Gather", b.weight(module.weight, node), x, axis=0)


def _identity_module(b: Builder, node: fx.Node, module: nn.Module, x: str) -> str:
    return x


MODULES: Sequence[tuple[Any, ModuleHandler]] = (
    (nn.Linear, _linear),
    (ALL_CONVS, _convolution),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    (nn.LayerNorm, _layer_norm_module),
    (nn.Embedding, _embedding_module),
    ((nn.Dropout, nn.Identity), _identity_module),
)

UNARY: Mapping[str, str] = {
    "abs": "Abs",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "hardswish": "HardSwish",
    "log": "Log",
    "mish": "Mish",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}


def _gelu(b: Builder, node: fx.Node, a: Arguments) -> str:
    x, dtype = b.name(a["self"], node), tensor_of(node).dtype
    if b.region.opset >= GELU_OPSET:
        return b.emit("Gelu", x, approximate=a["approximate"])
    if a["approximate"] != "none":
        raise UnsupportedRegion(node, f"approximate GELU in opset {b.region.opset}")
    half, one, root = (b.constant(value, dtype, node) for value in (0.5, 1.0, math.sqrt(2)))
    return b.emit("Mul", b.emit("Mul", x, b.emit("Add", b.emit("Erf", b.emit("Div", x, root)), one)), half)


def _silu(b: Builder, node: fx.Node, a: Arguments) -> str:
    x = b.name(a["self"], node)
    return b.emit("Mul", x, b.emit("Sigmoid", x))


def _rsqrt(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("Reciprocal", b.emit("Sqrt", b.operand(a["self"], node)))


def _hardsigmoid(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("HardSigmoid", b.name(a["self"], node), alpha=1 / 6, beta=0.5)


def _leaky_relu(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("LeakyRelu", b.name(a["self"], node), alpha=float(a["negative_slope"]))


def _clip(b: Builder, node: fx.Node, a: Arguments) -> str:
    low, high = (a.get("min_val", a.get("min")), a.get("max_val", a.get("max")))
    if node.target.overloadpacket is torch.ops.aten.relu6:  # type: ignore[union-attr]
        low, high = 0, 6
    dtype = tensor_of(node).dtype
    x = b.operand(a["self"], node)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        if low is not None and high is not None:
            raise UnsupportedRegion(node, "clamps to tensors")
        return b.emit("Max" if high is None else "Min", x, b.operand(low if high is None else high, node))
    bounds = ("" if bound is None else b.constant(bound, dtype, node) for bound in (low, high))
    return b.emit("Clip", x, *bounds)


def _binary(op: str) -> FunctionHandler:
    def lower(b: Builder, node: fx.Node, a: Arguments) -> str:
        if a.get("rounding_mode") is not None:
            raise UnsupportedRegion(node, "division with rounding")
        x, y = b.operand(a["self"], node), b.operand(a["other"], node)
        if a.get("alpha", 1) != 1:
            y = b.emit("Mul", y, b.constant(a["alpha"], tensor_of(node).dtype, node))
        return b.emit(op, x, y)

    return lower


def _rsub(b: Builder, node: fx.Node, a: Arguments) -> str:
    if a.get("alpha", 1) != 1:
        raise UnsupportedRegion(node, "reversed subtraction with a factor")
    return b.emit("Sub", b.operand(a["other"], node), b.operand(a["self"], node))


def _pow(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("Pow", b.operand(a["self"], node), b.operand(a["exponent"], node))


def _cast(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.operand(a["self"], node)


def _same(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.name(a.get("self", a.get("input")), node)


def _reshape(b: Builder, node: fx.Node, a: Arguments) -> str:
    x, shape = b.name(a["self"], node), tensor_of(node).shape
    return x if tensor_of(a["self"]).shape == shape else b.reshape(x, shape, node)


def _permute(b: Builder, node: fx.Node, a: Arguments) -> str:
    axes = tensor_of(node).dim()
    order = list(range(axes))
    if "dims" in a:
        order = [d % axes for d in a["dims"]]
    elif "dim0" in a or "axis0" in a:
        first, second = (a.get(f"dim{i}", a.get(f"axis{i}")) % axes for i in (0, 1))
        order[first], order[second] = second, first
    elif node.target.overloadpacket in (torch.ops.aten.mT, torch.ops.aten.t):  # type: ignore[union-attr]
        order[-2:] = order[-2:][::-1]
    else:
        order.reverse()
    return b.emit("Transpose", b.name(a["self"], node), perm=order)


def _unsqueeze(b: Builder, node: fx.Node, a: Arguments) -> str:
    axis = a["dim"] % tensor_of(node).dim()
    return b.emit("Unsqueeze", b.name(a["self"], node), b.integers([axis], node))


def _squeeze(b: Builder, node: fx.Node, a: Arguments) -> str:
    shape = tensor_of(a["self"]).shape
    asked = a.get("dim", range(len(shape)))
    asked = [asked] if isinstance(asked, int) else asked
    axes = [d % len(shape) for d in asked if shape[d] == 1]
    x = b.name(a["self"], node)
    return b.emit("Squeeze", x, b.integers(axes, node)) if axes else x


def _slice(b: Builder, node: fx.Node, a: Arguments) -> str:
    x, shape, axis = b.name(a["self"], node), tensor_of(a["self"]).shape, a["dim"] % tensor_of(node).dim()
    if tensor_of(node).shape == shape:
        return x
    start, end, _ = slice(a["start"], a["end"]).indices(shape[axis])
    return b.emit("Slice", x, *(b.integers([v], node) for v in (start, end, axis, a["step"])))


def _select(b: Builder, node: fx.Node, a: Arguments) -> str:
    axis = a["dim"] % tensor_of(a["self"]).dim()
    return b.emit("Gather", b.name(a["self"], node), b.constant(a["index"], torch.int64, node), axis=axis)


def _concat(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("Concat", *(b.operand(t, node) for t in a["tensors"]), axis=a["dim"])


def _split(b: Builder, node: fx.Node, a: Arguments) -> list[str]:
    axis = a["dim"] % tensor_of(a["self"]).dim()
    lengths = [int(part.shape[axis]) for part in node.meta["val"]]
    x = b.name(a["self"], node)
    if len(lengths) == 1:
        return [x]
    return b.emit_many("Split", [x, b.integers(lengths, node)], len(lengths), axis=axis)


def _expand(b: Builder, node: fx.Node, a: Arguments) -> str:
    x, shape = b.name(a["self"], node), tensor_of(node).shape
    return x if tensor_of(a["self"]).shape == shape else b.emit("Expand", x, b.integers(list(shape), node))


def _softmax(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("Softmax", b.operand(a["self"], node), axis=a["dim"])


def _matmul(b: Builder, node: fx.Node, a: Arguments) -> str:
    other = a["other"] if "other" in a else a["mat2"]
    return b.emit("MatMul", b.operand(a["self"], node), b.operand(other, node))


def _addmm(b: Builder, node: fx.Node, a: Arguments) -> str:
    inputs = (b.operand(a[name], node) for name in ("mat1", "mat2", "self"))
    return b.emit("Gemm", *inputs, alpha=float(a["alpha"]), beta=float(a["beta"]), transA=0, transB=0)


def _reduce(op: str) -> FunctionHandler:
    def lower(b: Builder, node: fx.Node, a: Arguments) -> str:
        x, axes = b.operand(a["self"], node), tensor_of(a["self"]).dim()
        asked = a.get("dim")
        asked = [asked] if isinstance(asked, int) else asked
        reduced = [d % axes for d in asked] if asked else list(range(axes))
        return b.emit(op, x, b.integers(reduced, node), keepdims=int(a.get("keepdim", False)), noop_with_empty_axes=0)

    return lower


def _pad(b: Builder, node: fx.Node, a: Arguments) -> str:
    if a.get("mode", "constant") != "constant":
        raise UnsupportedRegion(node, f"padding mode {a['mode']}")
    axes, amounts = tensor_of(node).dim(), list(a["pad"])
    if any(isinstance(amount, fx.Node) for amount in amounts):
        raise UnsupportedRegion(node, "pads by a computed amount")
    before, after = [0] * axes, [0] * axes
    for i in range(len(amounts) // 2):
        before[axes - 1 - i], after[axes - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    value = b.constant(a.get("value") or 0, tensor_of(node).dtype, node)
    return b.emit("Pad", b.name(a["self"], node), b.integers(before + after, node), value, mode="constant")


def _pool_options(node: fx.Node, a: Arguments, axes: int) -> dict[str, Any]:
    if tensor_of(node).dim() != axes + 2:
        raise UnsupportedRegion(node, "pooling without a batch axis")
    kernel = _per_axis(a["kernel_size"], axes)
    pads = _per_axis(a["padding"], axes)
    return {
        "auto_pad": "NOTSET",
        "ceil_mode": int(a["ceil_mode"]),
        "kernel_shape": kernel,
        "pads": pads + pads,
        "strides": _per_axis(a["stride"], axes) if a["stride"] else kernel,
    }


def _max_pool(axes: int) -> FunctionHandler:
    def lower(b: Builder, node: fx.Node, a: Arguments) -> str:
        options = _pool_options(node, a, axes)
        dilations = _per_axis(a["dilation"], axes)
        return b.emit("MaxPool", b.name(a["self"], node), dilations=dilations, storage_order=0, **options)

    return lower


def _avg_pool(axes: int) -> FunctionHandler:
    def lower(b: Builder, node: fx.Node, a: Arguments) -> str:
        if a.get("divisor_override") is not None:
            raise UnsupportedRegion(node, "average pooling with its own divisor")
        options = _pool_options(node, a, axes)
        return b.emit("AveragePool", b.name(a["self"], node), count_include_pad=int(a["count_include_pad"]), **options)

    return lower


def _adaptive_avg_pool(axes: int) -> FunctionHandler:
    def lower(b: Builder, node: fx.Node, a: Arguments) -> str:
        x = tensor_of(a["self"])
        sizes_in, sizes_out = list(x.shape[-axes:]), _per_axis(a["output_size"], axes)
        name = b.name(a["self"], node)
        if set(sizes_out) == {1}:
            reduced = list(range(-axes, 0))
            return b.emit("ReduceMean", name, b.integers(reduced, node), keepdims=1, noop_with_empty_axes=0)
        if x.dim() != axes + 2 or any(i % o for i, o in zip(sizes_in, sizes_out, strict=True)):
            raise UnsupportedRegion(node, f"adaptive pooling of {sizes_in} to {sizes_out}")
        kernel = [i // o for i, o in zip(sizes_in, sizes_out, strict=True)]
        return b.emit("AveragePool", name, kernel_shape=kernel, strides=kernel, count_include_pad=1)

    return lower


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _layer_norm(b: Builder, node: fx.Node, a: Arguments) -> str:
    weight, bias = (None if a[name] is None else b.name(a[name], node) for name in ("weight", "bias"))
    return _normalize_layer(b, node, b.name(a["input"], node), a["normalized_shape"], weight, bias, a["eps"])


def _instance_norm(b: Builder, node: fx.Node, a: Arguments) -> str:
    if not a["use_input_stats"]:
        raise UnsupportedRegion(node, "instance norm with running statistics")
    y = tensor_of(node)
    scale = _given_or(b, node, a["weight"], 1.0, y.shape[1])
    shift = _given_or(b, node, a["bias"], 0.0, y.shape[1])
    return b.emit("InstanceNormalization", b.name(a["input"], node), scale, shift, epsilon=a["eps"])


def _group_norm(b: Builder, node: fx.Node, a: Arguments) -> str:
    shape, groups = list(tensor_of(node).shape), a["num_groups"]
    if b.region.opset >= GROUP_NORM_OPSET:
        x, scale, shift = b.name(a["input"], node), a["weight"], a["bias"]
        scale, shift = (_given_or(b, node, given, value, shape[1]) for given, value in ((scale, 1.0), (shift, 0.0)))
        return b.emit("GroupNormalization", x, scale, shift, num_groups=groups, epsilon=a["eps"])
    grouped = b.reshape(b.name(a["input"], node), [shape[0], groups, math.prod(shape[1:]) // groups], node)
    unit = (_given_or(b, node, None, value, groups) for value in (1.0, 0.0))
    result = b.reshape(b.emit("InstanceNormalization", grouped, *unit, epsilon=a["eps"]), shape, node)
    for op, given in (("Mul", a["weight"]), ("Add", a["bias"])):
        if given is not None:
            result = b.emit(op, result, _per_channel(b, node, given))
    return result


def _rms_norm(b: Builder, node: fx.Node, a: Arguments) -> str:
    x, dtype, axes = b.name(a["input"], node), tensor_of(node).dtype, len(a["normalized_shape"])
    eps = torch.finfo(dtype).eps if a["eps"] is None else a["eps"]
    if b.region.opset >= RMS_NORM_OPSET and a["weight"] is not None:
        return b.emit("RMSNormalization", x, b.name(a["weight"], node), axis=-axes, epsilon=eps)
    squares = b.emit("Pow", x, b.constant(2.0, dtype, node))
    mean = b.emit("ReduceMean", squares, b.integers(list(range(-axes, 0)), node), keepdims=1, noop_with_empty_axes=0)
    root = b.emit("Sqrt", b.emit("Add", mean, b.constant(eps, dtype, node)))
    result = b.emit("Mul", x, b.emit("Reciprocal", root))
    return result if a["weight"] is None else b.emit("Mul", result, b.name(a["weight"], node))


def _prelu(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("PRelu", b.name(a["self"], node), _per_channel(b, node, a["weight"]))


def _given_or(b: Builder, node: fx.Node, given: Any, value: float, channels: int) -> str:
    if given is not None:
        return b.name(given, node)
    return b.constant([value] * channels, tensor_of(node).dtype, node)


def _per_channel(b: Builder, node: fx.Node, weight: fx.Node) -> str:
    """A vector over axis 1 of the node's value, or one number for all, shaped to broadcast."""
    shape = [tensor_of(weight).numel(), *[1] * max(0, tensor_of(node).dim() - 2)]
    return b.emit("Reshape", b.name(weight, node), b.integers(shape, node), allowzero=0)


def _upsample(mode: str) -> FunctionHandler:
    def lower(b: Builder, node: fx.Node, a: Arguments) -> str:
        x, align = b.name(a["input"], node), a.get("align_corners")
        linear = "align_corners" if align else "pytorch_half_pixel"
        options = {
            "coordinate_transformation_mode": "asymmetric" if mode == "nearest" else linear,
            "mode": mode,
            "nearest_mode": "floor",
        }
        if a.get("scale_factors"):
            scales = b.constant([1.0, 1.0, *a["scale_factors"]], torch.float32, node)
            return b.emit("Resize", x, "", scales, **options)
        return b.emit("Resize", x, "", "", b.integers([int(size) for size in tensor_of(node).shape], node), **options)

    return lower


def _embedding(b: Builder, node: fx.Node, a: Arguments) -> str:
    return b.emit("Gather", b.name(a["weight"], node), b.name(a["indices"], node), axis=0)


_SHARED: Sequence[tuple[str, FunctionHandler]] = (
    ("alias clone contiguous detach lift_fresh lift_fresh_copy dropout feature_dropout", _same),
    ("clamp clamp_min clamp_max hardtanh relu6", _clip),
    ("flatten reshape unflatten view _unsafe_view", _reshape),
    ("mT numpy_T permute swapaxes t transpose", _permute),
    ("chunk split split_with_sizes", _split),
    ("bmm matmul mm", _matmul),
    ("_softmax softmax", _softmax),
    ("_to_copy to", _cast),
    ("cat concat concatenate", _concat),
    ("constant_pad_nd pad", _pad),
)

FUNCTIONS: Mapping[str, FunctionHandler] = {
    **{name: handler for names, handler in _SHARED for name in names.split()},
    **{f"max_pool{suffix}": _max_pool(axes) for suffix, axes in _POOL_AXES.items()},
    **{f"avg_pool{suffix}": _avg_pool(axes) for suffix, axes in _POOL_AXES.items()},
    **{f"upsample_nearest{suffix}": _upsample("nearest") for suffix in _POOL_AXES},
    **{f"upsample_{name}": _upsample("linear") for name in ("linear1d", "bilinear2d", "trilinear3d")},
    **{f"adaptive_avg_pool{suffix}": _adaptive_avg_pool(axes) for suffix, axes in _POOL_AXES.items()},
    "add": _binary("Add"),
    "addmm": _addmm,
    "amax": _reduce("ReduceMax"),
    "div": _binary("Div"),
    "embedding": _embedding,
    "expand": _expand,
    "gelu": _gelu,
    "group_norm": _group_norm,
    "gru": lower_gru,
    "hardsigmoid": _hardsigmoid,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "lstm": lower_lstm,
    "mean": _reduce("ReduceMean"),
    "mul": _binary("Mul"),
    "pow": _pow,
    "prelu": _prelu,
    "rms_norm": _rms_norm,
    "rsqrt": _rsqrt,
    "rsub": _rsub,
    "scaled_dot_product_attention": lower_attention,
    "select": _select,
    "silu": _silu,
    "slice": _slice,
    "squeeze": _squeeze,
    "sub": _binary("Sub"),
    "sum": _reduce("ReduceSum"),
    "unsqueeze": _unsqueeze,
}
