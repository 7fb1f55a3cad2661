"""What the user asks for: how much error, how small, how fast; and how sure a gain has to be."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

from lrcompile.errors import InputError
from lrcompile.planning.measures import MEASURES, OF_FLOATS, RELATIVE, Measure, measure_named

if TYPE_CHECKING:  # strategies search within budgets
    from lrcompile.planning.strategies.strategy import Strategy

DEFAULT_MAX_ERROR = 0.05
DEFAULT_CONFIDENCE = 0.8
STRATEGY_NAMES = ("milp", "beam", "latency-step", "energy", "uniform")
LEAST_BARE_BYTES = 1000  # less, without a unit, was meant to be something else
EXACT_ERROR = 1e-5  # what exact rewrites may show in single precision


@dataclass(frozen=True)
class Budget:
    """Limits on the rewritten model; those left None do not bind.

    `max_error`: relative output error, ‖y − ŷ‖/‖y‖ of the worst output. `size`: weight bytes as a share of the
    original (≤ 1) or in bytes (> 1). `speedup`: predicted latency before/after. `max_latency_s`: predicted latency
    in seconds. `confidence`: the least probability of being faster at which a rewrite is accepted. `max_drop`: how far
    the user's metric may fall, in its own units. `measure`: what `max_error` is of, "error" as above, "kl" (divergence
    of the softmax over the last axis of the first floating-point output from the original's, in nats a position) or
    "top1" (the share of positions at which the largest entry of that axis is another one). `strategy`: what chooses, a
    name or one with options of its own, such as `Beam(width=8)`. `reserve`: the share of `max_error`, squared, and of
    `max_drop` that rewrites leave to what comes after them, such as quantisation. `int8`: limits on size and, as
    measured, on latency are those of a file in 8-bit integers, which `Result.save` is to write.

    With `max_error` or `max_drop`, or with no limit at all (then a `max_error` of `DEFAULT_MAX_ERROR` holds), the
    fastest model within the limits is sought; with only size, speed or latency limits, the most accurate one.
    """

    max_error: float | None = None
    size: float | None = None
    speedup: float | None = None
    max_latency_s: float | None = None
    confidence: float = DEFAULT_CONFIDENCE
    max_drop: float | None = None
    measure: str = "error"
    strategy: str | Strategy = "milp"
    reserve: float = 0.0
    int8: bool = False

    def __post_init__(self) -> None:
        for name in ("max_error", "size", "speedup", "max_latency_s", "confidence", "max_drop"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0):
                raise InputError(f"budget {name} is {value!r}; expected a finite number of at least 0")
            object.__setattr__(self, name, float(value))  # of numpy too, which no plan could hold
        limits = (self.max_error, self.size, self.speedup, self.max_latency_s, self.max_drop)
        if measure_named(self.measure) != RELATIVE and all(limit is None for limit in limits):
            raise InputError(f"--measure {self.measure} has no default limit; say how much with --max-error")
        if self.speedup is not None and self.speedup < 1:
            raise InputError(f"--speedup {self.speedup} asks for a slower model; expected 1 or more, such as 1.5")
        if self.size == 0:
            raise InputError("--size 0 leaves no model; expected a share of the original such as 0.5, or bytes")
        if not self.confidence < 1:
            raise InputError(f"--confidence {self.confidence} can never be reached; expected less than 1, such as 0.8")
        if not 0 <= self.reserve < 1:
            raise InputError(f"budget reserve is {self.reserve!r}; expected a share of at least 0 and less than 1")
        if not isinstance(self.int8, bool):
            raise InputError(f"budget int8 is {self.int8!r}; expected True or False")
        if getattr(self.strategy, "name", self.strategy) not in STRATEGY_NAMES:
            raise InputError(f"--strategy {self.strategy!r} is unknown; expected one of {', '.join(STRATEGY_NAMES)}")
        if self.max_drop is not None and self.strategy_name != STRATEGY_NAMES[0]:
            raise InputError(
                f"--strategy {self.strategy_name} does not search by a metric; leave out --max-drop, or use milp"
            )

    @property
    def error_limit(self) -> float | None:
        """The limit on the error of rewrites, or on the root of another measure; None where nothing limits it."""
        return None if self.whole_limit is None else self.whole_limit * math.sqrt(1 - self.reserve)

    @property
    def whole_limit(self) -> float | None:
        """The same without a reserve: the one given, or the default where nothing is limited."""
        if self.max_error is not None:
            return MEASURES[self.measure].root(self.max_error)
        limited = any((self.size, self.speedup, self.max_latency_s)) or self.max_drop is not None
        return None if limited else DEFAULT_MAX_ERROR

    @property
    def measure_in_use(self) -> Measure:
        """What errors are measured in; integer outputs, which differ or do not, count where the error has a limit."""
        ranks = self.error_limit is None and self.measure == RELATIVE.name
        return OF_FLOATS if ranks else MEASURES[self.measure]

    @property
    def exact_only(self) -> bool:
        """Whether the error allowed leaves room for nothing but rounding."""
        return self.error_limit is not None and self.error_limit <= EXACT_ERROR

    @property
    def strategy_name(self) -> str:
        """The name of what chooses."""
        return self.strategy if isinstance(self.strategy, str) else self.strategy.name

    def bytes_limit(self, original_bytes: float) -> float:
        """The size limit in bytes, infinite where there is none."""
        if self.size is None:
            return math.inf
        return self.size * original_bytes if self.size <= 1 else self.size

    @property
    def limits_latency(self) -> bool:
        """Whether a speed-up or a latency is asked for."""
        return self.speedup is not None or self.max_latency_s is not None

    def latency_limit_s(self, original_s: float) -> float:
        """The latency limit in seconds, infinite where there is none."""
        limits = [math.inf]
        if self.speedup is not None:
            limits.append(original_s / self.speedup)
        if self.max_latency_s is not None:
            limits.append(self.max_latency_s)
        return min(limits)

    def to_json(self) -> dict[str, Any]:
        """The limits as plain values, and the name of the strategy."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"strategy": self.strategy_name}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Budget:
        """The budget that `to_json` wrote; unknown keys are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


def parse_size(text: str) -> float:
    """A share ("0.5", "50%") or a number of bytes ("12MB", "300KiB").

    Raises:
        InputError: the text is neither, or a share of more than all, or so few bytes that they would read as a share.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%|[kmg]i?b|b)?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    expected = "expected a share such as 0.5 or 50%, or bytes such as 12MB"
    if match is None or math.isnan(number):
        raise InputError(f"--size got {text!r}; {expected}")
    unit = (match[2] or "").lower()
    if unit == "%" and number > 100:
        raise InputError(f"--size got {text!r}, which is more than all of the original; {expected}")
    if unit == "%":
        return number / 100
    if not unit and 1 < number < LEAST_BARE_BYTES:
        raise InputError(f"--size got {text!r}, which is neither a share nor has a unit; {expected}")
    if not unit:
        return number
    power = {"b": 0, "k": 1, "m": 2, "g": 3}[unit[0]]
    size_bytes = number * (1024 if "i" in unit else 1000) ** power
    if size_bytes <= 1:
        raise InputError(f"--size got {text!r}, which leaves no model; {expected}")
    return size_bytes


def are_falling_shares(sizes: Sequence[float]) -> bool:
    """Whether there are sizes, each a share of the whole and less than the one before."""
    return bool(sizes) and all(0 < size < 1 for size in sizes) and list(sizes) == sorted(set(sizes), reverse=True)


def parse_sizes(text: str) -> list[float]:
    """The falling shares of a family of models, "0.8,0.6,0.4".

    Raises:
        InputError: one is no share, or does not fall.
    """
    try:
        sizes = [parse_size(word) for word in text.split(",")]
    except InputError:
        sizes = []
    if not are_falling_shares(sizes):
        raise InputError(f"--progressive got {text!r}; expected falling shares of the original, such as 0.8,0.6,0.4")
    return sizes


def parse_latency(text: str) -> float:
    """Seconds from "12ms", "800us" or "0.5s"; a bare number is milliseconds.

    Raises:
        InputError: the text is no duration.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(us|ms|s)?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or math.isnan(number):
        raise InputError(f"--max-latency got {text!r}; expected a duration such as 12ms or 800us")
    return number * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[(match[2] or "ms").lower()]
