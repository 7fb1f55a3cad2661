"""Splits an embedding table in a narrow table and a linear layer that widens what was looked up.

With token counts the truncation is weighted by how often each row is used, as GroupReduce does (Chen et al. 2018;
one group, and smoothed counts: our reading). The projection P is on the right, so the weights need no inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lrcompile.graph.graph import Graph, Site, owners
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile.planning.decompose import Spectrum
from lrcompile_passes.layers import cannot_decompose, check_least, linear
from lrcompile_passes.low_rank_linear import break_even


@dataclass(frozen=True)
class LowRankEmbedding(Pass):
    """Embedding(E) → Embedding(E·P_r) ; Linear(P_r).

    `smoothing` is added to every count, so that rows the calibration data never used keep some weight.
    """

    stage = Stage.FACTORIZE
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, "smoothing", 0)

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """One rewrite a rank below break-even, r < VD/(V+D)."""
        owner_map = owners(graph)
        for site in graph.modules_of(nn.Embedding):
            reason = _cannot_split(site) or cannot_decompose(graph, site, owner_map)
            if reason:
                yield site.refuse(reason)
                continue
            rows, width = site.module.weight.shape  # type: ignore[union-attr, misc]
            ranks = context.ranks(below=break_even(rows, width))
            if not ranks:
                yield site.refuse(f"too small: no rank of the device's step saves weights of {rows}×{width}")
                continue
            for rank in ranks:
                yield site.rewrite(rank=rank, error=partial(self._error, site, context, rank))

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts the two layers in the place of every call; a zero padding row stays zero, for nothing adds a bias."""
        site = rewriter.site()
        module: Any = site.module
        projection = self._spectrum(site, rewriter.context).basis[:, : int(rewrite.params["rank"])]  # type: ignore[arg-type]
        narrow = (module.weight.double() @ projection).to(module.weight.dtype)
        rows, rank = narrow.shape
        table = nn.Embedding(rows, rank, padding_idx=module.padding_idx, device="meta")
        table.weight = nn.Parameter(narrow, requires_grad=module.weight.requires_grad)
        table.train(module.training)
        rewriter.replace_module(site, [table, linear(module, projection.to(module.weight.dtype).contiguous())])

    def _error(self, site: Site, context: Context, rank: int) -> float:
        return self._spectrum(site, context).tail(rank)

    def _spectrum(self, site: Site, context: Context) -> Spectrum:
        counts = context.lookups(site)

        def matrix() -> Tensor:
            table: Any = site.module.weight
            if counts is None:
                return table.double().T
            return (table.double() * (counts.double() + self.smoothing).sqrt().unsqueeze(1)).T

        form = "embedding" if counts is None else f"embedding by count + {self.smoothing}"
        return context.svd(site, form, matrix)


def _cannot_split(site: Site) -> str | None:
    module: Any = site.module
    if module.max_norm is not None:
        return "max_norm changes the table while it is read"
    if module.scale_grad_by_freq or module.sparse:
        return "gradients by frequency or sparse gradients would be lost"
    return None
