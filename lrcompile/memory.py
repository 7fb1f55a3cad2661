"""How much memory there is, and what is done where it runs out: the same work on half of the samples."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
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


def available_bytes() -> float:
    """Memory that programs may still take; all of the machine's where the system does not say, else infinite."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
