"""Recoveries of what is out of the ordinary: float16, masks in outputs, labels that say nothing, folded and merged."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pair_of
from recovered import WIDTH, data, net, split_net
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, CalibrationData, Recovery, Result, calibration_from
from lrcompile.errors import InputError
from lrcompile.graph.graph import Graph
from lrcompile.graph.rewrite import Rewrite
from lrcompile.graph.verify import relative_error
from lrcompile.recover import _remarks
from lrcompile.recovery import refit as refit_module
from lrcompile.recovery.freeze import factors_of
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.loss import probabilities_off, right
from lrcompile.recovery.optimise import Masters, sharpness_aware
from lrcompile.recovery.pair import difference
from lrcompile.recovery.processes import Processes
from lrcompile.recovery.refit import refit
from lrcompile.recovery.samples import IGNORED
from lrcompile.recovery.settings import Precision
from lrcompile.recovery.train import Trained


@pytest.fixture(scope="module")
def compiled() -> Result:
    return split_net()


# ------------------------------------------------------------------------------------------------------- float16


class Spread(nn.Module):
    """Its many and large outputs leave each a gradient too small for float16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return 512 * self.second(self.first(x).relu()).unsqueeze(-1).expand(-1, -1, 2048).reshape(len(x), -1)


def test_small_gradients_do_not_vanish_in_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = lrcompile.compile(
        Spread().eval(), (torch.randn(8, WIDTH),), target="rpi5", dtype="fp16", budget=Budget(size=0.6)
    )
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1)).half()
    options: dict[str, Any] = {"rate": 3e-3, "refit": False, "hidden": 0.0, "checkpoints": tmp_path}
    found = lrcompile.recover(result, calibration_from({"x": x}, ["x"], 8), steps=30, **options)
    assert found.report.recovery is not None
    before, after = found.report.recovery["error"]
    assert after < 0.9 * before


def test_gradients_that_overflow_are_not_followed_to_the_worst_point_near_by() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, torch.inf, 0.0])
    sharpness_aware([weight], 0.05, lambda: pytest.fail("it goes there"))
    assert weight.tolist() == [1, 1, 1]


class Clips(nn.Module):
    """Three frames are one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().view(x.shape[0] // 3, 3, WIDTH).mean(1))


def test_samples_of_several_rows_stay_together() -> None:
    torch.manual_seed(0)
    result = lrcompile.compile(Clips().eval(), (torch.randn(6, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    assert result.traced.open_axes == ((0,),)
    x = torch.randn(120, WIDTH, generator=torch.Generator().manual_seed(1))
    found = lrcompile.recover(result, calibration_from({"x": x}, ["x"], 6), steps=20, rate=1e-3)
    assert found.report.recovery is not None
    before, after = found.report.recovery["error"]
    assert after < before
    with pytest.raises(InputError, match="or of multiples of a number, only, so its batch cannot be set"):
        lrcompile.recover(result, calibration_from({"x": x}, ["x"], 6), steps=20, batch=32)


def test_a_loss_that_is_too_large_for_float16_is_scaled_less(compiled: Result, tmp_path: Path) -> None:
    from lrcompile.recovery import train as training

    half = lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", dtype="fp16", budget=Budget(size=0.6))
    batches = [(batch["x"].half(),) for batch in data(64).batches]
    samples = lrcompile.recovery.samples.samples_of(batches, None, 16)
    given = (pair_of(half, batches[0]), samples, Recovery(steps=4, rate=1e-3), None, lambda *_: None, Processes())
    one = training._Training(*given, lambda: False)
    one._begin()
    assert one.state.scale == training.LOSS_SCALE
    one.state.scale = 2.0**60
    assert one._step(one._order()[0], 1.0)
    assert 1.0 < one.state.scale < 2.0**60
    assert one.state.rolled_back == 0


def test_gathered_gradients_are_those_of_the_loss() -> None:
    weights = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float16, torch.float32)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 8.0)
    trained = Masters(weights).gather(4.0)
    assert [w.grad.tolist() for w in trained if w.grad is not None] == [[2.0] * 3] * 2
    assert trained[1] is weights[1]


# ------------------------------------------------------------------------------------------- what masks put in outputs


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("form", ["mse", "kl"])
def test_masked_scores_count_for_nothing(fill: float, form: Any) -> None:
    torch.manual_seed(0)
    y, z = torch.randn(4, 6), torch.randn(4, 6).requires_grad_()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 4:] = True
    masked = difference(y.masked_fill(mask, fill), z.masked_fill(mask, fill), 4, form)
    plain = difference(y[:, :4], z[:, :4], 4, form)
    assert torch.allclose(masked, plain, rtol=1e-4)
    (gradient,) = torch.autograd.grad(masked.sum(), z)
    assert gradient.isfinite().all()
    assert gradient[:, :4].abs().max() > 0
    assert gradient[:, 4:].abs().max() == 0


@pytest.mark.parametrize(
    ("fill", "dtype"),
    [(-math.inf, torch.float32), (torch.finfo(torch.float32).min, torch.float32), (-1e9, torch.float32),
     (torch.finfo(torch.float16).min, torch.float16), (-1e9, torch.float64)],
)  # fmt: skip
def test_what_masks_fill_in_hides_no_error(fill: float, dtype: torch.dtype) -> None:
    y, z = torch.tensor([1.0, 2.0, fill], dtype=dtype), torch.tensor([1.0, 2.5, fill], dtype=dtype)
    assert relative_error([y], [z]) == pytest.approx(0.5 / 5**0.5, rel=1e-3)
    other = torch.tensor([1.0, 2.0, 0.0], dtype=dtype)
    assert relative_error([y], [other]) > 0.5  # a mask that is lost is no detail


class Masked(nn.Module):
    """Scores of classes of which some are never given."""

    def __init__(self, fill: float, as_tensor: bool = False) -> None:
        super().__init__()
        self.net, self.fill = net(), fill
        self.register_buffer("never", torch.tensor([False, True, False, False, True]))
        self.register_buffer("held", torch.tensor(fill) if as_tensor else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).masked_fill(self.never, self.fill if self.held is None else self.held)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # which has not the lowest number of single precision
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_a_model_with_masked_scores_is_trained(
    fill: float, as_tensor: bool, precision: Precision, tmp_path: Path
) -> None:
    model = Masked(fill, as_tensor).eval()
    result = lrcompile.compile(model, (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    assert result.report.error["measured"] > 0.01
    found = lrcompile.recover(
        result, data(), steps=60, rate=1e-3, refit=False, precision=precision, checkpoints=tmp_path
    )
    assert found.report.recovery is not None
    scores = found.model(torch.randn(8, WIDTH))
    assert torch.equal(scores == fill, model.never.expand_as(scores))  # as it was given
    assert found.report.recovery["error"][1] < 0.9 * found.report.recovery["error"][0]


# ----------------------------------------------------------------------------------------- outputs, labels, settings


class Classes(nn.Module):
    def __init__(self, with_count: bool) -> None:
        super().__init__()
        self.net, self.with_count = net(), with_count

    def forward(self, x: Tensor) -> Any:
        scores = self.net(x)
        return (scores, x.shape[0]) if self.with_count else scores.argmax(-1)


def test_whole_numbers_alone_cannot_be_trained() -> None:
    result = lrcompile.compile(Classes(False).eval(), (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    with pytest.raises(InputError, match="no output is of real numbers"):
        lrcompile.recover(result, data(), steps=4)


def test_a_size_among_the_outputs(tmp_path: Path) -> None:
    model = Classes(True).eval()
    result = lrcompile.compile(model, (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    found = lrcompile.recover(result, data(), steps=20, rate=1e-3, checkpoints=tmp_path)
    assert found.report.recovery is not None
    assert found.report.recovery["error"][1] < found.report.recovery["error"][0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attention": 1.0}, "attention was not compared: the models have no call of scaled_dot_product_attention"),
        ({"freeze": "sequential"}, None),
    ],
)
def test_what_cannot_be_compared_or_frozen_is_said(
    compiled: Result, tmp_path: Path, settings: dict[str, Any], says: str | None
) -> None:
    after = lrcompile.recover(
        compiled, data(), steps=2, rate=1e-3, refit=False, checkpoints=tmp_path, **settings
    )  # fmt: skip
    assert any((says or "of no use") in note for note in after.report.notes) == bool(says)


def test_freezing_where_there_are_no_factors_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrcompile.recovery.train.factors_of", lambda *given: (frozenset(), frozenset()))
    after = lrcompile.recover(
        split_net(), data(), steps=2, rate=1e-3, refit=False, freeze="regular", checkpoints=tmp_path
    )  # fmt: skip
    assert any("freeze was of no use" in note for note in after.report.notes)


def test_a_share_that_its_samples_cannot_tell_is_refused_before_the_training(tmp_path: Path) -> None:
    """Of 96 that judge none may change its class, and still one of 97 may."""
    budget = Budget(size=0.6, measure="top1", max_error=1.0)
    compiled = lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", budget=budget)
    seen: list[str] = []
    with pytest.raises(InputError, match=r"a share of 0\.005 cannot be told from 0\.01"):
        lrcompile.recover(
            compiled, data(), steps=400, until=0.005, checkpoints=tmp_path,
            progress=lambda stage, done, total: seen.append(stage),
        )  # fmt: skip
    assert "recover" not in seen


def test_one_class_has_no_divergence(tmp_path: Path) -> None:
    one = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)).eval()
    compiled = lrcompile.compile(one, (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    given = calibration_from({"input": torch.randn(32, WIDTH)}, ["input"], 8)
    with pytest.raises(InputError, match='outputs="kl" compares classes on the last axis, and there is one'):
        lrcompile.recover(compiled, given, steps=2, outputs="kl", checkpoints=tmp_path)


def test_samples_of_which_the_original_makes_no_numbers_are_named(tmp_path: Path) -> None:
    """Among those that are trained on: those that judge are looked at before."""

    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu()) + x[:, :1].sqrt()

    torch.manual_seed(0)
    x = torch.rand(320, WIDTH)
    compiled = lrcompile.compile(Logarithm().eval(), (x[:8],), target="rpi5", budget=Budget(size=0.6))
    x[40, 0] = -1.0
    given = calibration_from({"x": x}, ["x"], 8)
    with pytest.raises(InputError, match="an output of the original is NaN on some of the samples"):
        lrcompile.recover(compiled, given, steps=400, rate=1e-3, refit=False, checkpoints=tmp_path)


def test_labels_that_say_nothing_are_left_out() -> None:
    scores = torch.randn(3, 4, 5)
    labels = torch.randint(5, (3, 4))
    labels[0, 2:] = IGNORED
    labels[2] = IGNORED
    hits = right(scores, labels)
    assert len(hits) == 6
    alone = probabilities_off(scores[:1, :2], labels[:1, :2])
    found = probabilities_off(scores, labels)
    assert found[0] == pytest.approx(float(alone))
    assert found[2] == 0


def test_labels_stay_with_their_samples_where_some_are_left_out_between() -> None:
    """Samples of one length that do not fill a batch are left out, and so are their labels."""
    pieces = [{"x": torch.full((count, length), float(length))} for count, length in ((10, 3), (5, 4), (9, 5))]
    labels = torch.arange(24)
    given = calibration_from(pieces, ["x"], 4)
    assert [float(batch["x"][0, 0]) for batch in given.batches] == [3, 3, 4, 5, 5]
    assert given.in_batches(labels).tolist() == [*range(8), *range(10, 14), *range(15, 23)]
    assert given.in_batches(labels[:23]).tolist() == given.in_batches(labels).tolist()
    with pytest.raises(InputError, match="there are 22 labels for 23 samples"):
        given.in_batches(labels[:22])


def test_a_recovery_learns_the_labels_of_its_samples(compiled: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [{"x": torch.randn(12, WIDTH)}, {"x": torch.randn(16, WIDTH, dtype=torch.float64)}]
    learned = []

    def split(batches: Any, labels: Tensor, size: int) -> None:
        learned.append(labels)
        raise InputError("seen")

    monkeypatch.setattr(import_module("lrcompile.recover"), "samples_of", split)
    with pytest.raises(InputError, match="seen"):
        lrcompile.recover(compiled, calibration_from(pieces, ["x"], 8), steps=1, labels=torch.arange(28))
    assert learned[0].tolist() == [*range(8), *range(12, 28)]


def fixed() -> tuple[Result, CalibrationData]:
    """A model that takes batches of four."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.view(4, WIDTH))

    result = lrcompile.compile(Fixed().eval(), (torch.randn(4, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    return result, calibration_from({"x": torch.randn(64, WIDTH)}, ["x"], 4)


def test_subsets_that_cannot_be_chosen_are_told_of(compiled: Result, tmp_path: Path) -> None:
    result, few = fixed()
    with pytest.raises(InputError, match="no subset of samples"):
        lrcompile.recover(result, few, steps=4, subset=0.5)
    found = lrcompile.recover(compiled, data(), steps=4, rate=1e-3, subset=0.5, checkpoints=tmp_path)
    assert any("subset was of no use" in note for note in found.report.notes)


def test_attention_that_is_not_compared_is_told_of(compiled: Result, tmp_path: Path) -> None:
    teacher = Graph(compiled.traced.graph.gm, compiled.traced.graph.fake_mode).copy()
    options: dict[str, Any] = {"steps": 2, "rate": 1e-3, "refit": False, "checkpoints": tmp_path}
    found = lrcompile.recover(compiled, data(), attention=1.0, original=teacher, **options)
    assert any("attention was not compared" in note for note in found.report.notes)


@pytest.mark.parametrize("setting", [{"minutes": math.inf}, {"steps": math.inf}, {"steps": 4, "rate": math.nan}])
def test_settings_are_finite(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a number"):
        Recovery(**setting)


# --------------------------------------------------------------------------------------------------- factors, refit


def named(result: Result, parameters: list[nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in result.model.named_parameters()}
    return {names[id(parameter)].removesuffix(".weight") for parameter in parameters}


class Normed(nn.Module):
    """Convolutions in a container, of which a clean-up folds the norms, and layers that are split."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        )
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.features(x).flatten(1)[:, :WIDTH])


def test_folded_layers_of_a_container_are_no_factors() -> None:
    result = lrcompile.compile(Normed().eval(), (torch.randn(8, 3, 6, 6),), target="rpi5", budget=Budget(size=0.6))
    assert any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.report.rewrites)
    outer, inner = factors_of(Graph(result.model, result.traced.graph.fake_mode), result.traced.graph.gm)
    sites = {rewrite.site[0] for rewrite in result.plan.rewrites if not rewrite.exact}
    assert sites
    assert named(result, outer) == {f"{site}.0" for site in sites}
    assert named(result, inner) == {f"{site}.1" for site in sites}


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() + self.k(x).sigmoid() * self.v(x)


@pytest.mark.parametrize("split_first", [False, True])
def test_factors_of_siblings_that_are_merged(split_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(8, WIDTH)
    result = lrcompile.compile(model, (x,), target="rpi5", budget=Budget(size=0.5))
    if split_first:
        splits = [Rewrite("low-rank-linear", (name,), {"rank": 16}, 0.1, False) for name in "qkv"]
        merged = Rewrite("merge-siblings", ("q.0", "k.0", "v.0"), {}, 0.0, True)
        plan = replace(result.plan, rewrites=(*splits, merged))
        result = lrcompile.compile(model, (x,), plan=plan)
    outer, inner = factors_of(Graph(result.model, result.traced.graph.fake_mode), result.traced.graph.gm)
    assert "merge-siblings" in {rewrite.pass_name for rewrite in result.plan.rewrites}
    if split_first:
        assert named(result, inner) == {"q.1", "k.1", "v.1"}
        assert len(named(result, outer)) == 1
        assert not named(result, outer) & {"q.0", "k.0", "v.0"}
    else:
        assert (named(result, outer), named(result, inner)) == ({"q_k_v.0"}, {"q_k_v.1"})


def test_a_refit_counts_the_memory_of_the_batches_it_gets(compiled: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = compiled.traced.graph, Graph(compiled.model, compiled.traced.graph.fake_mode)
    example = 8 * (refit_module._live_bytes(teacher) + refit_module._live_bytes(student)) / 8
    monkeypatch.setattr(refit_module, "LIVE_BYTES", 3 * 10 * example)
    runs: list[int] = []
    begin = refit_module._Run.__init__

    def counted(self: Any, gm: Any, batch: Any, *rest: Any) -> None:
        runs.append(len(batch[0]))
        begin(self, gm, batch, *rest)

    monkeypatch.setattr(refit_module._Run, "__init__", counted)
    known = Lineage.of(teacher).counterparts(student)
    refit(teacher, student, [(torch.randn(80, WIDTH),) for _ in range(6)], known)
    assert runs == [80] * 4  # two batches of ten times the example, in the original and in the copy


# --------------------------------------------------------------------------------------------------------- processes


def test_all_processes_begin_with_the_weights_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [torch.ones(3), torch.zeros(2, 2)]
    sent = iter(first)
    monkeypatch.setattr("accelerate.utils.broadcast", lambda tensor: next(sent))
    mine = [nn.Parameter(torch.randn_like(tensor)) for tensor in first]
    Processes(2, 1).take_over(mine)
    assert all(map(torch.equal, mine, first))


@pytest.mark.parametrize(("gpus", "expected"), [(1, [0, 0, 0, 0]), (2, [0, 1, 0, 1]), (4, [0, 1, 2, 3])])
def test_each_process_has_a_gpu_of_its_machine(gpus: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    several = [Processes(8, 4 + local, local) for local in range(4)]  # of the second of two machines
    assert [one.device(cuda).index for one in several] == expected
    assert {one.device(cpu) for one in several} == {cpu}
    assert Processes().device(cuda) == cuda


def test_what_a_recovery_says_of_minutes_that_were_over(compiled: Result) -> None:
    trained = Trained(0, 1.0, 1e-3, 1.0, 1.0, 0, 0, 0, "cpu")
    short = Recovery(minutes=0.01)
    assert "were over before its first step" in _remarks(trained, short, None, 0.5, ())[0]
    assert "layers were fitted anew alone" in _remarks(trained, short, None, 0.5, ("head",))[0]
    assert "held without any training" in _remarks(trained, short, 0.6, 0.5, ())[0]
    assert "the weights were recovered" in _remarks(trained, short, 0.6, 0.5, ("head",))[0]


def test_memory_that_runs_out_in_fitting_anew_leaves_the_training(
    compiled: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(import_module("lrcompile.recover"), "refit", fails)
    result = lrcompile.recover(compiled, data(), steps=40, rate=1e-3, checkpoints=tmp_path)
    assert result.report.recovery is not None
    assert result.report.recovery["refitted"] == []
    assert result.report.recovery["loss"][1] < result.report.recovery["loss"][0]
    assert any("memory ran out while layers were fitted anew" in note for note in result.report.notes)
