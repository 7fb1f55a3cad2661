"""Operations with constants: which nodes scale or shift a value by something that is known before the model runs.

A constant is a number, or what follows from stored tensors alone, such as a view of a parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.graph.graph import Graph, aten, attribute, dtype, shape
from lrcompile.passes import Context
from lrcompile_passes.affine import Affine
from lrcompile_passes.fold_layout import COPIES, RESHAPES

Number = int | float


@dataclass(frozen=True)
class Step:
    """One operation as source ↦ scale·source + shift; each constant is a number or a node, times a number."""

    source: fx.Node
    scale: Number | fx.Node | None = None
    shift: Number | fx.Node | None = None
    inverse: bool = False
    scale_by: float = 1.0
    shift_by: float = 1.0

    @property
    def constants(self) -> list[fx.Node]:
        """The nodes whose values it needs."""
        return [value for value in (self.scale, self.shift) if isinstance(value, fx.Node)]

    def same_as(self, other: Step) -> bool:
        """Whether two steps do the same to different sources."""
        fields = ("scale", "shift", "inverse", "scale_by", "shift_by")
        return all(getattr(self, name) == getattr(other, name) for name in fields)


def step_of(node: fx.Node) -> Step | None:
    """The operation of a node, if it is affine with constants in a value of the same shape and type."""
    if node.op != "call_function" or node.target not in _STEPS or set(node.kwargs) - {"alpha"}:
        return None
    step = _STEPS[node.target](*node.args, **node.kwargs)
    if step is None or is_constant(step.source) or not isinstance(step.source.meta.get("val"), Tensor):
        return None
    kind = dtype(node)
    same = kind == dtype(step.source) and kind is not None and kind.is_floating_point
    return step if same and shape(node) == shape(step.source) else None


def _multiplied(a: Any, b: Any) -> Step | None:
    if _constant(b):
        return Step(a, scale=b) if isinstance(a, fx.Node) else None
    return Step(b, scale=a) if _constant(a) else None


def _divided(a: Any, b: Any) -> Step | None:
    return Step(a, scale=b, inverse=True) if isinstance(a, fx.Node) and _constant(b) else None


def _added(a: Any, b: Any, alpha: Any = 1, sign: int = 1) -> Step | None:
    if not isinstance(alpha, int | float):
        return None
    if _constant(b):
        return Step(a, shift=b, shift_by=sign * alpha) if isinstance(a, fx.Node) else None
    return Step(b, scale=sign * alpha, shift=a) if _constant(a) else None


def _subtracted(a: Any, b: Any, alpha: Any = 1) -> Step | None:
    return _added(a, b, alpha, -1)


def _subtracted_from(a: Any, b: Any, alpha: Any = 1) -> Step | None:
    return _added(b, a, alpha, -1)


_STEPS: dict[Any, Any] = {
    aten.mul.Tensor: _multiplied,
    aten.mul.Scalar: _multiplied,
    aten.div.Tensor: _divided,
    aten.div.Scalar: _divided,
    aten.add.Tensor: _added,
    aten.add.Scalar: _added,
    aten.sub.Tensor: _subtracted,
    aten.sub.Scalar: _subtracted,
    aten.rsub.Tensor: _subtracted_from,
    aten.rsub.Scalar: _subtracted_from,
    aten.neg.default: lambda a: Step(a, scale=-1),
}

MOVES = {
    *RESHAPES, *COPIES, aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.expand.default,
}  # fmt: skip
_OF_CONSTANTS = {
    *MOVES, *_STEPS, aten.exp.default, aten.sigmoid.default, aten.tanh.default, aten.softplus.default,
    aten.abs.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.to.dtype,
}  # fmt: skip


def _constant(value: Any) -> bool:
    if isinstance(value, int | float):
        return math.isfinite(value)
    return isinstance(value, fx.Node) and is_constant(value)


def is_constant(node: fx.Node) -> bool:
    """Whether a value follows from stored tensors alone."""
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    computed = node.op == "call_function" and node.target in _OF_CONSTANTS and bool(node.all_input_nodes)
    return node.op == "get_attr" or (computed and all(map(is_constant, node.all_input_nodes)))


def needed(node: fx.Node) -> Step:
    """The step of a node.

    Raises:
        ValueError: there is none.
    """
    step = step_of(node)
    if step is None:
        raise ValueError(f"{node.name} is not a scale or shift by a constant")
    return step


def read(graph: Graph, step: Step, context: Context) -> Affine:
    """The step with its values."""
    scale = None if step.scale is None else _values(graph, step.scale, context)
    if scale is not None:
        scale = (1 / scale if step.inverse else scale) * step.scale_by
    shift = None if step.shift is None else _values(graph, step.shift, context) * step.shift_by
    return Affine(scale, shift)


def _values(graph: Graph, constant: Number | fx.Node, context: Context) -> Tensor:
    if isinstance(constant, fx.Node):
        return _evaluated(graph, constant, context).double().reshape(-1)
    return torch.tensor([float(constant)], dtype=torch.float64)


def _evaluated(graph: Graph, node: fx.Node, context: Context) -> Tensor:
    if node.op == "get_attr":
        return context.constant(attribute(graph.gm, str(node.target)))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _evaluated(graph, n, context))  # type: ignore[arg-type]
    return node.target(*args, **kwargs)  # type: ignore[operator]
