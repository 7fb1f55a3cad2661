from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrcompile_passes import ComposeLinear, LowRankConv
from lrcompile_passes.layers import CONVS
from torch import nn

import lrcompile
from lrcompile.graph.graph import Graph
from lrcompile.graph.rewrite import Rewrite
from lrcompile.nn.linear import TransposedLinear
from lrcompile.planning.price import Candidate
from tests.passes import common

PASS = ComposeLinear()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encoder(x))


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert str(rewrite) == "compose-linear(encoder.0, encoder.1)"
    result = common.applied(graph, PASS, rewrite)
    assert common.text(result) == (
        "x = placeholder x()\n"
        "encoder_0_1 = call_module encoder.0_1(x)\n"
        "relu = call_function relu.default(encoder_0_1)\n"
        "output = output output((relu,))"
    )
    assert common.layers(result) == {"encoder.0_1": "Linear(in_features=6, out_features=8, bias=True)"}
    assert common.on_other_batch(result, model, (x,), (torch.randn(3, 5, 6, dtype=torch.float64)[0],)) < 1e-10


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_biases(first: bool, second: bool) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    graph = common.drawn(nn.Sequential(nn.Linear(6, 3, first), TransposedLinear(3, 8, second)).double(), x)
    (rewrite,) = common.rewrites(graph, PASS)
    result = common.applied(graph, PASS, rewrite)
    assert common.difference(result, graph, x) < 1e-10
    assert (result.gm.get_submodule("0_1").bias is not None) == (first or second)


@settings(max_examples=80)
@given(st.data())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_are_composed_exactly_or_refused(data: Any) -> None:
    axes = data.draw(st.integers(1, 3))
    middle = data.draw(st.integers(1, 4))
    pointwise = data.draw(st.sampled_from([0, 1]))
    modules = []
    for i, (into, out) in enumerate([(3, middle), (middle, 2)]):
        kernel = 1 if i == pointwise else data.draw(st.sampled_from([1, 2, 3]))
        options: dict[str, Any] = {"bias": data.draw(st.booleans()), "dilation": data.draw(st.integers(1, 2))}
        if data.draw(st.booleans()):
            options["padding"] = "same"
        else:
            options |= {"stride": data.draw(st.integers(1, 3)), "padding": data.draw(st.integers(0, 1))}
        modules.append(CONVS[axes - 1](into, out, kernel, **options))
    x = torch.randn(2, 3, *[9] * axes, dtype=torch.float64)
    graph = common.drawn(nn.Sequential(*modules).double(), x)
    found, refused = common.rewrites(graph, PASS), common.refusals(graph, PASS)
    assert len(found) + len(refused) == 1
    for rewrite in found:
        result = common.applied(graph, PASS, rewrite)
        assert list(common.layers(result)) == ["0_1"]
        assert common.difference(result, graph, x) < 1e-10


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), None),
        (nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1), None),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1, stride=2), None),
        (nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 1), None),
        (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), "both kernels are larger than 1×1"),
        (
            nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1),
            "the bias of the 1×1 convolution does not reach the zeros that the next one pads",
        ),
        (
            nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 4, 3),
            "the 1×1 convolution before a larger one has a stride or pads",
        ),
        (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, padding=1), "the 1×1 convolution pads"),
        (nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 1, stride=2), "stride after padding 'same'"),
        (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=2), "grouped convolution"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1), "padding mode is not zeros"),
    ],
)  # fmt: skip
def test_legality(first: nn.Module, second: nn.Module, reason: str | None) -> None:
    graph = common.drawn(nn.Sequential(first, second), torch.randn(1, 3, 8, 8))
    assert bool(common.rewrites(graph, PASS)) == (reason is None)
    assert common.refusals(graph, PASS) == ({} if reason is None else {"0": f"with 1: {reason}"})


def test_refusals() -> None:
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x) + self.encoder[1](x[:, :3])

    class Both(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.encoder[0](x)
            return self.encoder[1](y).sum(-1) + y.sum(-1)

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.encoder[1] = nn.Linear(3, 6, bias=False)
            self.last = nn.Linear(3, 6, bias=False)
            self.last.weight = self.encoder[1].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x) + torch.relu(self.last(x[:, :3]))

    x = torch.randn(4, 6)
    reason = "module encoder.1 called at 2 sites"
    assert common.refusals(common.drawn(Twice(), x), PASS) == {"encoder.0": f"with encoder.1: {reason}"}
    reason = "output of encoder.0 has 2 users"
    assert common.refusals(common.drawn(Both(), x), PASS) == {"encoder.0": f"with encoder.1: {reason}"}
    assert common.refusals(common.drawn(Tied(), x), PASS) == {"encoder.0": "with encoder.1: weight tied with last"}
    between = common.drawn(nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6)), x)
    assert common.rewrites(between, PASS) == []
    assert common.refusals(between, PASS) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    graph = common.drawn(Net().to(dtype), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 0.02


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 with nothing between them; the 3×3 is of exact Tucker rank."""

    def __init__(self, width: int = 128, rank: int = 32, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.d = nn.Conv2d(2 * width, width, 1, bias=bias), nn.Conv2d(width, 2 * width, 1, stride=2, bias=bias)
        self.k = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        up, down = (torch.randn(width, rank, generator=generator).double() / rank**0.5 for _ in range(2))
        core = torch.randn(rank, rank, 9, generator=generator).double() / (9 * rank) ** 0.5
        self.double()
        self.k.weight.data = torch.einsum("so,oik,ci->sck", up, core, down).unflatten(2, (3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.d(self.k(self.a(torch.relu(x)))))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
def test_split_of_a_bottleneck_merges_on_both_sides(dtype: torch.dtype, limit: float, bias: bool) -> None:
    """Tucker of the 3×3, then A′ = VᵀA and D′ = D·U: three convolutions again, narrower (2407.20266)."""
    model, x = Bottleneck(16, 4, bias).to(dtype).eval(), torch.randn(2, 32, 9, 9, dtype=dtype)
    graph = common.exported(model, x)
    split = Rewrite(LowRankConv.name, ("k",), {"form": "tucker", "rank_out": 4, "rank_in": 4})
    result = common.applied(graph, LowRankConv(), split)
    for pair in [("a", "k.0"), ("k.2", "d")]:
        (merge,) = [rewrite for rewrite in common.rewrites(result, PASS) if rewrite.site == pair]
        result = common.applied(result, PASS, merge)
    assert [f"{m.in_channels}→{m.out_channels} {m.kernel_size}" for m in convs(result)] == [
        "32→4 (1, 1)", "4→4 (3, 3)", "4→32 (1, 1)",
    ]  # fmt: skip
    assert common.difference(result, graph, x) < limit
    other = torch.randn(5, 32, 9, 9, dtype=dtype)
    assert common.on_other_batch(result, model, (x,), (other,)) < limit


def convs(graph: Graph) -> list[Any]:
    return [site.module for site in graph.sites().values()]


def test_pricing_finds_the_merges_on_both_sides() -> None:
    model, x = Bottleneck().float().eval(), torch.randn(8, 256, 28, 28, generator=torch.Generator().manual_seed(1))
    passes = [LowRankConv(pairs=2), ComposeLinear()]
    prepared = lrcompile.prepare_model(model, (x,), target="v100", passes=passes)
    by_passes: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for candidate in prepared.pricing.candidates:
        by_passes[tuple(rewrite.pass_name for rewrite in candidate.rewrites)].append(candidate)
    both = by_passes["low-rank-conv", "compose-linear", "compose-linear"]
    assert ("a", "k.0") in {candidate.rewrites[1].site for candidate in both}
    gain = {names: max(c.gain.latency_s for c in found) for names, found in by_passes.items()}
    one = gain["low-rank-conv", "compose-linear"]
    assert gain["low-rank-conv", "compose-linear", "compose-linear"] > one > gain["low-rank-conv",]
    result = lrcompile.solve(prepared, lrcompile.Budget(max_error=1e-3))
    assert len([node for node in result.model.graph.nodes if node.op == "call_module"]) <= 3
    assert result.report.error["measured"] < 1e-5
    assert {r.pass_name for r in result.report.rewrites} == {"low-rank-conv", "compose-linear"}
    again = lrcompile.compile(model, (x,), plan=lrcompile.Plan.loads(result.plan.dumps()), passes=passes)
    assert torch.equal(again.model(x), result.model(x))
