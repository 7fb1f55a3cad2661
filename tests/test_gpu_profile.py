"""The shipped profile of a GPU and the measurements that it was made of."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.calibrate import fitted_to, with_starts
from lrcompile.devices.features import family
from lrcompile.devices.profile import load_device
from lrcompile.devices.sampling import GPU, GPU_WEIGHTS, operations
from tools import gpu_profile, measure_gpu
from tools.gpu_profile import FOLDER, SURE, op_of, read, row_of

MEASURED = FOLDER / "measured"
H200 = load_device("h200")


def test_lines_say_all_of_an_operation() -> None:
    for op in islice(operations(9, GPU, GPU_WEIGHTS), 300):
        assert op_of(json.loads(json.dumps(row_of(op)))) == op


def test_enough_was_measured() -> None:
    names = [family(m.op) or "" for m in read(MEASURED / "h200.jsonl")]
    bases = [name.partition("-")[0] for name in names]
    assert bases.count("gemm") >= 200
    assert bases.count("conv") + bases.count("pointwise") >= 300
    assert {"gemm-half", "conv-half", "pointwise-half", "depthwise-half", "attention-half"} <= set(H200.residuals)


def test_operations_that_were_not_fitted_to() -> None:
    model, errors = AnalyticCostModel(H200), []
    for m in read(MEASURED / "h200-fresh.jsonl"):
        if family(m.op) == "gemm-half":
            errors.append(abs(model.cost(m.op).latency_s / m.cost.latency_s - 1))
    assert len(errors) >= 25
    assert np.mean(errors) < 0.1


def test_splits_that_it_is_sure_of_are_faster() -> None:
    _, count, share = gpu_profile.pairs(H200, MEASURED / "h200-pairs.jsonl")
    assert count >= 60
    assert share >= SURE


def test_the_splits_are_those_of_their_seed() -> None:
    stored = [json.loads(line)["pair"] for line in (MEASURED / "h200-pairs.jsonl").read_text().splitlines()]
    drawn = islice(measure_gpu.pairs(5, ("bf16", "bf16", "fp16", "fp32")), len(stored))
    assert stored == [json.loads(json.dumps([[row_of(op) for op in side] for side in sides])) for sides in drawn]


def test_a_step_beside_the_alignment_costs_what_was_measured() -> None:
    """Products of an odd width take five to ten times as long, so that ranks have to be multiples of eight."""
    model = AnalyticCostModel(H200)
    prices = [model.cost(op_of(["gemm", "bf16", [8192, n, 2048, 1, "TN"], True])).latency_s for n in (511, 512, 513)]
    assert 5 < prices[0] / prices[1] < 10
    assert 5 < prices[2] / prices[1] < 10


@pytest.mark.slow
def test_the_shipped_profile_is_what_the_measurements_give() -> None:
    start = load_device(str(MEASURED / "h200-start.toml"))
    found = fitted_to(with_starts(start), read(MEASURED / "h200.jsonl"), 0)
    assert found.device.launch_s == pytest.approx(H200.launch_s, rel=1e-3)
    assert found.device.bandwidth_bytes_s == pytest.approx(H200.bandwidth_bytes_s, rel=1e-3)
    assert set(found.residuals) == set(H200.residuals)
    for name, residuals in found.residuals.items():
        assert np.allclose(residuals.values, H200.residuals[name].values, atol=2e-3)
