"""Calibration on machines that are made up, and what a profile keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lrcompile.cli import run
from lrcompile.devices import measure
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.calibrate import LEAST, WEIGHTS, Calibration, calibrate, calibrated, fitted_to, operations
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device, available_devices, load_device
from lrcompile.devices.fit import with_figures
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.residual import WIDTHS, Residuals, family, features, fitted
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc, conv_op, gemm_op
from tests.test_analytic import CONV

X86 = load_device("x86-ort")
SLOWER = {"peak_flops.fp32": 5e10, "launch_s.conv": 3e-5, "bandwidth_bytes_s": 6e9, "engines.avx2.conv.efficiency": 0.5}


class Clock:
    """Goes on when something is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def machine(clock: Clock, noise: float = 0.0) -> Callable[[OpDesc], Cost]:
    """An x86 whose figures differ from the profile's, and whose narrow convolutions are half as fast."""
    model = AnalyticCostModel(with_figures(X86, SLOWER))

    def measured(op: OpDesc) -> Cost:
        clock.now += 0.1
        latency_s = model.cost(op).latency_s * (2.0 if op.conv is not None and op.conv.channels_out < 64 else 1.0)
        return Cost(latency_s, noise * latency_s)

    return measured


def made(seconds: float = 40.0, noise: float = 0.0, seed: int = 0) -> Calibration:
    clock = Clock()
    return calibrate(X86, machine(clock, noise), seconds, seed=seed, clock=clock)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return made()


def test_operations_are_of_all_families_and_the_same_for_a_seed() -> None:
    drawn = list(islice(operations(3), 300))
    assert drawn == list(islice(operations(3), 300))
    assert {family(op) for op in drawn} == set(WEIGHTS) == set(WIDTHS)
    assert all(len(features(op)) == WIDTHS[family(op) or ""] for op in drawn)
    assert all(AnalyticCostModel(X86).cost(op).latency_s > 0 for op in drawn)


def test_what_was_not_measured_is_predicted(calibration: Calibration) -> None:
    device = calibrated(calibration, "mine", "made up", "measured here (a test)")
    model, prior, truth = AnalyticCostModel(device), AnalyticCostModel(X86), machine(Clock())
    fresh = list(islice(operations(99), 200))
    errors = np.array([abs(model.cost(op).latency_s / truth(op).latency_s - 1) for op in fresh])
    before = np.array([abs(prior.cost(op).latency_s / truth(op).latency_s - 1) for op in fresh])
    assert (errors < 0.1).mean() > 0.75
    assert np.median(errors) < 0.2 * np.median(before)
    deviations = [
        math.log(model.cost(op).latency_s / truth(op).latency_s) / (model.cost(op).sigma_s / model.cost(op).latency_s)
        for op in fresh
    ]
    assert (np.abs(deviations) < 2).mean() > 0.9


def test_the_report_says_how_good_it_is(calibration: Calibration) -> None:
    rows = {row["family"]: row for row in calibration.summary()}
    assert set(rows) == set(WEIGHTS)
    assert sum(row["count"] for row in rows.values()) == len(calibration.measurements)
    assert rows["gemm"]["error"] < 0.05
    assert rows["conv"]["error"] < rows["conv"]["formula"]  # it does not know of narrow ones


def test_figures_of_what_was_not_measured_keep_their_source(calibration: Calibration) -> None:
    found = fitted_to(X86, [m for m in calibration.measurements if family(m.op) in ("gemm", "memory")], 0)
    device = calibrated(found, "mine", "made up", "measured here (a test)")
    measured = {key for key, source in device.provenance.items() if source.startswith("measured here (a test)")}
    assert {"launch.gemm", "launch.other", "residuals.gemm", "sigma.gemm"} <= measured
    assert (
        not {"launch.conv", "engine.avx2.conv.efficiency", "engine.avx2.depthwise_efficiency", "sigma.conv"} & measured
    )
    assert device.launch_s["conv"] == X86.launch_s["conv"]


def test_time_goes_where_predictions_are_bad() -> None:
    measurements = made().measurements
    count = sum(family(m.op) in ("conv", "pointwise") for m in measurements)
    assert count / len(measurements) > 1.2 * (WEIGHTS["conv"] + WEIGHTS["pointwise"]) / sum(WEIGHTS.values())


def test_a_busy_machine_and_too_little_time_are_refused() -> None:
    with pytest.raises(DeviceError, match="the machine is too busy to calibrate"):
        made(noise=0.2)
    with pytest.raises(DeviceError, match=f"27 operations were measured in 4 s, at least {LEAST} are needed"):
        made(seconds=4.45)


# ---------------------------------------------------------------------------------------------------------- residuals


def test_residuals_hold_near_measurements_and_fade_away_from_them() -> None:
    points = np.array([[4.0, 4.0], [8.0, 4.0], [8.0, 8.0]])
    residuals = Residuals(points, np.array([0.3, -0.2, 0.1]), reach=2.0, spread=0.3, noise=0.01)
    for point, value in zip(points, residuals.values, strict=True):
        got, sigma = residuals.at(point)
        assert got == pytest.approx(value, abs=0.01)
        assert sigma < 0.03
    got, sigma = residuals.at([100.0, 100.0])
    assert abs(got) < 1e-6
    assert sigma == pytest.approx(math.hypot(0.3, 0.01), rel=1e-3)
    for i in range(3):
        rest = np.arange(3) != i
        others = Residuals(points[rest], residuals.values[rest], 2.0, 0.3, 0.01)
        assert residuals.left_out()[i] == pytest.approx(residuals.values[i] - others.at(points[i])[0])
    nothing = Residuals(np.zeros((0, 2)), np.zeros(0), 1.0, 0.2, 0.01)
    assert nothing.at([1.0, 1.0]) == (0.0, 0.2)


def test_reach_and_spread_are_found() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 10, (120, 2))
    smooth = fitted(points, 0.3 * np.sin(points[:, 0] / 4), 0.02)
    rough = fitted(points, rng.normal(0, 0.3, 120), 0.02)
    assert smooth.reach > 4 * rough.reach


def test_other_operations_have_no_residuals() -> None:
    volume = replace(CONV, kernel=(3, 3, 3), size_in=(8, 8, 8), size_out=(8, 8, 8), stride=(1,) * 3, dilation=(1,) * 3)
    assert family(conv_op(volume, "fp32")) is None
    assert family(conv_op(replace(CONV, groups=2), "fp32")) is None
    assert family(OpDesc("view", "fp32", 0, 0, 0)) is None
    assert family(gemm_op(1, 2, 3, "fp32", weight=False)) == "bmm"


# ----------------------------------------------------------------------------------------------------------- profiles


def same(a: Device, b: Device) -> bool:
    rest = [f.name for f in fields(Device) if f.name not in ("name", "residuals")]
    return all(getattr(a, name) == getattr(b, name) for name in rest) and a.residuals.keys() == b.residuals.keys()


@pytest.mark.parametrize("name", available_devices())
def test_profiles_are_read_as_they_were_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "again.toml").write_text(profile_text(load_device(name), "A test."))
    assert same(load_device(name), load_device(str(tmp_path / "again.toml")))


def test_a_calibrated_profile_predicts_the_same_when_read(calibration: Calibration, tmp_path: Path) -> None:
    device = calibrated(calibration, "mine", "made up", "measured here (a test)")
    (tmp_path / "mine.toml").write_text(profile_text(device, "A test."))
    again = load_device(str(tmp_path / "mine.toml"))
    assert again.provenance["dtype.fp32.peak"] == "measured here (a test)"
    assert (
        again.provenance["hardware.bandwidth_peak"] == X86.provenance["hardware.bandwidth_peak"]
    )  # nothing exceeds it
    for op in islice(operations(5), 50):
        got, expected = AnalyticCostModel(again).cost(op), AnalyticCostModel(device).cost(op)
        assert got.latency_s == pytest.approx(expected.latency_s, rel=1e-3)
        assert got.sigma_s == pytest.approx(expected.sigma_s, rel=2e-2)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("[residuals.gemm]", "[residuals.gem]", "residuals.gem"),
        ("reach = ", "reach = -", "residuals.bmm.reach"),
        ("spread = ", "spred = ", "residuals.bmm.spred"),
        ("points = [\n    [", "points = [\n    [nan, ", "residuals.bmm.points"),
        ('source = "measured here (a test)"\nreach', 'source = "trust me"\nreach', "residuals.bmm.source"),
    ],
)
def test_bad_residuals_are_named(calibration: Calibration, tmp_path: Path, old: str, new: str, key: str) -> None:
    device = calibrated(calibration, "mine", "made up", "measured here (a test)")
    kept = {name: device.residuals[name] for name in ("bmm", "gemm")}
    text = profile_text(replace(device, residuals=kept), "A test.")
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(DeviceError, match=r"mine\.toml: .*expected .*, got ") as caught:
        load_device(str(tmp_path / "mine.toml"))
    assert key in str(caught.value)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured = machine(Clock())
    monkeypatch.setattr(measure.LocalCostModel, "cost", lambda self, op: measured(op))
    out = tmp_path / "mine.toml"
    assert run(["calibrate", "--out", str(out), "--minutes", "0.02", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in printed["families"]} == set(WEIGHTS)
    (tmp_path / "ops.csv").write_text("op,m,n,k\ngemm,512,512,512\n")
    assert run(["predict", str(tmp_path / "ops.csv"), "--out", str(tmp_path / "o.csv"), "--target", str(out)]) == 0
    assert run(["calibrate", "--out", str(out), "--minutes", "0.02"]) == 0
    assert "within 10 %" in capsys.readouterr().out
    assert run(["calibrate", "--out", str(tmp_path / "mine.txt")]) == 2
    assert "give --out mine.toml" in capsys.readouterr().err
