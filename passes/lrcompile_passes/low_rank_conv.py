"""Splits a convolution in two or three: three rival forms, of which the device's prices choose.

"pointwise" is the SVD of a 1×1 kernel. "tucker" puts a small kernel between two 1×1 convolutions (Kim et al.
2016). "spatial" splits a 2-D kernel in a column and a row (Jaderberg et al. 2014; in the SVD form of Tai et al.
2016). With calibration data what reads the input is weighted by its channels, positions of the window taken as alike,
and the rest is fitted to the patches that the window sees (`lrcompile.planning.windows`; our reading).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

from torch import Tensor, nn

from lrcompile.graph.graph import TRANSPOSED_CONVS, Graph, Site, owners, shape
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile.planning.decompose import Spectrum
from lrcompile_passes.layers import (
    CONVS,
    cannot_decompose,
    check_least,
    conv,
    conv_transpose,
    geometry,
    is_pointwise,
    shifted,
)


@dataclass(frozen=True)
class LowRankConv(Pass):
    """Conv(W) → Conv(V) ; Conv(core) ; Conv(U).

    `pairs` bounds how many pairs of Tucker ranks are proposed a site: those that no other pair beats in both
    error and multiply-adds. With `center`, calibration inputs count from their mean, and what the split takes from the
    mean output is added to the bias, which a layer without one gets. The mean is that over all positions: with zeros
    around the input, outputs at the border are shifted by what suits the average one. Transposed convolutions, padded
    1×1 ones and those whose patches are too large to be kept are not shifted.
    """

    stage = Stage.FACTORIZE
    pairs: int = 16
    center: bool = False

    def __post_init__(self) -> None:
        check_least(self, "pairs", 1)

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Every form that fits the site, at every rank that saves both weights and multiply-adds."""
        owner_map = owners(graph)
        for site in graph.modules_of(*CONVS, *TRANSPOSED_CONVS):
            reason = cannot_split(site) or cannot_decompose(graph, site, owner_map)
            if reason:
                yield site.refuse(reason)
                continue
            found = list(self._splits(site, context))
            yield from found
            if not found:
                size = "×".join(map(str, site.module.weight.shape))  # type: ignore[arg-type, union-attr]
                yield site.refuse(f"too small: no rank of the device's step saves weights and work of {size}")

    def _splits(self, site: Site, context: Context) -> Iterator[Rewrite]:
        sizes = Sizes.of(site)
        module: Any = site.module
        if is_pointwise(module):
            for rank in context.ranks(below=sizes.break_even(sizes.into + sizes.out, sizes.into + sizes.out, 1)):
                yield site.rewrite(form="pointwise", rank=rank, error=partial(context.error, site, rank, self.center))
            return
        yield from self._tucker(site, context, sizes)
        if isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1:
            high, wide = module.kernel_size[0] * sizes.into, module.kernel_size[1] * sizes.out
            middle = shape(site.nodes[0])[-2] * shape(site.input)[-1]
            limit = sizes.break_even(high + wide, high * middle + wide * sizes.after, sizes.after)
            for rank in context.ranks(below=limit):
                yield site.rewrite(form="spatial", rank=rank, error=partial(self._spatial_error, site, context, rank))

    def _tucker(self, site: Site, context: Context, sizes: Sizes) -> Iterator[Rewrite]:
        for rank_out, rank_in in tucker_ranks(site, context, sizes, self.pairs, center=self.center):
            error = context.tucker(site, self.center).tail(rank_out, rank_in)
            yield site.rewrite(form="tucker", rank_out=rank_out, rank_in=rank_in, error=error)

    def _spatial_error(self, site: Site, context: Context, rank: int) -> float:
        return _spatial(site, context, self.center).tail(rank)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts the chain in the place of every call; only its last convolution has a bias."""
        make = {"pointwise": _pointwise_chain, "tucker": _tucker_chain, "spatial": _spatial_chain}
        site = rewriter.site()
        chain = make[rewrite.params["form"]](site, rewriter.context, rewrite.params, self.center)  # type: ignore[index]
        rewriter.replace_module(site, chain)


@dataclass(frozen=True)
class Sizes:
    """Channels, taps, and positions before and after: what weights and multiply-adds are counted from."""

    into: int
    out: int
    taps: int
    before: int
    after: int
    transposed: bool

    @classmethod
    def of(cls, site: Site) -> Sizes:
        """Those of a convolution's first call."""
        module: Any = site.module
        axes = len(module.kernel_size)
        before, after = (prod(shape(node)[-axes:]) for node in (site.input, site.nodes[0]))
        transposed = isinstance(module, TRANSPOSED_CONVS)
        return cls(module.in_channels, module.out_channels, prod(module.kernel_size), before, after, transposed)

    @property
    def weights(self) -> int:
        """Of the layer as it is, without its bias."""
        return self.into * self.out * self.taps

    @property
    def positions(self) -> int:
        """At which the layer's window is laid."""
        return self.before if self.transposed else self.after

    def break_even(self, weights: int, work: int, positions: int) -> int:
        """The least rank that saves nothing, for `weights` and `work` a unit of rank."""
        return ceil(min(self.weights / weights, self.weights * positions / work))

    def tucker_work(self, rank_out: int, rank_in: int, groups: int = 1) -> int:
        """Multiply-adds of the chain; its core may be in groups."""
        core = self.taps * rank_in * rank_out // groups * self.positions
        return self.into * rank_in * self.before + core + rank_out * self.out * self.after

    def saves(self, rank_out: int, rank_in: int, groups: int = 1) -> bool:
        """Whether the chain has fewer weights and multiply-adds than the layer."""
        weights = self.into * rank_in + self.taps * rank_in * rank_out // groups + rank_out * self.out
        return weights < self.weights and self.tucker_work(rank_out, rank_in, groups) < self.weights * self.positions


def tucker_ranks(
    site: Site, context: Context, sizes: Sizes, pairs: int, groups: int = 1, center: bool = False
) -> list[tuple[int, int]]:
    """Pairs (r2, r1) that save weights and work, those that no other beats in error and work; at most `pairs`.

    With a core in groups the error is that before the blocks are cut, which is enough to leave out poor pairs.
    """
    choices = [
        (sizes.tucker_work(rank_out, rank_in, groups), rank_out, rank_in)
        for rank_out in context.ranks(below=sizes.out)
        for rank_in in context.ranks(below=sizes.into)
        if not (rank_out % groups or rank_in % groups) and sizes.saves(rank_out, rank_in, groups)
    ]
    if not choices:
        return []
    tucker = context.tucker(site, center)
    front: list[tuple[float, int, int]] = []
    for _, rank_out, rank_in in sorted(choices):
        error = tucker.tail(rank_out, rank_in)
        if not front or error < front[-1][0]:
            front.append((error, rank_out, rank_in))
    step = max(1, ceil(len(front) / pairs))
    return [(rank_out, rank_in) for _, rank_out, rank_in in front[::-1][::step][::-1]]


def cannot_split(site: Site) -> str | None:
    """Why a convolution is none that a chain can take the place of, or None."""
    module: Any = site.module
    if module.groups == module.in_channels and module.groups > 1:
        return "depthwise: each channel has a filter of its own"
    if module.groups > 1:
        return f"grouped convolution: groups={module.groups}"
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode}"
    if any(len(shape(node)) != len(module.kernel_size) + 2 for node in site.nodes):
        return "input has no batch axis"
    return None


def _spatial(site: Site, context: Context, center: bool) -> Spectrum:
    """The SVD of the kernel as [(S, row tap) × (C, column tap)]."""
    return context.separable(site, (0,), center)


def _bias(site: Site, context: Context, lost: Tensor | None) -> Tensor | None:
    bias: Any = site.module.bias
    return shifted(None if bias is None else context.constant(bias), lost)


def _pointwise_chain(site: Site, context: Context, params: Any, center: bool) -> list[nn.Module]:
    module: Any = site.module
    spectrum = context.spectrum(site, center)
    up, down = spectrum.factors(params["rank"])
    bias = _bias(site, context, spectrum.lost_mean(params["rank"]))
    taps = (1,) * len(module.kernel_size)
    if isinstance(module, TRANSPOSED_CONVS):  # the first works on the smaller side, so the second carries the stride
        widen = up.T.contiguous().unflatten(1, (-1, *taps))
        first = conv(module, down.unflatten(1, (-1, *taps)))
        return [first, conv_transpose(module, widen, bias, **geometry(module))]
    first = conv(module, down.unflatten(1, (-1, *taps)), **geometry(module))
    return [first, conv(module, up.unflatten(1, (-1, *taps)), bias)]


def _tucker_chain(site: Site, context: Context, params: Any, center: bool) -> list[nn.Module]:
    module: Any = site.module
    tucker, ranks = context.tucker(site, center), (params["rank_out"], params["rank_in"])
    up, core, down = tucker.factors(*ranks)
    bias = _bias(site, context, tucker.lost_mean(*ranks))
    taps = (1,) * len(module.kernel_size)
    if isinstance(module, TRANSPOSED_CONVS):
        middle: nn.Module = conv_transpose(module, core.transpose(0, 1).contiguous(), **geometry(module))
    else:
        middle = conv(module, core, **geometry(module))
    first, last = down.unflatten(1, (-1, *taps)), up.unflatten(1, (-1, *taps))
    return [conv(module, first), middle, conv(module, last, bias)]


def _spatial_chain(site: Site, context: Context, params: Any, center: bool) -> list[nn.Module]:
    module: Any = site.module
    high, wide = module.kernel_size
    rank = params["rank"]
    spectrum = _spatial(site, context, center)
    up, down = spectrum.factors(rank)
    bias = _bias(site, context, spectrum.lost_mean(rank))
    column = down.reshape(rank, module.in_channels, high, 1)
    row = up.reshape(module.out_channels, wide, rank).transpose(1, 2).unsqueeze(2).contiguous()
    (stride_y, stride_x), (dilation_y, dilation_x) = module.stride, module.dilation
    same = isinstance(module.padding, str)
    padding_y, padding_x = ("same", "same") if same else ((module.padding[0], 0), (0, module.padding[1]))
    return [
        conv(module, column, stride=(stride_y, 1), padding=padding_y, dilation=(dilation_y, 1)),
        conv(module, row, bias, stride=(1, stride_x), padding=padding_x, dilation=(1, dilation_x)),
    ]
