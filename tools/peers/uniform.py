"""What is done without a tool: every layer keeps one share of its weights, and data are not looked at."""

from __future__ import annotations

import math
from typing import Any

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

from tools.peers.original import Compress, Compressed, NothingToDo, Original, put, wide_layers

SWEEPS = 10


def prepared(original: Original, name: str) -> Compress:
    """The compression of a model to a share.

    Raises:
        NothingToDo: the model has no layer that is wide enough.
    """
    if not any(wide_layers(original.model)):
        raise NothingToDo("it has no linear layer or plain convolution that is wide enough to split")
    return lambda share: compressed(original.copy(), share)


def compressed(model: nn.Module, share: float) -> Compressed:
    """`model`, changed: its wide layers split so that each keeps `share` of its weights."""
    layers = list(wide_layers(model))
    with torch.no_grad():
        for name, layer in layers:
            put(model, name, split_linear(layer, share) if isinstance(layer, nn.Linear) else split_conv(layer, share))
    return Compressed(model, (f"{len(layers)} layers split",))


def split_linear(layer: nn.Linear, share: float) -> nn.Sequential:
    """Two linear layers by the singular vectors of the weights."""
    out, into = layer.weight.shape
    rank = svd_rank(out, into, share)
    u, v = halves(layer.weight, rank)
    first, second = nn.Linear(into, rank, bias=False), nn.Linear(rank, out, bias=layer.bias is not None)
    first.weight.copy_(v)
    second.weight.copy_(u)
    if layer.bias is not None:
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def split_conv(layer: nn.Conv2d, share: float) -> nn.Sequential:
    """Two 1 × 1 convolutions by singular vectors, or a core between two by Tucker-2."""
    out, into, *kernel = layer.weight.shape
    bias = layer.bias is not None
    place: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if math.prod(kernel) == 1:
        rank = svd_rank(out, into, share)
        u, v = halves(layer.weight.flatten(1), rank)
        layers = [nn.Conv2d(into, rank, 1, bias=False, **place), nn.Conv2d(rank, out, 1, bias=bias)]
        weights = [v[:, :, None, None], u[:, :, None, None]]
    else:
        ranks = tucker_ranks(out, into, math.prod(kernel), share)
        tensorly.set_backend("pytorch")
        (core, (u, v)), _ = partial_tucker(layer.weight, rank=ranks, modes=[0, 1], n_iter_max=SWEEPS, init="svd")
        layers = [
            nn.Conv2d(into, ranks[1], 1, bias=False),
            nn.Conv2d(ranks[1], ranks[0], (kernel[0], kernel[1]), bias=False, **place),
            nn.Conv2d(ranks[0], out, 1, bias=bias),
        ]
        weights = [v.T[:, :, None, None], core, u[:, :, None, None]]
    for new, weight in zip(layers, weights, strict=True):
        new.weight.copy_(weight)
    if layer.bias is not None:
        layers[-1].bias = nn.Parameter(layer.bias.clone())
    return nn.Sequential(*layers)


def halves(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U√Σ, √ΣVᵀ) of the largest singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def svd_rank(out: int, into: int, share: float) -> int:
    """The rank with which two factors keep a share of the weights."""
    return min(out, into, max(1, round(share * out * into / (out + into))))


def tucker_ranks(out: int, into: int, kernel: int, share: float) -> list[int]:
    """Ranks [of outputs, of inputs], in the proportion of the two, with which Tucker-2 keeps a share of the weights."""
    beta = out / into
    linear, square = into + beta * out, beta * kernel
    rank = (-linear + math.sqrt(linear**2 + 4 * square * share * kernel * into * out)) / (2 * square)
    return [min(out, max(1, round(beta * rank))), min(into, max(1, round(rank)))]
