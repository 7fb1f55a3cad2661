"""What a model makes of rounding alone: how far an exact rewrite may be off where its precision is coarse."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lrcompile.graph.graph import Graph

HALVES = (torch.float16, torch.bfloat16)
OF_WEIGHTS = 2.0  # times the error of weights rounded once more, which exact rewrites may show in half precision


def of_rounding(limit: float, graph: Graph, error: Callable[[Graph], float]) -> float:
    """The limit on the relative error of exact rewrites, or more where a graph makes more of rounding.

    What it makes of weights in half precision that are rounded once more, as `error` says of another graph, counts
    `OF_WEIGHTS` times. Without such weights the limit holds.
    """
    if not any(weight.dtype in HALVES for weight in graph.gm.parameters()):
        return limit
    of_weights = error(_rounded_again(graph))
    return max(limit, OF_WEIGHTS * of_weights) if math.isfinite(of_weights) else limit


def _rounded_again(graph: Graph) -> Graph:
    """A copy of which all weights are moved by up to half of their last digit."""
    moved, drawn = graph.copy(own=True), torch.Generator().manual_seed(0)
    for module in list(moved.gm.modules()):
        for name, weight in module._parameters.items():
            if weight is None or not weight.is_floating_point():
                continue
            part = torch.rand(weight.shape, generator=drawn).to(weight.device) - 0.5
            other = weight.detach().double() * (1 + torch.finfo(weight.dtype).eps * part)
            module._parameters[name] = nn.Parameter(other.to(weight.dtype), requires_grad=False)
    return moved
