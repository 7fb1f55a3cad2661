"""Folds a constant scale into the layer before it: one operation less, such as the 1/√d of attention queries."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lrcompile import Context, Graph, Pass, Refusal, Rewrite, Rewriter, Site, Stage
from lrcompile.graph.graph import aten, tied_with

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # float16 has too little range for scaled weights


@dataclass(frozen=True)
class FoldScale(Pass):
    """Layer(W, b)·c → Layer(cW, cb).

    `limit` is an option: scales above it or below 1/`limit` are left alone.
    """

    stage = Stage.CANONICALIZE
    limit: float = 4096.0

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """One rewrite for each layer whose calls are all multiplied by one constant and used nowhere else."""
        for site in graph.modules_of(*LAYERS):
            scales = [_scale(user) for node in site.nodes for user in node.users]
            if all(scale is None for scale in scales):
                continue
            reason = self._cannot_fold(graph, site, scales)
            yield site.refuse(reason) if reason else site.rewrite(exact=True, scale=scales[0])

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Gives the layer scaled weights, under its old path, and erases the multiplications."""
        site = rewriter.site()
        scaled: Any = copy.deepcopy(site.module)
        scaled.weight.mul_(rewrite.params["scale"])
        if scaled.bias is not None:
            scaled.bias.mul_(rewrite.params["scale"])
        rewriter.set_module(site.path, scaled)
        for node in site.nodes:
            rewriter.replace(next(iter(node.users)), node)

    def _cannot_fold(self, graph: Graph, site: Site, scales: list[float | None]) -> str | None:
        weight: Any = site.module.weight
        if len(scales) > len(site.nodes) or None in scales:
            return "its output is used without the scale too"
        if len(set(scales)) > 1:
            return f"module called at {len(site.nodes)} sites with different scales"
        if not 1 / self.limit <= abs(scales[0] or 0.0) <= self.limit:
            return f"scale {scales[0]:g} is beyond the limit of {self.limit:g}"
        if weight.dtype not in DTYPES:
            return f"weight is of type {str(weight.dtype).removeprefix('torch.')}"
        other = tied_with(graph, site)
        return f"weight tied with {other}" if other else None


def _scale(node: fx.Node) -> float | None:
    """The constant that a node multiplies its first argument by, or None."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    by = node.args[1]
    if not isinstance(by, int | float) or not math.isfinite(by) or by == 0:
        return None
    return float(by) if node.target is aten.mul.Tensor else 1 / by
