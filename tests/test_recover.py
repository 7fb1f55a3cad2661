"""Recovery: what it learns, what it leaves alone, how it goes on after a stop, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Recovery, Result
from lrcompile.cache import put_whole
from lrcompile.cli import run
from lrcompile.errors import InputError
from lrcompile.recovery import train as training
from lrcompile.recovery.checkpoint import Checkpoint
from lrcompile.recovery.loss import Loss
from lrcompile.recovery.optimise import Masters, RunningMean, centralise
from lrcompile.recovery.pair import Pair, _moved, independent
from lrcompile.recovery.samples import samples_of
from tests.pairs import pair_of
from tests.recovered import WIDTH, data, labels, net, recovered, same, split_net, weights, written


@pytest.fixture(scope="module")
def compiled() -> Result:
    return split_net()


def test_it_lowers_the_error_on_samples_kept_out(compiled: Result, tmp_path: Path) -> None:
    before = weights(compiled)
    result = recovered(compiled, tmp_path, steps=300, rate=3e-3)
    figures = result.report.recovery
    assert figures is not None
    assert figures["error"][1] < 0.9 * figures["error"][0]
    assert figures["loss"][1] < figures["loss"][0]
    assert same(before, weights(compiled))  # the compiled model is as it was
    assert not same(before, weights(result))
    assert {**(result.plan.recovery or {}), "seconds": figures["seconds"]} == figures
    assert "seconds" not in (result.plan.recovery or {})  # equal runs make equal plans
    assert not list(tmp_path.iterdir())  # a checkpoint is not kept beyond the end


def test_unseen_data_gain_too(compiled: Result, tmp_path: Path) -> None:
    x = data(seed=2).batches[0]["x"]
    expected = net()(x)
    result = lrcompile.recover(compiled, data(), steps=300, rate=3e-3, checkpoints=tmp_path)
    with torch.no_grad():
        errors = [float((model(x) - expected).norm()) for model in (compiled.model, result.model)]
    assert errors[1] < 0.9 * errors[0]


def test_what_is_judged_worse_is_not_kept(compiled: Result, tmp_path: Path) -> None:
    result = recovered(compiled, tmp_path, steps=20, rate=10.0)
    figures = result.report.recovery
    assert figures is not None
    assert figures["kept_step"] == 0
    assert same(weights(compiled), weights(result))
    assert any("made nothing better" in note for note in result.report.notes)


def test_a_rate_is_chosen(compiled: Result, tmp_path: Path) -> None:
    figures = recovered(compiled, tmp_path, steps=400, rate=None).report.recovery
    assert figures is not None
    least, most = (recovered(compiled, tmp_path, steps=400, rate=rate).report.recovery for rate in (1e-5, 1.0))
    assert least is not None
    assert most is not None
    assert figures["loss"][1] < min(least["loss"][1], most["loss"][1])


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"subset": 0.5}, {"freeze": "sequential"}, {"rate": None}])
def test_a_stopped_training_ends_as_one_that_was_not(
    compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = recovered(compiled, tmp_path / "whole", steps=90, **settings)
    monkeypatch.setattr(training, "SAVED_EVERY_S", 0.0)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == 47:
            raise KeyboardInterrupt

    settings = {"steps": 90, "rate": 1e-3, "refit": False} | settings
    with pytest.raises(KeyboardInterrupt):
        lrcompile.recover(compiled, data(), checkpoints=tmp_path / "cut", progress=stop, **settings)
    assert len(list((tmp_path / "cut").iterdir())) == 1
    steps = []
    again = lrcompile.recover(
        compiled, data(), checkpoints=tmp_path / "cut", progress=lambda s, done, total: steps.append(done), **settings
    )
    assert steps[0] == 47
    assert same(weights(whole), weights(again))


def test_a_damaged_checkpoint_is_as_none(compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVED_EVERY_S", 0.0)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lrcompile.recover(compiled, data(), steps=60, rate=1e-3, refit=False, checkpoints=tmp_path, progress=stop)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    whole = recovered(compiled, tmp_path / "other")
    assert same(weights(whole), weights(recovered(compiled, tmp_path)))


def test_a_cache_that_cannot_be_used_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    below = Checkpoint(tmp_path / "file" / "a.pt")
    below.save({"step": 1})
    below.drop()

    def closed(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "is_file", closed)
    assert below.load() is None


def test_what_a_killed_write_left_is_removed_in_time(tmp_path: Path) -> None:
    one = Checkpoint.of("one", folder=tmp_path)
    with suppress(KeyboardInterrupt), put_whole(one.path) as path:
        (written,) = (found.name for found in tmp_path.iterdir())
        assert path.name == written
        raise KeyboardInterrupt
    left = [tmp_path / name for name in (written, Checkpoint.of("two").path.name)]
    others = [tmp_path / name for name in ("model.pt", "old.tmp", f"{one.path.name}.md")]  # the user's own
    for path in (*left, *others):
        path.write_text("")
        os.utime(path, (0, 0))
    new = tmp_path / f"{left[1].name}.new.tmp"
    new.write_text("")
    one.save({"step": 1})
    assert set(tmp_path.iterdir()) == {one.path, new, *others}


# --------------------------------------------------------------------------------------------- what is compared


def test_values_inside_are_those_of_rewritten_layers(compiled: Result) -> None:
    x = data().batches[0]["x"]
    couple = pair_of(compiled, (x,))
    sites = {rewrite.site[0] for rewrite in compiled.plan.rewrites}
    assert len(couple.inside) == len(sites)
    with torch.no_grad():
        expected = couple.expected((x,))
        found = couple.differences((x,), expected, "mse")
        assert torch.allclose(found.got[0], compiled.model(x))
    assert torch.allclose(expected[0][0], net()(x))
    assert found.outputs.shape == found.inside.shape == (8,)
    assert 0 < float(found.inside.mean()) < 1


def test_the_trained_copy_shares_no_memory_and_keeps_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    prepared = lrcompile.prepare_model(Tied().eval(), (torch.zeros(2, 3, dtype=torch.long),))
    copied = independent(prepared.graph)
    ours, theirs = ({p.data_ptr() for p in graph.gm.parameters()} for graph in (prepared.graph, copied))
    assert len(ours) == len(theirs) == 1
    assert not ours & theirs


def test_a_graph_moves_with_what_it_makes_itself() -> None:
    """Weights stay the same objects, so that those that are trained elsewhere are those of the result."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + torch.arange(5, device="cpu")

    result = lrcompile.compile(Counted().eval(), (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    couple, x = pair_of(result, (torch.randn(8, WIDTH),)), torch.randn(8, WIDTH)
    there, expected = torch.device("meta"), couple.student(x)[0][0]
    trained = dict(couple.trained.gm.named_parameters())
    weights_before = {name: p.detach().clone() for name, p in trained.items()}
    with couple.on(torch.device("cpu")) as same_pair:
        assert same_pair is couple
    moved = _moved(copy.deepcopy(couple.student), there)
    assert moved(x.to(there))[0][0].device == there
    assert all(parameter.device == there for parameter in moved.parameters())
    kept = {id(parameter) for parameter in couple.student.parameters()}
    assert _moved(couple.student, torch.device("cpu")) is couple.student
    assert {id(parameter) for parameter in couple.student.parameters()} == kept
    assert kept <= {id(parameter) for parameter in trained.values()}
    assert torch.equal(couple.student(x)[0][0], expected)
    assert all(torch.equal(weights_before[name], p) for name, p in trained.items())


@pytest.mark.parametrize("settings", [{}, {"outputs": "kl", "attention": 1.0}])
def test_a_step_elsewhere_mixes_no_devices(compiled: Result, settings: dict[str, Any]) -> None:
    """On the meta device, where nothing is computed and other devices are refused as on a GPU."""
    couple, there = pair_of(compiled, (torch.randn(8, WIDTH),)), torch.device("meta")
    moved = Pair(
        _moved(copy.deepcopy(couple.teacher), there), _moved(couple.student, there), couple.trained, couple.inside
    )
    samples = samples_of([(torch.randn(8, WIDTH),)] * 4, None, 8)
    loss = Loss(moved, Recovery(steps=1, **({"precision": "fp32"} | settings)))
    assert loss.device == there
    parameters = [p for p in moved.trained.gm.parameters() if p.is_floating_point()]
    masters = Masters(parameters)
    mean = RunningMean(masters, 0.9)
    for most in (8, 3):
        for part in loss.parts(samples.batch(torch.arange(8)), most):
            part.mean().backward()
    trained = masters.gather(1.0)
    centralise(trained)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    masters.step(torch.optim.AdamW(masters.weights, 1e-3))
    mean.update()
    with mean.in_place():
        masters.put([torch.zeros(p.shape) for p in parameters])
    assert all(p.grad is not None and p.grad.device == there for p in parameters)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no CUDA GPU here; leave it out to use the CPU"):
            Recovery(steps=1, device="cuda")
        assert Recovery(steps=1).where == torch.device("cpu")
    with pytest.raises(InputError, match="device is 'tpu'; expected one of cpu, cuda"):
        Recovery(steps=1, device="tpu")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_loss_that_is_no_number_goes_back(compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = Loss.__call__

    def sometimes(self: Loss, batch: Any, inside: bool = True) -> Tensor:
        calls.append(batch)
        loss = plain(self, batch, inside)
        return loss * math.nan if len(calls) in (30, 31) and torch.is_grad_enabled() else loss

    monkeypatch.setattr(Loss, "__call__", sometimes)
    result = recovered(compiled, tmp_path, rate=4e-3)
    figures = result.report.recovery
    assert figures is not None
    assert figures["rolled_back"] == 2
    assert figures["rate"] == 1e-3
    assert figures["loss"][1] < figures["loss"][0]


def test_a_loss_that_stays_no_number_ends_it(compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loss.__call__
    monkeypatch.setattr(
        Loss,
        "__call__",
        lambda self, batch, inside=True: plain(self, batch, inside) * (math.nan if torch.is_grad_enabled() else 1),
    )
    result = recovered(compiled, tmp_path)
    assert same(weights(compiled), weights(result))
    assert any("stopped being finite 6 times" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "give either --recover STEPS or --recover-minutes"),
        ({"steps": 5, "minutes": 1}, "give either"),
        ({"steps": -1}, "steps is -1; expected a number of at least 0"),
        ({"minutes": math.nan}, "minutes is nan"),
        ({"steps": 5, "ema": 1.0}, "ema is 1.0; expected a number from 0"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"steps": 5, "batch": 16.0}, "batch is 16.0; expected a whole number"),
        ({"steps": 5, "seed": 0.5}, "seed is 0.5; expected a whole number"),
        ({"steps": 5, "seed": None}, "seed is None; expected a whole number"),
        ({"steps": 5, "hidden": np.float32("nan")}, "hidden is .*nan.*; expected a number of at least 0"),
        ({"steps": 5, "freeze": "all"}, "expected one of none, regular, sequential"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recovery(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    settings = Recovery(steps=np.int64(5), rate=np.float32(0.5), batch=np.int8(16), hidden=2, seed=np.uint64(3))
    assert settings == Recovery(steps=5, rate=0.5, batch=16, hidden=2.0, seed=3)
    assert json.loads(json.dumps(settings.to_json()))["rate"] == 0.5
    assert Recovery(minutes=np.float64(0.5)).steps is None


def test_what_python_users_give(compiled: Result, tmp_path: Path) -> None:
    """The signature in `docs/python-api.md`, a folder by its name, labels that are no tensor, and seeds of any size."""
    options: dict[str, Any] = {"steps": 2, "rate": 1e-3, "subset": 0.5, "batch": 64, "seed": 2**64 - 1}
    options |= {"progress": None, "checkpoints": str(tmp_path / "kept")}
    found = lrcompile.recover(compiled, data(), labels=labels().numpy(), **options)
    assert found.report.recovery is not None
    assert found.report.recovery["steps"] == 2


def test_one_batch_is_too_few(compiled: Result) -> None:
    with pytest.raises(InputError, match="one batch of 8 samples"):
        lrcompile.recover(compiled, data(8), steps=5)


def test_nothing_lossy_needs_nothing() -> None:
    result = lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(max_error=0))
    same_one = lrcompile.recover(result, data(), steps=5)
    assert same_one.model is result.model
    assert any("nothing to recover" in note for note in same_one.report.notes)


def test_what_another_tool_made_learns_from_the_original() -> None:
    smaller = net()
    with torch.no_grad():
        smaller.get_submodule("second").weight.mul_(torch.rand(WIDTH, WIDTH) < 0.5)
    result = lrcompile.compile(smaller, (torch.randn(8, WIDTH),), target="rpi5", passes=[])
    original = lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", passes=[]).traced.graph
    figures = lrcompile.recover(result, data(), original=original, steps=60, rate=3e-3).report.recovery
    assert figures is not None
    assert figures["error"][1] < 0.7 * figures["error"][0]


def test_minutes_end_in_time(compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, step = [0.0], training._Training._step

    def slow(self: training._Training, numbers: Tensor, rate: float) -> bool:
        seconds[0] += 0.5
        return step(self, numbers, rate)

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(training._Training, "_step", slow)
    result = lrcompile.recover(compiled, data(), minutes=2, refit=False, checkpoints=tmp_path)
    figures = result.report.recovery
    assert figures is not None
    assert 100 < figures["seconds"] <= 120
    assert figures["steps"] > 1


def test_the_rate_falls_in_time_where_the_machine_slows_down(
    compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, rates = [0.0], []
    step = training._Training._step

    def slow(self: training._Training, numbers: Tensor, rate: float) -> bool:
        rates.append(rate)
        seconds[0] += 1.0 if len(rates) <= 3 else 4.0  # three steps say how long one takes
        return step(self, numbers, rate)

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(training._Training, "_step", slow)
    result = lrcompile.recover(compiled, data(), minutes=2, rate=1e-3, refit=False, checkpoints=tmp_path)
    figures = result.report.recovery
    assert figures is not None
    assert figures["steps"] == len(rates) - 3 == 30  # of some hundred that there was time for
    assert rates[-1] < 0.02
    assert max(rates) > 0.99


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = written()
    np.save("labels.npy", labels().numpy())
    code = run(
        [*common, "--recover", "80", "--labels", "labels.npy", "--option", "recover.rate=0.003", "--out", "out.onnx",
         "--plan-out", "plan.json", "--report-json", "report.json"]
    )  # fmt: skip
    assert code == 0
    assert "recovery  error" in capsys.readouterr().out
    report = json.loads(Path("report.json").read_text())
    assert report["recovery"]["error"][1] < report["recovery"]["error"][0]
    assert report["verification"]["onnx_vs_torch"] < 1e-4
    assert json.loads(Path("plan.json").read_text())["recovery"]["steps"] == 80
    assert run(["net.pt2", "--plan", "plan.json", "--calib", "calib.npz", "--out", "again.onnx"]) == 0
    assert "was trained" in " ".join(capsys.readouterr().out.split())
    for words, says in (
        (["--labels", "labels.npy"], "belongs to a recovery"),
        (["--recover", "5", "--option", "recover.freez=none"], "did you mean 'freeze'"),
        (["--recover", "5", "--option", "recover.rate=fast"], "expected a number, got 'fast'"),
        (["--recover", "5", "--labels", "calib.npz"], "holds float32"),
    ):
        assert run([*common, *words]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert run(["net.pt2", "--target", "rpi5", "--recover", "5"]) == 2
    assert "no inputs to learn from" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
def test_two_processes_train_as_one(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    torch.export.save(
        torch.export.export(net(), (torch.randn(8, WIDTH),), dynamic_shapes=({0: torch.export.Dim.AUTO},)), "net.pt2"
    )
    np.savez("calib.npz", x=torch.cat([batch["x"] for batch in data().batches]).numpy())
    assert run(["net.pt2", "--size", "0.6", "--calib", "calib.npz", "--plan-out", "plan.json", "--target", "rpi5"]) == 0
    words = ["-m", "lrcompile", "net.pt2", "--plan", "plan.json", "--calib", "calib.npz", "--recover", "60"]
    words += [f"--option=recover.{option}" for option in ("rate=0.001", "precision=fp32", f"device={device}")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        more = ["--out", f"{name}", "--report-json", f"{name}.json"]
        done = subprocess.run([*command, *words, *more], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("recovery  error") == 1
    one, two = (json.loads(Path(f"{name}.json").read_text())["recovery"] for name in ("one", "two"))
    assert [figures["processes"] for figures in (one, two)] == [1, 2]
    assert {figures["device"] for figures in (one, two)} == {device}
    assert one["steps"] == two["steps"] == 60
    assert two["error"][1] < two["error"][0]
    assert two["error"][1] == pytest.approx(one["error"][1], rel=0.01)
    refused = subprocess.run(
        [*launch, "-m", "lrcompile", "net.pt2", "--calib", "calib.npz", "--recover", "5"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "each would decide for itself" in refused.stdout + refused.stderr
