"""The `local` target: measured pairs, and what is remembered of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from lrcompile.devices import measure as measure_module
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.measure import (
    SIGMA_CONTENDED,
    SIGMA_FLOOR,
    LocalCostModel,
    cpu_facts,
    cpu_name,
    local_device,
    measure,
    usable_cores,
)
from lrcompile.devices.onnx_region import LoweredRegion
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc, gemm_op
from tests.regions import of, region

IMAGE = torch.zeros(2, 4, 9, 9)


class FakeMachine:
    """A clock that only moves when a fake run takes its time, and a count of runs."""

    def __init__(self) -> None:
        self.now_s = self.waited_s = 0.0
        self.runs = 0

    def clock(self) -> float:
        return self.now_s

    def waited(self) -> float:
        return self.waited_s

    def run(self, latencies_s: Iterator[float], waiting: float = 0.0) -> Callable[[], None]:
        def once() -> None:
            self.runs += 1
            latency_s = next(latencies_s)
            self.now_s += latency_s
            self.waited_s += waiting * latency_s

        return once


def test_steady_runs_are_measured_in_few_rounds() -> None:
    machine = FakeMachine()
    runs = [machine.run(itertools.repeat(3e-3)), machine.run(itertools.repeat(2e-3))]
    before, after = measure(runs, machine.clock, machine.waited)
    assert before == pytest.approx((3e-3, 3e-3 * SIGMA_FLOOR))
    assert after == pytest.approx((2e-3, 2e-3 * SIGMA_FLOOR))
    assert machine.runs == 2 * (3 + 6)


def test_short_runs_are_batched_into_samples_above_the_timer_noise() -> None:
    machine = FakeMachine()
    measure([machine.run(itertools.repeat(1.02e-5))], machine.clock, machine.waited)
    assert machine.runs == 3 + 6 * 20


def test_interference_that_only_adds_time_is_ignored() -> None:
    machine = FakeMachine()
    spiky = itertools.cycle([2e-3, 2e-3, 9e-3, 2e-3, 5e-3])
    [(latency_s, sigma_s)] = measure([machine.run(spiky)], machine.clock, machine.waited)
    assert latency_s == pytest.approx(2e-3)
    assert sigma_s == pytest.approx(2e-3 * SIGMA_FLOOR)


def test_drift_of_both_sides_does_not_widen_the_error_of_their_difference() -> None:
    machine = FakeMachine()
    shared = (1.0 + 0.02 * i for i in itertools.count())
    one, other = itertools.tee(shared)
    runs = [machine.run(1e-2 * f for f in one), machine.run(1e-2 * f for f in other)]
    (before_s, sigma_s), _ = measure(runs, machine.clock, machine.waited)
    assert sigma_s == pytest.approx(SIGMA_FLOOR * before_s, rel=0.5)


def test_disagreeing_halves_are_tried_again_and_widen_the_error() -> None:
    machine = FakeMachine()
    slower = (1e-3 * 1.1**i for i in itertools.count())
    [(latency_s, sigma_s)] = measure([machine.run(slower)], machine.clock, machine.waited)
    assert sigma_s > 2 * SIGMA_FLOOR * latency_s
    assert machine.runs > 3 + 6


def test_waiting_for_a_core_widens_the_error() -> None:
    machine = FakeMachine()
    run = machine.run(itertools.repeat(1e-3), waiting=0.5)
    [(latency_s, sigma_s)] = measure([run], machine.clock, machine.waited)
    assert sigma_s / latency_s == pytest.approx(SIGMA_FLOOR + 0.5 * SIGMA_CONTENDED)


MILLISECOND = 2.0**-10  # sums of it are exact


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Runs that take a millisecond for each weight of the region, on a fake clock."""
    machine = FakeMachine()

    def open_region(region: LoweredRegion, threads: int | None = None) -> Callable[[], None]:
        return machine.run(itertools.repeat(MILLISECOND * max(1, len(region.weights))))

    monkeypatch.setattr("lrcompile.devices.measure.open_region", open_region)
    return machine


def local_model(machine: FakeMachine, folder: Path | None, **options: Any) -> LocalCostModel:
    return LocalCostModel(cache_dir=folder, clock=machine.clock, waited=machine.waited, **options)


def pair(rank: int, width: int = 64) -> tuple[fx.GraphModule, fx.GraphModule]:
    x = torch.zeros(1, 4, width)
    before = region(of(nn.Linear(width, width)), x)
    factors = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
    return before, region(lambda tape, x: tape(factors[1], tape(factors[0], x)), x)


def test_a_pair_is_measured_once_and_never_by_a_second_compile(machine: FakeMachine, tmp_path: Path) -> None:
    first = local_model(machine, tmp_path)
    costs = first.compare(*pair(8))
    assert [cost.latency_s for cost in costs] == [2 * MILLISECOND, 3 * MILLISECOND]
    assert costs[1].flops == 2 * 4 * 64 * 8 * 2
    assert first.compare(*pair(8)) == costs  # other weights, same shapes
    assert (first.measured, first.reused) == (1, 1)
    runs = machine.runs
    second = local_model(machine, tmp_path)
    assert second.compare(*pair(8)) == costs
    assert (second.measured, second.reused, machine.runs) == (0, 1, runs)
    second.compare(*pair(16))
    local_model(machine, tmp_path, threads=1).compare(*pair(8))
    assert second.measured == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_folder_results_stay_in_memory(machine: FakeMachine, tmp_path: Path) -> None:
    model = local_model(machine, None)
    assert model.compare(*pair(8)) == model.compare(*pair(8))
    assert (model.measured, model.reused) == (1, 1)


def test_what_is_forgotten_is_measured_again(machine: FakeMachine, tmp_path: Path) -> None:
    op, other = gemm_op(64, 64, 64, "fp32"), gemm_op(64, 64, 32, "fp32")
    model = local_model(machine, tmp_path)
    before = [model.cost(op), model.cost(other)]
    assert model.measured == 2
    model.forget(op)
    assert [model.cost(op), model.cost(other)] == before
    assert model.measured == 3
    model.forget(op)
    again = local_model(machine, tmp_path)
    assert [again.cost(op), again.cost(other)] == before
    assert again.measured == 1


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"timings_s": [[1, 2]]}',
        '{"timings_s": [[-1, 1], [1, 1]]}',
        '{"timings_s": [[NaN, 1], [1, 1]]}',
        "\udcff",
    ],
    ids=["empty", "cut", "list", "one side", "negative", "nan", "binary"],
)
def test_a_damaged_cache_file_is_measured_again_and_rewritten(
    machine: FakeMachine, tmp_path: Path, damage: str
) -> None:
    costs = local_model(machine, tmp_path).compare(*pair(8))
    [file] = tmp_path.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage.encode("utf-8", "surrogateescape"))
    model = local_model(machine, tmp_path)
    assert model.compare(*pair(8)) == costs
    assert model.measured == 1
    assert file.read_bytes() == intact


def test_a_very_noisy_result_is_measured_again_after_an_hour(machine: FakeMachine, tmp_path: Path) -> None:
    local_model(machine, tmp_path).compare(*pair(8))
    [file] = tmp_path.iterdir()
    file.write_text('{"timings_s": [[1.0, 0.5], [1.0, 0.5]]}')
    assert local_model(machine, tmp_path).compare(*pair(8))[0].sigma_s == 0.5
    os.utime(file, (0, 0))
    model = local_model(machine, tmp_path)
    assert model.compare(*pair(8))[0].latency_s == 2 * MILLISECOND
    assert model.measured == 1


@pytest.mark.parametrize("disturbance", ["none", "age", "noise", "later clock"])
def test_what_is_measured_now_takes_nothing_of_other_hours(
    machine: FakeMachine, tmp_path: Path, disturbance: str
) -> None:
    costs = local_model(machine, tmp_path).compare(*pair(8))
    known = local_model(machine, tmp_path)
    assert known.compare(*pair(8)) == costs
    assert (known.counters.recalled, known.reused, known.measured) == (0, 1, 0)  # just now
    [file] = tmp_path.iterdir()
    now_s = file.stat().st_mtime
    if disturbance == "noise":
        file.write_text('{"timings_s": [[1.0, 0.1], [1.0, 0.1]]}')
    elif disturbance != "none":
        moved_s = now_s + (3600 if disturbance == "later clock" else -3600)
        os.utime(file, (moved_s, moved_s))
    then = local_model(machine, tmp_path)
    then.compare(*pair(8))
    assert (then.counters.recalled, then.measured) == (int(disturbance != "none"), 0)
    now = known.of_now()
    assert now.compare(*pair(8)) == costs
    assert (now.counters.recalled, now.measured) == (0, int(disturbance != "none"))
    if disturbance == "noise":
        assert local_model(machine, tmp_path).compare(*pair(8)) == costs  # the disturbed one is written over


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(machine: FakeMachine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = local_model(machine, tmp_path / "file" / "folder")
    model.compare(*pair(8))
    assert model.measured == 1


def test_equal_regions_cost_exactly_the_same(machine: FakeMachine) -> None:
    before, after = local_model(machine, None).compare(pair(8)[0], pair(8)[0])
    assert before == after


def test_an_unsupported_region_is_predicted_and_counted(machine: FakeMachine) -> None:
    model = local_model(machine, None)
    before = region(of(nn.GroupNorm(2, 4)), IMAGE)
    after = region(lambda tape, x: tape(nn.Conv2d(4, 4, 1), tape(nn.GroupNorm(2, 4), x)), IMAGE)
    costs = model.compare(before, after)
    assert costs == AnalyticCostModel(local_device()).compare(before, after)
    assert model.fallbacks == {"module GroupNorm": 1}
    assert model.measured == 0


def test_what_onnx_runtime_cannot_open_is_predicted(tmp_path: Path) -> None:
    model = LocalCostModel(cache_dir=tmp_path)
    gm = region(of(nn.Conv2d(4, 4, 1).to(torch.bfloat16)), IMAGE.to(torch.bfloat16))
    for _ in range(2):
        cost, _ = model.compare(gm, gm)
    assert cost.sigma_s >= 0
    assert sum(model.fallbacks.values()) == 2
    assert model.measured == 0


def test_what_memory_does_not_hold_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_region(region: LoweredRegion, threads: int | None = None) -> Callable[[], None]:
        raise MemoryError("Unable to allocate 4.00 TiB")

    monkeypatch.setattr("lrcompile.devices.measure.open_region", open_region)
    model = LocalCostModel(cache_dir=None)
    assert model.cost(gemm_op(8, 16, 32, "fp32")) == AnalyticCostModel(local_device()).cost(gemm_op(8, 16, 32, "fp32"))
    assert model.fallbacks == {"ONNX Runtime: Unable to allocate 4.00 TiB": 1}


def test_a_hopeless_candidate_is_not_measured(machine: FakeMachine) -> None:
    model = local_model(machine, None)
    worse = pair(2048, width=512)
    assert not model.worth_measuring(*worse)
    before, after = model.compare(*worse)
    assert after.latency_s > before.latency_s
    assert (model.measured, model.counters.skipped) == (0, 1)
    assert model.worth_measuring(*pair(64, width=512))


def test_an_operation_is_priced_by_what_more_of_it_takes(machine: FakeMachine) -> None:
    model = local_model(machine, None)
    op = gemm_op(8, 16, 32, "fp32")
    cost = model.cost(op)
    assert cost.latency_s == pytest.approx(MILLISECOND)  # one product: what starts a run is not in it
    assert (cost.flops, cost.weight_bytes, cost.activation_bytes) == (op.flops, op.weight_bytes, op.activation_bytes)
    assert model.cost(op) == cost
    assert (model.measured, model.reused) == (1, 1)
    assert model.cost(OpDesc("view", "fp32", 0.0, 0.0, 0.0)) == Cost()
    assert model.cost(gemm_op(8, 16, 32, "int8")).latency_s > 0
    assert model.fallbacks == {"operation gemm in int8 has no ONNX form of its own": 1}
    with pytest.raises(DeviceError, match="it cannot be measured here: operation gemm in int8 has no ONNX form"):
        replace(model, measures_only=True).cost(gemm_op(8, 16, 32, "int8"))


def test_a_real_pair_runs(tmp_path: Path) -> None:
    model = LocalCostModel(cache_dir=tmp_path)
    for cost in model.compare(*pair(8)):
        assert cost.sigma_s > 0
        assert 0 < cost.latency_s < 1
    assert model.kind == "measured"
    assert not model.fallbacks


def test_the_local_device_is_this_machine() -> None:
    device = local_device()
    assert device.name == "local"
    assert device.units == usable_cores()
    assert device.rank_step["fp32"] in (8, 16)
    assert device.ranks(256)
    assert "scaled to" in device.provenance["dtype.fp32.peak"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"model name": "AMD EPYC", "flags": "fma avx2"}, "AMD EPYC (AVX2)"),
        ({"model name": "AMD EPYC", "flags": "avx2 avx512f avx512_vnni"}, "AMD EPYC (AVX-512 with VNNI)"),
        ({"model name": "Xeon", "flags": "avx2 avx512f avx512_vnni amx_tile"}, "Xeon (AMX)"),
        ({"model name": "Cortex"}, "Cortex"),
    ],
)
def test_processors_of_one_name_are_told_apart(
    facts: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "_cpu_facts", lambda: facts)
    assert cpu_name() == expected
    named = cpu_facts()
    monkeypatch.setattr(measure_module, "_cpu_facts", lambda: facts | {"cache size": "512 KB"})
    assert cpu_name() == expected
    assert cpu_facts() != named  # by which measurements are remembered
