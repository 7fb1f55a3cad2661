"""What all operations together tell of a machine that is slower for a while."""

from __future__ import annotations

import numpy as np
import pytest

from lrcompile.devices.calibrate import calibrate
from lrcompile.devices.cost import Cost
from lrcompile.devices.drift import FEWEST, WINDOW, Drift, drift_of
from lrcompile.graph.op import OpDesc
from tests.test_calibrate import X86, Clock, machine

SLOW = (0.0, 0.1, 0.0, 0.04, 0.0)


def told(count: int) -> tuple[list[int], list[float]]:
    """Errors at turns, so many of each window."""
    rng = np.random.default_rng(0)
    turns = [window * WINDOW + i for window in range(len(SLOW)) for i in range(count)]
    return turns, [SLOW[turn // WINDOW] + 0.3 + float(rng.laplace(0.0, 0.03)) for turn in turns]


def test_a_drift_is_undone() -> None:
    drift = drift_of(*told(WINDOW))
    assert drift.slower == pytest.approx(SLOW, abs=0.01)  # whatever the level of all errors is
    for window, slower in enumerate(SLOW):
        cost = drift.undone(window * WINDOW + 7, Cost(np.exp(slower), 0.02 * np.exp(slower)))
        assert cost.latency_s == pytest.approx(1.0, abs=0.01)
        assert cost.sigma_s == pytest.approx(0.02, abs=0.001)
    last = len(SLOW) * WINDOW
    assert drift.undone(9 * last, Cost(1.0)) == drift.undone(last - 1, Cost(1.0))  # what came after its last window


def test_windows_that_tell_nothing_lie_between_their_neighbours() -> None:
    turns, errors = told(WINDOW)
    few = [i for i, turn in enumerate(turns) if turn // WINDOW != 2 or turn % WINDOW < FEWEST - 1]
    drift = drift_of([turns[i] for i in few], [errors[i] for i in few])
    assert drift.slower == pytest.approx((0.0, 0.1, 0.07, 0.04, 0.0), abs=0.02)
    assert drift_of(turns[: WINDOW + FEWEST - 1], errors[: WINDOW + FEWEST - 1]) == Drift()
    assert drift_of([], []) == Drift()
    assert Drift().undone(5, Cost(1.0)) == Cost(1.0)


@pytest.mark.parametrize("slower", [1.0, 1.15])
def test_a_calibration_is_as_of_the_undisturbed_machine(slower: float) -> None:
    """All operations take longer for a third of the time, and nothing but they tell of it."""
    clock, spell = Clock(), dict[OpDesc, bool]()
    truth = machine(clock)

    def measured(op: OpDesc, visit: int) -> Cost:
        late = 12.0 < clock.now < 24.0
        spell.setdefault(op, late)
        cost = truth(op, visit)
        return Cost(cost.latency_s * (slower if late else 1.0), 0.01 * cost.latency_s)

    found = calibrate(X86, measured, 40.0, clock=clock)
    off = {m.op: np.log(m.cost.latency_s / truth(m.op).latency_s) for m in found.measurements}
    for late in (True, False):
        assert abs(np.median([error for op, error in off.items() if spell[op] is late])) < 0.03
