"""What needs a CUDA GPU: measuring operations on it, calibrating it, and training on it."""

from __future__ import annotations

import time
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Recovery, calibration_from
from lrcompile.devices import calibrate
from lrcompile.devices.measure_cuda import CudaCostModel
from lrcompile.devices.measure_ort_cuda import PROVIDER, OrtCudaCostModel
from lrcompile.devices.profile import load_device
from lrcompile.devices.repeated import chain
from lrcompile.graph.op import ConvShape, conv_op, gemm_op
from lrcompile.session import calibrate_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
WIDTH = 256


class Block(nn.Module):
    """Attention under a causal mask that the graph makes itself, and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.arange(x.shape[1], device=x.device)[None, :, None] * 0.01
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return x + self.scale * self.out(y.transpose(1, 2).reshape(x.shape))


def test_operations_take_longer_where_there_is_more_to_do(tmp_path: Path) -> None:
    model = CudaCostModel(tmp_path)
    small, large = (model.cost(gemm_op(size, size, size, "bf16")) for size in (512, 8192))
    assert large.latency_s > 20 * small.latency_s > 0
    assert large.flops / large.latency_s > 5e13
    assert model.cost(gemm_op(512, 512, 512, "bf16")) == small  # remembered
    shape = ConvShape(8, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert 0 < model.cost(conv_op(shape, "fp16")).latency_s < 1e-3


@pytest.mark.skipif(PROVIDER not in ort.get_available_providers(), reason="ONNX Runtime has no CUDA provider")
def test_operations_are_measured_with_onnx_runtime(tmp_path: Path) -> None:
    model = OrtCudaCostModel(tmp_path)
    for dtype in ("fp32", "tf32", "fp16"):
        small, large = (model.cost(gemm_op(size, size, size, dtype)) for size in (512, 8192))
        assert large.latency_s > 20 * small.latency_s > 0
    shape = ConvShape(8, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert 0 < model.cost(conv_op(shape, "fp16")).latency_s < 1e-3


def test_a_region_is_compared_with_its_split() -> None:
    whole, halves = (
        [gemm_op(4096, 4096, 4096, "bf16")],
        [gemm_op(4096, n, k, "bf16") for n, k in ((64, 4096), (4096, 64))],
    )
    before, after = CudaCostModel(None).compare(chain(whole), chain(halves))
    assert before.latency_s > 3 * after.latency_s


def test_this_gpu_can_be_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "FIRST", 20)
    out = tmp_path / "mine.toml"
    found = calibrate_file(out, 30, 0, lambda stage, done, total: None, runtime="torch-cuda")
    assert len(found.measurements) >= 40
    device = load_device(str(out))
    assert device.kind == "gpu"
    assert torch.cuda.get_device_name() in device.description
    assert "gemm-half" in device.residuals
    for row in found.summary():
        print(row["family"], row["count"], f"{row['error']:.1%}")


def test_a_recovery_trains_there_and_leaves_its_weights_here() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    data = calibration_from({"input": torch.randn(512, 64, WIDTH)}, ["input"], 32)
    compiled = lrcompile.compile(model, (torch.randn(2, 64, WIDTH),), target="rpi5", budget=Budget(size=0.5))
    errors, seconds = {}, {}
    for device in ("cpu", "cuda"):
        start = time.perf_counter()
        settings = Recovery(steps=60, rate=1e-3, refit=False, precision="fp32", device=device)  # type: ignore[arg-type]
        result = lrcompile.recover(compiled, data, settings)
        seconds[device] = time.perf_counter() - start
        assert result.report.recovery["device"] == device
        assert {p.device.type for p in result.model.parameters()} == {"cpu"}
        before, errors[device] = result.report.recovery["error"]
        assert errors[device] < 0.97 * before
    print("seconds", seconds, "errors", errors)
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)
    half = lrcompile.recover(compiled, data, Recovery(steps=60, rate=1e-3, refit=False, device="cuda"))
    assert half.report.recovery["device"] == "cuda"
    assert half.report.recovery["error"][1] == pytest.approx(errors["cpu"], rel=0.2)
