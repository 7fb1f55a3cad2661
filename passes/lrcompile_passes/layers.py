"""Makes layers from tensors, and says what all passes over weights must leave alone.

Every layer that a pass emits is a plain `torch.nn` module holding exactly the given tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lrcompile.errors import InputError
from lrcompile.graph.graph import TRANSPOSED_CONVS, Graph, Site, tied_with
from lrcompile.passes import Pass

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

CONVS: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def linear(like: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight [out × in]; trainable and in the mode that `like` is."""
    out_features, in_features = weight.shape
    return _assign(_bare(nn.Linear, in_features, out_features, bias=bias is not None), like, weight, bias)


def conv(like: nn.Module, weight: Tensor, bias: Tensor | None = None, groups: int = 1, **options: Any) -> Conv:
    """A convolution from its weight [out × in/groups × taps…]; options are those of `nn.Conv*`."""
    out_channels, in_channels, *kernel = weight.shape
    options |= {"groups": groups, "bias": bias is not None}
    module = _bare(CONVS[len(kernel) - 1], in_channels * groups, out_channels, tuple(kernel), **options)
    return _assign(module, like, weight, bias)


def conv_transpose(
    like: nn.Module, weight: Tensor, bias: Tensor | None = None, groups: int = 1, **options: Any
) -> ConvTranspose:
    """A transposed convolution from its weight [in × out/groups × taps…]."""
    in_channels, out_channels, *kernel = weight.shape
    options |= {"groups": groups, "bias": bias is not None}
    module = _bare(TRANSPOSED_CONVS[len(kernel) - 1], in_channels, out_channels * groups, tuple(kernel), **options)
    return _assign(module, like, weight, bias)


def with_weight(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a layer, of the same class and options, that holds other tensors of the same shape."""
    clone = copy.copy(module)
    clone._parameters, clone._buffers = dict(module._parameters), dict(module._buffers)
    clone._modules = dict(module._modules)
    return _assign(clone, module, weight, bias)


def shifted(bias: Tensor | None, lost: Tensor | None) -> Tensor | None:
    """A bias with the mean output added that a split loses; either may be missing."""
    if bias is None or lost is None:
        return lost if bias is None else bias
    return bias + lost


def geometry(module: Any) -> dict[str, Any]:
    """The options of a convolution that place its window: stride, padding, dilation, output padding."""
    padding = 0 if module.padding == "same" and is_pointwise(module) else module.padding
    options = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    return {**options, "output_padding": module.output_padding} if isinstance(module, TRANSPOSED_CONVS) else options


def pads(module: Any) -> bool:
    """Whether a convolution sees more than its input: whether anything is put around it."""
    padding = geometry(module)["padding"]
    return isinstance(padding, str) or any(padding if isinstance(padding, tuple) else (padding,))


def is_pointwise(module: Any) -> bool:
    """Whether a convolution looks at one position at a time."""
    return all(size == 1 for size in module.kernel_size)


def cannot_rebuild(graph: Graph, site: Site, owner_map: Mapping[int, frozenset[str]]) -> str | None:
    """Why the weight of a site cannot be recomputed, or None."""
    weight: Any = site.module.weight
    if weight.dtype not in _FLOATS:
        return f"weight is of type {str(weight.dtype).removeprefix('torch.')}"
    if not weight.numel():
        return f"weight of {'×'.join(map(str, weight.shape))} holds nothing"
    other = tied_with(graph, site, owner_map)
    return f"weight tied with {other}" if other else None


def cannot_decompose(graph: Graph, site: Site, owner_map: Mapping[int, frozenset[str]]) -> str | None:
    """Why the weight of a site cannot be decomposed, or None."""
    weight: Any = site.module.weight
    reason = cannot_rebuild(graph, site, owner_map)
    return reason or (None if bool(weight.isfinite().all()) else "weight holds values that are not finite")


def check_least(transform: Pass, option: str, least: float) -> None:
    """Holds an option of a pass, or each of several values of it, to a least one.

    Raises:
        InputError: a value is smaller, or no number.
    """
    found = getattr(transform, option)
    for value in found if isinstance(found, tuple) else (found,):
        if not least <= value < math.inf:
            place = f"{transform.name}.{option}"
            raise InputError(f"{place} is {value}; expected {least:g} or more: give --option {place}={least:g}")


def joint_path(paths: Sequence[str]) -> str:
    """One path for a layer that takes the place of several: their common container, their names joined."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join([*parts[0][:shared], "_".join("_".join(p[shared:]) for p in parts)])


def _bare(kind: Any, *args: Any, **options: Any) -> Any:
    """A layer without weights yet; drawing random ones for it would take longer than all else."""
    module = _undrawn(kind)(*args, device="meta", **options)
    module.__class__ = kind
    return module


@cache
def _undrawn(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})


def _assign(module: Any, like: Any, weight: Tensor, bias: Tensor | None) -> Any:
    module.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=like.weight.requires_grad)
    module.train(like.training)
    return module
