"""Folds a batch norm with fixed statistics into the convolution or linear layer before it.

Written because `torch.fx.experimental.optimization.fuse` folds a layer that is called at two sites into the batch
norm of one of them, and is then silently wrong at the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.graph import Graph, Site, aten, owners, shape
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.layers import CONVS, TRANSPOSED_CONVS, cannot_rebuild, with_weight

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Conv(W)·BN → Conv(W′), W′ = W·γ/√(σ²+ε), b′ = (b−μ)·γ/√(σ²+ε)+β."""

    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Every layer whose calls all go into one batch norm and nowhere else."""
        owner_map = owners(graph)
        for site in graph.modules_of(nn.Linear, *CONVS, *TRANSPOSED_CONVS):
            if not any(_normalizes(graph, user) for node in site.nodes for user in node.users):
                continue
            reason = _cannot_fold(graph, site) or cannot_rebuild(graph, site, owner_map)
            yield site.refuse(reason) if reason else site.rewrite(exact=True)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Gives the layer new weights, under its old path, and erases the batch norm's calls after it."""
        site = rewriter.site()
        norms = [next(iter(node.users)) for node in site.nodes]
        norm: Any = rewriter.graph.module(norms[0])
        rewriter.set_module(site.path, with_weight(site.module, *folded(site.module, norm)))
        for norm_node, node in zip(norms, site.nodes, strict=True):
            rewriter.replace(norm_node, node)


def folded(module: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the layer with the batch norm folded in, computed in float64, in the layer's dtype."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = module.weight.double()
    if isinstance(module, TRANSPOSED_CONVS):  # [in × out/groups × taps…]: output channels count within their group
        grouped = weight.unflatten(0, (module.groups, -1))
        by_group = scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * by_group).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if module.bias is None else module.bias.double() * scale + shift
    return weight.to(module.weight.dtype), bias.to(module.weight.dtype)


def _normalizes(graph: Graph, node: fx.Node) -> bool:
    return node.target is aten.batch_norm.default or isinstance(graph.module(node), BATCH_NORMS)


def _cannot_fold(graph: Graph, site: Site) -> str | None:
    users = list(dict.fromkeys(user for node in site.nodes for user in node.users))
    norms: list[Any] = [graph.module(user) for user in users]
    if len(site.nodes) > 1 and (len(users) != len(site.nodes) or not all(_same(norms[0], norm) for norm in norms)):
        return f"module called at {len(site.nodes)} sites, not each followed by the same batch norm alone"
    if len(users) > len(site.nodes):
        return f"output has {len(users)} users, only one is the batch norm"
    if not all(isinstance(norm, BATCH_NORMS) and norm.running_mean is not None and not norm.training for norm in norms):
        return "batch norm uses the statistics of the batch"
    if isinstance(site.module, nn.Linear) and any(len(shape(node)) != 2 for node in site.nodes):
        return "batch norm normalizes axis 1, and the linear layer's features are the last axis"
    weight: Any = site.module.weight
    if weight.dtype is torch.float16 and not folded(site.module, norms[0])[0].isfinite().all():
        return "the folded weight exceeds the range of float16"
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether two modules are one batch norm, as lifted at each of the names that the model has for it."""
    names = ("running_mean", "running_var", "weight", "bias")
    both = isinstance(a, BATCH_NORMS) and isinstance(b, BATCH_NORMS)
    return both and a.eps == b.eps and all(getattr(a, name) is getattr(b, name) for name in names)
