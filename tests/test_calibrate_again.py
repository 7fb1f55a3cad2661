"""A calibration that is stopped goes on where it was."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from lrcompile.devices import measure
from lrcompile.devices.calibrate import calibrate
from lrcompile.devices.measure import LocalCostModel
from lrcompile.devices.sampling import operations
from lrcompile.devices.timings import Timing
from lrcompile.devices.visits import TOLD, VISITS
from lrcompile.graph.op import OpDesc
from tests.test_calibrate import X86, Clock, machine


def test_what_was_measured_before_a_stop_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 300 measurements, it measures the others only, and as many more as it has time for."""
    clock, asked = Clock(), list[OpDesc]()
    truth, stop_after = machine(clock), 300

    def timed(runs: list[OpDesc], *_: object) -> tuple[Timing, ...]:
        op = runs[0]
        asked.append(op)
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        latency_s = truth(op).latency_s
        return tuple((seconds, 1e-12) for seconds in (2 * latency_s, latency_s, 1e-5, 1e-5))

    monkeypatch.setattr(measure, "measure", timed)
    monkeypatch.setattr(measure, "_repeated", lambda op, opset: (1, [op] * 4))
    monkeypatch.setattr(LocalCostModel, "_opened", lambda self, region: region)
    monkeypatch.setattr(LocalCostModel, "_identified", lambda self, regions: (str(hash(regions[0])), regions))

    def run(folder: Path) -> None:
        models = [LocalCostModel(cache_dir=folder / str(visit)) for visit in range(VISITS)]
        clock.now = 0.0
        calibrate(X86, lambda op, visit: models[visit].cost(op), 30.0, seed=3, clock=clock)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    kept = len(list((tmp_path / "stopped").rglob("*.json")))
    assert kept == stop_after - 1
    stop_after, before, remembered = 10**9, len(asked), asked[: stop_after - 1]
    run(tmp_path / "stopped")
    fresh, stopped_in = asked[before:], asked[before - 1]
    again = {op for op, count in Counter(asked).items() if count > 2}  # two visits agree here
    assert again <= {stopped_in}
    asked.clear()
    run(tmp_path / "whole")
    some = set(asked[: 2 * TOLD])
    assert some == set(islice(operations(3), TOLD)) <= {*fresh, *remembered}  # the same operations
    assert len(fresh) >= len(asked) - 1  # and with the time that was saved, as many more
