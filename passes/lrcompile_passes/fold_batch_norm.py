"""Folds a batch norm with fixed statistics into the layer before it, or into the layers that read it.

Written because `torch.fx.experimental.optimization.fuse` folds a layer that is called at two sites into the batch
norm of one of them, and is then silently wrong at the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.graph import Graph, Site, aten, feature_axis, owners, shape
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.affine import (
    BATCH_NORMS,
    LAYERS,
    Affine,
    after,
    before,
    cancels,
    cannot_absorb,
    of_batch_norm,
    out_of_range,
    out_of_step,
    readers,
    rebuilt,
)
from lrcompile_passes.layers import cannot_rebuild


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Conv(W)·BN → Conv(W′), W′ = W·γ/√(σ²+ε), b′ = (b−μ)·γ/√(σ²+ε)+β ; BN·Conv(W) likewise."""

    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Every layer whose calls all go into one batch norm and nowhere else; then the layers behind a batch norm."""
        owner_map, sites = owners(graph), graph.sites()
        folded: set[fx.Node] = set()
        for site in graph.modules_of(*LAYERS):
            norms = {user for node in site.nodes for user in node.users if _normalizes(graph, user)}
            if not norms:
                continue
            reason = _cannot_fold(graph, site, context) or cannot_rebuild(graph, site, owner_map)
            folded |= set() if reason else norms
            paths = dict.fromkeys(str(norm.target) for norm in norms)
            yield site.refuse(reason) if reason else Rewrite("", (site.path, *paths), exact=True)
        for site in graph.modules_of(*BATCH_NORMS):
            for node in site.nodes:
                if node not in folded and readers(graph, node, sites):
                    yield _ahead(graph, site, node, sites, owner_map, context)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Gives the layers new weights, under their old paths, and erases the batch norm's calls next to them."""
        if "shift" in rewrite.params:
            self._apply_ahead(rewriter, rewrite)
            return
        site = rewriter.site()
        norms = [next(iter(node.users)) for node in site.nodes]
        affine = of_batch_norm(rewriter.graph.module(norms[0]), rewriter.context)
        rewriter.set_module(site.path, rebuilt(site.module, *after(site.module, affine, rewriter.context)))
        for norm_node, node in zip(norms, site.nodes, strict=True):
            rewriter.replace(norm_node, node)

    def _apply_ahead(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        affine = of_batch_norm(rewriter.site().module, rewriter.context)
        if not rewrite.params["shift"]:
            affine = Affine(affine.scale)
        for path in rewrite.site[1:]:
            site = rewriter.site(path)
            rewriter.set_module(path, rebuilt(site.module, *before(site.module, affine, rewriter.context)))
            for call in site.nodes:
                source = call.args[0].args[0]  # type: ignore[union-attr]
                rewriter.replace(call, rewriter.call_module(path, source, before=call))


def _normalizes(graph: Graph, node: fx.Node) -> bool:
    return node.target is aten.batch_norm.default or isinstance(graph.module(node), BATCH_NORMS)


def _cannot_fold(graph: Graph, site: Site, context: Context) -> str | None:
    users = list(dict.fromkeys(user for node in site.nodes for user in node.users))
    norms: list[Any] = [graph.module(user) for user in users]
    if len(site.nodes) > 1 and (len(users) != len(site.nodes) or not all(_same(norms[0], norm) for norm in norms)):
        return f"module called at {len(site.nodes)} sites, not each followed by the same batch norm alone"
    if len(users) > len(site.nodes):
        return f"output has {len(users)} users, only one is the batch norm"
    if not all(isinstance(norm, BATCH_NORMS) and norm.running_mean is not None and not norm.training for norm in norms):
        return "batch norm uses the statistics of the batch"
    if any(len(shape(node)) + feature_axis(site.module) != 1 for node in site.nodes):
        return _of_other_axis(site)
    weight: Any = site.module.weight
    if not weight.is_floating_point():
        return None
    folded, bias = after(site.module, of_batch_norm(norms[0], context), context)
    return out_of_range(folded, bias, weight.dtype) or _cancels(norms[0], bias, weight.dtype, context)


def _of_other_axis(site: Site) -> str:
    whose = "linear layer" if isinstance(site.module, nn.Linear) else "convolution"
    return f"batch norm normalizes axis 1, and the {whose}'s features are another axis"


def _cancels(norm: Any, folded: Tensor | None, dtype: torch.dtype, context: Context) -> str | None:
    """Why what a norm takes away is too large to be taken from weights, or None.

    That is γ(μ−b)/√(σ²+ε) = β−b′, of the `folded` bias b′ in float64; what comes out is about √(γ²+β²).
    """
    if folded is None:
        return None
    scale = torch.ones_like(folded) if norm.weight is None else context.constant(norm.weight).double()
    shift = torch.zeros_like(folded) if norm.bias is None else context.constant(norm.bias).double()
    return cancels("the batch norm", shift - folded, torch.hypot(scale, shift), dtype)


def _same(a: Any, b: Any) -> bool:
    """Whether two modules are one batch norm, as lifted at each of the names that the model has for it."""
    names = ("running_mean", "running_var", "weight", "bias")
    both = isinstance(a, BATCH_NORMS) and isinstance(b, BATCH_NORMS)
    return both and a.eps == b.eps and all(getattr(a, name) is getattr(b, name) for name in names)


def _ahead(
    graph: Graph,
    norm: Site,
    node: fx.Node,
    sites: Mapping[str, Site],
    owner_map: Mapping[int, frozenset[str]],
    context: Context,
) -> Rewrite | Refusal:
    """The fold of one call of a batch norm into the layers that read it, or why not."""
    module: Any = norm.module
    if module.running_mean is None or module.training:
        return norm.refuse("batch norm uses the statistics of the batch")
    found = readers(graph, node, sites)
    affine = of_batch_norm(module, context)
    assert affine.shift is not None
    shifts = bool(affine.shift.any())  # a batch norm without any may come before zero padding
    reason = cannot_absorb(graph, node, found, shifts, owner_map)
    for site in found:
        if len(shape(node)) + feature_axis(site.module) != 1:
            reason = reason or _of_other_axis(site)
        weight: Any = site.module.weight
        reason = reason or out_of_step(affine.shift if shifts else None, weight.dtype)
        reason = reason or out_of_range(*before(site.module, affine, context), weight.dtype)
    if reason:
        return norm.refuse(reason)
    return Rewrite("", (norm.path, *(site.path for site in found)), {"shift": shifts}, exact=True)
