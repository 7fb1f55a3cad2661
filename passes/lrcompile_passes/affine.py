"""Constant scales and shifts next to a layer with weights: what they are, and what the layer becomes with them inside.

The passes that fold constants, batch norms and layer norms share this algebra. It is done in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.graph import TRANSPOSED_CONVS, Graph, Site
from lrcompile.passes import Context
from lrcompile_passes.layers import CONVS, cannot_rebuild, is_pointwise, pads, with_weight

LAYERS = (nn.Linear, *CONVS, *TRANSPOSED_CONVS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LARGEST_SHIFT = {torch.float64: 2.0**20, torch.float32: 64.0, torch.float16: 2.0, torch.bfloat16: 2.0}


@dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ scale·x + shift, in float64: each part is [features], [1] for all features, or None where there is none."""

    scale: Tensor | None = None
    shift: Tensor | None = None


def of_batch_norm(norm: Any, context: Context) -> Affine:
    """What a batch norm with fixed statistics does: scale γ/√(σ²+ε), shift β − μ·scale."""
    scale = (context.constant(norm.running_var).double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * context.constant(norm.weight).double()
    shift = -context.constant(norm.running_mean).double() * scale
    if norm.bias is not None:
        shift = shift + context.constant(norm.bias).double()
    return Affine(scale, shift)


def after(module: Any, affine: Affine, context: Context) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of affine(layer(x)), in float64: W′ = scale·W, b′ = scale·b + shift."""
    weight, bias = _parameters(module, context)
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    if affine.scale is not None:
        scale = affine.scale.expand(outputs)
        if isinstance(module, TRANSPOSED_CONVS):  # [in × out/groups × taps…]: output channels count within their group
            by_group = scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (weight.unflatten(0, (module.groups, -1)) * by_group).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = None if bias is None else bias * scale
    if affine.shift is not None:
        shift = affine.shift.expand(outputs)
        bias = shift.clone() if bias is None else bias + shift
    return weight, bias


def before(module: Any, affine: Affine, context: Context) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of layer(affine(x)), in float64: W′ = W·scale, b′ = b + W·shift summed over the taps."""
    original, bias = _parameters(module, context)
    weight, taps = original, [1] * (original.dim() - 2)
    inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    if affine.scale is not None:
        scale = affine.scale.expand(inputs)
        if isinstance(module, TRANSPOSED_CONVS):
            weight = original * scale.view(-1, 1, *taps)
        else:
            by_group = scale.view(groups, 1, -1, *taps)
            weight = (original.unflatten(0, (groups, -1)) * by_group).flatten(0, 1)
    if affine.shift is not None:
        shift = affine.shift.expand(inputs).reshape(groups, -1)
        matrix = original.flatten(2).sum(2) if original.dim() > 2 else original
        by_group = matrix.unflatten(0, (groups, -1))
        form = "gco,gc->go" if isinstance(module, TRANSPOSED_CONVS) else "goc,gc->go"
        reached = torch.einsum(form, by_group, shift).flatten()
        bias = reached if bias is None else bias + reached
    return weight, bias


def out_of_range(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why folded float64 values cannot be kept in a layer's type, or None: too large, or so small that digits go."""
    lost = (weight.to(dtype).double() - weight).flatten(1).norm(dim=1)
    held = bool((lost <= 2 * torch.finfo(dtype).eps * weight.flatten(1).norm(dim=1)).all())
    if held and (bias is None or bias.to(dtype).isfinite().all()):
        return None
    return f"the folded weight exceeds the range of {_name(dtype)}"


def out_of_step(shift: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why a shift in front of a layer cannot be made behind it, or None: W(x + t) is precise where Wx + Wt cancels.

    `shift` is in units of what the layer reads, which is taken as about one.
    """
    most = 0.0 if shift is None else float(shift.abs().max())
    limit = LARGEST_SHIFT.get(dtype, 0.0)
    return None if most <= limit else f"a shift of {most:.3g} would cancel: at most {limit:g} in {_name(dtype)}"


def cancels(what: str, taken: Tensor, left: Tensor, dtype: torch.dtype) -> str | None:
    """Why what is `taken` away behind a layer cannot go into it, or None: W′x + b′ rounds elsewhere than Wx + b − t.

    Rounding shows by what is taken over what is `left` of the layer, about, or what there was of it before. Half
    precision is looked at as a whole, by what all exact rewrites come to.
    """
    times, limit = float(taken.norm() / left.norm().clamp_min(1e-30)), LARGEST_SHIFT.get(dtype, 0.0)
    if dtype in (torch.float16, torch.bfloat16) or times <= limit:
        return None
    return f"what {what} takes away is {times:.3g} times what is beside it, at most {limit:g}: rounding would show"


def rounds_again(scale: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why a scale should not go into weights of half precision, or None: only powers of two leave their digits alone.

    One more rounding of every weight of a deep model adds up to more than exact rewrites may show.
    """
    if scale is None or dtype in (torch.float64, torch.float32) or bool((scale.frexp().mantissa.abs() == 0.5).all()):
        return None
    return f"the weights would be rounded once more in {_name(dtype)}"


def readers(graph: Graph, node: fx.Node, sites: Mapping[str, Site]) -> tuple[Site, ...]:
    """The layers that read a value."""
    users = (user for user in node.users if isinstance(graph.module(user), LAYERS))
    return tuple(dict.fromkeys(sites[user.target] for user in users))  # type: ignore[index]


def cannot_absorb(
    graph: Graph, node: fx.Node, found: tuple[Site, ...], shifts: bool, owner_map: Mapping[int, frozenset[str]]
) -> str | None:
    """Why the readers of a value cannot take in the scale, and the shift if it `shifts`, that made it; or None."""
    for user in node.users:
        if not isinstance(graph.module(user), LAYERS):
            return f"its result is read by {user.name} too"
    for site in found:
        if any(call.args[0] is not node for call in site.nodes):
            return f"module {site.path} called at {len(site.nodes)} sites, on different values"
        reason = cannot_rebuild(graph, site, owner_map) or (_cannot_shift(site.module) if shifts else None)
        if reason:
            return f"{site.path}: {reason}"
    return None


def _cannot_shift(module: Any) -> str | None:
    """Why a shift of the input is not a shift of the output."""
    if isinstance(module, nn.Linear):
        return None
    if isinstance(module, TRANSPOSED_CONVS):
        plain = (
            is_pointwise(module) and not pads(module) and set(module.stride) == {1} and not any(module.output_padding)
        )
        return None if plain else "a transposed convolution spreads the shift unevenly"
    if pads(module) and module.padding_mode == "zeros":
        return "the shift does not reach the zeros that it pads"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(module: Any, context: Context) -> tuple[Tensor, Tensor | None]:
    bias = None if module.bias is None else context.constant(module.bias).double()
    return context.constant(module.weight).double(), bias


def rebuilt(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a layer with folded float64 values, in the layer's type."""
    kind = module.weight.dtype
    return with_weight(module, weight.to(kind).contiguous(), None if bias is None else bias.to(kind))
