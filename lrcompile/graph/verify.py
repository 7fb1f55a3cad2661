"""How far two computations of the same outputs lie apart: the one metric that every check uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

HUGE = 1e8


def relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest ‖y − ŷ‖/‖y‖ over the floating-point outputs, without a unit.

    Infinite where an output is NaN, has another shape, or is not floating-point and not equal. What a mask `filled` in,
    such as infinities of masked scores, is left out.

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


def has_nan(values: Iterable[Any]) -> bool:
    """Whether an output holds NaN."""
    return any(is_float(value) and bool(value.isnan().any()) for value in values)


def filled(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Where both hold what a mask puts there: the same infinity, or the same value that dwarfs what is computed.

    Huge is 1e8 (our reading: -1e9 and the lowest number of a type are common), in half precision half of the largest.
    """
    return (expected == got) & (expected.abs() >= min(HUGE, torch.finfo(expected.dtype).max / 2))


def squared_difference(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """(‖y − ŷ‖², ‖y‖²) in double precision, without the positions that a mask `filled` in both.

    The first is infinite where an output is NaN, or where types that are not floating-point differ.
    """
    if not is_float(expected):
        return (0.0 if torch.equal(expected, got) else math.inf), 1.0
    wide = torch.complex128 if expected.is_complex() or got.is_complex() else torch.float64
    y, other = expected.detach().to(wide), got.detach().to(wide)
    masked = filled(expected.detach(), got.detach())
    difference = float((y - other).masked_fill(masked, 0.0).norm()) ** 2
    size = float(y.masked_fill(masked, 0.0).norm()) ** 2
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
