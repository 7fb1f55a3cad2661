"""Multiplies out two layers with nothing between them: worth it where the product is no larger than the two.

Batch norms that were folded, removed dropouts and low-rank factors of neighbouring layers leave such pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.graph.graph import Graph, Site, owners
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.layers import CONVS, cannot_rebuild, conv, geometry, is_pointwise, joint_path, linear


@dataclass(frozen=True)
class ComposeLinear(Pass):
    """Linear(W₁)·Linear(W₂) → Linear(W₂W₁), b = W₂b₁ + b₂."""

    stage = Stage.FUSE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Each pair of linear layers, or of convolutions of which one is 1×1; whether it pays is for the price."""
        owner_map = owners(graph)
        sites = graph.sites()
        for second in graph.modules_of(nn.Linear, *CONVS):
            first = sites.get(second.input.target) if second.input.op == "call_module" else None  # type: ignore[arg-type]
            if first is None or _family(first.module) is None or _family(first.module) != _family(second.module):
                continue
            reason = _cannot_compose(first, second)
            for site in (first, second):
                reason = reason or cannot_rebuild(graph, site, owner_map)
            yield (
                first.refuse(f"with {second.path}: {reason}")
                if reason
                else Rewrite("", (first.path, second.path), exact=True)
            )

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Calls the product where the first layer was called."""
        first, second = (rewriter.site(path) for path in rewrite.site)
        path = rewriter.add_module(joint_path(rewrite.site), _product(first.module, second.module, rewriter.context))
        composed = rewriter.call_module(path, first.input, before=first.nodes[0])
        rewriter.replace(second.nodes[0], composed)


def _family(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in (nn.Linear, *CONVS) if isinstance(module, kind)), None)


def _cannot_compose(first: Site, second: Site) -> str | None:
    for site in (first, second):
        if len(site.nodes) > 1:
            return f"module {site.path} called at {len(site.nodes)} sites"
    if len(first.nodes[0].users) > 1:
        return f"output of {first.path} has {len(first.nodes[0].users)} users"
    a: Any = first.module
    b: Any = second.module
    if a.weight.dtype != b.weight.dtype:
        return f"types {a.weight.dtype} and {b.weight.dtype}"
    if isinstance(a, nn.Linear):
        return None
    if a.groups != 1 or b.groups != 1:
        return "grouped convolution"
    if a.padding_mode != "zeros" or b.padding_mode != "zeros":
        return "padding mode is not zeros"
    if is_pointwise(b) and not _pads(b):
        strided = set(b.stride) != {1} and isinstance(geometry(a)["padding"], str)
        return "stride after padding 'same'" if strided else None
    if not is_pointwise(a):
        return "both kernels are larger than 1×1" if not is_pointwise(b) else "the 1×1 convolution pads"
    if _pads(a) or set(a.stride) != {1}:
        return "the 1×1 convolution before a larger one has a stride or pads"
    if a.bias is not None and _pads(b):
        return "the bias of the 1×1 convolution does not reach the zeros that the next one pads"
    return None


def _pads(module: Any) -> bool:
    padding = geometry(module)["padding"]
    return isinstance(padding, str) or (padding != 0 and any(padding))


def _product(first: Any, second: Any, context: Context) -> nn.Module:
    """The one layer, computed in float64."""
    inner, outer = (context.constant(module.weight).double() for module in (first, second))
    if isinstance(first, nn.Linear):
        weight = outer @ inner
    elif is_pointwise(second):
        weight = torch.einsum("sm,mck->sck", outer.flatten(1), inner.flatten(2)).unflatten(2, inner.shape[2:])
    else:
        weight = torch.einsum("smk,mc->sck", outer.flatten(2), inner.flatten(1)).unflatten(2, outer.shape[2:])
    bias = _bias(first, second, outer, context)
    weight = weight.to(first.weight.dtype).contiguous()
    if isinstance(first, nn.Linear):
        return linear(first, weight, bias)
    options = geometry(first) if is_pointwise(second) and not _pads(second) else geometry(second)
    options["stride"] = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    return conv(first, weight, bias, **options)


def _bias(first: Any, second: Any, outer: Tensor, context: Context) -> Tensor | None:
    if first.bias is None and second.bias is None:
        return None
    bias = outer.new_zeros(outer.shape[0])
    if first.bias is not None:
        per_channel = outer if outer.dim() == 2 else outer.flatten(2).sum(2)
        bias = bias + per_channel @ context.constant(first.bias).double()
    if second.bias is not None:
        bias = bias + context.constant(second.bias).double()
    return bias.to(first.weight.dtype)
