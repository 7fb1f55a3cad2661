"""From nodes of a lifted graph to lines of Python: the spelling of a person where torch has one, else torch.ops."""

from __future__ import annotations

import builtins
import itertools
import keyword
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lrcompile.errors import InputError

WIDTH = 120
_INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "matmul.default": "@",
    "add.Scalar": "+", "sub.Scalar": "-", "mul.Scalar": "*", "div.Scalar": "/", "pow.Tensor_Scalar": "**",
    "pow.Tensor_Tensor": "**", "__and__.Tensor": "&", "__or__.Tensor": "|", "bitwise_and.Tensor": "&",
    "bitwise_or.Tensor": "|", "eq.Tensor": "==", "eq.Scalar": "==", "ne.Tensor": "!=", "ne.Scalar": "!=",
    "lt.Tensor": "<", "lt.Scalar": "<", "le.Tensor": "<=", "le.Scalar": "<=", "gt.Tensor": ">", "gt.Scalar": ">",
    "ge.Tensor": ">=", "ge.Scalar": ">=",
}  # fmt: skip
_OPERATORS: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/",
    operator.mod: "%", operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_METHODS = frozenset((
    "reshape.default", "view.default", "permute.default", "expand.default", "repeat.default", "transpose.int",
    "t.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default", "flatten.using_ints",
    "unflatten.int", "contiguous.default", "select.int", "softmax.int", "log_softmax.int", "mean.dim",
    "mean.default", "sum.dim_IntList", "sum.default", "amax.default", "amin.default", "argmax.default",
    "argmin.default", "max.dim", "min.dim", "cumsum.default", "masked_fill.Scalar", "masked_fill.Tensor",
    "chunk.default", "split.Tensor", "split.sizes", "unbind.int", "gather.default", "index_select.default",
    "clamp.default", "clamp_min.default", "to.dtype", "roll.default", "diff.default", "topk.default",
    "sort.default", "clone.default", "type_as.default", "new_ones.default", "new_zeros.default", "new_full.default",
    "all.default", "any.default", "all.dim", "any.dim",
))  # fmt: skip
_SPLAT = frozenset(("reshape.default", "view.default", "permute.default", "expand.default", "repeat.default"))
_TORCH = frozenset((
    "relu.default", "sigmoid.default", "tanh.default", "exp.default", "log.default", "sqrt.default",
    "rsqrt.default", "sin.default", "cos.default", "abs.default", "erf.default", "cat.default", "stack.default",
    "where.self", "where.ScalarOther", "where.ScalarSelf", "bmm.default", "arange.default", "arange.start",
    "arange.start_step", "zeros.default", "ones.default", "full.default", "zeros_like.default", "ones_like.default",
    "full_like.default", "minimum.default", "maximum.default", "group_norm.default", "layer_norm.default",
    "prelu.default", "addmm.default", "baddbmm.default", "triu.default", "tril.default", "conv1d.default",
    "conv2d.default", "conv3d.default", "logical_not.default", "logical_and.default", "logical_or.default",
))  # fmt: skip
_FUNCTIONAL = frozenset((
    "gelu.default", "silu.default", "hardtanh.default", "softplus.default", "hardswish.default",
    "hardsigmoid.default", "relu6.default", "leaky_relu.default", "mish.default", "adaptive_avg_pool1d.default",
    "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default", "max_pool1d.default", "max_pool2d.default",
    "max_pool3d.default", "avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", "pad.default",
    "scaled_dot_product_attention.default", "linear.default",
))  # fmt: skip
_CONVERSIONS = frozenset(("to.device", "to.dtype_layout", "_to_copy.default"))
_OF_TORCH = frozenset(("aten", "prims", "quantized", "quantization", "mkl", "mkldnn", "sparse"))  # what it registers
_NEEDED = frozenset(("self", "torch", "nn", "math", "device"))
_LAST = torch.iinfo(torch.int64).max


def expression(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """What a `call_function` node computes, over the names of its inputs; `device` is a name for the inputs' device.

    Raises:
        InputError: the node calls something that cannot be named in a file that needs torch alone.
    """
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in _OF_TORCH:
            raise InputError(
                f"cannot write {node.target} as plain PyTorch, since another library defines it; write a .pt2 archive "
                "instead, which needs that library too"
            )
        return _operation(node, names)
    target: Any = node.target
    arguments = [literal(value, names) for value in node.args]
    if target in _OPERATORS:
        return f"{_operand(arguments[0])} {_OPERATORS[target]} {arguments[1]}"
    if target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    if target is operator.neg:
        return f"-{_operand(arguments[0])}"
    for prefix, module in (("torch.", torch), ("math.", math), ("", builtins)):
        name = getattr(target, "__name__", "")
        if name and getattr(module, name, None) is target:
            return f"{prefix}{name}({', '.join(arguments)})"
    raise InputError(f"cannot write {node.name} ({target}) as plain PyTorch; write a .pt2 archive instead")


def literal(value: Any, names: Mapping[fx.Node, str]) -> str:
    """An argument of a node in Python.

    Raises:
        InputError: there is no way to write it.
    """
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        items = [literal(item, names) for item in value]
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, slice):
        return ":".join("" if v is None else literal(v, names) for v in (value.start, value.stop))
    if isinstance(value, torch.device):
        return "device" if value.type == "cpu" else f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return "torch.nan" if math.isnan(value) else "torch.inf" if value > 0 else "-torch.inf"
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if value is None or value is Ellipsis or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    raise InputError(f"cannot write the argument {value!r} as plain PyTorch; write a .pt2 archive instead")


def uses_device(node: fx.Node) -> bool:
    """Whether the node's line contains the name `device`."""
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, torch.device) else v)
    return bool(found) and _name(node) not in _CONVERSIONS


def is_free(name: str) -> bool:
    """Whether a parameter can have that name: no line of `forward` needs it for something else."""
    return name not in _NEEDED and not keyword.iskeyword(name)


def wrap(line: str, indent: int) -> str:
    """The line with its indentation, broken at the commas of its first bracket that reaches over the page."""
    space = " " * indent
    if len(line) + indent <= WIDTH:
        return space + line
    start, end, commas = _bracket(line)
    if start < 0:
        return space + line
    edges = [start, *commas, end]
    parts = [line[a + 1 : b].strip() for a, b in itertools.pairwise(edges)]
    rows = [""]
    for part in filter(None, parts):
        if rows[-1] and len(rows[-1]) + len(part) + indent + 7 > WIDTH:
            rows.append("")
        rows[-1] += (" " if rows[-1] else "") + part + ","
    inner = "\n".join(wrap(row[:-1], indent + 4) + "," for row in rows)
    if line[start] == "[":
        inner = inner[:-1]  # a comma would make an index of one a tuple
    return f"{space}{line[: start + 1]}\n{inner}\n{space}{line[end:]}"


def _operation(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    name, args = _name(node), node.args
    kwargs = {key: value for key, value in node.kwargs.items() if not _is_idle(key, value)}
    short = name.split(".")[0]
    texts = [literal(value, names) for value in args]
    if name in _INFIX and len(args) == 2 and not kwargs:
        return f"{_operand(texts[0])} {_INFIX[name]} {texts[1]}"
    if name == "neg.default":
        return f"-{_operand(texts[0])}"
    if name == "sym_size.int":
        return f"{texts[0]}.shape[{texts[1]}]"
    if name == "slice.Tensor" and len(args) > 1 and isinstance(args[1], int) and args[1] >= 0:
        return f"{texts[0]}[{':, ' * args[1]}{_slice(texts[2:])}]"
    if name == "index.Tensor":
        return f"{texts[0]}[{', '.join(':' if i is None else literal(i, names) for i in args[1])}]"  # type: ignore[union-attr]
    if name in _CONVERSIONS:
        dtype = kwargs.get("dtype", next((value for value in args if isinstance(value, torch.dtype)), None))
        return f"{texts[0]}.to({dtype})" if dtype else texts[0]
    if "pool" in short:
        texts = [texts[0], *(literal(_single(value), names) for value in args[1:])]
    keywords = [f"{key}={literal(value, names)}" for key, value in kwargs.items()]
    if name in _SPLAT and isinstance(args[1], list | tuple) and args[1]:
        return f"{texts[0]}.{short}({', '.join([literal(value, names) for value in args[1]] + keywords)})"
    if name in _METHODS:
        return f"{texts[0]}.{short}({', '.join(texts[1:] + keywords)})"
    prefix = "torch." if name in _TORCH else "nn.functional." if name in _FUNCTIONAL else None
    called = f"{prefix}{short}" if prefix else f"torch.ops.{_qualified(node)}"
    return f"{called}({', '.join(texts + keywords)})"


def _name(node: fx.Node) -> str:
    """`add.Tensor` of `aten.add.Tensor`, all of the name for operators of others."""
    return _qualified(node).removeprefix("aten.") if isinstance(node.target, torch._ops.OpOverload) else ""


def _qualified(node: fx.Node) -> str:
    return str(node.target)


def _is_idle(key: str, value: Any) -> bool:
    return (key == "pin_memory" and not value) or (key == "layout" and value == torch.strided)


def _operand(text: str) -> str:
    return f"({text})" if text.startswith("-") else text


def _slice(texts: list[str]) -> str:
    start, end, step = [*texts, *("None", "None", "1")[len(texts) :]]
    start = "" if start in ("None", "0") else start
    end = "" if end in ("None", str(_LAST)) else end
    return f"{start}:{end}" + (f":{step}" if step != "1" else "")


def _single(value: Any) -> Any:
    """One number for a list of equal numbers."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) and v == value[0] for v in value):
        return value[0]
    return value


def _bracket(line: str) -> tuple[int, int, list[int]]:
    """Start and end of the longest outermost bracket of a line, and its commas; -1 where there is none."""
    best: tuple[int, int, list[int]] = (-1, -1, [])
    depth, start, quote = 0, 0, ""
    commas: list[int] = []
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote and line[i - 1] != "\\" else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
            if depth == 1:
                start, commas = i, []
        elif character in ")]}":
            depth -= 1
            if depth == 0 and i - start > best[1] - best[0]:
                best = (start, i, commas)
        elif character == "," and depth == 1:
            commas.append(i)
    return best
