"""Whole models against published latencies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrcompile.devices.profile import load_device
from lrcompile.graph.op import conv_op, gemm_op
from tests.test_analytic import CONV
from tools import validate_models
from tools.published_models import MODELS
from tools.validate_models import LIMITS, Point, in_half, one_each, points, published, summary
from tools.validate_profiles import LATENCY

PARAMETERS = {
    "Resnet18_for_PyTorch": 11.69, "ResNet34": 21.80, "Resnet50_Pytorch_Infer": 25.56, "MobileNet-v1": 4.23,
    "MobileNetV2_for_Pytorch": 3.50, "MobileNetV3_for_Pytorch": 5.48, "Mnasnet1_0": 4.38, "Squeezenet1_1": 1.24,
    "shufflenetv2": 2.28, "GoogleNet_for_Pytorch": 6.62, "xception": 22.86, "convmixer_1536_20": 51.63,
    "SE_ResNet50_Pytorch_Infer": 28.09, "vit-small": 22.05, "EfficientNet_for_Pytorch": 5.29,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name][0]()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)


def test_half_precision_moves_half_of_the_bytes() -> None:
    for op in (gemm_op(64, 128, 256, "fp32"), conv_op(CONV, "fp32")):
        half = in_half(op)
        assert (half.dtype, half.flops) == ("fp16", op.flops)
        assert half.weight_bytes + half.activation_bytes == (op.weight_bytes + op.activation_bytes) / 2
    assert in_half(gemm_op(1, 1, 1, "int64")).dtype == "int64"


def table(folder: Path, *rows: str) -> Path:
    (folder / "ascend_modelzoo_infer.csv").write_text("\n".join(("device,model,batch,ms,quality", *rows)) + "\n")
    return folder


def test_only_what_can_be_built_and_is_not_suspect_counts(tmp_path: Path) -> None:
    rows = ["Ascend310P,RepVGG,8,1.0,ok", "Ascend310P,RepVGG,8,3.0,ok", "Ascend310P,RepVGG,1,0.5,ok"]
    rows += ["Ascend310P,RepVGG,4,9,suspect_typo", "T4,RepVGG,2,1,ok", "Ascend310P,YOLOX,8,1,ok"]
    assert published(table(tmp_path, *rows), "Ascend310P") == {"RepVGG": {1: 0.5, 8: 2.0}}


def test_predictions_grow_with_the_batch() -> None:
    found = points(load_device("ascend310p"), {"DCGAN": {1: 0.1, 4: 0.1, 64: 1.0}}, {})
    times = [point.predicted_ms for point in found]
    assert times == sorted(times)
    assert times[2] > 3 * times[0]
    assert all(point.sigma_ms > 0 for point in found)
    assert [point.batch for point in one_each(found)] == [4]


def test_a_rank_correlation_below_its_limit_fails() -> None:
    good = [Point(str(i), 8, i, 2 * i, 0.1) for i in range(1, 33)]
    row, holds = summary("ascend310p", good)
    assert holds
    assert row == "| ascend310p | 32 | 32 | 1.000 | 1.000 | 100 % | +100% | ≥ 0.8 |"
    assert not summary("ascend310p", good[:29])[1]
    assert not summary("ascend310p", [Point(p.model, 8, p.measured_ms, 100 - p.predicted_ms, 0) for p in good])[1]


@pytest.mark.slow
@pytest.mark.skipif(not LATENCY.is_dir(), reason=f"published measurements are not here: {LATENCY}")
def test_order_of_whole_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_models.main([]) == 0
    assert capsys.readouterr().out.count("| ascend310p | 32 |") == 1
    assert LIMITS["ascend310p"] == 0.8
