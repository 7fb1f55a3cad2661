"""What is done where memory runs out: the same work on half of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def samples_in(flat: Sequence[Any]) -> int:
    """The first axis of the first of some inputs that has one; 1 without."""
    return next((len(value) for value in flat if isinstance(value, Tensor) and value.dim()), 1)


def in_pieces(flat: Sequence[Any], most: int) -> list[tuple[Any, ...]]:
    """Flat inputs of at most `most` samples each; what has no samples goes into every piece."""
    count = samples_in(flat)
    return [
        tuple(
            value[start : start + most] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
            for value in flat
        )
        for start in range(0, count, most)
    ]
