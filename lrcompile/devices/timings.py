"""Measured latencies remembered on disk, one file each, by a key of what was measured and with what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lrcompile.cache import cache_folder, put_whole

SCHEMA = 2  # raise it when a measurement means something else
TOO_NOISY = 0.25  # relative error above which a result is kept for an hour only
NOISY_KEPT_S = 3600.0
RECENT_S = 600.0
DISTURBED = 0.08  # relative error above which a result tells of other programs

Timing = tuple[float, float]  # latency and its standard deviation, in seconds


def default_cache_dir() -> Path:
    """Where measurements of this machine are remembered."""
    return cache_folder("local")


def key_of(*facts: Any) -> str:
    """The name under which a measurement is remembered."""
    return hashlib.sha256(json.dumps([SCHEMA, *facts]).encode()).hexdigest()


class Recalled(NamedTuple):
    """Remembered timings; `recent` are those that were measured in the last minutes, undisturbed."""

    timings: tuple[Timing, ...]
    recent: bool


def recalled(folder: Path | None, key: str, sides: int) -> Recalled | None:
    """The timings of so many sides, or None: absent or damaged ones are measured again and rewritten."""
    if folder is None:
        return None
    path = folder / f"{key}.json"
    try:
        age_s = time.time() - path.stat().st_mtime
        stored = json.loads(path.read_text(encoding="utf-8"))
        timings = tuple((float(latency_s), float(sigma_s)) for latency_s, sigma_s in stored["timings_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    good = all(math.isfinite(value) and value > 0 for timing in timings for value in timing)
    if not good or len(timings) != sides:
        return None
    noise = max(sigma_s / latency_s for latency_s, sigma_s in timings)
    if noise > TOO_NOISY and age_s > NOISY_KEPT_S:
        return None
    return Recalled(timings, noise <= DISTURBED and 0 <= age_s <= RECENT_S)


def recall(folder: Path | None, key: str, sides: int) -> tuple[Timing, ...] | None:
    """The timings alone that `recalled` gives."""
    found = recalled(folder, key, sides)
    return found.timings if found else None


def forget(folder: Path | None, key: str) -> None:
    """Drops timings, so that they are measured again."""
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / f"{key}.json").unlink(missing_ok=True)


def remember(folder: Path | None, key: str, timings: Sequence[Timing]) -> None:
    """Writes timings; a full or read-only disk costs a measurement next time, nothing else."""
    if folder is None:
        return
    with contextlib.suppress(OSError), put_whole(folder / f"{key}.json") as file:
        file.write_text(json.dumps({"timings_s": timings}), encoding="utf-8")
