"""How far two computations of the same outputs lie apart: the one metric that every check uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest ‖y − ŷ‖/‖y‖ over the floating-point outputs, without a unit.

    Infinite where an output is NaN, has another shape, or is not floating-point and not equal. Equal infinities, as
    of masked scores, count as no error.

    Raises:
        ValueError: the two have different numbers of outputs.
    """
    return max((_error(y, other) for y, other in zip(expected, got, strict=True)), default=0.0)


def rounded_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The same, but of whole numbers, such as classes, the share that differs: rounding changes a few of many."""
    return max((_rounded(y, other) for y, other in zip(expected, got, strict=True)), default=0.0)


def is_float(value: Any) -> bool:
    """Whether an output is a tensor of real or complex numbers."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def squared_difference(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """(‖y − ŷ‖², ‖y‖²) in double precision, without the positions where both are the same infinity.

    The first is infinite where an output is NaN, or where types that are not floating-point differ.
    """
    if not is_float(expected):
        return (0.0 if torch.equal(expected, got) else math.inf), 1.0
    wide = torch.complex128 if expected.is_complex() or got.is_complex() else torch.float64
    y, other = expected.detach().to(wide), got.detach().to(wide)
    same_infinity = y.isinf() & (y == other)
    difference = float((y - other).masked_fill(same_infinity, 0.0).norm()) ** 2
    size = float(y.masked_fill(same_infinity, 0.0).norm()) ** 2
    return (difference, size) if math.isfinite(difference) and math.isfinite(size) else (math.inf, 1.0)


def _error(expected: Any, got: Any) -> float:
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return 0.0 if expected == got else math.inf
    if expected.shape != got.shape:
        return math.inf
    return ratio(*squared_difference(expected, got))


def _rounded(expected: Any, got: Any) -> float:
    tensors = isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor) and expected.shape == got.shape
    if not tensors or is_float(expected):
        return _error(expected, got)
    return float((expected != got).double().mean()) if expected.numel() else 0.0


def ratio(difference: float, size: float) -> float:
    """‖y − ŷ‖/‖y‖ from its squares; of nothing, no error is none and any is infinite."""
    if difference == 0.0:
        return 0.0
    return (difference / size) ** 0.5 if size > 0.0 else math.inf
