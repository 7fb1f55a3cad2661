"""The check of a calibrated profile, on measurements that are made up: it must find what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from torch import fx

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.elsewhere import Elsewhere
from lrcompile.devices.measure import LocalCostModel
from lrcompile.devices.profile import load_device
from lrcompile.graph.op import OpDesc
from tools import check_calibration
from tools.check_calibration import check_operations, check_pairs, check_steps, measured, pairs_of

DEVICE = load_device("x86-ort")
MODEL = AnalyticCostModel(DEVICE)


def as_predicted(factor: float, noise: float = 0.0) -> Callable[[Sequence[OpDesc], Device], list[float]]:
    rng = np.random.default_rng(0)

    def measured(ops: Sequence[OpDesc], device: Device) -> list[float]:
        return [factor * MODEL.cost(op).latency_s * math.exp(rng.normal(0, noise)) for op in ops]

    return measured


def test_operations_that_are_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_calibration, "measured", as_predicted(1.05))
    found = check_operations(DEVICE, 60)
    assert found.holds
    assert "60 operations, 0 left out: 100.0% within 10%" in found.line
    monkeypatch.setattr(check_calibration, "measured", as_predicted(1.3))
    assert not check_operations(DEVICE, 60).holds


def test_operations_that_differ_from_themselves_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_calibration, "measured", as_predicted(1.0, noise=0.1))
    line = check_operations(DEVICE, 60).line
    assert 20 < int(line.split()[2]) < 60


def test_steps_that_a_profile_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_calibration, "measured", as_predicted(1.0))
    assert check_steps(DEVICE).holds

    def stepped(ops: Sequence[OpDesc], device: Device) -> list[float]:
        odd = [op.conv is not None and (op.conv.channels_in % 2 or op.conv.channels_out % 2) for op in ops]
        return [MODEL.cost(op).latency_s * (2 if jump else 1) for op, jump in zip(ops, odd, strict=True)]

    monkeypatch.setattr(check_calibration, "measured", stepped)
    found = check_steps(DEVICE)
    assert not found.holds
    assert "0 of 4" in found.line


def test_measured_is_a_median_of_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    monkeypatch.setattr(Elsewhere, "cost", lambda self, op: Cost(next(latencies), 0.01))
    op = next(check_calibration.operations(0))
    assert measured([op, op], DEVICE) == [2.0, 20.0]


def test_rewrites_are_compared_with_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs = pairs_of(DEVICE, 6)
    assert len(pairs) == 6
    assert all(0 <= chance <= 1 for _, _, chance in pairs)
    monkeypatch.setattr(check_calibration, "pairs_of", lambda device, count: pairs)

    def compare(self: LocalCostModel, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        self.counters.measured += 1
        return MODEL.compare(before, after)

    monkeypatch.setattr(LocalCostModel, "compare", compare)
    found = check_pairs(DEVICE, 6, None)
    assert not found.holds  # fewer than 60
    sure = [chance for *_, chance in pairs if chance >= 0.9]
    assert f"{len(sure)} of 6 rewrites have a chance of 0.9 or more" in found.line
    if sure:
        assert "100.0% of them are faster" in found.line
    monkeypatch.setattr(LocalCostModel, "compare", lambda self, before, after: MODEL.compare(before, after))
    assert "0 of 0 rewrites" in check_pairs(DEVICE, 6, None).line  # what is predicted does not count


def test_layers_take_what_they_are_given() -> None:
    for module, example in islice(check_calibration.layers(0), 40):
        assert module(example).numel()
