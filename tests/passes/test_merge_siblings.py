from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrcompile_passes import LowRankLinear, MergeSiblings
from lrcompile_passes.layers import CONVS
from torch import nn

import lrcompile
from lrcompile.frontend.trace import trace
from lrcompile.passes import apply
from tests.passes import common

PASS = MergeSiblings()


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 32), nn.Linear(width, 32, bias=False), nn.Linear(width, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (y.view(x.size(0), -1) for y in (self.q(x), self.k(x)))  # needs memory without gaps
        return torch.cat([q * k, self.v(x).flatten(1)], 1)


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    graph = common.exported(model, x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert str(rewrite) == "merge-siblings(q, k, v)"
    assert rewrite.exact
    result = common.applied(graph, PASS, rewrite)
    merged = [line for line in common.text(result).splitlines() if "sym_size" not in line][:5]
    assert merged == [
        "x = placeholder x()",
        "q_k_v = call_module q_k_v(x)",
        "split_with_sizes_default = call_function split_with_sizes.default(q_k_v, [32, 32, 48], -1)",
        "getitem = call_function getitem(split_with_sizes_default, 0)",
        "getitem_1 = call_function getitem(split_with_sizes_default, 1)",
    ]
    assert common.layers(result) == {"q_k_v": "Linear(in_features=32, out_features=112, bias=True)"}
    assert common.difference(result, graph, x) < 1e-10
    assert common.on_other_batch(result, model, (x,), (torch.randn(3, 5, 32, dtype=torch.float64),)) < 1e-10


class Named(nn.Module):
    """Two layers of one input, and another one that has the name that they would have as one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.q_k = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_k(torch.relu(self.last(torch.relu(self.q(x) * self.k(x)))))


def test_what_follows_a_merge_acts_on_the_merged_layer() -> None:
    prepared = lrcompile.prepare_model(Named(), (torch.randn(2, 64),), target="v100")
    chains = [candidate.rewrites for candidate in prepared.pricing.candidates]
    follows = [follow for first, *more in chains if first.site == ("q", "k") for follow in more]
    assert {follow.site for follow in follows if follow.pass_name == "low-rank-linear"} == {("q_k_2",)}


def test_first_factors_of_split_siblings_merge() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    graph = common.exported(Attention().double(), x)
    context = common.context(graph, (x,))
    split, trial = graph.copy(), graph.copy()
    for rewrite in common.rewrites(graph, LowRankLinear(), context):
        if rewrite.params["rank"] == 8:
            apply(split, LowRankLinear(), rewrite, context)
            apply(trial, LowRankLinear(), rewrite, context.on_trial(graph.fake_mode))
    assert common.rewrites(trial, PASS) == common.rewrites(split, PASS)
    (rewrite,) = common.rewrites(split, PASS)
    assert rewrite.site == ("q.0", "k.0", "v.0")
    result = common.applied(split, PASS, rewrite, context)
    assert "q_0_k_0_v_0" in common.layers(result)
    assert common.difference(result, split, x) < 1e-10


class Siblings(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, int]:
    axes = draw(st.integers(1, 3))
    options: dict[str, Any] = {"dilation": draw(st.integers(1, 2))}
    if draw(st.booleans()):
        options["padding"] = "same"
    else:
        options |= {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1))}
    kernel = draw(st.sampled_from([1, 3]))
    count = draw(st.integers(2, 3))
    modules = [
        CONVS[axes - 1](3, draw(st.integers(1, 4)), kernel, bias=draw(st.booleans()), **options) for _ in range(count)
    ]
    return Siblings(*modules), axes


@settings(max_examples=25)
@given(convolutions())
def test_convolutions_with_all_options(drawn: tuple[nn.Module, int]) -> None:
    model, axes = drawn
    x = torch.randn(2, 3, *[6] * axes, dtype=torch.float64)
    graph = common.drawn(model.double(), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert len(common.layers(common.applied(graph, PASS, rewrite))) == 1
    assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 1e-10


def test_input_without_batch_axis() -> None:
    x = torch.randn(3, 6, 6, dtype=torch.float64)

    class Sum(Siblings):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.branches[0](x) + self.branches[1](x)

    graph = common.drawn(Sum(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)).double(), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32).to(dtype)
    graph = common.drawn(Siblings(nn.Linear(32, 8), nn.Linear(32, 8)).to(dtype), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 0.01


def test_others_are_left_out() -> None:
    def found(*modules: nn.Module, x: torch.Tensor) -> list[tuple[str, ...]]:
        return [r.site for r in common.rewrites(common.drawn(Siblings(*modules), x), PASS)]

    x = torch.randn(2, 4, 6, 6)
    assert found(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), x=x) == []
    assert found(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, groups=2), x=x) == []
    assert found(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1, groups=2), x=x) == [
        ("branches.0", "branches.1")
    ]
    assert found(nn.Conv2d(4, 4, 1), x=x) == []


def test_refusals() -> None:
    class Shared(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x), self.q(2 * x)], -1)

    class Tied(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.k.weight = self.q.weight

    x = torch.randn(2, 5, 32)
    shared = common.drawn(Shared(), x)
    assert common.refusals(shared, PASS) == {"q": "module called at 2 sites"}
    assert [r.site for r in common.rewrites(shared, PASS)] == [("k", "v")]
    tied = common.exported(Tied(), x)
    assert common.refusals(tied, PASS) == {"q": "weight tied with k", "k": "weight tied with q"}
    assert common.rewrites(tied, PASS) == []


class Strided(nn.Module):
    """Two layers that read one value, and something that reads the first by its strides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.how = nn.Linear(8, 8), nn.Linear(8, 1 if how == "complex" else 8), how

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q(x)
        if self.how == "complex":
            q = torch.view_as_real(torch.view_as_complex(q.reshape(4, 4, 2)) * 1j)
        elif self.how == "strided":
            q = q.as_strided((4, 7, 2), (8, 1, 1))
        elif self.how == "strided part":
            q = q.chunk(2, -1)[1].as_strided((4, 3, 2), (8, 1, 1), 4)
        return q + 1, self.k(x)


@pytest.mark.parametrize("how", ["complex", "strided", "strided part", "plain"])
def test_what_is_read_by_its_strides_is_not_merged(how: str) -> None:
    model, x = Strided(how).eval(), torch.randn(4, 8)
    graph = trace(model, (x,)).graph
    assert bool(common.rewrites(graph, PASS)) == (how == "plain")
    assert how == "plain" or "by its strides" in common.refusals(graph, PASS)["q"]
    result = lrcompile.compile(model, (x,), target="rpi5", budget=lrcompile.Budget(max_error=0.0))
    for got, expected in zip(result.model(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_is_read_by_its_strides_is_not_merged_with_a_factor() -> None:
    """The reader is out of sight where a split of the other layer is tried."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q(x).unsqueeze(1).as_strided((4, 63, 2), (64, 1, 1)) + 1, self.k(x)

    passes = [PASS, LowRankLinear()]
    prepared = lrcompile.prepare_model(Far().eval(), (torch.randn(4, 64),), target="rpi5", passes=passes)
    merged = [r.site for c in prepared.pricing.candidates for r in c.rewrites if r.pass_name == PASS.name]
    assert merged
    assert all("q" not in site for site in merged)
