"""Calibration on machines that are made up, and what a profile keeps of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from lrcompile.cli import run
from lrcompile.devices import calibrate as calibrate_module
from lrcompile.devices import measure_torch
from lrcompile.devices import networks as networks_module
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.calibrate import LEAST, Calibration, calibrate, calibrated, fitted_to
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device, Pace
from lrcompile.devices.elsewhere import Elsewhere
from lrcompile.devices.features import WIDTHS, family, features, width_of
from lrcompile.devices.fit import with_figures
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.measure import local_device
from lrcompile.devices.measure_torch import TorchCostModel
from lrcompile.devices.networks import Network
from lrcompile.devices.pace import Paced
from lrcompile.devices.profile import available_devices, load_device
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.residual import DISTANCES, NEAREST, Residuals, _surprise, fitted
from lrcompile.devices.runtimes import runtime_here
from lrcompile.devices.sampling import GPU, GPU_WEIGHTS, WEIGHTS, operations, rows
from lrcompile.devices.visits import VISITS, Measurement
from lrcompile.errors import DeviceError
from lrcompile.graph.op import FUNCTIONS, OpDesc, conv_op, gemm_op
from tests.test_analytic import CONV

X86 = load_device("x86-ort")
H200 = load_device("h200")
SLOWER = {"peak_flops.fp32": 5e10, "launch_s.conv": 3e-5, "bandwidth_bytes_s": 6e9, "engines.avx2.conv.efficiency": 0.5}


class Clock:
    """Goes on when something is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def machine(clock: Clock, noise: float = 0.0) -> Callable[..., Cost]:
    """An x86 whose figures differ from the profile's, and whose narrow convolutions are half as fast."""
    model = AnalyticCostModel(with_figures(X86, SLOWER))

    def measured(op: OpDesc, visit: int = 0) -> Cost:
        assert visit < VISITS
        clock.now += 0.03
        latency_s = model.cost(op).latency_s * (2.0 if op.conv is not None and op.conv.channels_out < 64 else 1.0)
        return Cost(latency_s, noise * latency_s)

    return measured


def use_made_up_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands calibrate on a machine that is made up, and soon have enough of it."""
    measured = machine(Clock())

    def whole(self: Elsewhere, network: Network) -> Cost:
        ops = describe_all(network.graph(), X86.fuses, X86.lacks).values()
        return Cost(1e-5 + sum(measured(op).latency_s for op in ops if op.kind not in ("view", "fused")))

    monkeypatch.setattr(Elsewhere, "cost", lambda self, op, visit: measured(op))
    monkeypatch.setattr(Elsewhere, "network", whole)
    monkeypatch.setattr(calibrate_module, "MOST", 150)
    monkeypatch.setattr(networks_module, "NETWORKS", 3)
    monkeypatch.setattr(calibrate_module, "POOL", 600)
    monkeypatch.setattr(calibrate_module, "ROUNDS", (0.94,))


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
    assert all(len(features(op, X86)) == WIDTHS[family(op) or ""] for op in drawn)
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


def test_bars_of_what_has_no_residuals_are_those_of_the_formula_alone(calibration: Calibration) -> None:
    device = calibrated(calibration, "mine", "made up", "measured here (a test)")
    alone, truth = AnalyticCostModel(replace(device, residuals={})), machine(Clock())
    fresh = [op for op in islice(operations(99), 400) if op.conv is not None]
    errors = np.array([math.log(alone.cost(op).latency_s / truth(op).latency_s) for op in fresh])
    stated = [alone.cost(op).sigma_s / alone.cost(op).latency_s for op in fresh]
    assert stated == pytest.approx([stated[0]] * len(stated))
    assert stated[0] == pytest.approx(np.sqrt((errors**2).mean()), rel=0.3)
    assert stated[0] > 2 * calibration.sigma("conv")


def test_the_report_says_how_good_it_is(calibration: Calibration) -> None:
    summary = {row["family"]: row for row in calibration.summary()}
    assert set(summary) == set(WEIGHTS)
    assert sum(row["count"] for row in summary.values()) == len(calibration.measurements)
    assert summary["gemm"]["error"] < 0.05
    assert summary["conv"]["sigma_robust"] < summary["conv"]["sigma"]  # a few errors are large
    assert summary["conv"]["error"] < summary["conv"]["formula"]  # it does not know of narrow ones


def test_figures_of_what_was_not_measured_keep_their_source(calibration: Calibration) -> None:
    found = fitted_to(X86, [m for m in calibration.measurements if family(m.op) in ("gemm", "copy")], 0)
    device = calibrated(found, "mine", "made up", "measured here (a test)")
    measured = {key for key, source in device.provenance.items() if source.startswith("measured here (a test)")}
    assert {"launch.gemm", "launch.other", "residuals.gemm", "sigma.gemm"} <= measured
    assert (
        not {"launch.conv", "engine.avx2.conv.efficiency", "engine.avx2.depthwise_efficiency", "sigma.conv"} & measured
    )
    assert device.launch_s["conv"] == X86.launch_s["conv"]


def test_time_goes_where_predictions_are_bad(calibration: Calibration) -> None:
    measurements = calibration.measurements
    good = ("gemm", "bmm", *FUNCTIONS)  # of which the formula says all
    share = sum(family(m.op) in good for m in measurements) / len(measurements)
    assert share < 0.8 * sum(WEIGHTS[name] for name in good) / sum(WEIGHTS.values())


def test_a_busy_machine_and_too_little_time_are_refused() -> None:
    with pytest.raises(DeviceError, match="the machine is too busy to calibrate"):
        made(noise=0.2)
    clock = Clock()
    with pytest.raises(DeviceError, match="the machine is too busy to calibrate"):
        calibrate(X86, machine(clock, 0.2), 400.0, clock=clock)
    assert 100 <= clock() < 200  # it does not take all of the time to see that
    with pytest.raises(DeviceError, match=f"^34 operations were measured in 2 s, at least {LEAST} are needed"):
        made(seconds=2)
    with pytest.raises(DeviceError, match=f"^0 operations were measured in 0 s, at least {LEAST} are needed"):
        made(seconds=0)


def test_noisy_measurements_are_not_kept_for_the_next_calibration() -> None:
    clock, forgotten = Clock(), list[OpDesc]()
    steady = machine(clock)

    def measured(op: OpDesc, visit: int) -> Cost:
        """Of linear layers visits disagree at first."""
        cost = steady(op, visit)
        if family(op) != "gemm" or clock.now > 10:
            return cost
        return replace(cost, latency_s=cost.latency_s * (1 + visit))

    found = calibrate(X86, measured, 20.0, forget=forgotten.append, clock=clock)
    assert len(set(forgotten)) == found.noisy > 3
    assert {family(op) for op in forgotten} == {"gemm"}


def test_networks_say_what_they_take_besides(tmp_path: Path) -> None:
    clock, truth = Clock(), machine(Clock())

    def whole(network: Network) -> Cost:
        ops = describe_all(network.graph(), X86.fuses, X86.lacks).values()
        return Cost(1e-4 + 1.3 * sum(truth(op).latency_s for op in ops if op.kind not in ("view", "fused")))

    found = calibrate(X86, machine(clock), 30.0, network=whole, clock=clock)
    assert found.network == {"run_s": pytest.approx(1e-4, rel=0.3), "slower": pytest.approx(1.3, rel=0.05)}
    (tmp_path / "mine.toml").write_text(profile_text(calibrated(found, "", "made up", "measured here (a test)"), "A."))
    device = load_device(str(tmp_path / "mine.toml"))
    assert device.network == pytest.approx(found.network, rel=1e-4)
    for op in islice(operations(7), 20):
        again, once = AnalyticCostModel(replace(device, network={})).cost(op), AnalyticCostModel(device).cost(op)
        assert once.latency_s == pytest.approx(device.network["slower"] * again.latency_s)
        assert once.sigma_s / once.latency_s == pytest.approx(again.sigma_s / again.latency_s)


def test_networks_that_are_not_measured_steadily_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "NETWORKS", 6)
    drawn = list(networks_module.networks(0))
    asked: list[int] = []

    def measured(network: Network) -> Cost:
        index = drawn.index(network)
        asked.append(index)
        if index == 3:
            raise DeviceError("too large")
        visit = asked.count(index) - 1
        return Cost(1.0 + visit * {5: 0.5, 7: 0.07 * (visit < 2)}.get(index, 0.02))

    def found(in_time: Callable[[], bool]) -> list[int]:
        asked.clear()
        wholes = networks_module.NetworkVisits(drawn, measured)
        for _ in range(6):
            wholes.again(None, in_time)
        return [drawn.index(network) for network, latency_s in wholes.measured(None) if latency_s < 1.1]

    assert found(lambda: True) == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert asked[:12] == list(range(12))
    assert asked[12] == 3  # those that were visited least
    assert sorted(asked[12:]) == sorted([*range(12), 3, 5, 7, *[3, 5] * 2, 3])  # as often as it may be, or all are told
    assert found(lambda: False) == [0, 1, 2, 4, 5]  # as few as are needed, the first visit alone
    assert asked == [0, 1, 2, 3, 4, 5]


def test_networks_out_of_step_are_visited_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "NETWORKS", 5)
    drawn, pace = list(networks_module.networks(0)), Pace(1e-4, 1.0, 1.0)
    asked: list[Network] = []

    def measured(network: Network) -> Cost:
        asked.append(network)
        late = 10 < len(asked) <= 20  # the second visit of all is in a bad spell
        return Paced(2.0 if late else 1.0, product_s=2e-4, handed_s=3e-4 if late else 2e-4)

    wholes = networks_module.NetworkVisits(drawn, measured)
    for _ in range(5):
        wholes.again(pace, lambda: True)
    assert len(asked) == 30
    assert [latency_s for _, latency_s in wholes.measured(pace)] == [0.5] * 10  # at the pace that is asked for


def test_networks_that_are_mostly_unsteady_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "NETWORKS", 10)
    drawn = list(networks_module.networks(0))

    def found(unsteady: int) -> int:
        asked: list[Network] = []

        def measured(network: Network) -> Cost:
            asked.append(network)
            return Cost(1.0 + asked.count(network) * (drawn.index(network) < unsteady))

        wholes = networks_module.NetworkVisits(drawn, measured)
        for _ in range(5):
            wholes.again(None, lambda: True)
        return len(wholes.measured(None))

    assert [found(unsteady) for unsteady in (0, 9, 10, 11)] == [20, 11, 10, 0]


def test_rows_are_chains() -> None:
    drawn = rows(3, 12)
    assert drawn == rows(3, 12)
    for shapes in drawn:
        assert all(a.channels_out == b.channels_in and a.size_out == b.size_in for a, b in pairwise(shapes))
        assert min(min(shape.size_out) for shape in shapes) >= 1


# ---------------------------------------------------------------------------------------------------------- residuals


def test_residuals_hold_near_measurements_and_fade_away_from_them() -> None:
    points = np.array([[4.0, 4.0], [8.0, 4.0], [8.0, 8.0]])
    residuals = Residuals(points, np.array([0.3, -0.2, 0.1]), reach=np.array([2.0, 2.0]), spread=0.3, noise=0.01)
    for point, value in zip(points, residuals.values, strict=True):
        got, sigma = residuals.at(point)
        assert got == pytest.approx(value, abs=0.01)
        assert sigma < 0.03
    got, sigma = residuals.at([100.0, 100.0])
    assert abs(got) < 1e-6
    assert sigma == pytest.approx(math.hypot(0.3, 0.01), rel=1e-3)
    for i in range(3):
        rest = np.arange(3) != i
        others = Residuals(points[rest], residuals.values[rest], residuals.reach, 0.3, 0.01)
        assert residuals.left_out()[i] == pytest.approx(residuals.values[i] - others.at(points[i])[0])
    nothing = Residuals(np.zeros((0, 2)), np.zeros(0), np.ones(2), 0.2, 0.01)
    assert nothing.at([1.0, 1.0]) == (0.0, pytest.approx(math.hypot(0.2, 0.01)))


def test_what_is_not_known_of_near_shapes_is_alike() -> None:
    residuals = Residuals(np.array([[4.0, 4.0]]), np.array([0.3]), np.array([2.0, 2.0]), 0.3, 0.01)
    _, covariance = residuals.joint([[8.0, 8.0], [8.1, 8.0], [20.0, 20.0]])
    correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert correlation[0, 1] > 0.9
    assert abs(correlation[0, 2]) < 0.01
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_the_nearest_values_are_enough() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 6, (3 * NEAREST, 2))
    values = 0.3 * np.sin(points[:, 0]) + 0.1 * points[:, 1]
    residuals = Residuals(points, values, np.array([4.0, 4.0]), 0.5, 0.02)
    covariance = residuals._covariance(residuals._scaled)
    for at in rng.uniform(0, 6, (20, 2)):
        near = 0.25 * np.exp(-np.linalg.norm(at / 4 - residuals._scaled, axis=1))
        assert residuals.at(at)[0] == pytest.approx(near @ np.linalg.solve(covariance, values), abs=0.01)


def test_reach_and_spread_are_found() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 10, (120, 2))
    smooth = fitted(points, 0.3 * np.sin(points[:, 0]) + rng.normal(0, 0.02, 120))
    assert smooth.reach[1] > 4 * smooth.reach[0]  # the second feature says nothing
    assert smooth.noise < 0.1
    rough = fitted(points, rng.normal(0, 0.3, 120))
    assert np.abs(rough.left_out()).mean() > 5 * np.abs(smooth.left_out()).mean()


def test_the_distance_that_explains_more_is_taken() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 10, (120, 3))
    jumps = sum(0.3 * rng.normal(0, 1, 12)[points[:, i].astype(int)] for i in range(3))  # each has steps of its own
    hills = 0.3 * np.sin(np.linalg.norm(points - 5, axis=1) * 2)
    assert [fitted(points, np.asarray(values)).distance for values in (jumps, hills)] == ["cityblock", "euclidean"]


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_search_knows_its_slope(distance: Any) -> None:
    rng = np.random.default_rng(1)
    points, values = rng.uniform(0, 10, (30, 3)), rng.normal(0, 0.3, 30)
    start = np.log([3.0, 5.0, 2.0, 0.4, 0.1])
    surprise = partial(_surprise, distance=distance, held=np.zeros(5), points=points, values=values)
    _, slope = surprise(start)
    for i in range(5):
        step = 1e-5 * np.eye(5)[i]
        up, down = (surprise(start + sign * step)[0] for sign in (1, -1))
        assert slope[i] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-4)


def test_other_operations_have_no_residuals() -> None:
    volume = replace(CONV, kernel=(3, 3, 3), size_in=(8, 8, 8), size_out=(8, 8, 8), stride=(1,) * 3, dilation=(1,) * 3)
    assert family(conv_op(volume, "fp32")) == "volume"
    assert family(conv_op(replace(CONV, transposed=True), "fp32")) is None
    assert family(conv_op(replace(CONV, channels_in=8, channels_out=8, groups=2), "fp32")) == "grouped"
    assert family(OpDesc("view", "fp32", 0, 0, 0)) is None
    assert family(gemm_op(1, 2, 3, "fp32", weight=False)) == "bmm"
    assert family(gemm_op(1, 2, 3, "fp16")) == family(gemm_op(1, 2, 3, "bf16")) == "gemm-half"
    assert family(gemm_op(1, 2, 3, "tf32")) == "gemm-tf32"
    assert family(gemm_op(1, 2, 3, "int8")) is None


def test_a_gpu_has_features_of_its_own() -> None:
    drawn = list(islice(operations(3, GPU, GPU_WEIGHTS), 600))
    assert {op.dtype for op in drawn} == {"fp32", "tf32", "fp16", "bf16"}
    for op in drawn:
        name = family(op)
        assert name is not None
        assert len(features(op, H200)) == width_of(name, "gpu")
    aligned, odd = (features(gemm_op(256, n, 512, "bf16"), H200) for n in (512, 511))
    assert max(abs(a - b) for a, b in zip(aligned, odd, strict=True)) > 2  # another kernel
    assert width_of("gemm-fp64", "gpu") is None is width_of("nothing", "gpu")


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
        ("reach = [", "reach = [-", "residuals.bmm.reach"),
        ("reach = [", "reach = [1.0, ", "residuals.bmm.reach"),
        ("spread = ", "spred = ", "residuals.bmm.spred"),
        ("points = [\n    [", "points = [\n    [nan, ", "residuals.bmm.points"),
        ('distance = "', 'distance = "taxi ', "residuals.bmm.distance"),
        ('source = "measured here (a test)"\ndist', 'source = "trust me"\ndist', "residuals.bmm.source"),
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
    use_made_up_machine(monkeypatch)
    out = tmp_path / "mine.toml"
    assert run(["calibrate", "--out", str(out), "--minutes", "0.02", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in printed["families"]} == set(WEIGHTS)
    assert (printed["doubt"] is None) == (printed["within_10"] >= 0.8)
    (tmp_path / "ops.csv").write_text("op,m,n,k\ngemm,512,512,512\n")
    assert run(["predict", str(tmp_path / "ops.csv"), "--out", str(tmp_path / "o.csv"), "--target", str(out)]) == 0
    assert run(["calibrate", "--out", str(out), "--minutes", "0.02"]) == 0
    screen = capsys.readouterr().out
    assert "within 10 %" in screen
    assert ("do not trust it: only" in screen) == (printed["within_10"] < 0.8)
    assert run(["calibrate", "--out", str(tmp_path / "mine.txt")]) == 2
    assert "give --out mine.toml" in capsys.readouterr().err


def test_no_bar_is_longer_than_a_latency(calibration: Calibration) -> None:
    far = tuple(Measurement(m.op, replace(m.cost, latency_s=9 * m.cost.latency_s)) for m in calibration.measurements)
    assert set(calibrated(replace(calibration, measurements=far), "mine", "", "").sigma_relative.values()) == {1.0}


def test_a_poor_calibration_says_so(calibration: Calibration) -> None:
    poor, good = (replace(calibration, held_out={"gemm": np.array([0.3, *[0.05] * n, -0.2])}) for n in (6, 18))
    assert poor.within_10 == 0.75
    assert "only 75% of the operations" in (poor.doubt or "")
    assert good.doubt is None
    assert replace(poor, device=load_device("a100")).doubt is None  # where as much is usual


# -------------------------------------------------------------------------------------------------------------- torch


def test_pytorch_is_measured_and_remembered(tmp_path: Path) -> None:
    first, second = TorchCostModel(tmp_path), TorchCostModel(tmp_path)
    by_family = {family(op): op for op in islice(operations(2), 300) if op.flops < 1e7}
    assert set(by_family) == set(WEIGHTS)
    for op in by_family.values():
        cost = first.cost(op)
        assert 0 < cost.latency_s < 1
        assert second.cost(op) == cost
    with pytest.raises(DeviceError, match="operation gemm in fp16 is not measured in PyTorch; give one in fp32"):
        first.cost(gemm_op(8, 8, 8, "fp16"))
    uneven = conv_op(replace(CONV, padding=((0, 1), (1, 1)), stride=(2, 2), groups=1), "fp32")
    for op in (OpDesc("recurrent", "fp32", 0, 8, 8), uneven):
        with pytest.raises(DeviceError, match=f"operation {op.kind} in fp32 is not measured in PyTorch"):
            first.cost(op)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, which torch.compile imports
def test_compiled_pytorch_is_measured_apart(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    eager, compiled = TorchCostModel(tmp_path), TorchCostModel(tmp_path, compiled=True)
    by_family = {family(op): op for op in islice(operations(2), 300) if op.flops < 1e7}
    for op in by_family.values():
        cost = compiled.cost(op)
        assert 0 < cost.latency_s < 1
        assert TorchCostModel(tmp_path, compiled=True).cost(op) == cost
        assert eager.cost(op) != cost


def test_what_cannot_be_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gm: object, compiled: bool = False) -> None:
        raise TorchDynamoException("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(measure_torch, "call_of", fails)
    with pytest.raises(
        DeviceError, match=r"torch\.compile failed: InvalidCxxCompiler: No working C\+\+ compiler found; "
    ):
        TorchCostModel(tmp_path, compiled=True).cost(gemm_op(8, 8, 8, "fp32"))


@pytest.mark.parametrize(("runtime", "words"), [("torch", "eager"), ("torch-compile", "compiled")])
def test_a_profile_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, words: str) -> None:
    measured = machine(Clock())

    def cost(self: TorchCostModel, op: OpDesc) -> Cost:
        assert self.compiled == (words == "compiled")
        return measured(op)

    monkeypatch.setattr(measure_torch.TorchCostModel, "cost", cost)
    monkeypatch.setattr(calibrate_module, "MOST", 120)
    out = tmp_path / "mine.toml"
    assert run(["calibrate", "--out", str(out), "--minutes", "1", "--runtime", runtime]) == 0
    device = load_device(str(out))
    assert not device.fuses
    assert not device.network
    assert f"PyTorch {torch.__version__}, {words}" in device.description


def test_pytorch_fuses_nothing_and_takes_any_strides() -> None:
    device = runtime_here("torch").device
    assert not device.fuses
    assert device.lacks == local_device().lacks - {"product_bias", "strided_views", "plain_images", "free_views"}


def test_what_fails_is_left_out_of_a_calibration() -> None:
    clock = Clock()
    measured = machine(clock)

    def measure(op: OpDesc, visit: int = 0) -> Cost:
        if op.attention is not None:
            clock.now += 0.03
            raise DeviceError("out of memory")
        return measured(op, visit)

    found = calibrate(X86, measure, 30.0, clock=clock)
    assert {family(m.op) for m in found.measurements} == set(WEIGHTS) - {"attention"}

    def fail(op: OpDesc, visit: int = 0) -> Cost:
        clock.now += 0.03
        raise DeviceError("no such kernel")

    with pytest.raises(DeviceError, match="no such kernel"):
        calibrate(X86, fail, 10.0, clock=clock)


def test_another_runtime_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "--out", str(tmp_path / "mine.toml"), "--runtime", "cuda"]) == 2
    assert "unknown runtime 'cuda': expected onnxruntime or torch or torch-compile" in capsys.readouterr().err
    assert not (tmp_path / "mine.toml").exists()
