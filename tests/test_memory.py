"""Where memory runs out: halves of batches give the same, and less than one sample is refused with advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, CalibrationData, Recovery, Result, calibration_from
from lrcompile.cli import run
from lrcompile.errors import InputError
from lrcompile.frontend.trace import Traced, trace
from lrcompile.memory import in_pieces
from lrcompile.planning.calibration import Statistics, collect
from lrcompile.planning.distribution import entering
from lrcompile.planning.sensitivity import Evaluator
from lrcompile.recovery.loss import Loss
from lrcompile.recovery.samples import Batch
from tests.pairs import pair_of

WIDTH = 96
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


class Net(nn.Module):
    """A table, layers of which two can be split, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.second = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 8, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        y = self.second(self.first(self.table(ids) * scale.unsqueeze(1)).relu()).relu()
        return self.conv(y.movedim(-1, 1))


def inputs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(20, (samples, 7), generator=chance), torch.rand(samples, WIDTH, generator=chance) + 0.5


def data(samples: int, batch: int = 16) -> CalibrationData:
    ids, scale = inputs(samples, 1)
    return calibration_from({"ids": ids, "scale": scale}, ["ids", "scale"], batch)


def limited(module: nn.Module, most: int, error: Callable[[str], Exception], with_gradients: bool = False) -> list[int]:
    """Lets a layer raise what is raised where memory runs out, for more samples than `most`; returns what it ran."""
    ran: list[int] = []

    def check(module: nn.Module, args: tuple[Tensor]) -> None:
        if with_gradients and not torch.is_grad_enabled():
            return
        if len(args[0]) > most:
            raise error(ALLOCATOR)
        ran.append(len(args[0]))

    module.register_forward_pre_hook(check)
    return ran


@pytest.fixture
def traced() -> Traced:
    return trace(Net().eval(), inputs(16, 0))


def moments(found: Statistics) -> dict[str, Tensor]:
    grams = {str(key): known.gram for key, known in found.grams.items()}
    totals = {f"{key} total": known.total for key, known in found.grams.items()}
    rows = {f"{key} rows": torch.tensor(float(known.rows)) for key, known in found.grams.items()}
    return {**grams, **totals, **rows, **{name: c.double() for name, c in found.token_counts.items()}}


def close(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float) -> None:
    assert one.keys() == other.keys()
    for name, expected in one.items():
        torch.testing.assert_close(other[name].double(), expected.double(), rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize("layer", ["first", "conv"])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_calibration_in_halves(traced: Traced, layer: str, error: Callable[[str], Exception]) -> None:
    batches = [inputs(16, seed) for seed in (2, 3)]
    expected = moments(collect(traced.graph, batches))
    spread = entering(traced.graph, batches)
    ran = limited(traced.graph.gm.get_submodule(layer), 5, error)
    close(expected, moments(collect(traced.graph, batches, divisible=True)), rtol=1e-5)
    assert ran == [4] * 8  # the second batch is not tried whole
    assert spread.keys() == entering(traced.graph, batches, divisible=True).keys()


def test_sensing_in_halves(traced: Traced) -> None:
    batches = [inputs(16, seed) for seed in (2, 3)]
    whole = collect(traced.graph, batches, weighted=True)
    limited(traced.graph.gm.get_submodule("conv"), 8, MemoryError)
    halves = collect(traced.graph, batches, weighted=True, divisible=True)
    assert halves.grams.keys() == whole.grams.keys()
    assert halves.gradients.keys() == whole.gradients.keys()
    for name, counts in whole.token_counts.items():
        assert torch.equal(halves.token_counts[name], counts)
    for key, known in whole.gradients.items():  # signs are drawn anew: alike, not equal
        assert float(halves.gradients[key].gram.trace() / known.gram.trace()) == pytest.approx(1, abs=0.2)


def test_errors_are_measured_in_halves(traced: Traced) -> None:
    batches = [inputs(16, seed) for seed in (2, 3)]
    other = trace(Net().eval(), inputs(16, 0)).graph
    with torch.no_grad():
        other.gm.get_submodule("first").weight += 0.01
    expected = Evaluator(traced.graph, batches).error(other)
    limited(traced.graph.gm.get_submodule("first"), 8, RuntimeError)
    halves = Evaluator(traced.graph, batches, divisible=True)
    assert [len(batch[0]) for batch in halves.batches] == [8] * 4
    assert halves.error(other) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("divisible", "most", "says"), [(True, 0, "1 "), (False, 8, "16 ")])
def test_less_than_one_sample_is_refused(traced: Traced, divisible: bool, most: int, says: str) -> None:
    limited(traced.graph.gm.get_submodule("first"), most, MemoryError)
    for work in (collect, Evaluator):
        with pytest.raises(InputError, match=f"not enough memory to run the model .*{says}.*smaller --batch"):
            work(traced.graph, [inputs(16, 2)], divisible=divisible)


def test_other_errors_are_not_hidden(traced: Traced) -> None:
    limited(traced.graph.gm.get_submodule("first"), 4, lambda text: RuntimeError("shapes differ"))
    for work in (collect, Evaluator, entering):
        with pytest.raises(InputError, match=r"does not run on the data .*RuntimeError: shapes differ"):
            work(traced.graph, [inputs(16, 2)], divisible=True)


def test_pieces_share_what_has_no_samples() -> None:
    x, table, number = torch.arange(5), torch.zeros(3), torch.tensor(2.0)
    found = in_pieces((x, table, number, True), 2)
    assert [piece[0].tolist() for piece in found] == [[0, 1], [2, 3], [4]]
    assert all(piece[1] is table and piece[2] is number and piece[3] is True for piece in found)


# ------------------------------------------------------------------------------------------------------- recovery


@pytest.fixture(scope="module")
def compiled() -> Result:
    result = lrcompile.compile(Net().eval(), inputs(16, 0), target="rpi5", budget=Budget(size=0.7))
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)
    return result


def unlimited(result: Result) -> None:
    for module in (*result.model.modules(), *result.traced.graph.gm.modules()):
        module._forward_pre_hooks.clear()


@pytest.mark.parametrize("settings", [{}, {"outputs": "kl"}, {"hidden": 0.0}])
def test_the_loss_in_parts_is_that_of_the_whole(compiled: Result, settings: dict[str, Any]) -> None:
    couple = pair_of(compiled, inputs(10, 4))
    loss, batch = Loss(couple, Recovery(steps=1, precision="fp32", **settings)), Batch(inputs(10, 5), None)
    parameters = [p for p in couple.trained.gm.parameters() if p.is_floating_point()]

    def gradients(most: int) -> tuple[float, Tensor]:
        total = sum((part.sum() for part in loss.parts(batch, most)), torch.zeros(()))
        found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        return float(total.detach()), torch.cat([g.flatten() for g in found])

    value, expected = gradients(10)
    assert value > 0
    for most in (5, 3, 1):
        other, got = gradients(most)
        assert other == pytest.approx(value, rel=1e-5)
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("settings", [{}, {"sam": 0.05}])
def test_recovery_in_smaller_parts(compiled: Result, tmp_path: Path, settings: dict[str, Any]) -> None:
    how: dict[str, Any] = {
        "steps": 6,
        "batch": 16,
        "rate": 1e-3,
        "precision": "fp32",
        "refit": False,
        "checkpoints": tmp_path,
    }
    whole = lrcompile.recover(compiled, data(160), **how, **settings)
    ran = limited(compiled.model.get_submodule("conv"), 5, MemoryError, with_gradients=True)
    try:
        parts = lrcompile.recover(compiled, data(160), **how, **settings)
    finally:
        unlimited(compiled)
    assert set(ran) == {4}
    first, second = whole.model.state_dict(), parts.model.state_dict()
    start = compiled.model.state_dict()
    moved = max(float((first[name] - start[name]).norm()) for name in first)
    assert moved > 0
    for name in first:
        assert float((first[name] - second[name]).norm()) <= 2e-3 * moved, name
    assert parts.report.error["measured"] == pytest.approx(whole.report.error["measured"], rel=1e-4)


def test_recovery_without_memory_for_one_sample(compiled: Result, tmp_path: Path) -> None:
    limited(compiled.model.get_submodule("conv"), 0, RuntimeError, with_gradients=True)
    try:
        with pytest.raises(InputError, match="recovery: not enough memory to train on 1 samples at a time; give"):
            lrcompile.recover(compiled, data(160), steps=2, rate=1e-3, refit=False, checkpoints=tmp_path)
    finally:
        unlimited(compiled)


def test_the_command_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: object) -> None:
    def without(*args: object, **kwargs: object) -> None:
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr("lrcompile.session.compile_model", without)
    monkeypatch.setattr("lrcompile.session._asked", lambda *asked: type("A", (), {"inputs": (), "options": {}})())
    assert run(["net:build", "--target", "v100", "--out", str(tmp_path / "out.onnx")]) == 2
    assert "out of memory; try a smaller --batch" in capsys.readouterr().err  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
