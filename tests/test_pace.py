"""A machine that is slower at times: latencies are given for one pace of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lrcompile.devices import measure
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.calibrate import calibrate, calibrated
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Pace
from lrcompile.devices.measure import LocalCostModel
from lrcompile.devices.pace import FEWEST, Paced, at, in_step, pace_of
from lrcompile.devices.profile import load_device
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.sampling import operations
from lrcompile.devices.visits import Visits
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc, conv_op, gemm_op
from tests.test_analytic import CONV

X86 = load_device("x86-ort")
PRODUCT_S = 40e-6


def visits(follows: float, count: int = 200, noise: float = 0.02) -> list[list[Cost]]:
    """Operations at two visits each, of a machine that is often twice as slow, and `follows` in part."""
    rng = np.random.default_rng(0)
    found: list[list[Cost]] = []
    for latency_s in rng.uniform(1e-5, 1e-3, count):
        slow = rng.choice([1.0, 2.0], 2)
        takes = latency_s * slow**follows * np.exp(noise * rng.standard_normal(2))
        found.append(
            [Paced(t, 0.01 * t, 0, 0, 0, PRODUCT_S * s, 3 * PRODUCT_S * s) for t, s in zip(takes, slow, strict=True)]
        )
    return found


@pytest.mark.parametrize("follows", [0.0, 0.6, 1.0])
def test_visits_agree_at_one_pace(follows: float) -> None:
    found = visits(follows)
    pace = pace_of(found)
    assert pace is not None
    assert pace.product_s == pytest.approx(PRODUCT_S)
    assert pace.follows == pytest.approx(follows, abs=0.02)
    for first, second in found:
        one, other = at(pace, first), at(pace, second)
        assert one.latency_s == pytest.approx(other.latency_s, rel=0.1)
        assert one.sigma_s / one.latency_s == pytest.approx(0.01)
        assert at(pace, one) == one


def test_what_has_no_pace_stays_as_it_is() -> None:
    assert pace_of([[Cost(1.0), Cost(2.0)]] * FEWEST) is None
    assert pace_of(visits(1.0, FEWEST - 1)) is None
    assert at(None, Paced(1.0, product_s=2.0)) == Paced(1.0, product_s=2.0)
    assert at(Pace(1.0, 1.0, 3.0), Cost(1.0)) == Cost(1.0)
    assert in_step(Pace(1.0, 1.0, 3.0), Cost(1.0))


def test_visits_do_not_count_while_threads_hand_over_work_slowly() -> None:
    found, rng = visits(0.5, 300), np.random.default_rng(1)
    slowly = [[rng.random() < 0.1 for _ in known] for known in found]
    disturbed: list[list[Cost]] = [
        [
            replace(cost, latency_s=cost.latency_s * 2, handed_s=cost.handed_s * 1.7) if late else cost  # type: ignore[call-arg]
            for cost, late in zip(known, lates, strict=True)
        ]
        for known, lates in zip(found, slowly, strict=True)
    ]
    pace = pace_of(disturbed)
    assert pace is not None
    assert pace.handed == pytest.approx(3.0)
    assert pace.follows == pytest.approx(0.5, abs=0.02)
    assert [[not in_step(pace, cost) for cost in known] for known in disturbed] == slowly
    ops = list(islice(operations(0), len(found)))
    known = dict(zip(ops, disturbed, strict=True))
    turns = {op: list(range(len(costs))) for op, costs in known.items()}
    kept = Visits(lambda op, visit: Cost(), lambda op: None, known, turns).measurements()
    assert [m.op for m in kept] == [op for op, lates in zip(ops, slowly, strict=True) if not all(lates)]
    of = {m.op: m.cost.latency_s for m in kept}
    once = [(op, costs[1]) for op, costs, lates in zip(ops, disturbed, slowly, strict=True) if lates == [True, False]]
    assert all(of[op] == at(pace, cost).latency_s for op, cost in once)


def machine(clock: list[float], *, told: bool, period_s: float = 4.0) -> Callable[[OpDesc, int], Cost]:
    """An x86 that is twice as slow for half of every period; the product tells of it, or not."""
    model = AnalyticCostModel(replace(X86, residuals={}))

    def measured(op: OpDesc, visit: int) -> Cost:
        clock[0] += 0.03
        slow = 2.0 if clock[0] % period_s < period_s / 2 else 1.0
        own = 1 + 0.03 * math.sin(op.flops + op.activation_bytes)  # what no formula says
        latency_s = own * model.cost(op).latency_s * slow
        product_s = PRODUCT_S * slow if told else PRODUCT_S
        return Paced(latency_s, 0.001 * latency_s, product_s=product_s, handed_s=3 * product_s)

    return measured


def test_a_machine_that_is_slow_at_times_is_calibrated(tmp_path: Path) -> None:
    clock = [0.0]
    untold = calibrate(X86, machine(clock, told=False, period_s=10.0), 24.0, clock=lambda: clock[0])
    assert untold.doubt is not None
    assert untold.within_10 < 0.7
    clock = [0.0]
    with pytest.raises(DeviceError, match="the machine is too busy to calibrate"):
        calibrate(X86, machine(clock, told=False), 24.0, clock=lambda: clock[0])
    clock = [0.0]
    found = calibrate(X86, machine(clock, told=True), 24.0, clock=lambda: clock[0])
    assert (found.noisy, found.doubt) == (0, None)
    assert found.within_10 > 0.95
    assert found.pace == Pace(pytest.approx(PRODUCT_S), pytest.approx(1.0), pytest.approx(3.0))
    device = calibrated(found, "mine", "made up", "measured here (a test)")
    (tmp_path / "mine.toml").write_text(profile_text(device, "A test."))
    read = load_device(str(tmp_path / "mine.toml"))
    assert read.pace == Pace(*(pytest.approx(value, rel=1e-3) for value in (PRODUCT_S, 1.0, 3.0)))
    assert read.provenance["pace.follows"] == "measured here (a test)"


@pytest.mark.parametrize("op", [gemm_op(999, 999, 999, "fp32"), conv_op(CONV, "fp32")], ids=["product", "convolution"])
def test_the_product_is_measured_in_turn(op: OpDesc, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def measured(runs: list[object], *clocks: object) -> tuple[tuple[float, float], ...]:
        sides.append(len(runs))
        return tuple((float(len(runs) - i), 0.01) for i in range(len(runs)))

    monkeypatch.setattr(measure, "measure", measured)
    cost = LocalCostModel(cache_dir=None).cost(op)
    assert sides == [3 if op.gemm is not None else 4]  # of a product, what it is compared with is that one
    assert isinstance(cost, Paced)
    assert (cost.product_s, cost.handed_s) == ((2.0, 1.0) if op.gemm is not None else (1.0, 2.0))
