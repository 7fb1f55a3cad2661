"""What a recovery is made of: differences, layers fitted anew, frozen factors, steps, labels, importance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Recovery, Result
from lrcompile.graph.graph import Graph
from lrcompile.recovery import train as training
from lrcompile.recovery.checkpoint import Checkpoint
from lrcompile.recovery.freeze import factors_of
from lrcompile.recovery.importance import most_important
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.optimise import Masters, RunningMean, centralise, rate_at, sharpness_aware
from lrcompile.recovery.pair import difference
from lrcompile.recovery.processes import Processes
from lrcompile.recovery.refit import fitted, refit
from lrcompile.recovery.samples import samples_of
from tests.pairs import pair_of
from tests.recovered import WIDTH, data, net, recovered, same, split_net, weights


@pytest.fixture(scope="module")
def compiled() -> Result:
    return split_net()


def test_differences() -> None:
    y, z = torch.randn(4, 6), torch.randn(4, 6)
    each = difference(y, z, 4, "mse")
    assert torch.allclose(each.mean(), (z - y).square().sum() / y.square().sum())
    assert torch.allclose(difference(y.flatten(), z.flatten(), 4, "mse"), each)
    uneven = difference(y.flatten()[:23], z.flatten()[:23], 4, "mse")
    assert uneven.shape == (4,)
    assert float(uneven.std()) == 0
    p, q = y.softmax(-1), z.softmax(-1)
    assert torch.allclose(difference(y, z, 4, "kl"), (p * (p / q).log()).sum(-1), atol=1e-6)


# ------------------------------------------------------------------------------------------------- fitting anew


def test_layers_fitted_anew_lower_the_error_on_unseen_data(compiled: Result, tmp_path: Path) -> None:
    before = weights(compiled)
    result = lrcompile.recover(compiled, data(3000, seed=3), steps=0, checkpoints=tmp_path)
    figures = result.report.recovery
    assert figures is not None
    assert figures["steps"] == 0
    split = {rewrite.site[0] for rewrite in compiled.plan.rewrites if not rewrite.exact}
    assert {f"{site}.1" for site in split} <= set(figures["refitted"])
    assert "head" in figures["refitted"]
    assert figures["error"][1] < figures["error"][0]
    assert same(before, weights(compiled))
    x = torch.cat([batch["x"] for batch in data(seed=2).batches])
    with torch.no_grad():
        expected = net()(x)
        errors = [float((model(x) - expected).norm()) for model in (compiled.model, result.model)]
    assert errors[1] < errors[0]


def test_a_fitted_layer_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    layer, wanted = nn.Linear(7, 5), nn.Linear(7, 5)
    inputs = [torch.randn(40, 7) for _ in range(3)]
    with torch.no_grad():
        found = fitted(layer, inputs, [wanted(x) for x in inputs], ridge=0.0)
    assert torch.allclose(found.weight, wanted.weight, atol=1e-5)
    assert torch.allclose(found.bias, wanted.bias, atol=1e-5)
    held = fitted(layer, inputs, [wanted(x) for x in inputs], ridge=1e9)
    assert torch.allclose(held.weight, layer.weight, atol=1e-5)
    kernel = nn.Conv2d(7, 5, 1, bias=False)
    images = [torch.randn(4, 7, 6, 6)]
    goal = nn.Conv2d(7, 5, 1, bias=False)
    with torch.no_grad():
        assert torch.allclose(fitted(kernel, images, [goal(images[0])], ridge=0.0).weight, goal.weight, atol=1e-5)
        for old, wants, alone in (
            (kernel, goal, list(images[0])),
            (layer, wanted, list(inputs[0])),
        ):  # without a batch axis
            found = fitted(old, alone, [wants(x) for x in alone], ridge=0.0)
            assert torch.allclose(found.weight, wants.weight, atol=1e-5)


def test_what_nothing_was_lost_before_is_not_fitted() -> None:
    graph = lrcompile.prepare_model(net(), (torch.randn(8, WIDTH),)).graph
    assert refit(graph, graph, [(torch.randn(8, WIDTH),)], Lineage.of(graph).counterparts(graph))[1] == ()


# ------------------------------------------------------------------------------------------------------- freezing


def test_factors(compiled: Result) -> None:
    graph = Graph(compiled.model, compiled.traced.graph.fake_mode)
    outer, inner = factors_of(graph, compiled.traced.graph.gm)
    named = {id(parameter): name for name, parameter in compiled.model.named_parameters()}
    sites = {rewrite.site[0] for rewrite in compiled.plan.rewrites if not rewrite.exact}
    assert {named[id(p)] for p in outer} == {f"{site}.0.weight" for site in sites}
    assert {named[id(p)] for p in inner} == {f"{site}.1.weight" for site in sites}


@pytest.mark.parametrize("freeze", ["regular", "sequential"])
def test_frozen_factors_are_bit_identical_over_their_epoch(compiled: Result, freeze: str) -> None:
    x = data()
    batches = [(batch["x"],) for batch in x.batches]
    samples = samples_of(batches, None, 16)
    couple = pair_of(compiled, batches[0])
    outer, inner = factors_of(couple.trained, couple.teacher)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def watch(stage: str, done: int, total: int) -> None:
        if done % samples.steps_an_epoch == 0 and len(seen) < 5:
            seen.append(([p.detach().clone() for p in outer], [p.detach().clone() for p in inner]))

    steps = 4 * samples.steps_an_epoch
    settings = Recovery(steps=steps, rate=1e-3, freeze=freeze)  # type: ignore[arg-type]
    training.train(couple, samples, settings, progress=watch)
    for epoch in range(3):
        kept = [all(map(torch.equal, seen[epoch][side], seen[epoch + 1][side])) for side in (0, 1)]
        assert kept == ([True, False] if freeze == "regular" or epoch % 2 == 0 else [False, True]), epoch


# ------------------------------------------------------------------------------------------ what is laid over AdamW


def test_a_sharpness_aware_step_is_that_of_the_worst_point_near_by() -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

    def backward() -> Tensor:
        loss = 0.5 * w @ matrix @ w
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    backward()
    start = w.detach().clone()
    g = matrix @ start
    expected = matrix @ (start + 0.05 * g / g.norm())
    sharpness_aware([w], 0.05, backward)
    assert w.grad is not None
    assert torch.allclose(w.grad, expected, atol=1e-9)
    assert torch.allclose(w.detach(), start, atol=1e-12)


def test_centralised_gradients_have_no_mean() -> None:
    kernel, bias = nn.Parameter(torch.randn(4, 3, 5, 5)), nn.Parameter(torch.randn(4))
    kernel.grad, bias.grad = torch.randn(4, 3, 5, 5), torch.ones(4)
    centralise([kernel, bias])
    assert float(kernel.grad.mean((1, 2, 3)).abs().max()) < 1e-7
    assert torch.equal(bias.grad, torch.ones(4))


def test_a_running_mean_is_unbiased_and_leaves_the_weights() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    mean = RunningMean(Masters([w]), 0.9)
    for value in (1.0, 2.0):
        w.data.fill_(value)
        mean.update()
    with mean.in_place():
        assert w.item() == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / 0.19)
    assert w.item() == 2.0


def test_steps_too_small_for_half_precision_add_up() -> None:
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = Masters([w])
    optimizer = torch.optim.SGD(masters.weights, lr=1e-4)
    for _ in range(200):
        w.grad = -torch.ones_like(w)
        masters.gather(1.0)
        masters.step(optimizer)
    assert w.tolist() == pytest.approx([1.02] * 3, abs=0.004)


def begun(compiled: Result, checkpoint: Checkpoint | None, processes: Processes, **settings: Any) -> training._Training:
    """A training before its first step."""
    batches = [(batch["x"],) for batch in data().batches]
    dtype = next(compiled.model.parameters()).dtype
    batches = [(x.to(dtype),) for (x,) in batches]
    couple, samples = pair_of(compiled, batches[0]), samples_of(batches, None, 16)
    recovery = Recovery(**{"steps": 4, "rate": 1e-3} | settings)
    return training._Training(couple, samples, recovery, checkpoint, lambda *given: None, processes, lambda: False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_forgets_the_gradients_of_the_one_before(dtype: str) -> None:
    compiled = lrcompile.compile(
        net(), (torch.randn(8, WIDTH),), target="rpi5", dtype=dtype, budget=Budget(size=0.6)
    )  # fmt: skip
    training_ = begun(compiled, None, Processes())
    training_._begin()
    order = training_._order()
    gradients = []
    for _ in range(2):
        assert training_._step(order[0], 0.0)
        gradients.append([p.grad.clone() for p in training_.parameters if p.grad is not None])
    assert gradients[0]
    assert all(map(torch.equal, *gradients))


def test_all_processes_ask_each_other_whatever_they_have(compiled: Result, tmp_path: Path) -> None:
    """On another machine there may be no checkpoint: a process that has one must not wait for ever."""
    asked: dict[str, int] = {}
    path = Checkpoint.of("facts", folder=tmp_path)

    class Asked(Processes):
        def mean(self, values: Sequence[float]) -> list[float]:
            asked[where] = asked.get(where, 0) + 1
            return [0.5 * value for value in values]  # the other one has none

    for where, checkpoint in (("without", None), ("none", path), ("with", path)):
        if where == "with":
            path.save({"weights": [p.detach() for p in begun(compiled, None, Processes()).parameters]})
        assert not begun(compiled, checkpoint, Asked())._resumed()
    assert asked == {"without": 1, "none": 1, "with": 1}


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8])
def test_each_sample_counts_as_much_over_processes(samples: int) -> None:
    values = torch.randn(samples)
    shares = [Processes(4, index).share(torch.arange(samples)) for index in range(4)]
    means = [weight * float(values[part].mean()) for part, weight in shares]
    assert sum(means) / 4 == pytest.approx(float(values.mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_models_in_half_precision(tmp_path: Path, dtype: str) -> None:
    result = lrcompile.compile(
        net(), (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6), calibration=data(), dtype=dtype
    )
    after = recovered(result, tmp_path, steps=200)
    figures = after.report.recovery
    assert figures is not None
    assert figures["error"][1] < 0.95 * figures["error"][0]
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {parameter.dtype for parameter in after.model.parameters()} == {kind}


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step / 200) for step in range(201)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(1.0)
    assert top == 10
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] <= 0.011


@pytest.mark.parametrize(
    "settings",
    [{"sam": 0.05}, {"centralize": True}, {"ema": 0.9}, {"outputs": "kl"}, {"hidden": 0}, {"precision": "bf16"}],
)
def test_each_option_trains(compiled: Result, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = recovered(compiled, tmp_path, **settings)
    assert result.report.recovery is not None
    before, after = result.report.recovery["loss"]
    assert after < before


# ----------------------------------------------------------------------------------------------------- importance


def test_the_most_important_are_kept_by_class() -> None:
    importance = torch.arange(20.0)
    classes = torch.tensor([0] * 10 + [1] * 10)
    assert most_important(importance, 0.3, classes, 0.0, 0).tolist() == [7, 8, 9, 17, 18, 19]
    assert most_important(importance, 0.3, None, 0.0, 0).tolist() == [14, 15, 16, 17, 18, 19]
    mixed = most_important(importance, 0.4, None, 0.5, 0).tolist()
    assert len(set(mixed)) == 8
    assert {16, 17, 18, 19} <= set(mixed)
    assert min(mixed) < 16


def test_hard_tasks_draw_at_random_and_say_so(compiled: Result, tmp_path: Path) -> None:
    noise = torch.randint(5, (960,), generator=torch.Generator().manual_seed(0))
    result = lrcompile.recover(
        compiled, data(), labels=noise, steps=130, rate=1e-3, subset=0.25, batch=16, checkpoints=tmp_path
    )
    assert any("of the training samples were learned" in note for note in result.report.notes)
    assert result.report.recovery is not None
    assert result.report.recovery["scored"] % result.report.recovery["samples"] == 0
    assert result.report.recovery["scored"] > 0
    with torch.no_grad():
        own = torch.cat([compiled.model(batch["x"]).argmax(-1) for batch in data().batches])
    learned = lrcompile.recover(
        compiled, data(), labels=own, steps=130, rate=1e-5, refit=False, subset=0.25, batch=16, checkpoints=tmp_path
    )
    assert not any("of the training samples were learned" in note for note in learned.report.notes)
