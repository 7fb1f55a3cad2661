"""What a calibration visits: operations measured once each, some of them again, with others between.

Many operations once say more of those between them than half as many twice, as long as visits that were disturbed are
found: an operation is visited again where its latency surprises (`calibrate`). Of some it is not asked whether they
surprise: these tell how far visits differ on this machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Pace
from lrcompile.devices.drift import Drift, drift_of
from lrcompile.devices.pace import at, in_step, in_step_at, pace_of
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc

VISITS = 3  # of an operation at most
TOLD = 60  # of the first operations every one is visited again, then every so manieth
EVERY = 10
AGREE = 0.05  # difference of two visits up to which there is no third
NOISY = 0.1  # relative error above which a measurement does not count
MOST_NOISY = 1 / 3  # share of such measurements above which the machine is called too busy
ROBUST = 1.4826  # of the median of absolute errors, for a normal distribution to have its standard deviation


@dataclass(frozen=True)
class Measurement:
    """An operation and what it takes here."""

    op: OpDesc
    cost: Cost

    @classmethod
    def of(cls, op: OpDesc, costs: Sequence[Cost]) -> Measurement:
        """What some visits of an operation say."""
        return cls(op, middle(costs))

    @property
    def is_noisy(self) -> bool:
        """Whether it says too little to be fitted to."""
        return is_noisy(self.cost)


@dataclass
class Visits:
    """Operations, and what each visit of them gave.

    `measure` takes an operation and the number of the visit; where that fails the visit is left out. What is too noisy
    is handed to `forget`. `turns` are those of an operation's visits among all that were `visited`; what they gave is
    read without the `drift`. `told` are the operations that were visited again without being chosen for it.
    """

    measure: Callable[[OpDesc, int], Cost]
    forget: Callable[[OpDesc], None]
    known: dict[OpDesc, list[Cost]] = field(default_factory=dict)
    turns: dict[OpDesc, list[int]] = field(default_factory=dict)
    visited: int = 0
    drift: Drift = field(default_factory=Drift)
    told: set[OpDesc] = field(default_factory=set)
    failure: DeviceError | None = None

    @property
    def pace(self) -> Pace | None:
        """That of an undisturbed machine, as far as the visits tell."""
        return pace_of(self.known.values())

    def add(self, ops: Iterable[OpDesc], in_time: Callable[[], bool]) -> None:
        """Visits new operations, and then some of them again."""
        fresh = [op for op in dict.fromkeys(ops) if op not in self.known]
        for op in fresh:
            if in_time():
                self._visit(op)
        some = fresh if len(self.told) < TOLD else fresh[::EVERY]
        self.told.update(some)
        self.again(some, in_time)

    def again(self, ops: Sequence[OpDesc], in_time: Callable[[], bool]) -> None:
        """Visits operations a second time, and a third one where the two do not agree."""
        pace = self.pace
        for visit in range(1, VISITS):
            for op in ops:
                known = self.known.get(op, [])
                if len(known) == visit and in_time() and not (visit > 1 and agree(known, pace)):
                    self._visit(op)

    def measurements(self) -> list[Measurement]:
        """Operations with what their visits say, all at one pace of the machine; only visits in step with it count."""
        pace = self.pace
        found = (self._measurement(op, pace) for op in self.known)
        return [m for m in found if m is not None]

    def follow(self, expected: Mapping[OpDesc, float]) -> None:
        """Learns the drift, from what operations take in s as all others say."""
        pace = self.pace
        errors = [
            (turn, math.log(at(pace, cost).latency_s / expected[op]))
            for op in self.known.keys() & expected.keys()
            for turn, cost in zip(self.turns[op], self.known[op], strict=True)
            if in_step(pace, cost)
        ]
        self.drift = drift_of([turn for turn, _ in errors], [error for _, error in errors])

    def good(self) -> list[Measurement]:
        """The measurements that count; the other operations are forgotten.

        Raises:
            DeviceError: of the operations that tell how far visits differ, the first two of too many do.
        """
        found = {m.op: m for m in self.measurements()}
        for op in self.known:
            if op not in found or found[op].is_noisy:
                self.forget(op)
        pace = self.pace
        twice = [m for op in self.told if (m := self._measurement(op, pace, 2))]
        if (noisy := sum(m.is_noisy for m in twice)) > MOST_NOISY * len(twice):
            raise DeviceError(
                f"{noisy} of {len(twice)} measurements have an error above {NOISY:.0%}: the machine is too busy to "
                "calibrate; stop other programs and start again: what was measured well is kept"
            )
        return [m for m in found.values() if not m.is_noisy]

    def _visit(self, op: OpDesc) -> None:
        try:
            cost = self.measure(op, len(self.known.get(op, ())))
        except DeviceError as problem:  # such as too little memory for it
            self.failure = problem
            return
        self.known.setdefault(op, []).append(cost)
        self.turns.setdefault(op, []).append(self.visited)
        self.visited += 1

    def _measurement(self, op: OpDesc, pace: Pace | None, visits: int = VISITS) -> Measurement | None:
        """What an operation's first visits say at one pace; nothing where none was in step with it."""
        known = zip(self.turns.get(op, []), self.known.get(op, []), strict=True)
        counted = [
            self.drift.undone(turn, at(pace, cost)) for turn, cost in islice(known, visits) if in_step(pace, cost)
        ]
        return Measurement.of(op, counted) if counted else None


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of some visits, and how far they are apart, or their own deviation if that is larger.

    Two of three that agree are believed: the robust deviation counts.
    """
    latencies = [cost.latency_s for cost in costs]
    median = statistics.median(latencies)
    spread = statistics.stdev(latencies) if len(costs) == 2 else 0.0
    if len(costs) > 2:
        spread = ROBUST * statistics.median(abs(latency_s - median) for latency_s in latencies)
    return replace(costs[0], latency_s=median, sigma_s=max(spread, min(cost.sigma_s for cost in costs)))


def is_noisy(cost: Cost) -> bool:
    """Whether a measurement says too little to be fitted to."""
    return cost.sigma_s > NOISY * cost.latency_s


def agree(costs: Sequence[Cost], pace: Pace | None) -> bool:
    """Whether two visits make another one superfluous."""
    latencies = sorted(cost.latency_s for cost in in_step_at(pace, costs))
    return any(b - a < AGREE * a for a, b in pairwise(latencies))
