from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrcompile_passes import ComposeLinear
from lrcompile_passes.layers import CONVS
from torch import nn

from lrcompile.nn.linear import TransposedLinear
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


@settings(max_examples=80, derandomize=True, deadline=None)
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
