from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrcompile_passes import FoldBatchNorm
from lrcompile_passes.layers import CONVS, TRANSPOSED_CONVS
from torch import nn

import lrcompile
from lrcompile.frontend.trace import trace
from tests.passes import common

PASS = FoldBatchNorm()
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def trained(module: nn.Module) -> nn.Module:
    """Gives every batch norm statistics and scales that differ from those it starts with."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, NORMS):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.eval()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate", bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Twice(nn.Module):
    """One convolution at two sites: what torch.fx's fuse gets silently wrong."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.BatchNorm2d(4)
        self.second = self.first if same else nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


def test_golden() -> None:
    model = trained(Net().double())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert str(rewrite) == "fold-batch-norm(conv, norm)"
    assert rewrite.exact
    result = common.applied(graph, PASS, rewrite)
    assert common.text(result) == (
        "x = placeholder x()\n"
        "pad = call_function pad.default(x, [1, 1, 1, 1], replicate)\n"
        "conv = call_module conv(pad)\n"
        "relu = call_function relu.default(conv)\n"
        "output = output output((relu,))"
    )
    assert common.layers(result) == {"conv": "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))"}
    assert {"conv.weight", "conv.bias"} <= set(result.gm.state_dict())
    assert graph.gm.get_submodule("conv").bias is None
    assert common.on_other_batch(result, model, (x,), (torch.randn(5, 3, 6, 6, dtype=torch.float64),)) < 1e-10


def test_conv_called_at_two_sites() -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    graph = common.exported(trained(Twice(same=False).double()), x)
    reason = "module called at 2 sites, not each followed by the same batch norm alone"
    assert common.refusals(graph, PASS) == {"conv": reason}
    assert common.rewrites(graph, PASS) == []
    graph = common.exported(trained(Twice(same=True).double()), x)
    (rewrite,) = common.rewrites(graph, PASS)
    result = common.applied(graph, PASS, rewrite)
    assert list(common.layers(result)) == ["conv"]
    assert common.difference(result, graph, x) < 1e-10


@st.composite
def folds(draw: Any) -> tuple[nn.Module, int]:
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    conv = common.drawn_conv(draw, axes, into, out, groups)
    return nn.Sequential(
        conv, NORMS[axes - 1](out, affine=draw(st.booleans()), eps=draw(st.sampled_from([1e-5, 0.1])))
    ), axes


@settings(max_examples=40)
@given(folds())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_exact_for_all_options(drawn: tuple[Any, int]) -> None:
    model, axes = drawn
    x = torch.randn(2, model[0].in_channels, *[7] * axes, dtype=torch.float64)
    graph = common.drawn(trained(model.double()), x)
    (rewrite,) = common.rewrites(graph, PASS)
    result = common.applied(graph, PASS, rewrite)
    assert list(common.layers(result)) == ["0"]
    assert common.difference(result, graph, x) < 1e-10


def test_linear() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    graph = common.exported(trained(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)).double()), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 1e-10


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    x = torch.randn(2, 4, 6, 6).to(dtype)
    graph = common.drawn(model, x)
    (rewrite,) = common.rewrites(graph, PASS)
    result = common.applied(graph, PASS, rewrite)
    assert common.outputs(result, x)[0].dtype == dtype
    assert common.difference(result, graph, x) < limit


def test_half_precision_overflow_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, eps=0.0)).half()
    model[1].running_var.fill_(1e-7)
    model[1].weight.data.fill_(6e4)
    graph = common.drawn(model, torch.randn(2, 4, 6, 6).half())
    assert common.refusals(graph, PASS) == {"0": "the folded weight exceeds the range of float16"}


def test_refusals() -> None:
    class Both(nn.Module):
        def __init__(self, linear: bool = False) -> None:
            super().__init__()
            self.conv = nn.Linear(6, 6) if linear else nn.Conv1d(4, 4, 1)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) if isinstance(self.conv, nn.Linear) else self.norm(y) + y

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.norm(self.a(x))))

    x = torch.randn(2, 4, 6)
    assert common.refusals(common.drawn(Both(), x), PASS) == {"conv": "output has 2 users, only one is the batch norm"}
    reason = "batch norm normalizes axis 1, and the linear layer's features are another axis"
    assert common.refusals(common.drawn(Both(linear=True), x), PASS) == {"conv": reason}
    assert common.refusals(common.drawn(Tied(), x), PASS) == {"a": "weight tied with b"}
    batch = common.exported(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, track_running_stats=False)), x)
    assert common.refusals(batch, PASS) == {"0": "batch norm uses the statistics of the batch"}
    alone = common.drawn(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.BatchNorm1d(4)), x)
    assert common.refusals(alone, PASS) == {}
    assert common.rewrites(alone, PASS) == []


def test_statistics_of_the_batch_norm_hold_for_the_folded_conv() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).double())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    graph = common.drawn(model, x)
    ctx = common.context(graph, (x,))
    (rewrite,) = common.rewrites(graph, PASS, ctx)
    result = common.applied(graph, PASS, rewrite, ctx)
    gram = ctx.input_gram(result.site("2"), 1)
    assert gram is not None
    assert torch.equal(gram, ctx.grams["_1", 1].gram)


class Before(nn.Module):
    """A batch norm in front of layers, as in networks that normalize before they convolve."""

    def __init__(self, norm: nn.Module, *layers: nn.Module) -> None:
        super().__init__()
        self.norm, self.layers = norm, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.tanh(x))
        return sum(layer(y) for layer in self.layers)  # type: ignore[return-value]


def test_golden_before_layers() -> None:
    layers = (nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, groups=2))
    model = trained(Before(nn.BatchNorm2d(4), *layers).double())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert str(rewrite) == "fold-batch-norm(norm, layers.0, layers.1; shift=True)"
    assert rewrite.exact
    result = common.applied(graph, PASS, rewrite)
    assert [node.target for node in result.nodes if node.op == "call_module"] == ["layers.0", "layers.1"]
    assert common.difference(result, graph, x) < 1e-10
    other = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    assert common.on_other_batch(result, model, (x,), (other,)) < 1e-10


@given(folds(), st.booleans())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_before_layers_exact_for_all_options_or_refused(drawn: tuple[Any, int], shifts: bool) -> None:
    (conv, _), axes = drawn
    norm: Any = trained(NORMS[axes - 1](conv.in_channels))
    if not shifts:  # a batch norm that only scales: what zero padding allows
        norm.running_mean.zero_()
        norm.bias.data.zero_()
    x = torch.randn(2, conv.in_channels, *[7] * axes, dtype=torch.float64)
    graph = common.drawn(nn.Sequential(norm, conv).double(), x)
    found, refused = common.rewrites(graph, PASS), common.refusals(graph, PASS)
    assert len(found) + len(refused) == 1
    zeros = isinstance(conv, TRANSPOSED_CONVS) or conv.padding_mode == "zeros"
    if not shifts or (isinstance(conv, CONVS) and (conv.padding in ((0,) * axes, "valid") or not zeros)):
        assert found
    for rewrite in found:
        result = common.applied(graph, PASS, rewrite)
        assert list(common.layers(result)) == ["1"]
        assert common.difference(result, graph, x) < 1e-10


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), (6, 6), "layers.0: the shift does not reach the zeros that it pads"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (6, 6), None),
        (nn.ConvTranspose2d(4, 4, 2), (6, 6), "layers.0: a transposed convolution spreads the shift unevenly"),
        (nn.ConvTranspose2d(4, 4, 1), (6, 6), None),
        (nn.Linear(4, 4), (), None),
        (nn.Linear(6, 4), (6,), "batch norm normalizes axis 1, and the linear layer's features are another axis"),
    ],
)
def test_refusals_before_layers(model: nn.Module, size: tuple[int, ...], reason: str | None) -> None:
    norm = nn.BatchNorm2d(4) if len(size) == 2 else nn.BatchNorm1d(4)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    graph = common.drawn(trained(Before(norm, model)).double(), x)
    assert common.refusals(graph, PASS) == ({} if reason is None else {"norm": reason})
    for rewrite in common.rewrites(graph, PASS):
        assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 1e-10


def test_batch_norm_that_others_read_stays() -> None:
    class Both(Before):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(torch.tanh(x))
            return self.layers[0](y) + y

    x = torch.randn(3, 4)
    graph = common.exported(trained(Both(nn.BatchNorm1d(4), nn.Linear(4, 4))), x)
    assert common.refusals(graph, PASS) == {"norm": "its result is read by add too"}
    far = trained(Before(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4)))
    far.norm.running_mean.fill_(1e4)
    reason = "a shift of 2.24e+04 would cancel: at most 64 in float32"
    far.norm.running_var.fill_(0.2)
    assert common.refusals(common.exported(far, x), PASS) == {"norm": reason}


def test_batch_norm_called_twice_before_layers() -> None:
    class Twice(Before):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers[0](self.norm(torch.tanh(x)))
            return self.layers[1](self.norm(torch.relu(y)))

    x = torch.randn(3, 4, dtype=torch.float64)
    graph = common.exported(trained(Twice(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))).double(), x)
    first, second = common.rewrites(graph, PASS)
    assert [first.site, second.site] == [("norm", "layers.0"), ("norm", "layers.1")]
    both = common.applied(common.applied(graph, PASS, first), PASS, second)
    assert "norm" not in common.layers(both)
    assert common.difference(both, graph, x) < 1e-10


class Rows(nn.Module):
    """A norm over the rows of a single image, of which a convolution's channels are another axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("channels", [8, 16])
def test_channels_of_a_single_image_are_another_axis(channels: int) -> None:
    graph = trace(trained(Rows(channels)), (torch.randn(3, 16, 16),)).graph
    assert (
        common.refusals(graph, PASS)["conv"]
        == "batch norm normalizes axis 1, and the convolution's features are another axis"
    )


@pytest.mark.parametrize(("away", "folds"), [(1.0, True), (10.0, True), (1e5, False)])
def test_what_would_cancel_is_not_folded(away: float, folds: bool) -> None:
    """Raw features far from zero, which a norm brings there: folded, rounding of what cancels would show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64)).eval()
    x = away + torch.randn(256, 8)
    with torch.no_grad():
        model[0].weight.abs_()
        y = model[0](x)
        model[1].running_mean.copy_(y.mean(0))  # type: ignore[operator,union-attr]
        model[1].running_var.copy_(y.var(0))  # type: ignore[operator,union-attr]
    graph = common.exported(model, x)
    assert bool(common.rewrites(graph, PASS)) == folds
    assert folds or "at most 64: rounding would show" in common.refusals(graph, PASS)["0"]
    result = lrcompile.compile(model, (x,), target="rpi5", budget=lrcompile.Budget(max_error=0.0))
    assert any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.plan.rewrites) == folds
