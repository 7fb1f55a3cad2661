from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrcompile_passes import LowRankConv
from lrcompile_passes.layers import CONVS, TRANSPOSED_CONVS
from torch import nn

from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context
from tests.passes import common

PASS = LowRankConv()


def single(module: nn.Module, *size: int) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*size, dtype=torch.float64)
    return common.drawn(nn.Sequential(module.double()), x), x


def full(form: str, module: Any) -> Rewrite:
    into, out = module.in_channels, module.out_channels
    kernel = module.kernel_size
    params: dict[str, Any] = {
        "pointwise": {"rank": min(into, out)},
        "tucker": {"rank_out": out, "rank_in": into},
        "spatial": {"rank": min(into * kernel[0], out * kernel[-1])},
    }[form]
    return Rewrite(PASS.name, ("0",), {"form": form, **params})


def forms(module: Any) -> list[str]:
    if set(module.kernel_size) == {1}:
        return ["pointwise"]
    return ["tucker", "spatial"] if isinstance(module, nn.Conv2d) else ["tucker"]


@st.composite
def convolutions(draw: Any) -> tuple[Any, int]:
    axes = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    kernel = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    padding: Any = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    channels = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    options: dict[str, Any] = {"bias": draw(st.booleans()), "dilation": dilation}
    if transposed:
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        options |= {"output_padding": extra, "padding": tuple(min(1, p) for p in padding), "stride": stride}
        return TRANSPOSED_CONVS[axes - 1](*channels, kernel, **options), axes
    if draw(st.booleans()):
        return CONVS[axes - 1](*channels, kernel, padding="same", **options), axes
    return CONVS[axes - 1](*channels, kernel, stride=stride, padding=padding, **options), axes


@settings(max_examples=40)
@given(convolutions(), st.booleans())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_full_rank_is_the_identity_for_all_options(drawn: tuple[Any, int], calibrated: bool) -> None:
    module, axes = drawn
    graph, x = single(module, 2, module.in_channels, *[6] * axes)
    ctx = common.context(graph, (x,)) if calibrated else common.context()
    for form in forms(module):
        result = common.applied(graph, PASS, full(form, module), ctx)
        assert common.difference(result, graph, x) < 1e-10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, stride=2, padding=1, dilation=(1, 2), padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(2, 16, 9, 9, dtype=torch.float64)
    graph = common.exported(model, x)  # export makes the reflection an operation of its own
    found = {str(r): r for r in common.rewrites(graph, PASS)}
    assert list(found) == [
        "low-rank-conv(conv; form=tucker, rank_out=8, rank_in=8)",
        "low-rank-conv(conv; form=tucker, rank_out=16, rank_in=8)",
        "low-rank-conv(conv; form=tucker, rank_out=24, rank_in=8)",
        "low-rank-conv(conv; form=spatial, rank=8)",
        "low-rank-conv(conv; form=spatial, rank=16)",
    ]
    tucker = common.applied(graph, PASS, list(found.values())[1])
    assert common.text(tucker) == (
        "x = placeholder x()\n"
        "pad = call_function pad.default(x, [1, 1, 1, 1], reflect)\n"
        "conv_0 = call_module conv.0(pad)\n"
        "conv_1 = call_module conv.1(conv_0)\n"
        "conv_2 = call_module conv.2(conv_1)\n"
        "relu = call_function relu.default(conv_2)\n"
        "output = output output((relu,))"
    )
    assert common.layers(tucker) == {
        "conv.0": "Conv2d(16, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)",
        "conv.1": "Conv2d(8, 16, kernel_size=(3, 3), stride=(2, 2), dilation=(1, 2), bias=False)",
        "conv.2": "Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1))",
    }
    spatial = common.applied(graph, PASS, list(found.values())[-1])
    assert common.layers(spatial) == {
        "conv.0": "Conv2d(16, 16, kernel_size=(3, 1), stride=(2, 1), bias=False)",
        "conv.1": "Conv2d(16, 32, kernel_size=(1, 3), stride=(1, 2), dilation=(1, 2))",
    }
    identity = Rewrite(PASS.name, ("conv",), {"form": "spatial", "rank": 48})
    other = torch.randn(5, 16, 9, 9, dtype=torch.float64)
    assert common.on_other_batch(common.applied(graph, PASS, identity), model, (x,), (other,)) < 1e-10


@pytest.mark.parametrize(
    ("module", "size", "kinds"),
    [
        (nn.Conv1d(32, 32, 3), (8,), {"tucker"}),
        (nn.Conv2d(32, 32, 3), (8, 8), {"tucker", "spatial"}),
        (nn.Conv2d(32, 32, (3, 1)), (8, 8), {"tucker"}),
        (nn.Conv3d(32, 32, 3), (5, 5, 5), {"tucker"}),
        (nn.Conv3d(32, 32, 1), (5, 5, 5), {"pointwise"}),
        (nn.ConvTranspose1d(32, 32, 3), (8,), {"tucker"}),
        (nn.ConvTranspose2d(32, 64, 3, stride=2), (8, 8), {"tucker"}),
        (nn.ConvTranspose3d(32, 32, 1, stride=2), (5, 5, 5), {"pointwise"}),
    ],
)
def test_predicted_error_is_that_of_the_weights(module: Any, size: tuple[int, ...], kinds: set[str]) -> None:
    graph, _ = single(module, 1, 32, *size)
    found = common.rewrites(graph, PASS)
    assert {r.params["form"] for r in found} == kinds
    for rewrite in found:
        result = common.applied(graph, PASS, rewrite)
        assert common.relative(kernel(result), module.weight) == pytest.approx(rewrite.error, rel=1e-8)
        parameters = sum(p.numel() for p in result.gm.parameters())
        assert parameters < sum(p.numel() for p in module.parameters())


def kernel(graph: Any) -> torch.Tensor:
    """The kernel that a chain amounts to, in the original's layout."""
    chain = [site.module for site in graph.sites().values()]
    swap = [isinstance(m, TRANSPOSED_CONVS) for m in chain]
    weights = [m.weight.transpose(0, 1) if s else m.weight for m, s in zip(chain, swap, strict=True)]
    if len(weights) == 3:
        up, core, down = weights[2].flatten(1), weights[1], weights[0].flatten(1)
        result = torch.einsum("so,oik,ic->sck", up, core.flatten(2), down).unflatten(2, core.shape[2:])
    elif weights[1].shape[2:].numel() == 1:
        result = (weights[1].flatten(1) @ weights[0].flatten(1)).view(-1, weights[0].shape[1], *weights[0].shape[2:])
    else:
        result = torch.einsum("srj,rci->scij", weights[1].flatten(2), weights[0].flatten(2))
    return result.transpose(0, 1) if any(swap) else result


def test_error_is_that_of_the_calibration_inputs() -> None:
    torch.manual_seed(1)
    mixing = torch.randn(32, 32).double() @ torch.diag(torch.linspace(0.1, 2, 32).double())
    x = torch.einsum("dc,nchw->ndhw", mixing, torch.randn(20, 32, 4, 4, dtype=torch.float64))
    graph = common.drawn(nn.Sequential(nn.Conv2d(32, 48, 1, bias=False).double()), x)
    ctx = common.context(graph, (x,))
    found = common.rewrites(graph, PASS, ctx)
    assert found
    for rewrite in found:
        measured = common.difference(common.applied(graph, PASS, rewrite, ctx), graph, x)
        assert measured == pytest.approx(rewrite.error, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("rewrite", [0, -1])
def test_calibration_helps_larger_kernels(rewrite: int) -> None:
    torch.manual_seed(2)
    mixing = torch.diag(torch.logspace(-1.5, 0.5, 16).double()) @ torch.randn(16, 16).double()
    x = torch.einsum("dc,nchw->ndhw", mixing, torch.randn(8, 16, 8, 8, dtype=torch.float64))
    graph = common.drawn(nn.Sequential(nn.Conv2d(16, 16, 3, bias=False).double()), x)
    ctx = common.context(graph, (x,))
    aware, plain = common.rewrites(graph, PASS, ctx)[rewrite], common.rewrites(graph, PASS)[rewrite]
    assert aware.params == plain.params
    error = common.difference(common.applied(graph, PASS, aware, ctx), graph, x)
    assert error < common.difference(common.applied(graph, PASS, plain), graph, x)


def test_tucker_pairs_are_those_that_no_other_beats() -> None:
    graph, _ = single(nn.Conv2d(64, 64, 3), 1, 64, 8, 8)
    pairs = [r for r in common.rewrites(graph, PASS) if r.params["form"] == "tucker"]
    assert 8 < len(pairs) <= PASS.pairs
    errors = [r.error for r in pairs]
    assert errors == sorted(errors, reverse=True)
    few = [r for r in common.rewrites(graph, LowRankConv(pairs=3)) if r.params["form"] == "tucker"]
    assert len(few) <= 3
    assert few[-1] == pairs[-1]


def test_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(self.conv(x)))

    torch.manual_seed(3)
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    graph = common.drawn(Twice().double(), x)
    ctx = common.context(graph, (x,))
    rewrite = Rewrite(PASS.name, ("conv",), {"form": "tucker", "rank_out": 16, "rank_in": 16})
    result = common.applied(graph, PASS, rewrite, ctx)
    assert len(result.site("conv.1").nodes) == 2
    assert common.difference(result, graph, x) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 16, 8, 8).to(dtype)
    module = nn.Conv2d(16, 16, 3, padding=1).to(dtype)
    graph = common.drawn(nn.Sequential(module), x)
    for form in forms(module):
        result = common.applied(graph, PASS, full(form, module))
        assert {p.dtype for p in result.gm.parameters()} == {dtype}
        assert common.difference(result, graph, x) < 0.03


class Twice(nn.Module):
    """A convolution of a batch, and of its first sample alone."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.conv(x[0])


def test_refusals() -> None:
    def reason(module: nn.Module, *size: int) -> str:
        graph, _ = single(module, *size)
        assert common.rewrites(graph, PASS) == []
        return common.refusals(graph, PASS)["0"]

    assert reason(nn.Conv2d(32, 32, 3, groups=32), 1, 32, 8, 8) == "depthwise: each channel has a filter of its own"
    assert reason(nn.Conv2d(32, 32, 3, groups=4), 1, 32, 8, 8) == "grouped convolution: groups=4"
    assert reason(nn.ConvTranspose1d(32, 32, 3, groups=2), 1, 32, 8) == "grouped convolution: groups=2"
    assert reason(nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), 1, 32, 8, 8) == "padding mode circular"
    assert reason(nn.Conv2d(32, 32, 3), 32, 8, 8) == "input has no batch axis"
    twice = common.drawn(Twice(nn.Conv1d(32, 32, 3)), torch.randn(2, 32, 8))
    assert common.refusals(twice, PASS) == {"conv": "input has no batch axis"}
    small = "too small: no rank of the device's step saves weights and work of 4×4×1×1"
    assert reason(nn.Conv2d(4, 4, 1), 1, 4, 8, 8) == small


def test_tied_weight() -> None:
    graph = common.drawn(
        common.Tied(nn.Conv1d(32, 32, 3, padding=1), nn.ConvTranspose1d(32, 32, 3, padding=1)), torch.randn(1, 32, 8)
    )
    assert common.refusals(graph, PASS) == {"down": "weight tied with up", "up": "weight tied with down"}


def test_contexts_do_not_mix_up_inputs() -> None:
    """One weight at one path, calibrated and not, in one process: each context keeps its own decompositions."""
    graph, x = single(nn.Conv2d(16, 16, 3), 4, 16, 8, 8)
    ctx = common.context(graph, (x * torch.logspace(-2, 1, 16).double().view(1, -1, 1, 1),))
    assert isinstance(ctx, Context)
    assert common.rewrites(graph, PASS, ctx)[0].error != common.rewrites(graph, PASS)[0].error


def test_contexts_do_not_mix_up_windows() -> None:
    """Two layers of equal weights that read one value, one of them in wider steps: each is fitted to what it sees."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = (nn.Conv2d(16, 32, 3, padding=d, dilation=d).double() for d in (1, 3))
            self.far.load_state_dict(self.near.state_dict())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.near(x), self.far(x)

    torch.manual_seed(0)
    x = torch.randn(4, 16, 16, 16, dtype=torch.float64).cumsum(2).cumsum(3)
    graph = common.drawn(Wide(), x)
    ctx = common.context(graph, (x,))
    for rewrite in common.rewrites(graph, PASS, ctx)[::5]:
        result = common.applied(graph, PASS, rewrite, ctx)
        assert common.difference(result, graph, x) == pytest.approx(rewrite.error, rel=1e-3), rewrite
