"""Calibrating a GPU that is made up: no machine of the tests needs one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lrcompile.cli import run
from lrcompile.devices import calibrate as calibrate_module
from lrcompile.devices import measure_cuda, measure_ort_cuda
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.fit import with_figures
from lrcompile.devices.measure_ort_cuda import PROVIDER, OrtCudaCostModel
from lrcompile.devices.profile import load_device
from lrcompile.devices.repeated import least_copies
from lrcompile.devices.runtimes import cuda_device
from lrcompile.errors import DeviceError
from lrcompile.graph.op import AttentionShape, ConvShape, OpDesc, attention_op, conv_op, gemm_op
from lrcompile.session import calibrate_file


def made_up_gpu(op: OpDesc) -> Cost:
    """An A100 whose launches are shorter and whose misaligned products are slow."""
    figures = {"launch_s.gemm": 3e-6, "launch_s.other": 1e-6, "engines.tensor_core.gemm.misaligned": 0.2}
    latency_s = AnalyticCostModel(with_figures(load_device("a100"), figures)).cost(op).latency_s
    return Cost(latency_s * (3.0 if op.attention is not None and op.attention.mask != "none" else 1.0))


def use_made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands calibrate on a GPU that is made up, and soon have enough of it."""
    facts = SimpleNamespace(multi_processor_count=108, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    for model in (measure_cuda.CudaCostModel, OrtCudaCostModel):
        monkeypatch.setattr(model, "cost", lambda self, op: made_up_gpu(op))
    monkeypatch.setattr(calibrate_module, "MOST", 300)


def test_a_gpu_is_calibrated_in_every_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile that is written predicts as the one that was fitted, figures that no fit reached included."""
    use_made_up_gpu(monkeypatch)
    out = tmp_path / "mine.toml"
    found = calibrate_file(out, 60, 0, lambda stage, done, total: None, runtime="torch-cuda")
    device = load_device(str(out))
    assert "NVIDIA A100" in device.description
    assert device.launch_s["gemm"] == pytest.approx(3e-6, rel=0.2)
    assert device.engines["tensor_core"].gemm.misaligned == pytest.approx(0.2, rel=0.2)
    assert {"gemm", "gemm-half", "conv-half", "attention-half"} <= set(device.residuals)
    model = AnalyticCostModel(device)
    errors = [abs(model.cost(m.op).latency_s / m.cost.latency_s - 1) for m in found.measurements]
    assert np.median(errors) < 0.03
    fitted_model = AnalyticCostModel(replace(found.device, residuals=found.residuals))
    for m in found.measurements:
        assert model.cost(m.op).latency_s == pytest.approx(fitted_model.cost(m.op).latency_s, rel=0.01)


@pytest.mark.parametrize("runtime", ["torch-cuda", "onnxruntime-cuda"])
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], runtime: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    assert run(["calibrate", "--out", str(tmp_path / "mine.toml"), "--runtime", runtime]) == 2
    assert f"runtime {runtime}: torch sees no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "mine.toml").exists()


def test_a_gpu_of_another_size_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(multi_processor_count=54, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A30")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    device, a100 = cuda_device(), load_device("a100")
    assert device.units == 54
    assert device.peak_flops["fp16"] == pytest.approx(a100.peak_flops["fp16"] / 2)
    assert device.provenance["hardware.units"].startswith("assumed (a100, scaled to 54 units)")


def test_a_gpu_of_gamers_has_twice_the_lanes_of_an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(multi_processor_count=54, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX A4500")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert cuda_device().peak_flops["fp32"] == pytest.approx(load_device("a100").peak_flops["fp32"])


# ---------------------------------------------------------------------------------------- ONNX Runtime's CUDA provider


def here(folder: Path | None) -> OrtCudaCostModel:
    """What measures there, run by the CPU."""
    return OrtCudaCostModel(folder, provider="CPUExecutionProvider", on="cpu")


def test_operations_are_measured_with_a_provider(tmp_path: Path) -> None:
    model = here(tmp_path)
    small, large = (model.cost(gemm_op(size, size, size, "fp32")) for size in (32, 512))
    assert large.latency_s > 20 * small.latency_s > 0
    assert model.cost(gemm_op(512, 512, 512, "fp32")) == large  # remembered
    model.forget(gemm_op(512, 512, 512, "fp32"))
    assert model.cost(gemm_op(512, 512, 512, "fp32")) != large
    image = ConvShape(1, 16, 16, (14, 14), (14, 14), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    for op in (conv_op(image, "fp32"), attention_op(AttentionShape(2, 4, 4, 16, 16, 8), "fp32")):
        assert 0 < here(None).cost(op).latency_s < 1e-2


def test_copies_fit_into_a_file_and_into_a_gpu() -> None:
    for size in (64, 4096, 16384):
        op = gemm_op(64, size, size, "fp32")
        copies = measure_ort_cuda.copies_for(op)
        assert 1 <= copies <= measure_ort_cuda.COPIES
        assert (copies + least_copies(op)) * op.weight_bytes < 2**31
    assert measure_ort_cuda.copies_for(gemm_op(1, 8, 8, "fp32")) == measure_ort_cuda.COPIES


def test_what_a_provider_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="operation view in fp32 has no ONNX form"):
        here(None).cost(OpDesc("view", "fp32", 0, 0, 0))
    monkeypatch.setattr(measure_ort_cuda, "open_region", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(measure_ort_cuda, "UNMEASURABLE", (ZeroDivisionError,))
    with pytest.raises(DeviceError, match="ONNX Runtime with CPUExecutionProvider: division by zero"):
        here(None).cost(gemm_op(8, 8, 8, "fp32"))


def test_a_profile_of_the_cuda_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_made_up_gpu(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    arguments = ["calibrate", "--out", str(tmp_path / "mine.toml"), "--minutes", "1", "--runtime", "onnxruntime-cuda"]
    assert run(arguments) == 2
    assert f"expected an ONNX Runtime with {PROVIDER}, got one with " in capsys.readouterr().err
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    assert run(arguments) == 0
    device = load_device(str(tmp_path / "mine.toml"))
    assert "CUDA provider" in device.description
    assert {"skip_layer_norm", "bias_gelu"} <= device.fuses
    assert "product_bias" in device.lacks
    assert {"gemm", "gemm-half", "gemm-tf32", "bias_gelu-half"} <= set(device.residuals)
