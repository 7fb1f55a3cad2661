"""Splits a linear layer in two thin ones, where the product of their sizes is smaller than the layer.

The truncated SVD is weighted by the layer's calibration inputs where there are any (SVD-LLM's idea; the form
without an inverse is our reading, see `lrcompile.planning.decompose`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lrcompile.graph.graph import Graph, owners
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.layers import cannot_decompose, linear, shifted


@dataclass(frozen=True)
class LowRankLinear(Pass):
    """Linear(W) → Linear(V_r) ; Linear(U_r).

    With `center`, calibration inputs count from their mean, and what the split takes from the mean output is added to
    the bias, which a layer without one gets.
    """

    stage = Stage.FACTORIZE
    center: bool = False

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """One rewrite a rank below break-even, r < CS/(C+S); layers called often are split once for all calls."""
        owner_map = owners(graph)
        for site in graph.modules_of(nn.Linear):
            reason = cannot_decompose(graph, site, owner_map)
            if reason:
                yield site.refuse(reason)
                continue
            rows, columns = site.module.weight.shape  # type: ignore[union-attr, misc]
            ranks = context.ranks(below=break_even(rows, columns))
            if not ranks:
                yield site.refuse(f"too small: no rank of the device's step saves weights of {rows}×{columns}")
                continue
            for rank in ranks:
                yield site.rewrite(rank=rank, error=partial(context.error, site, rank, self.center))

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts the two layers in the place of every call; the second keeps the bias."""
        site, context = rewriter.site(), rewriter.context
        module: Any = site.module
        rank: Any = rewrite.params["rank"]
        spectrum = context.spectrum(site, self.center)
        up, down = spectrum.factors(rank)
        bias = None if module.bias is None else context.constant(module.bias)
        chain = [linear(module, down), linear(module, up, shifted(bias, spectrum.lost_mean(rank)))]
        rewriter.replace_module(site, chain)


def break_even(rows: int, columns: int) -> int:
    """The least rank at which two factors hold no fewer numbers than the matrix."""
    return -(-rows * columns // (rows + columns))
