"""Errors of similar operations are alike: what that makes of the error of a saving."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lrcompile.devices.analytic import AnalyticCostModel, eager_latency_s
from lrcompile.devices.correlation import SHARED, Priced, difference_sigma_s
from lrcompile.devices.features import features
from lrcompile.devices.profile import load_device
from lrcompile.devices.residual import Residuals
from lrcompile.graph.op import OpDesc, conv_op, gemm_op
from tests.test_analytic import CONV

V100 = load_device("v100")
MODEL = AnalyticCostModel(V100)


def priced(*ops: OpDesc) -> list[Priced]:
    return [(op, MODEL.cost(op)) for op in ops]


def independent(*sides: list[Priced]) -> float:
    return math.hypot(*(cost.sigma_s for side in sides for _, cost in side))


GEMM, NEAR, FAR = (gemm_op(512, n, 1024, "fp16") for n in (1024, 1088, 8))


def test_what_stands_on_both_sides_cancels() -> None:
    assert difference_sigma_s(V100, priced(GEMM), priced(replace(GEMM, label="another"))) == 0
    assert difference_sigma_s(V100, priced(GEMM, FAR), priced(FAR)) == pytest.approx(MODEL.cost(GEMM).sigma_s)
    biased = replace(GEMM, weight_bytes=GEMM.weight_bytes + 2048)
    assert difference_sigma_s(V100, priced(GEMM), priced(biased)) < 0.01 * MODEL.cost(GEMM).sigma_s
    assert difference_sigma_s(V100, [], []) == 0


def test_errors_cancel_between_sides_and_add_up_on_one() -> None:
    across = difference_sigma_s(V100, priced(GEMM), priced(NEAR))
    assert across == pytest.approx(independent(priced(GEMM), priced(NEAR)) * math.sqrt(1 - SHARED), rel=0.05)
    assert difference_sigma_s(V100, priced(GEMM, NEAR), []) > 1.2 * independent(priced(GEMM, NEAR))
    assert difference_sigma_s(V100, priced(GEMM, GEMM), []) == pytest.approx(2 * MODEL.cost(GEMM).sigma_s)


def test_other_kinds_types_and_axes_are_independent() -> None:
    conv = conv_op(CONV, "fp16")
    volume = conv_op(replace(CONV, size_in=(8,) * 3, size_out=(8,) * 3, kernel=(3,) * 3, stride=(1,) * 3,
                             padding=((1, 1),) * 3, dilation=(1,) * 3), "fp16")  # fmt: skip
    other = gemm_op(512, 1024, 1024, "fp32")
    for a, b in ((GEMM, conv), (GEMM, other), (conv, replace(volume, gemm=None))):
        expected = independent(priced(a), priced(b))
        assert difference_sigma_s(V100, priced(a), priced(b)) <= expected * (1 + 1e-9)
    assert difference_sigma_s(V100, priced(GEMM), priced(conv)) == pytest.approx(
        independent(priced(GEMM), priced(conv))
    )


def test_a_calibrated_family_has_the_covariance_of_its_process() -> None:
    a, b = gemm_op(64, 64, 64, "fp32"), gemm_op(64, 72, 64, "fp32")
    point = np.array([features(a, V100)])
    residuals = Residuals(point, np.array([0.1]), np.full(point.shape[1], 8.0), 0.3, 0.01)
    device = replace(V100, residuals={"gemm": residuals})
    model = AnalyticCostModel(device)
    known, far = difference_sigma_s(device, [(a, model.cost(a))], []), gemm_op(2048, 4096, 4096, "fp32")
    assert known == pytest.approx(model.cost(a).sigma_s, rel=0.01)
    assert known < 0.02 * model.cost(a).latency_s
    assert difference_sigma_s(device, [(far, model.cost(far))], []) > 0.2 * model.cost(far).latency_s
    near = difference_sigma_s(device, [(a, model.cost(a))], [(b, model.cost(b))])
    assert near / model.cost(b).latency_s < 0.5 * model.cost(far).sigma_s / model.cost(far).latency_s


def test_what_has_no_family_has_none_of_its_errors() -> None:
    """Transposed and 1-D convolutions are not of the calibrated "conv", though their kind has that name."""
    image = conv_op(CONV, "fp32")
    x86 = load_device("x86-ort")
    point = np.array([features(image, x86)])
    device = replace(x86, residuals={"conv": Residuals(point, np.array([0.1]), np.ones(point.shape[1]), 1e-9, 1e-9)})
    model = AnalyticCostModel(device)
    cube = replace(CONV, size_in=(8,) * 3, size_out=(8,) * 3, kernel=(3,) * 3, stride=(1,) * 3, padding=((1, 1),) * 3,
                   dilation=(1,) * 3)  # fmt: skip
    line = replace(CONV, size_in=(8,), size_out=(8,), kernel=(3,), stride=(1,), padding=((1, 1),), dilation=(1,))
    for op in (conv_op(replace(cube, transposed=True), "fp32"), conv_op(line, "fp32"), conv_op(cube, "fp64")):
        cost = model.cost(op)
        assert difference_sigma_s(device, [(op, cost)], []) == pytest.approx(cost.sigma_s)
        both = [(op, cost), (image, model.cost(image))]
        assert difference_sigma_s(device, both, []) == pytest.approx(cost.sigma_s, rel=0.01)


def test_an_eager_network_waits_for_its_host() -> None:
    small, large = gemm_op(8, 8, 8, "fp16"), gemm_op(8192, 8192, 8192, "fp16")
    assert V100.host_s == pytest.approx(66e-6)
    assert eager_latency_s(V100, [small] * 10) == pytest.approx(660e-6)
    assert eager_latency_s(V100, [large] * 10) == pytest.approx(10 * MODEL.cost(large).latency_s)
    assert eager_latency_s(V100, [OpDesc("view", "fp16", 0, 0, 0)] * 10 + [large]) == MODEL.cost(large).latency_s
    assert eager_latency_s(V100, []) == 0
