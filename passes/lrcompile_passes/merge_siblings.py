"""Computes layers that read the same input in one call, as q, k and v, and splits the result.

One wide product fills a device better than several narrow ones. Low-rank splits of siblings leave first factors
that read the same input, so this pass applies to what those passes made too.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.graph.graph import Graph, Site, aten, feature_axis, owners, read_by_strides
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.layers import CONVS, cannot_rebuild, conv, geometry, joint_path, linear


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """Linear(W₁)x, …, Linear(W_n)x → split(Linear([W₁; …; W_n])x)."""

    stage = Stage.FUSE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Each group of linear layers, or of convolutions with the same window, that read one value."""
        owner_map = owners(graph)
        groups: dict[Any, list[Site]] = defaultdict(list)
        for site in graph.modules_of(nn.Linear, *CONVS):
            groups[_kind(site)].append(site)
        for group in groups.values():
            if len(group) < 2:
                continue
            reasons = {s: _cannot_merge(s) or cannot_rebuild(graph, s, owner_map) for s in group}
            yield from (site.refuse(reason) for site, reason in reasons.items() if reason)
            legal = [site for site, reason in reasons.items() if not reason]
            if len(legal) < 2:
                continue
            yield Rewrite("", tuple(site.path for site in legal), exact=True)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Calls the merged layer where the first sibling was called; each sibling's users read their share."""
        sites = [rewriter.site(path) for path in rewrite.site]
        first = sites[0].nodes[0]
        path = rewriter.add_module(joint_path(rewrite.site), _merged(sites, rewriter.context))
        merged = rewriter.call_module(path, sites[0].input, before=first)
        modules: list[Any] = [site.module for site in sites]
        axis = feature_axis(modules[0])
        widths = [module.weight.shape[0] for module in modules]
        split = rewriter.call_function(aten.split_with_sizes.default, merged, widths, axis, before=first)
        pieces = [rewriter.call_function(operator.getitem, split, i, before=first) for i in range(len(sites))]
        for site, piece in zip(sites, pieces, strict=True):
            rewriter.replace(site.nodes[0], piece)


def _kind(site: Site) -> Any:
    """What siblings have in common: the input, the type, and for convolutions the window."""
    module: Any = site.module
    if isinstance(module, nn.Linear):
        return site.input, nn.Linear, module.weight.dtype
    window = tuple(geometry(module).values())
    if module.groups != 1 or module.padding_mode != "zeros":
        return site.path
    return site.input, type(module), module.weight.dtype, module.kernel_size, window


def _cannot_merge(site: Site) -> str | None:
    if len(site.nodes) > 1:
        return f"module called at {len(site.nodes)} sites"
    return next((f"{node.name} reads it by its strides" for node in read_by_strides(site.nodes[0])), None)


def _merged(sites: Sequence[Site], context: Context) -> nn.Module:
    modules: list[Any] = [site.module for site in sites]
    weight = torch.cat([context.constant(module.weight) for module in modules])
    bias = None
    if any(module.bias is not None for module in modules):
        bias = torch.cat([_bias(module, context) for module in modules])
    if isinstance(modules[0], nn.Linear):
        return linear(modules[0], weight, bias)
    return conv(modules[0], weight, bias, **geometry(modules[0]))


def _bias(module: Any, context: Context) -> Tensor:
    if module.bias is not None:
        return context.constant(module.bias)
    return context.constant(module.weight).new_zeros(module.weight.shape[0])
