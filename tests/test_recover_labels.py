"""Recoveries that learn labels, by cross-entropy or by the user's own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Result
from lrcompile.cli import run
from lrcompile.errors import InputError
from lrcompile.recovery.checkpoint import Checkpoint
from tests.recovered import data, labels, same, split_net, weights, written


@pytest.fixture(scope="module")
def compiled() -> Result:
    return split_net()


def test_labels_are_learned(compiled: Result, tmp_path: Path) -> None:
    given = labels()
    result = lrcompile.recover(
        compiled, data(), labels=given, steps=200, rate=3e-3, teacher=0.0, smoothing=0.05, checkpoints=tmp_path
    )
    x = torch.cat([batch["x"] for batch in data().batches])
    hits = [float((model(x).argmax(-1) == given).float().mean()) for model in (compiled.model, result.model)]
    assert hits[1] > hits[0]


def bad_label(given: Tensor) -> Tensor:
    given[3] = 5
    return given


def below_nothing(given: Tensor) -> Tensor:
    given[0] = -1
    return given


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (bad_label, "label 5 is out of range: the model has 5 classes, 0 to 4"),
        (below_nothing, "label -1 is out of range"),
        (lambda given: given[:50], "there are 50 labels for 960 samples"),
        (lambda given: given.unsqueeze(1).expand(-1, 3), "expected one label for each of its positions"),
        (lambda given: given / 5, "labels are float32; expected whole numbers"),
    ],
)
def test_bad_labels(compiled: Result, tmp_path: Path, change: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(InputError, match=says):
        lrcompile.recover(compiled, data(), labels=change(labels()), steps=60, rate=1e-3, checkpoints=tmp_path)


def test_labels_are_looked_at_before_the_first_step(compiled: Result, tmp_path: Path) -> None:
    given = labels()
    given[500] = 9
    seen: list[str] = []
    with pytest.raises(InputError, match="label 9 is out of range"):
        lrcompile.recover(
            compiled, data(), labels=given, steps=2, rate=1e-3, refit=False, checkpoints=tmp_path,
            progress=lambda stage, done, total: seen.append(stage),
        )  # fmt: skip
    assert "recover" not in seen


def test_labels_that_say_nothing_are_passed_over(compiled: Result, tmp_path: Path) -> None:
    given = labels()
    given[::2] = -100
    result = lrcompile.recover(compiled, data(), labels=given, steps=60, rate=1e-3, checkpoints=tmp_path)
    assert result.report.recovery is not None
    assert result.report.recovery["loss"][1] < result.report.recovery["loss"][0]


def test_a_set_that_is_sorted_by_class_is_noticed(compiled: Result, tmp_path: Path) -> None:
    given = labels()
    order = given.sort(stable=True).indices
    x = torch.cat([batch["x"] for batch in data().batches])[order]
    apart = lrcompile.calibration_from({"x": x}, ["x"], 8)
    how: dict[str, Any] = {"steps": 5, "rate": 1e-3, "refit": False, "checkpoints": tmp_path}
    noticed = [
        any("shuffle the data" in note for note in lrcompile.recover(compiled, d, labels=y, **how).report.notes)
        for d, y in ((apart, given[order]), (data(), given))
    ]
    assert noticed == [True, False]


# ------------------------------------------------------------------------------------------------- the user's loss


def cross_entropy(scores: Tensor, given: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, given, reduction="none")


def test_cross_entropy_of_the_users_own_is_that_of_lrcompile(compiled: Result, tmp_path: Path) -> None:
    how: dict[str, Any] = {"labels": labels(), "steps": 40, "rate": 1e-3, "checkpoints": tmp_path}
    built_in = weights(lrcompile.recover(compiled, data(), **how))
    own = weights(lrcompile.recover(compiled, data(), loss=cross_entropy, **how))
    assert same(built_in, own)
    mean = weights(lrcompile.recover(compiled, data(), loss=nn.CrossEntropyLoss(), **how))
    assert all(torch.allclose(built_in[name], mean[name], atol=1e-3) for name in built_in)


def test_values_are_learned_by_the_users_loss(compiled: Result, tmp_path: Path) -> None:
    goal = torch.cat([batch["x"] for batch in data().batches])[:, :5] / 10
    result = lrcompile.recover(
        compiled, data(), labels=goal, loss=nn.MSELoss(), steps=200, rate=3e-3, teacher=0.0, checkpoints=tmp_path
    )
    x = torch.cat([batch["x"] for batch in data().batches])
    off = [float((model(x) - goal).detach().square().mean()) for model in (compiled.model, result.model)]
    assert off[1] < 0.5 * off[0]
    each = lrcompile.recover(
        compiled, data(), labels=goal, loss=lambda y, given: (y - given).square(), steps=130, rate=3e-3, subset=0.25,
        batch=16, teacher=0.0, checkpoints=tmp_path,
    )  # fmt: skip
    assert float((each.model(x) - goal).detach().square().mean()) < off[0]


@pytest.mark.parametrize(
    ("loss", "settings", "says"),
    [
        (lambda y, given: 1 / 0, {}, "raised ZeroDivisionError: division by zero"),
        (lambda y, given: 0.5, {}, "returned 'float'; expected a tensor of numbers"),
        (lambda y, given: y.argmax(-1), {}, "returned a tensor of int64"),
        (lambda y, given: (y.argmax(-1) != given).float(), {"teacher": 0.0}, "returned a tensor that has no gradient"),
        (lambda y, given: y[:3].square(), {}, r"of shape \[3, 5\] for 32 samples; expected one number for each"),
        (lambda y, given: y.square().mean(), {"subset": 0.5}, "a subset of the samples is chosen by it"),
        (0.5, {}, "the loss is a float; expected a function"),
    ],
)
def test_bad_losses(compiled: Result, tmp_path: Path, loss: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        lrcompile.recover(
            compiled,
            data(),
            labels=labels(),
            loss=loss,
            steps=200,
            batch=32,
            rate=1e-3,
            checkpoints=tmp_path,
            **settings,
        )


def test_a_loss_that_changed_begins_anew(compiled: Result, tmp_path: Path) -> None:
    """Under the same name: a training that has ended, or was stopped, is of the loss that it began with."""
    times, steps = [1.0], [0]

    def far(y: Tensor, given: Tensor) -> Tensor:
        steps[0] += torch.is_grad_enabled()
        return times[0] * (y - given).square()

    goal, finished = torch.zeros(960, 5), list[Checkpoint]()
    how: dict[str, Any] = {"labels": goal, "loss": far, "rate": 1e-3, "teacher": 0.0, "checkpoints": tmp_path}
    first = lrcompile.recover(compiled, data(), steps=20, finished=finished, **how)
    (held,) = finished
    assert held.path.exists()
    assert steps == [20]
    same_again = lrcompile.recover(compiled, data(), steps=20, finished=finished, **how)
    assert steps == [20]
    assert same(weights(first), weights(same_again))
    times[0] = -1.0
    other = lrcompile.recover(compiled, data(), steps=20, finished=finished, **how)
    assert steps == [40]
    assert {checkpoint.path for checkpoint in finished} == {held.path}
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_users_loss_is_in_single_precision(compiled: Result, tmp_path: Path, precision: str) -> None:
    kinds = set()

    def far(y: Tensor, given: Tensor) -> Tensor:
        kinds.add((y.dtype, (y[:1] @ y[:1].T).dtype))
        return (y - given).square()

    goal = torch.zeros(960, 5)
    lrcompile.recover(
        compiled, data(), labels=goal, loss=far, steps=3, rate=1e-3, precision=precision, refit=False,
        checkpoints=tmp_path,
    )  # fmt: skip
    assert kinds == {(torch.float32, torch.float32)}


def test_a_loss_needs_labels(compiled: Result, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cross_entropy compares outputs with labels, and there are none"):
        lrcompile.recover(compiled, data(), loss=cross_entropy, steps=5, checkpoints=tmp_path)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = written()
    np.save("goal.npy", torch.cat([batch["x"] for batch in data().batches])[:, :5].numpy())
    Path("user_loss.py").write_text("def far(y, given):\n    return (y - given).square()\n\nnumber = 3\n")
    training = [*common, "--recover", "40", "--option", "recover.rate=0.003"]
    assert run([*training, "--labels", "goal.npy", "--loss", "user_loss:far", "--out", "out.onnx"]) == 0
    assert "recovery  error" in capsys.readouterr().out
    for words, says in (
        ([*common, "--labels", "goal.npy", "--loss", "user_loss:far"], "belongs to a recovery"),
        ([*training, "--loss", "user_loss:far"], "--loss user_loss:far compares outputs with labels"),
        ([*training, "--labels", "goal.npy", "--loss", "user_loss:fat"], "did you mean 'far'"),
        ([*training, "--labels", "goal.npy", "--loss", "user_loss:number"], "--loss user_loss:number is a int"),
        ([*training, "--labels", "goal.npy"], "holds float32"),
    ):
        assert run(words) == 2
        assert says in " ".join(capsys.readouterr().err.split())
