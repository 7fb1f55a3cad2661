"""What calibration data become: batches that are fitted to or judged on, and sums over the layers' inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.errors import PlanError
from lrcompile.planning.calibration import Split
from lrcompile.planning.plan import Plan

BATCH = 32


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Narrow(nn.Module):
    """Two wide layers whose inputs lie near a plane of few dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(256, 2048), nn.Linear(2048, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def samples(batches: int, seed: int = 1) -> Tensor:
    """More dimensions than samples: what is fitted to some of them does worse on others."""
    chance = torch.Generator().manual_seed(seed)
    shape = torch.randn(64, 256, generator=torch.Generator().manual_seed(9)) / 8
    count = batches * BATCH
    return torch.randn(count, 64, generator=chance) @ shape + 0.1 * torch.randn(count, 256, generator=chance)


def data(batches: int) -> lrcompile.CalibrationData:
    return lrcompile.calibration_from(samples(batches), ["x"], BATCH)


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (64, 16)])
def test_the_last_quarter_judges_where_there_are_four_batches(count: int, held_out: int) -> None:
    batches = [(i,) for i in range(count)]
    split = Split.of(batches)
    assert split.held_out == held_out
    assert list(split.fitted) == batches[: count - held_out]
    assert list(split.judged) == (batches[count - held_out :] if held_out else batches)


def compiled(batches: int, plan: Plan | None = None) -> lrcompile.Result:
    budget = lrcompile.Budget(max_error=0.3) if plan is None else None
    return lrcompile.compile(
        Narrow().eval(), (samples(1),), target="rpi5", budget=budget, calibration=data(batches), plan=plan
    )


def test_held_out_batches_judge_and_are_not_fitted_to() -> None:
    result = compiled(4)
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)
    error = result.report.error
    assert (error["batches_fitted"], error["batches_judged"]) == (3, 1)
    assert error["basis"] == "calibration data, 128 samples: 32 held out to measure on, 96 fitted to"
    last = samples(4)[-BATCH:]
    expected = Narrow()(last).detach()
    got = result.model(last).detach()
    assert error["measured"] == pytest.approx(float((got - expected).norm() / expected.norm()), rel=1e-3)
    assert not any("unseen" in note for note in result.report.notes)


def test_few_batches_do_both_and_the_report_says_so() -> None:
    result = compiled(3)
    error = result.report.error
    assert (error["batches_fitted"], error["batches_judged"], result.plan.held_out) == (3, 3, 0)
    assert error["basis"] == "calibration data, 96 samples"
    assert any("errors on unseen data may be larger" in note for note in result.report.notes)


def test_replay_splits_the_data_as_the_plan_says() -> None:
    first = compiled(4)
    plan = Plan.loads(first.plan.dumps())
    assert plan == first.plan
    assert plan.held_out == 1
    again = compiled(4, plan)
    weights = first.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())
    assert again.plan.dumps() == first.plan.dumps()
    assert again.report.error == first.report.error
    old = compiled(4, replace(plan, held_out=0))
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in old.model.state_dict().items())
    assert old.report.error["batches_judged"] == 4
    for wrong in (4, -1):
        with pytest.raises(PlanError, match=f"holds {wrong} calibration batches out, but there are 4"):
            compiled(4, replace(plan, held_out=wrong))
