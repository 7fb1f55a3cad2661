"""Splits of convolutions fitted to the patches that their windows see: the predicted error is the measured one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lrcompile_passes.branch_tucker import BranchTucker
from lrcompile_passes.factorize_conv3d import FactorizeConv3d
from lrcompile_passes.low_rank_conv import LowRankConv
from lrcompile_passes.low_rank_linear import LowRankLinear
from torch import Tensor, nn

import lrcompile
from lrcompile.errors import InputError
from lrcompile.graph.graph import Graph
from lrcompile.passes import Context, Pass
from lrcompile.planning import moments as moments_module
from lrcompile.planning.calibration import collect
from lrcompile.planning.moments import MOST_FEATURES, Moments, Window, moments
from tests.passes import common

IMAGES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": (2, 3), "padding": (0, 2), "stride": (1, 2)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "stride": 2, "padding": 1},
]


def smooth(*size: int) -> Tensor:
    """Correlated channels and neighbours, and a mean, as real activations have."""
    torch.manual_seed(1)
    value = torch.randn(*size, dtype=torch.float64)
    for axis in range(2, value.dim()):
        value = value + value.roll(1, axis) + value.roll(2, axis)
    mix = torch.randn(size[1], size[1], dtype=torch.float64)
    return torch.einsum("oc,bc...->bo...", mix, value) / 10 + 0.2


def channels_only(ctx: Context) -> Context:
    """The same statistics without patches: taps are taken as alike."""
    return Context(ctx.device, grams={key: known for key, known in ctx.grams.items() if key[1] == 1})


def check(graph: Graph, transform: Pass, x: Tensor) -> None:
    """Each split's predicted error is the measured one, and no larger than that of the split from channels alone."""
    ctx = common.context(graph, (x,))
    lossy = [rewrite for rewrite in common.rewrites(graph, transform, ctx) if not rewrite.exact]
    assert lossy
    for rewrite in lossy:
        measured = common.difference(common.applied(graph, transform, rewrite, ctx), graph, x)
        assert measured == pytest.approx(rewrite.error, rel=1e-3), rewrite
        blind = common.applied(graph, transform, rewrite, channels_only(ctx))
        assert measured <= common.difference(blind, graph, x) * (1 + 1e-6), rewrite


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("options", IMAGES, ids=str)
def test_error_of_splits_of_images_is_exact_and_no_larger(options: dict[str, Any], center: bool) -> None:
    x = smooth(6, 16, 12, 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, **options, bias=False)).double()
    check(common.drawn(model, x), LowRankConv(center=center), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [None, IMAGES[0], IMAGES[4]], ids=str)
def test_the_mean_output_is_kept(options: dict[str, Any] | None, bias: bool) -> None:
    """A bias takes what a split loses of the mean, so errors are smaller at the same rank, and still exact."""
    torch.manual_seed(0)
    x = smooth(6, 16, 12, 12) + torch.randn(16, 1, 1, dtype=torch.float64)
    kind = LowRankConv if options else LowRankLinear
    layer = nn.Conv2d(16, 24, **options, bias=bias) if options else nn.Linear(12, 24, bias=bias)
    graph = common.drawn(nn.Sequential(layer).double(), x)
    ctx = common.context(graph, (x,))
    (expected,) = common.outputs(graph, x)
    axes = (0, 2, 3) if options else (0, 1, 2)
    bias_of = torch.zeros(24) if layer.bias is None else layer.bias.detach()
    unbiased = expected.detach() - bias_of.view(-1, 1, 1) if options else expected.detach() - bias_of
    for rewrite in common.rewrites(graph, kind(center=True), ctx):
        (got,) = common.outputs(common.applied(graph, kind(center=True), rewrite, ctx), x)
        (without,) = common.outputs(common.applied(graph, kind(), rewrite, ctx), x)
        assert torch.allclose(got.mean(axes), expected.mean(axes), atol=1e-9)
        lost = float((got - expected).norm() / unbiased.norm())
        assert lost == pytest.approx(rewrite.error, rel=1e-3, abs=1e-6)
        assert lost < float((without - expected).norm() / unbiased.norm())


@pytest.mark.parametrize("layer", [nn.Linear(8, 12, bias=False), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 3)], ids=str)
def test_at_full_rank_no_bias_changes(layer: Any) -> None:
    x = smooth(4, 8, 8, 8)
    graph = common.drawn(nn.Sequential(layer).double(), x)
    ctx, site = common.context(graph, (x,)), graph.site("0")
    if layer.weight.dim() == 2 or layer.kernel_size == (1, 1):
        lost = [ctx.spectrum(site, centered=True).lost_mean(rank) for rank in (7, 8)]
    else:
        lost = [ctx.tucker(site, centered=True).lost_mean(*ranks) for ranks in ((12, 7), (12, 8))]
        assert ctx.separable(site, (0,), centered=True).lost_mean(24) is None
    assert lost[0] is not None
    assert lost[1] is None


def test_error_of_splits_of_sequences_is_exact_and_no_larger() -> None:
    x = smooth(6, 32, 40)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(32, 24, 5, stride=2, padding=3, bias=False)).double()
    check(common.drawn(model, x), LowRankConv(), x)


def test_error_of_splits_of_volumes_is_exact_and_no_larger() -> None:
    x = smooth(3, 16, 6, 8, 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(16, 16, (3, 3, 2), stride=(1, 2, 1), padding=1, bias=False)).double()
    graph = common.drawn(model, x)
    check(graph, FactorizeConv3d(), x)
    check(graph, LowRankConv(), x)


def test_patches_are_seen_on_all_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.conv(x), self.conv(x.flip(2).abs())], 1)

    x = smooth(6, 16, 12, 12)
    check(common.drawn(Twice().double(), x), LowRankConv(), x)


def test_what_the_data_do_not_excite_is_kept() -> None:
    """With all ranks the chain is the layer, on inputs unlike the data too; dead channels have weights."""
    x = smooth(4, 8, 10, 10)
    x[:, 3:] = 0
    torch.manual_seed(0)
    graph = common.drawn(nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)).double(), x)
    ctx, site = common.context(graph, (x,)), graph.site("0")
    weight: Any = site.module.weight
    up, core, down = ctx.tucker(site).factors(12, 8)
    assert common.relative(torch.einsum("so,oihw,ic->schw", up, core, down), weight) < 1e-8
    up, down = ctx.separable(site, (0,)).factors(24)
    kernel = (up @ down).reshape(12, 3, 8, 3).permute(0, 2, 3, 1)
    assert common.relative(kernel, weight) < 1e-8


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patches_are_what_a_convolution_sees(axes: int) -> None:
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    size, stride, dilation = (2, 3, 2)[:axes], (2, 1, 1)[:axes], (1, 2, 1)[:axes]
    for padding in ((1, 0, 2)[:axes], "valid"):
        conv = kind(3, 5, size, stride=stride, dilation=dilation, padding=padding, bias=False).double()
        x = torch.randn(2, 3, *(7, 8, 6)[:axes], dtype=torch.float64)
        window = Window.of(conv)
        assert window is not None
        seen = window.patches(x)
        product = torch.tensordot(seen.flatten(1 + axes), conv.weight.flatten(1), ([-1], [1]))
        assert torch.allclose(product.movedim(-1, 1), conv(x))


def test_windows_that_are_not_kept() -> None:
    assert Window.of(nn.Conv2d(8, 8, 1)) is None
    assert Window.of(nn.Conv2d(8, 8, 3, groups=2)) is None
    assert Window.of(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")) is None
    assert Window.of(nn.ConvTranspose2d(8, 8, 3)) is None
    assert Window.of(nn.Conv2d(MOST_FEATURES // 9, 8, 3)) is not None
    assert Window.of(nn.Conv2d(MOST_FEATURES // 9 + 1, 8, 3)) is None


def test_moments_are_the_same_in_pieces() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 7, 4, 3, dtype=torch.float64) + 1
    flat = rows.flatten(0, 1).flatten(1)
    for most in (1, 50, 10**6):
        got = moments(rows, features=2, most=most)
        assert torch.allclose(got.gram, flat.T @ flat, rtol=1e-12)
        assert torch.allclose(got.mean, flat.mean(0))
        centered = flat - flat.mean(0)
        assert torch.allclose(got.centered, centered.T @ centered)
        assert got.rows == 35


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(kind: torch.dtype) -> None:
    """The squares overflow half precision, and their sum would stop growing in bfloat16."""
    rows = torch.full((3000, 2), 300.0, dtype=kind)
    got = moments(rows)
    assert got.gram.flatten().tolist() == pytest.approx([2.7e8] * 4, rel=3000 * 2**-24)  # as single precision rounds
    assert got.total.tolist() == [9e5, 9e5]


def test_pieces_are_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 3, dtype=torch.float64)
    product, sizes = moments_module._product, []

    def limited(piece: Tensor, weights: Tensor | None) -> Moments:
        sizes.append(len(piece))
        if len(piece) > 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 960 bytes.")
        return product(piece, weights)

    monkeypatch.setattr(moments_module, "_product", limited)
    assert torch.allclose(moments(rows).gram, rows.T @ rows)
    assert sizes[:4] == [40, 20, 10, 5]
    assert sum(size for size in sizes if size <= 6) == 40


def test_no_memory_at_all_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(piece: Tensor, weights: Tensor | None) -> Moments:
        raise MemoryError

    graph = common.drawn(nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3))
    with monkeypatch.context() as patch:
        patch.setattr(moments_module, "_product", refuse)
        with pytest.raises(InputError, match=r"not enough memory for the Gram matrix of 3 .* without --calib$"):
            collect(graph, [(torch.ones(1, 3),)])

    class Hungry(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 1 TB")

    graph.gm.add_module("0", Hungry(3, 3))
    with pytest.raises(
        InputError, match=r"not enough memory to run the model .* calibration samples, 1 at a time: .* other programs$"
    ):
        collect(graph, [(torch.ones(1, 3),)])


def test_other_failures_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(piece: Tensor, weights: Tensor | None) -> Moments:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(moments_module, "_product", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        moments(torch.ones(4, 3))


def test_collected_from_a_generator() -> None:
    graph = common.drawn(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), torch.ones(1, 2, 4, 4))
    torch.manual_seed(0)
    batches = [(torch.randn(5, 2, 4, 4),) for _ in range(3)]
    found, same = collect(graph, iter(batches)), collect(graph, batches)
    assert found.grams.keys() == same.grams.keys()
    assert all(torch.equal(known.gram, same.grams[key].gram) for key, known in found.grams.items())
    assert {known.rows for known in found.grams.values()} == {15, 60, 240}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_inputs_of_a_layer_that_are_not_finite_are_named(value: float) -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * value)

    graph = common.drawn(Overflows(), torch.ones(1, 3))
    with pytest.raises(InputError, match=r"the inputs of second are infinite, NaN or beyond 1e19"):
        collect(graph, [(torch.ones(2, 3),)])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_convolution_of_one_sample_is_not_seen(weighted: bool) -> None:
    """Without a batch axis the channels are axis 0: axis 1 may be as long as a recording."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x[0]))

    x = torch.randn(2, 2, 50)
    found = collect(common.drawn(First(), x), [(x,)], weighted=weighted)
    assert (found.grams, found.gradients) == ({}, {})


def test_a_layer_on_a_single_row_or_vector() -> None:
    """One row is its own mean: nothing is left of it, and a bias can hold all that any rank loses."""
    torch.manual_seed(0)
    graph = common.drawn(nn.Sequential(nn.Linear(16, 24)), torch.ones(16))
    x = torch.linspace(-1, 2, 16)
    ctx = common.context(graph, (x,))
    site = graph.site("0")
    assert ctx.spectrum(site, centered=True).tail(1) < 1e-3
    assert ctx.spectrum(site).tail(1) < 0.1


def test_a_layer_of_complex_numbers_is_not_seen() -> None:
    """And the others are, with what the outputs feel of them; nothing is cast to real numbers, which torch warns of."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.last = nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.fft.ifft(self.mix(torch.fft.fft(x))).real)

    data = lrcompile.calibration_from({"x": torch.randn(8, 8)}, ["x"], batch=4)
    prepared = lrcompile.prepare_model(Spectral().eval(), (torch.randn(4, 8),), calibration=data)
    assert list(prepared.context.gradients) == [prepared.graph.site("last").nodes[0].name]
    assert len(prepared.context.grams) == len(prepared.seen) == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_inputs_that_do_not_vary(kind: torch.dtype) -> None:
    """Rounding leaves a centred Gram matrix that may be indefinite; zeros leave one that is nothing at all."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, dtype=kind)
    graph = common.drawn(
        nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 32, dtype=kind)), torch.ones(1, 8, 4, 4, dtype=kind)
    )
    for x in (torch.randn(1, 8, 4, 4, dtype=kind).expand(30, -1, -1, -1) * 1e3, torch.zeros(3, 8, 4, 4, dtype=kind)):
        ctx = common.context(graph, (x,))
        for centered in (False, True):
            conv, dense = graph.site("0"), graph.site("2")
            tails = [ctx.spectrum(dense, centered).tail(8), ctx.tucker(conv, centered).tail(8, 4)]
            tails.append(ctx.separable(conv, (0,), centered).tail(8))
            assert all(0 <= tail <= 1 for tail in tails), (centered, tails)
            factors = [*ctx.spectrum(dense, centered).factors(8), *ctx.tucker(conv, centered).factors(8, 4)]
            assert all(bool(factor.isfinite().all()) for factor in factors)


@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_that_are_zero(calibrated: bool) -> None:
    """As of a layer that training is to begin with: all that a split keeps of it is all there is."""
    layer = nn.Conv2d(16, 24, 3, padding=1)
    nn.init.zeros_(layer.weight)
    x = torch.randn(4, 16, 12, 12)
    graph = common.drawn(nn.Sequential(layer), x)
    ctx = common.context(graph, (x,)) if calibrated else common.context()
    for transform in (LowRankConv(), BranchTucker()):
        for rewrite in common.rewrites(graph, transform, ctx):
            assert rewrite.error == 0, rewrite
            assert common.difference(common.applied(graph, transform, rewrite, ctx), graph, x) == 0
