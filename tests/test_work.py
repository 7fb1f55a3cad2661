"""What latencies on a CPU are made of, the prices of it, and profiles that keep them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.calibrate import Calibration, _by_doubt, calibrated, fitted_to
from lrcompile.devices.correlation import difference_sigma_s
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.features import WORK, amounts, family, features, work_s
from lrcompile.devices.fit import prices
from lrcompile.devices.mlas import WAIT, product_cycles, row_cycles
from lrcompile.devices.profile import load_device
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.sampling import operations
from lrcompile.devices.visits import Measurement
from lrcompile.errors import DeviceError
from lrcompile.graph.op import ConvShape, OpDesc, conv_op, gemm_op

X86 = load_device("x86-ort")
WIDE = replace(X86, alignment_conv={**X86.alignment_conv, "fp32": 16})


# ------------------------------------------------------------------------------------------------------------- kernels


def test_cycles_of_a_product() -> None:
    """12 rows of two vectors take 12 cycles a step with AVX-512; one row of one waits for the step before."""
    assert product_cycles(12, 32, 10, 16) == 120
    assert product_cycles(1, 16, 10, 16) == 10 * WAIT
    assert product_cycles(1, 16, 10, 16, wait=0) == 5
    assert product_cycles(8, 32, 1, 16) == 6 + WAIT  # six rows, and two that wait
    assert product_cycles(13, 32, 1, 16) == 12 + WAIT
    assert product_cycles(6, 16, 1, 8) == 6  # of AVX2
    assert product_cycles(0, 32, 10, 16) == 0


@pytest.mark.parametrize("kind", ["conv", "depthwise"])
@pytest.mark.parametrize(("taps", "stride", "dilation", "pad"), [*product((3, 5), (1, 2), (1, 2), (0, 1, 4))])
def test_cycles_without_waits_are_the_products_that_meet_the_image(
    kind: str, taps: int, stride: int, dilation: int, pad: int
) -> None:
    size = 11
    after = (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
    groups = 1 if kind == "conv" else 40
    shape = ConvShape(
        1, 40, 40, (size,) * 2, (after,) * 2, (taps,) * 2, (stride,) * 2, ((pad, pad),) * 2, (dilation,) * 2, groups
    )
    met = sum(
        0 <= out * stride - pad + tap * dilation < size for out, tap in product(range(after), range(taps))
    )  # along an axis
    filters = -(-40 // 16)
    got = row_cycles(shape, 16, kind, 1, wait=0) * after
    assert got == pytest.approx(met**2 * filters / 2)
    waited = row_cycles(shape, 16, kind, 1) * after
    assert waited > got if kind == "depthwise" else waited >= got


# --------------------------------------------------------------------------------------------------------------- work


def test_work_of_all_families() -> None:
    for device in (X86, WIDE, replace(X86, units=64)):
        for op in islice(operations(4), 400):
            parts = amounts(op, device)
            assert len(parts) == WORK[family(op) or ""]
            assert all(0 <= part < math.inf for part in parts)
            assert any(parts)


def test_more_threads_do_not_make_more_work() -> None:
    few, many = (replace(WIDE, units=units) for units in (2, 8))
    for op in islice(operations(8), 300):
        if op.gemm is not None and op.gemm.batch == 1:  # whole products, which threads share by rows or columns
            assert amounts(op, many)[2] <= amounts(op, few)[2]


def test_a_gpu_and_operations_without_a_family_have_none() -> None:
    assert amounts(gemm_op(8, 8, 8, "fp16"), load_device("h200")) == []
    assert amounts(OpDesc("view", "fp32", 0, 0, 0), X86) == []


# ------------------------------------------------------------------------------------------------------------- prices


def test_prices_are_found_whatever_a_few_measurements_say() -> None:
    rng = np.random.default_rng(0)
    parts = np.column_stack([np.ones(200), *np.exp(rng.uniform(0, 12, (3, 200))), np.zeros(200)])
    parts[rng.random(200) < 0.5, 2] = 0
    truth = np.array([2e-6, 3e-9, 5e-10, 1e-9, 0.0])
    latencies = parts @ truth * np.exp(rng.normal(0, 0.03, 200))
    latencies[:10] *= 8
    found = prices(parts, latencies)
    assert found[:4] == pytest.approx(truth[:4], rel=0.1)
    assert math.isnan(found[4])


def test_parts_that_cost_nothing_are_free() -> None:
    rng = np.random.default_rng(1)
    parts = np.exp(rng.uniform(0, 8, (100, 2)))
    found = prices(parts, parts[:, 0] * 1e-9)
    assert found[0] == pytest.approx(1e-9, rel=1e-3)
    assert found[1] < 1e-12


# ----------------------------------------------------------------------------------------------------------- profiles


def machine(op: OpDesc) -> float:
    """Latency in s of a machine that pays for work alone, at the prices of a made-up kind."""
    paid = np.exp(np.random.default_rng(len(family(op) or "")).uniform(-24, -21, WORK[family(op) or ""]))
    return 1e-6 + work_s(op, X86, paid)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    measured = [Measurement(op, Cost(machine(op), 0.0)) for op in islice(operations(0), 1500) if family(op)]
    return fitted_to(X86, measured, 0)


@pytest.fixture
def device(calibration: Calibration) -> Device:
    return calibrated(calibration, "mine", "made up", "measured here (a test)")


def test_what_is_made_of_work_is_predicted_by_it(device: Device) -> None:
    assert {name for name, found in device.residuals.items() if found.work is not None} >= {"gemm", "conv", "copy"}
    model = AnalyticCostModel(device)
    errors = defaultdict(list)
    for op in islice(operations(7), 300):
        errors[family(op)].append(abs(model.cost(op).latency_s / machine(op) - 1))
    for name in ("gemm", "conv", "pointwise", "copy"):
        assert np.median(errors[name]) < 0.03, name


def test_work_of_a_kind_that_was_not_measured_is_left_to_the_formula(device: Device) -> None:
    """Depthwise convolutions whose channels are no multiple of four run unfolded, and none was drawn."""
    shape = ConvShape(1, 30, 30, (16, 16), (16, 16), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 30)
    op, usual = (conv_op(replace(shape, channels_in=n, channels_out=n, groups=n), "fp32") for n in (30, 32))
    work = device.residuals["depthwise"].work
    assert work is not None
    assert math.isnan(work_s(op, device, work))
    assert work_s(usual, device, work) > 0
    formula = AnalyticCostModel(replace(device, residuals={}))
    got = AnalyticCostModel(device).cost(op)
    assert got.latency_s == formula.cost(op).latency_s
    assert got.sigma_s == formula.cost(op).sigma_s
    sides = [[(op, got)], [(usual, AnalyticCostModel(device).cost(usual))]]
    assert 0 < difference_sigma_s(device, *sides) < math.inf


def test_what_has_work_that_nothing_had_is_measured_first(calibration: Calibration) -> None:
    shape = ConvShape(1, 30, 30, (16, 16), (16, 16), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 30)
    unknown = conv_op(shape, "fp32")
    pool = [*islice(operations(12), 30), unknown]
    found = _by_doubt(calibration, pool)
    assert found[0] == unknown
    assert sorted(map(repr, found)) == sorted(map(repr, pool))


def test_profiles_with_work_are_read_as_they_were_written(device: Device, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(profile_text(device, "A test."))
    again = load_device(str(tmp_path / "mine.toml"))
    for op in islice(operations(5), 200):
        got, expected = (AnalyticCostModel(one).cost(op) for one in (again, device))
        assert got.latency_s == pytest.approx(expected.latency_s, rel=2e-3)
    work = device.residuals["gemm"].work
    assert len(features(gemm_op(8, 8, 8, "fp32"), device, work)) == len(features(gemm_op(8, 8, 8, "fp32"), device)) + 1


@pytest.mark.parametrize("new", ["work = [1e-6, ", "work = [-1, ", 'work = ["a", ', "work = [inf, ", "work = 1 # ["])
def test_bad_prices_are_named(device: Device, tmp_path: Path, new: str) -> None:
    text = profile_text(replace(device, residuals={"gemm": device.residuals["gemm"]}), "A test.")
    first = text[text.index("work = [") :].split(",")[0]
    changed = text.replace(first + ", ", new, 1) if new != "work = [1e-6, " else text.replace("work = [", new, 1)
    (tmp_path / "mine.toml").write_text(changed)
    got = "18; if another version of lrcompile calibrated it, calibrate again" if new == "work = [1e-6, " else ""
    with pytest.raises(DeviceError, match=rf"residuals\.gemm\.work: expected 17 finite .*, got {got}"):
        load_device(str(tmp_path / "mine.toml"))
