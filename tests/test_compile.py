"""The whole line from Python: budgets, plans, refusals, and what other compressors get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import lrcompile
from lrcompile.errors import BudgetError, InputError, PlanError, VerificationError
from lrcompile.planning.plan import Plan


class Mlp(nn.Module):
    """Two wide layers of low rank: worth splitting wherever launches are cheap."""

    def __init__(self, width: int = 256, rank: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        for layer in (self.up, self.down):
            rows, columns = layer.weight.shape
            layer.weight.data = torch.randn(rows, rank) @ torch.randn(rank, columns) / columns**0.5
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(functional.gelu(self.up(x))))


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


X = torch.randn(4096, 256, generator=torch.Generator().manual_seed(1))


def relative(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected.double() - got.double()).norm() / expected.double().norm())


def test_splits_low_rank_layers_within_the_error_budget(mlp: Mlp) -> None:
    result = lrcompile.compile(mlp, (X,), target="v100", budget=lrcompile.Budget(max_error=1e-3))
    report = result.report
    assert {s.site for s in report.sites if s.decision == "rewritten"} == {"up", "down"}
    assert report.latency_ms["kind"] == "analytic"
    assert report.latency_ms["after"] < report.latency_ms["before"]
    assert report.error["measured"] <= 1e-3
    with torch.no_grad():
        assert relative(mlp(X), result.model(X)) == pytest.approx(report.error["measured"], rel=1e-3, abs=1e-7)
    assert report.model["params_after"] < report.model["params_before"] / 4
    assert report.model["params_before"] == sum(p.numel() for p in mlp.parameters())


def test_operations_are_counted_before_and_after(mlp: Mlp) -> None:
    model = nn.Sequential(mlp.head, nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(10)).eval()
    figures = lrcompile.compile(model, (X,), target="v100", budget=lrcompile.Budget(max_error=0.0)).report.model
    assert (figures["ops_before"], figures["ops_after"]) == (2, 1)


def test_zero_budget_makes_only_exact_rewrites(mlp: Mlp) -> None:
    result = lrcompile.compile(mlp, (X,), target="v100", budget=lrcompile.Budget(max_error=0.0))
    assert all(rewrite.exact for rewrite in result.plan.rewrites)
    with torch.no_grad():
        assert relative(mlp(X), result.model(X)) <= 1e-5


def test_the_model_given_is_not_changed(mlp: Mlp) -> None:
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    lrcompile.compile(mlp, (X,), target="v100")
    assert all(torch.equal(before[name], tensor) for name, tensor in mlp.state_dict().items())


def test_keys_of_untouched_layers_survive(mlp: Mlp) -> None:
    keys = set(lrcompile.compile(mlp, (X,), target="v100").model.state_dict())
    assert {"head.weight", "head.bias", "up.0.weight", "up.1.weight", "up.1.bias"} <= keys


def test_skip_leaves_a_site_alone(mlp: Mlp) -> None:
    result = lrcompile.compile(mlp, (X,), target="v100", skip=["u*"])
    by_site = {s.site: s for s in result.report.sites}
    assert by_site["up"].decision == "kept"
    assert "--skip" in by_site["up"].reason
    assert by_site["down"].decision == "rewritten"
    assert lrcompile.compile(mlp, (X,), target="v100", skip="up").report.sites[0].reason == by_site["up"].reason
    with pytest.raises(InputError, match=r"matches no site.*up"):
        lrcompile.compile(mlp, (X,), target="v100", skip=["nothing.*"])


def test_size_budget_is_met(mlp: Mlp) -> None:
    report = lrcompile.compile(mlp, (X,), target="v100", budget=lrcompile.Budget(size=0.5)).report
    assert report.model["weight_bytes_after"] <= 0.5 * report.model["weight_bytes_before"]


def test_size_that_only_slower_rewrites_reach_is_said(mlp: Mlp) -> None:
    report = lrcompile.compile(mlp, (X[:1],), target="t4", budget=lrcompile.Budget(size=0.5)).report
    assert report.model["weight_bytes_after"] <= 0.5 * report.model["weight_bytes_before"]
    if report.latency_ms["speedup"] < 1:
        assert any("do not make the target faster" in note for note in report.notes)


def test_speedup_budget_is_met(mlp: Mlp) -> None:
    report = lrcompile.compile(mlp, (X,), target="v100", budget=lrcompile.Budget(speedup=1.5)).report
    assert report.latency_ms["speedup"] >= 1.5


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (lrcompile.Budget(speedup=1000), "reachable range"),
        (lrcompile.Budget(max_latency_s=1e-9), "reachable range"),
        (lrcompile.Budget(size=0.0001), "reachable range"),
        (lrcompile.Budget(size=0.06, max_error=1e-6), "by exact rewrites alone"),
        (lrcompile.Budget(size=0.06, max_error=1e-4), "together"),
    ],
)
def test_budget_that_cannot_be_met_names_the_reachable_range(mlp: Mlp, budget: lrcompile.Budget, words: str) -> None:
    with pytest.raises(BudgetError, match=words) as caught:
        lrcompile.compile(mlp, (X,), target="v100", budget=budget)
    assert caught.value.exit_code == 1


def test_plan_replays_to_the_same_weights(mlp: Mlp, tmp_path: Path) -> None:
    result = lrcompile.compile(mlp, (X,), target="v100")
    path = tmp_path / "plan.json"
    path.write_text(result.plan.dumps())
    again = lrcompile.compile(mlp, (X,), plan=Plan.load(path))
    first, second = result.model.state_dict(), again.model.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.plan.dumps() == result.plan.dumps()


def test_a_plan_has_decided(mlp: Mlp) -> None:
    plan = lrcompile.compile(mlp, (X,), target="v100", seed=np.int64(3)).plan  # type: ignore[arg-type]
    plan = Plan.loads(plan.dumps())
    assert plan.seed == 3
    assert lrcompile.compile(mlp, (X,), target="v100", seed=3, plan=plan).plan == plan
    others: dict[str, Any] = {
        "target 'rpi5'": {"target": "rpi5"}, r"skip \['up'\]": {"skip": ["up"]}, "seed 4": {"seed": 4},
        "a budget": {"budget": lrcompile.Budget(speedup=50)},
    }  # fmt: skip
    for words, options in others.items():
        with pytest.raises(PlanError, match=f"^{words} has no meaning with a plan"):
            lrcompile.compile(mlp, (X,), plan=plan, **options)


def test_plan_of_another_model_is_refused(mlp: Mlp) -> None:
    plan = lrcompile.compile(mlp, (X,), target="v100").plan
    torch.manual_seed(1)
    with pytest.raises(PlanError, match="another model"):
        lrcompile.compile(Mlp().eval(), (X,), plan=plan)


def test_plan_needs_its_calibration_data(mlp: Mlp) -> None:
    data = lrcompile.calibration_from(X, ["x"], 256)
    plan = lrcompile.compile(mlp, (X,), target="v100", calibration=data).plan
    assert lrcompile.compile(mlp, (X,), plan=plan, calibration=data).plan == plan
    with pytest.raises(PlanError, match="--calib"):
        lrcompile.compile(mlp, (X,), plan=plan)


def test_prepared_model_is_solved_for_one_budget_after_another(mlp: Mlp) -> None:
    prepared = lrcompile.prepare_model(mlp, (X,), target="v100")
    loose = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.5)).report
    tight = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.0)).report
    assert loose.latency_ms["after"] < tight.latency_ms["after"]
    assert loose.error["measured"] <= 0.5


def test_unknown_target_suggests_the_nearest(mlp: Mlp) -> None:
    with pytest.raises(lrcompile.LrcompileError, match="v100"):
        lrcompile.compile(mlp, (X,), target="v10")


# ------------------------------------------------------------------------------- what peers get silently wrong


def conv_net(make: Callable[[], nn.Module], channels: int = 64, size: int = 14) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return make().eval(), torch.randn(2, channels, size, size)


class TwiceThenNormalised(nn.Module):
    """One convolution called at two sites, each followed by its own batch norm: folding either breaks the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(64), nn.BatchNorm2d(64)
        for norm in (self.first, self.second):
            norm.running_mean = torch.randn(64)
            norm.running_var = torch.rand(64) + 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(self.conv(x)).relu()))


def test_conv_called_at_two_sites_is_not_folded() -> None:
    model, x = conv_net(TwiceThenNormalised)
    result = lrcompile.compile(model, (x,), target="v100", budget=lrcompile.Budget(max_error=0.0))
    with torch.no_grad():
        assert relative(model(x), result.model(x)) <= 1e-5
    assert not any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.plan.rewrites)


class Functional(nn.Module):
    """A parameter convolved by F.conv2d, twice with different strides."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 64, 3, 3) / 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(functional.conv2d(x, self.kernel, padding=1), self.kernel, stride=2)


CONVS: dict[str, Callable[[], nn.Module]] = {
    "reflect": lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(64, 64, 3, padding=2, padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(64, 64, 5, padding=2, padding_mode="replicate"),
    "same": lambda: nn.Conv2d(64, 64, 4, padding="same", dilation=2),
    "dilated": lambda: nn.Conv2d(64, 96, 3, padding=2, dilation=2),
    "strided": lambda: nn.Conv2d(64, 96, (5, 3), stride=(2, 3), padding=(0, 2)),
    "no bias": lambda: nn.Conv2d(64, 64, 1, bias=False),
    "grouped": lambda: nn.Conv2d(64, 64, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(64, 64, 3, groups=64),
    "transposed": lambda: nn.ConvTranspose2d(64, 48, 4, stride=2, padding=1, output_padding=1),
    "functional": Functional,
}


REFUSED = {"grouped": "grouped", "depthwise": "depthwise", "functional": "tied"}


@pytest.mark.parametrize("kind", CONVS)
def test_every_conv_is_split_truly_or_refused(kind: str) -> None:
    """Forced to the smallest size, the reported error is the real one; what cannot be split says why."""
    model, x = conv_net(CONVS[kind])
    prepared = lrcompile.prepare_model(model, (x,), target="x86-ort")
    assert lrcompile.solve(prepared, lrcompile.Budget(max_error=0.0)).report.error["measured"] <= 1e-5
    if kind in REFUSED:
        assert not prepared.pricing.candidates
        assert any(REFUSED[kind] in refusal.reason for refusal in prepared.pricing.refusals)
        return
    result = lrcompile.solve(prepared, lrcompile.Budget(size=0.8))
    with torch.no_grad():
        measured = relative(model(x), result.model(x))
    assert measured == pytest.approx(result.report.error["measured"], rel=1e-3)
    assert 0 < measured < 1


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


def test_tied_embedding_stays_tied_and_says_so() -> None:
    torch.manual_seed(0)
    result = lrcompile.compile(Tied().eval(), (torch.randint(0, 1000, (2, 16)),), target="v100")
    reasons = {s.site: s.reason for s in result.report.sites}
    assert "head" in reasons["embedding"]
    assert "embedding" in reasons["head"]
    assert result.model.head.weight is result.model.embedding.weight
    assert result.report.model["params_before"] == 64_000


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_left_intact(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(32, 64, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(128, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    model, x = Tagger().eval(), torch.randn(3, 7, 32)
    result = lrcompile.compile(model, (x,), target="v100")
    with torch.no_grad():
        assert relative(model(x), result.model(x)) <= 1e-5
    assert {name for name, _ in model.named_parameters()} <= set(result.model.state_dict())


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision(mlp: Mlp, dtype: str, limit: float) -> None:
    budget = lrcompile.Budget(max_error=0.1, confidence=0.6)
    result = lrcompile.compile(mlp, (X,), target="ascend310", dtype=dtype, budget=budget)
    assert {p.dtype for p in result.model.parameters()} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    assert result.plan.dtype == dtype
    assert result.report.error["measured"] <= limit
    assert any(s.decision == "rewritten" for s in result.report.sites)


@dataclass(frozen=True)
class Doubling(lrcompile.Pass):
    """Linear(W) → Linear(factor·W), which is not what it promises."""

    stage = lrcompile.Stage.CANONICALIZE
    factor: float = 2.0
    exact: bool = True

    def propose(self, graph: lrcompile.Graph, context: lrcompile.Context) -> Iterator[lrcompile.Rewrite]:
        for site in graph.modules_of(nn.Linear):
            if site.path == "down" and not hasattr(site.module, "doubled"):
                yield site.rewrite(exact=self.exact)

    def apply(self, rewriter: lrcompile.Rewriter, rewrite: lrcompile.Rewrite) -> None:
        old = rewriter.site().module
        new = nn.Linear(old.in_features, old.out_features)
        new.weight = nn.Parameter(old.weight * self.factor)
        new.bias = old.bias
        new.doubled = True
        rewriter.set_module(rewrite.site[0], new)


def test_a_pass_that_breaks_its_promise_is_named_with_its_site(mlp: Mlp) -> None:
    with pytest.raises(VerificationError, match=r"pass doubling at down promised"):
        lrcompile.compile(mlp, (X,), target="v100", passes=[Doubling()])


@dataclass(frozen=True)
class Overflowing(Doubling):
    """Linear(W) → Linear(∞·W) in half the bytes: chosen for its size, refused for its output."""

    stage = lrcompile.Stage.FACTORIZE
    factor: float = float("inf")
    exact: bool = False

    def apply(self, rewriter: lrcompile.Rewriter, rewrite: lrcompile.Rewrite) -> None:
        super().apply(rewriter, rewrite)
        rewriter.site().module.bias = None


def test_a_rewrite_that_overflows_is_named_with_its_site(mlp: Mlp) -> None:
    with pytest.raises(VerificationError, match=r"pass overflowing at down makes the output infinite or NaN"):
        lrcompile.compile(mlp, (X,), target="v100", passes=[Overflowing()], budget=lrcompile.Budget(size=0.9999))


@pytest.mark.parametrize(("target", "rows", "told"), [("v100", 8, True), ("v100", 1 << 16, False), ("a100", 8, False)])
def test_where_the_host_decides_in_eager_pytorch_it_is_said(target: str, rows: int, told: bool) -> None:
    """The calls of small layers take longer than the layers do; what a call takes was measured for the V100 and T4."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    report = lrcompile.compile(model, (torch.randn(rows, 256),), target=target).report
    assert any("take the host" in note for note in report.notes) is told
