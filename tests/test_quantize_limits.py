"""Limits on size, latency, error and the user's metric of files in 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, CalibrationData, Quantization, Result, confirm
from lrcompile.devices.bench import BenchResult
from lrcompile.emit.verify import emitted_error
from lrcompile.errors import BudgetError, VerificationError
from lrcompile.quantization import quantize as decisions
from tests.quantized import (
    Mlp,
    Sensitive,
    benched,
    compiled,
    data,
    operations,
)


def asked_of_int8(size: float, kind: type[nn.Module] = Mlp, **options: Any) -> tuple[Result, CalibrationData]:
    torch.manual_seed(0)
    given = data(kind)
    budget = Budget(size=size, reserve=decisions.RESERVE, int8=True, **options)
    model = kind().eval()
    return lrcompile.compile(model, (given.batches[0]["x"],), target="rpi5", budget=budget, calibration=given), given


def watched(model: nn.Module, x: Tensor, times: float = 1.0) -> tuple[Callable[[nn.Module], float], list[float]]:
    """A metric, minus so many times the distance of outputs from those of a model, and the values that it gives."""
    expected = model(x).detach()
    values: list[float] = []

    def closeness(module: nn.Module) -> float:
        values.append(-times * float((module(x) - expected).norm() / expected.norm()))
        return values[-1]

    return closeness, values


@pytest.mark.parametrize("size", [0.9, 0.4, 0.2, 0.12])
def test_a_size_is_that_of_the_int8_file(size: float, tmp_path: Path) -> None:
    """Integers alone make a third of it, so that down to there no layer is split."""
    result, given = asked_of_int8(size)
    assert bool(result.plan.rewrites) == (size < 0.33)
    report = result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    assert report.quantization is not None
    assert report.quantization["written"] == "int8"
    stored = sum(numpy_helper.to_array(t).nbytes for t in onnx.load(tmp_path / "out.onnx").graph.initializer)
    of_original = stored / report.model["weight_bytes_before"]
    assert of_original <= size
    assert size > 0.33 or of_original > 0.7 * size  # and no more is cut than it takes


@pytest.mark.parametrize("size", [0.2, 0.12])
def test_a_size_is_kept_together_with_a_metric(size: float, tmp_path: Path) -> None:
    """What to ask of the float model for it is found out without evaluations."""
    torch.manual_seed(0)
    model, given = Mlp().eval(), data(Mlp)
    x = torch.cat([batch["x"] for batch in given.batches])
    closeness, seen = watched(model, x)
    result = lrcompile.compile(
        model, (x[:4],), target="rpi5", calibration=given, metric=closeness,
        budget=Budget(size=size, max_drop=2.0, reserve=decisions.RESERVE, int8=True),
    )  # fmt: skip
    report = result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    stored = sum(numpy_helper.to_array(t).nbytes for t in onnx.load(tmp_path / "out.onnx").graph.initializer)
    assert stored <= size * report.model["weight_bytes_before"]
    assert report.metric is not None
    assert report.metric["evaluations"] == len(seen) <= 25
    assert report.metric["before"] - report.metric["after"] <= 2.0


def test_a_size_that_integers_cannot_keep_either() -> None:
    with pytest.raises(BudgetError, match=r"limits of the float model, so that its int8 file is what was asked for"):
        asked_of_int8(0.002)


def test_a_file_that_stays_in_float_is_held_to_its_size_too(tmp_path: Path) -> None:
    result, given = asked_of_int8(0.5, max_error=1e-3)
    (tmp_path / "out.onnx").write_text("old")
    with pytest.raises(BudgetError, match=r"MB asked for: not quantised: .* over 0\.001 .*allow more error"):
        result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.onnx", "old")]
    replace(result, replayed=True).save(tmp_path / "out.onnx", quantize=Quantization(given))  # is not
    assert operations(tmp_path / "out.onnx")["MatMulInteger"] == 0


@pytest.mark.parametrize("wanted", [1.0, 1.8, 2.5, 4.0])
def test_as_many_layers_are_quantised_as_a_latency_takes(
    wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer saves a quarter of the time in int8, and that in the middle costs all accuracy."""

    def measured(first: Path | bytes, second: Path | bytes, **options: Any) -> BenchResult:
        model = onnx.load_from_string(second) if isinstance(second, bytes) else onnx.load(second)
        return benched(1 - 0.25 * sum(node.op_type == "MatMulInteger" for node in model.graph.node))

    monkeypatch.setattr(decisions, "paired", measured)
    result, given = compiled(Sensitive)
    budget = Budget(speedup=wanted, int8=True)
    asked = replace(result, plan=replace(result.plan, target="local", budget=budget))
    path = tmp_path / "out.onnx"
    if wanted > 4 - 1e-9:
        with pytest.raises(BudgetError, match=r"takes 0\.250× the original's time as measured .* 0 of 3 layers stay"):
            replace(asked, plan=replace(asked.plan, budget=replace(budget, speedup=5.0))).save(
                path, quantize=Quantization(given)
            )
        assert not path.exists()
    report = asked.save(path, quantize=Quantization(given))
    count = operations(path)["MatMulInteger"]
    assert count == {1.0: 2, 1.8: 2, 2.5: 3, 4.0: 3}[wanted]
    assert any("more than its default limit" in note for note in report.notes) == (count == 3)
    assert report.quantization is not None
    assert report.quantization["budget"] == (None if count == 3 else pytest.approx(0.05))


@pytest.mark.parametrize(("saved", "of_int8"), [(0.3, True), (-0.1, False)])
def test_here_integers_count_where_they_are_faster(
    saved: float, of_int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the time of the whole model a layer in int8 saves a share, made up, and no split anything."""

    def measured(first: Path | bytes, second: Path | bytes, **options: Any) -> BenchResult:
        model = onnx.load_from_string(second) if isinstance(second, bytes) else onnx.load(second)
        return benched(1 - saved * sum(node.op_type == "MatMulInteger" for node in model.graph.node))

    for module in (confirm, decisions):
        monkeypatch.setattr(module, "paired", measured)
    torch.manual_seed(0)
    given = data(Mlp)
    budget = Budget(speedup=2.0 if of_int8 else None, reserve=decisions.RESERVE, int8=True)
    result = lrcompile.compile(Mlp().eval(), (given.batches[0]["x"],), target="local", calibration=given, budget=budget)
    assert not result.plan.rewrites
    assert result.report.latency_ms["speedup"] == pytest.approx(2.5 if of_int8 else 1.0)
    said = " ".join(result.report.notes)
    assert ("that with all that can be in 8-bit integers" in said) == of_int8
    assert ("8-bit integers do not make this model faster here" in said) != of_int8
    figures = result.save(tmp_path / "out.onnx", quantize=Quantization(given, max_error=1.0)).quantization
    assert figures is not None
    assert figures["written"] == ("int8" if of_int8 else "float")
    assert of_int8 or figures["float_of_original"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("wanted", "spread", "holds"), [(2.53, 0.01, True), (2.53, 0.002, False), (2.6, 0.1, False)])
def test_a_latency_in_the_interval_of_integers_alone_is_kept_by_them(
    wanted: float, spread: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take 0.4 of the time, and 1/2.53 is 0.395; an interval as wide as 1/2.6 excuses no more than two percent."""

    def measured(first: Path | bytes, second: Path | bytes, **options: Any) -> BenchResult:
        model = onnx.load_from_string(second) if isinstance(second, bytes) else onnx.load(second)
        return benched(1 - 0.3 * sum(node.op_type == "MatMulInteger" for node in model.graph.node), spread)

    for module in (confirm, decisions):
        monkeypatch.setattr(module, "paired", measured)
    torch.manual_seed(0)
    given = data(Mlp)
    budget = Budget(speedup=wanted, reserve=decisions.RESERVE, int8=True)

    def compile_here() -> Result:
        example = (given.batches[0]["x"],)
        return lrcompile.compile(Mlp().eval(), example, target="local", calibration=given, budget=budget)

    if not holds:
        with pytest.raises(BudgetError):
            compile_here()
        return
    result = compile_here()
    assert not result.plan.rewrites
    assert any("0.395 asked for is in the interval, so no layer was cut for it" in note for note in result.report.notes)
    figures = result.save(tmp_path / "out.onnx", quantize=Quantization(given, max_error=1.0)).quantization
    assert figures is not None
    assert figures["written"] == "int8"


def test_what_a_recovery_trained_on_does_not_judge(tmp_path: Path) -> None:
    """It keeps out fewer batches than a compile does, and only those count."""
    result, given = compiled(Mlp, 0.2)
    trained = replace(result.plan, recovery={"steps": 5, "data": given.digest, "kept_out": 1})
    for plan, judged in ((result.plan, len(given.batches) // 4), (trained, 1)):
        figures = replace(result, plan=plan).save(tmp_path / "out.onnx", quantize=Quantization(given)).quantization
        assert figures is not None
        assert (figures["batches_judged"], figures["held_out"]) == (judged, True)
        assert figures["batches_fitted"] == len(given.batches) - judged


class Classes(nn.Module):
    """Scores and the class on top, which rounding changes where two are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.layer(x)
        return scores, scores.argmax(-1)


def test_whole_numbers_may_come_out_otherwise_where_that_is_allowed() -> None:
    torch.manual_seed(0)
    graph = lrcompile.prepare_model(Classes().eval(), (torch.randn(4, 32),)).graph.gm

    def emitted(flat: Any) -> list[Tensor]:
        scores, top = graph(*flat)
        return [scores, (top + 1) % 32 if len(scores) == 3 else top]

    common = {"gm": graph, "flat": [torch.randn(4, 32)], "dynamic_batch": True, "limit": 0.5}
    assert emitted_error(emitted, rounded=True, **common) == 0.0  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="at batch size 3"):
        emitted_error(emitted, **common)  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="at batch size 3"):
        emitted_error(lambda flat: [y[:2] if len(y) == 3 else y for y in emitted(flat)], rounded=True, **common)  # type: ignore[arg-type]


class Named(Sensitive):
    """Takes its input by name and returns it in a dictionary, beside something that is no tensor."""

    def forward(self, *, x: Tensor, scale: float = 1.0) -> dict[str, Any]:  # type: ignore[override]
        return {"scale": scale, "y": super().forward(x)}


@pytest.mark.parametrize(("max_drop", "layers"), [(1e3, 3), (20.0, 2), (1e-7, 0)])
def test_the_users_metric_is_that_of_the_file(max_drop: float, layers: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Named().eval(), data(Sensitive)
    x = torch.cat([batch["x"] for batch in given.batches])
    expected = model(x=x)["y"].detach()
    values = []

    def closeness(module: nn.Module) -> float:
        weight = next(module.parameters())
        got = module(x=x.to(weight.device, weight.dtype))
        assert got["scale"] == 1.0
        values.append(-100 * float((got["y"] - expected).norm() / expected.norm()))
        return values[-1]

    result = lrcompile.compile(
        model, (), {"x": x[:4]}, target="rpi5", calibration=given, metric=closeness,
        budget=Budget(max_drop=max_drop, reserve=decisions.RESERVE, int8=True),
    )  # fmt: skip
    path = tmp_path / "out.onnx"
    report = result.save(path, quantize=Quantization(given))
    assert operations(path)["MatMulInteger"] == layers
    assert report.metric is not None
    assert report.metric["evaluations"] == len(values) <= 25
    assert report.metric["before"] - report.metric["after"] <= max_drop
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    value = -100 * np.linalg.norm(got - expected.numpy()) / np.linalg.norm(expected)
    assert report.metric["after"] == pytest.approx(value, rel=1e-3, abs=1e-3)
    assert any("closeness fell to" in note for note in report.notes) == (layers == 0)


@pytest.mark.parametrize(
    ("ratio", "written"), [((0.5, 0.4, 0.6), "int8"), ((1.0, 0.9, 1.1), "int8"), ((2, 1.9, 2.1), "float")]
)
def test_here_what_is_surely_slower_is_not_written(
    ratio: tuple[float, float, float], written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle, low, high = ratio
    measured = BenchResult(
        1e-3, 1e-3, 1e-3, middle * 1e-3, middle * 1e-3, middle, low, high, 6, 12, False, 0.0, 0.0, "", 4, 1
    )
    monkeypatch.setattr(decisions, "paired", lambda *models, **options: measured)
    result, given = compiled(Mlp, 0.2)
    local = replace(result, plan=replace(result.plan, target="local"))
    report = local.save(tmp_path / "out.onnx", quantize=Quantization(given))
    figures = report.quantization
    assert figures is not None
    assert figures["written"] == written
    assert figures["latency_ms"]["of_float"] == list(ratio) == figures["latency_ms"]["of_original"]
    assert (operations(tmp_path / "out.onnx")["MatMulInteger"] > 0) == (written == "int8")
    said = " ".join(report.notes)
    assert ("2.00× the time" in said) == (written == "float")
    assert ("not measured to be faster" in said) == (low <= 1 <= high)
    decided = replace(local.plan, int8={"written": "int8", "left_float": [], "weight_bits": {}})
    again = replace(local, plan=decided, replayed=True).save(tmp_path / "again.onnx", quantize=Quantization(given))
    assert again.quantization is not None
    assert again.quantization["written"] == "int8"  # as the plan says, whatever is measured now


def test_a_metric_is_that_of_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "paired", lambda *models, **options: benched(2.0))
    torch.manual_seed(0)
    model, given = Mlp().eval(), data(Mlp)
    value = {"now": 1.0}
    result = lrcompile.compile(
        model, (given.batches[0]["x"],), target="rpi5", calibration=given, passes=[],
        metric=lambda module: value["now"], budget=Budget(max_drop=0.2, reserve=decisions.RESERVE),
    )  # fmt: skip
    value["now"] = 0.95
    local = replace(result, plan=replace(result.plan, target="local"))
    report = local.save(tmp_path / "out.onnx", quantize=Quantization(given))
    assert report.quantization is not None
    assert report.quantization["written"] == "float"
    assert report.quantization["metric_value"] == 0.95
    assert report.metric is not None
    assert result.report.metric is not None
    assert report.metric["after"] == result.report.metric["after"] == 1.0
    assert report.metric["evaluations"] == result.report.metric["evaluations"] + 1


def test_the_users_metric_sees_no_file_twice(tmp_path: Path) -> None:
    """Beside a limit on the error, which holds long before the metric does."""
    torch.manual_seed(0)
    model, given = Sensitive().eval(), data(Sensitive)
    x = torch.cat([batch["x"] for batch in given.batches])
    closeness, values = watched(model, x, 100)
    result = lrcompile.compile(
        model, (x[:4],), target="rpi5", calibration=given, metric=closeness, passes=[],
        budget=Budget(max_drop=0.8, max_error=0.3, reserve=decisions.RESERVE),
    )  # fmt: skip
    before = len(values)
    figures = result.save(tmp_path / "out.onnx", quantize=Quantization(given)).quantization
    assert figures is not None
    seen = values[before:]
    assert len(set(seen)) == len(seen) == figures["metric_evaluations"] == 2
    assert figures["written"] == "int8"
    assert len(figures["left_float"]) == 2
