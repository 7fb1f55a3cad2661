"""Moves the scale and shift of a layer norm into the linear layers that read it.

The norm has fewer numbers to read and to multiply by. And a linear layer that holds the scale shows in its spectrum
which inputs are large: without calibration data, low-rank splits of it are nearer to those with data. A layer that
has no bias would need an operation more for the shift, so it is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrcompile.graph.graph import Graph, Site, owners, tied_with
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.affine import Affine, before, cannot_absorb, out_of_range, readers, rebuilt

PRECISE = (torch.float64, torch.float32)  # in half precision, rounding every weight anew costs more than this saves


@dataclass(frozen=True)
class FoldLayerNorm(Pass):
    """LN_{γ,β}·Linear(W, b) → LN·Linear(W·γ, b + Wβ)."""

    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Each layer norm with a scale or a shift whose every reader is a linear layer that can take them."""
        owner_map, sites = owners(graph), graph.sites()
        for site in graph.modules_of(nn.LayerNorm):
            module: Any = site.module
            found = dict.fromkeys(reader for node in site.nodes for reader in readers(graph, node, sites))
            if (module.weight is None and module.bias is None) or not found:
                continue
            reason = _cannot_move(graph, site, sites, owner_map)
            for reader in found:
                weight: Any = reader.module.weight
                reason = reason or out_of_range(*before(reader.module, _affine(module, context), context), weight.dtype)
            paths = (site.path, *(reader.path for reader in found))
            yield site.refuse(reason) if reason else Rewrite("", paths, exact=True)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Gives the linear layers new weights, and the norm none, each under its old path."""
        site = rewriter.site()
        module: Any = site.module
        affine = _affine(module, rewriter.context)
        for path in rewrite.site[1:]:
            reader = rewriter.site(path).module
            rewriter.set_module(path, rebuilt(reader, *before(reader, affine, rewriter.context)))
        plain = nn.LayerNorm(module.normalized_shape, eps=module.eps, elementwise_affine=False)
        rewriter.set_module(site.path, plain.train(module.training))


def _affine(norm: Any, context: Context) -> Affine:
    parts = (None if tensor is None else context.constant(tensor).double() for tensor in (norm.weight, norm.bias))
    return Affine(*parts)


def _cannot_move(
    graph: Graph, site: Site, sites: Mapping[str, Site], owner_map: Mapping[int, frozenset[str]]
) -> str | None:
    module: Any = site.module
    other = tied_with(graph, site, owner_map)
    if other:
        return f"weight tied with {other}"
    if len(module.normalized_shape) > 1:
        return "it normalizes several axes"
    for node in site.nodes:
        found = readers(graph, node, sites)
        reason = cannot_absorb(graph, node, found, module.bias is not None, owner_map)
        if reason:
            return reason
        for reader in found:
            layer: Any = reader.module
            if not isinstance(layer, nn.Linear):
                return f"{reader.path} does not read features of the last axis"
            if layer.weight.dtype not in PRECISE:
                return f"{reader.path}: weight is of type {str(layer.weight.dtype).removeprefix('torch.')}"
            if module.bias is not None and layer.bias is None:
                return f"{reader.path} has no bias to take the shift"
    return None
