"""Splits a convolution as Tucker does, and keeps of the core only diagonal blocks: branches side by side in one call.

A core in N blocks has an N-th of the weights and of the work (2407.20266). Grouped convolutions are slower than their
work says on many devices, so the price decides. Ranks are put in the order that keeps most of the core, which is our
reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lrcompile.graph.graph import TRANSPOSED_CONVS, Graph, Site, owners
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.layers import (
    CONVS,
    cannot_decompose,
    check_least,
    conv,
    conv_transpose,
    geometry,
    is_pointwise,
)
from lrcompile_passes.low_rank_conv import Sizes, cannot_split, tucker_ranks


@dataclass(frozen=True)
class BranchTucker(Pass):
    """Conv(W) → Conv(V) ; Conv(diag(core₁ … core_N), groups=N) ; Conv(U), W ≈ Σ_n U_n·core_n·V_n.

    `groups` are the numbers of branches that are tried, `pairs` bounds how many pairs of ranks each is tried with.
    """

    stage = Stage.FACTORIZE
    groups: tuple[int, ...] = (2, 4)
    pairs: int = 8

    def __post_init__(self) -> None:
        check_least(self, "groups", 1)
        check_least(self, "pairs", 1)

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Every number of branches with the ranks that it divides and that save weights and multiply-adds."""
        if "grouped_conv" in context.device.lacks:
            return
        owner_map = owners(graph)
        for site in graph.modules_of(*CONVS, *TRANSPOSED_CONVS):
            if is_pointwise(site.module):
                continue  # its core is a matrix, which the SVD makes diagonal already
            reason = cannot_split(site) or cannot_decompose(graph, site, owner_map)
            if reason:
                yield site.refuse(reason)
                continue
            found = list(self._splits(site, context))
            yield from found
            if not found:
                size = "×".join(map(str, site.module.weight.shape))  # type: ignore[arg-type, union-attr]
                yield site.refuse(
                    f"too small: no ranks of the device's step in branches save weights and work of {size}"
                )

    def _splits(self, site: Site, context: Context) -> Iterator[Rewrite]:
        sizes = Sizes.of(site)
        for groups in self.groups:
            for rank_out, rank_in in tucker_ranks(site, context, sizes, self.pairs, groups):
                error = partial(_error, site, context, rank_out, rank_in, groups)
                yield site.rewrite(rank_out=rank_out, rank_in=rank_in, groups=groups, error=error)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts the chain in the place of every call; only its last convolution has a bias."""
        site = rewriter.site()
        module: Any = site.module
        ranks: Any = (rewrite.params[name] for name in ("rank_out", "rank_in", "groups"))
        rank_out, rank_in, groups = ranks
        up, core, down = rewriter.context.tucker(site).branches(rank_out, rank_in, groups)
        taps = (1,) * len(module.kernel_size)
        options = {**geometry(module), "groups": groups}
        if isinstance(module, TRANSPOSED_CONVS):  # its weight is [in × out/groups × taps…]
            turned = core.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()
            middle: nn.Module = conv_transpose(module, turned, **options)
        else:
            middle = conv(module, core, **options)
        first, last = down.unflatten(1, (-1, *taps)), up.unflatten(1, (-1, *taps))
        rewriter.replace_module(site, [conv(module, first), middle, conv(module, last, module.bias)])


def _error(site: Site, context: Context, rank_out: int, rank_in: int, groups: int) -> float:
    return context.tucker(site).branch_tail(rank_out, rank_in, groups)
