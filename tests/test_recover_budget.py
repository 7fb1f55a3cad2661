"""Recovery and budgets: an error to reach, and a metric that must not fall."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Recovery, Result
from lrcompile.cli import run
from lrcompile.errors import BudgetError
from lrcompile.frontend.trace import trace
from lrcompile.planning.sensitivity import Evaluator
from lrcompile.recover import reached, until_error
from lrcompile.recovery.checkpoint import Checkpoint
from tests.recovered import WIDTH, data, net


def inputs(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(seed))


def compiled(**options: Any) -> Result:
    budget = Budget(**{"size": 0.6} | options.pop("budget", {}))
    return lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", budget=budget, **options)


@pytest.fixture(scope="module")
def split() -> Result:
    return compiled()


def recovered(result: Result, tmp_path: Path, **settings: Any) -> Result:
    settings = {"steps": 400, "rate": 3e-3, "refit": False} | settings
    return lrcompile.recover(result, data(), checkpoints=tmp_path, **settings)


def figures(result: Result) -> dict[str, Any]:
    assert result.report.recovery is not None
    return dict(result.report.recovery)


def test_it_ends_at_the_error_asked_for(split: Result, tmp_path: Path) -> None:
    whole = figures(recovered(split, tmp_path))
    middle = (whole["error"][0] + whole["error"][1]) / 2
    found = figures(recovered(split, tmp_path, until=middle))
    assert found["steps"] < whole["steps"]
    assert found["kept_step"] == found["steps"]
    assert whole["error"][1] < found["error"][1] <= middle


def test_what_is_good_enough_is_not_trained(split: Result, tmp_path: Path) -> None:
    found = recovered(split, tmp_path, until=1.0)
    assert figures(found)["steps"] == 0
    assert "the error asked for held without any training: the weights are as they were" in found.report.notes
    assert not any("made nothing better" in note for note in found.report.notes)
    assert all(torch.equal(a, b) for a, b in zip(split.model.parameters(), found.model.parameters(), strict=True))


def test_an_error_out_of_reach_changes_nothing(split: Result, tmp_path: Path) -> None:
    one, other = (recovered(split, tmp_path, steps=60, until=until) for until in (None, 1e-9))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize("measure", ["kl", "top1"])
def test_errors_are_in_the_measure_of_the_budget(tmp_path: Path, measure: str) -> None:
    result = recovered(compiled(budget={"measure": measure}), tmp_path, steps=40)
    error, judged = result.report.error, Evaluator(result.traced.graph, [(inputs(960, seed=1),)])
    in_measure = judged.measured_in(result.plan.budget.measure_in_use)
    graph = lrcompile.Graph(result.model, result.traced.graph.fake_mode)
    assert error["measured"] == figures(result)["error"][1]
    value = in_measure.measure.value(in_measure.error(graph))
    assert error["measured"] == pytest.approx(value, rel=0.5)  # kept out, against all
    assert error["measured"] < 0.6 * judged.error(graph)  # the relative error is no such figure


def accuracy(model: nn.Module) -> float:
    """Agreement with the original on inputs of its own."""
    x = inputs(512, seed=3)
    with torch.no_grad():
        return float((model(x).argmax(1) == net()(x).argmax(1)).float().mean())


def test_a_metric_is_evaluated_once_more(tmp_path: Path) -> None:
    before = compiled(metric=accuracy, calibration=data(), budget={"max_drop": 0.5})
    after = recovered(before, tmp_path)
    assert before.report.metric is not None
    assert after.report.metric is not None
    assert after.report.metric["after"] == accuracy(after.model)
    assert after.report.metric["after"] > before.report.metric["after"]
    assert after.report.metric["evaluations"] == before.report.metric["evaluations"] + 1
    assert after.plan.metric == after.report.metric


def test_what_the_metric_falls_by_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that training makes worse: how near the outputs are to those of the compiled model."""
    found: list[nn.Module] = []

    def nearness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(inputs(64, seed=3)) - found[-1](inputs(64, seed=3))).norm()) if found else 0.0

    before = compiled(metric=nearness, calibration=data(), budget={"max_drop": 0.5})
    found.append(before.model)
    after = recovered(before, tmp_path)
    assert after.model is before.model
    assert after.report.metric == before.report.metric
    assert any("recovery let the metric fall from" in note for note in after.report.notes)


def test_an_error_alone_holds_after_a_training_too(split: Result, tmp_path: Path) -> None:
    """Labels of other classes than the model's: the loss falls, and the error rises."""
    limit = figures(recovered(split, tmp_path, steps=0))["error"][0] * 1.01
    before = replace(split, plan=replace(split.plan, budget=Budget(max_error=limit)))
    with torch.no_grad():
        others = (torch.cat([net()(batch["x"]) for batch in data().batches]).argmax(-1) + 1) % 5
    wrong: dict[str, Any] = {"labels": others, "teacher": 0.0, "steps": 60}
    after = recovered(before, tmp_path, **wrong)
    assert after.model is before.model
    assert after.report.error == before.report.error
    assert any("recovery let the relative output error rise from 0." in note for note in after.report.notes)
    stays = recovered(before, tmp_path, **wrong, until=1e-9)  # which it does not reach
    assert stays.model is before.model
    for taken in (split, replace(split, plan=replace(split.plan, budget=Budget()))):  # nothing was asked of the error
        assert figures(recovered(taken, tmp_path, **wrong))["error"][1] > limit


def kept_in(result: Result, tmp_path: Path, **options: Any) -> Path:
    """The file of a training that has nothing to do."""
    found: list[Checkpoint] = []
    lrcompile.recover(result, data(), checkpoints=tmp_path, finished=found, steps=0, until=10.0, refit=False, **options)
    return found[0].path


def test_what_has_to_be_reached(split: Result) -> None:
    """The limit beside one on size, not where a user's own training is to end early; a reserve is told as one."""
    asked, settings = Budget(size=0.6, max_error=0.2), Recovery(steps=5, until=0.01)
    assert until_error(asked, settings)[1] == settings
    assert until_error(asked, Recovery(steps=5, until=0.5))[1] == Recovery(steps=5, until=0.2)
    assert until_error(Budget(size=0.6), settings) == (Budget(size=0.6), settings)

    def of_error(error: float) -> Result:
        figures = {**split.report.error, "measured": error}
        return replace(split, report=replace(split.report, error=figures, recovery={}))

    assert reached(of_error(0.1), asked, settings).report.error["budget"] == 0.2
    assert reached(of_error(0.9), Budget(size=0.6), settings).report.error["measured"] == 0.9
    with pytest.raises(BudgetError, match=r"the error is 0.9, above the 0.2 allowed; allow more"):
        reached(of_error(0.9), asked, settings)
    kept_back = replace(asked, reserve=0.5)
    with pytest.raises(BudgetError, match=r"above the 0.141 that rewrites and training may take of 0.2; allow more"):
        reached(of_error(0.15), kept_back, settings)
    assert reached(of_error(0.14), kept_back, settings).report.error["budget"] == 0.2
    refused = replace(of_error(0.9).report, recovery=None, notes=["recovery let the metric fall"])
    with pytest.raises(BudgetError, match=r"allowed \(recovery let the metric fall\); allow more"):
        reached(replace(split, report=refused), asked, settings)


def test_what_is_compared_tells_a_training_from_others(split: Result, tmp_path: Path) -> None:
    """With an original that was traced apart, outputs alone are compared."""
    apart = trace(net(), (torch.randn(8, WIDTH),)).graph
    assert kept_in(split, tmp_path) != kept_in(split, tmp_path, original=apart)


def test_what_is_limited_tells_a_training_from_others(split: Result, tmp_path: Path) -> None:
    in_kl = replace(split, plan=replace(split.plan, budget=Budget(size=0.6, measure="kl")))
    assert kept_in(split, tmp_path) != kept_in(in_kl, tmp_path)


class Shifted(nn.Module):
    """Adds what no state dict holds."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.maximum(self.up(x), self.shift))


def test_constants_tell_a_training_from_others(tmp_path: Path) -> None:
    x = torch.randn(8, WIDTH)
    one, other = (
        lrcompile.compile(Shifted(shift).eval(), (x,), target="rpi5", budget=Budget(size=0.6)) for shift in (0.0, 1e-3)
    )
    assert (one.plan.fingerprint, one.plan.rewrites) == (other.plan.fingerprint, other.plan.rewrites)
    assert kept_in(one, tmp_path) == kept_in(one, tmp_path) != kept_in(other, tmp_path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = torch.export.export(net(), (torch.randn(8, WIDTH),), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.export.save(program, tmp_path / "model.pt2")
    np.savez(tmp_path / "calib.npz", x=inputs(960, seed=1).numpy())
    return tmp_path


def command(files: Path, *words: str) -> int:
    out = ["--out", str(files / "out"), "--report-json", str(files / "report.json")]
    calib = ["--calib", str(files / "calib.npz"), "--target", "rpi5", "--size", "45%"]
    return run([str(files / "model.pt2"), *calib, *out, *words])


def test_an_error_beside_a_size_is_what_training_reaches(files: Path) -> None:
    training = ["--recover", "400", "--option", "recover.rate=0.001", "--option", "recover.refit=false"]
    assert command(files, *training) == 0
    before, after = json.loads((files / "report.json").read_text())["recovery"]["error"]
    limit = str((before + after) / 2)
    assert command(files, "--max-error", limit) == 1  # without training there is no such model
    assert command(files, "--max-error", limit, *training) == 0
    report = json.loads((files / "report.json").read_text())
    assert report["error"]["measured"] <= float(limit)
    assert report["recovery"]["steps"] < 400


def test_an_error_that_training_does_not_reach(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, "--max-error", "0.001", "--recover", "20", "--option", "recover.rate=0.001") == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "after recovery the error is" in text
    assert "above the 0.001 allowed" in text
    assert not (files / "out").exists()
    assert not (files / "report.json").exists()
