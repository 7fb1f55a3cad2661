"""AdamW on a cosine, and what can be laid over it: sharpness-aware steps, centralised gradients, a running mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 0.05  # of all steps, over which the rate rises
LEAST = 0.01  # of the highest rate, at the end
LARGEST_GRADIENT = 1.0  # the norm that gradients are cut to


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay: what is learned is to stay close to what was."""
    return torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.0, betas=(0.9, 0.98))


class Masters:
    """Weights in single precision that are stepped in the place of those of a model in half precision.

    Small steps would be lost in half precision. Weights that are in single or double precision are their own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.pairs = [(p, p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float())) for p in parameters]

    @property
    def weights(self) -> list[nn.Parameter]:
        """What the optimiser steps."""
        return [master for _, master in self.pairs]

    def gather(self, scale: float) -> list[nn.Parameter]:
        """Those of the weights that have gradients, which are the model's own over `scale`."""
        for parameter, master in self.pairs:
            if parameter is not master:
                master.grad = None if parameter.grad is None else parameter.grad.float()
            if master.grad is not None and scale != 1:
                master.grad /= scale
        return [master for master in self.weights if master.grad is not None]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step by the gradients that were gathered."""
        optimizer.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                if parameter is not master:
                    parameter.copy_(master)

    def put(self, values: Sequence[Tensor]) -> None:
        """Sets weights, in both precisions."""
        with torch.no_grad():
            for (parameter, master), value in zip(self.pairs, values, strict=True):
                master.copy_(value)
                parameter.copy_(value)


def rate_at(progress: float) -> float:
    """The rate over the highest one, from 0 done to 1: a short rise, then half a cosine."""
    if progress < WARM_UP:
        return max(LEAST, progress / WARM_UP)
    along = min(1.0, (progress - WARM_UP) / (1 - WARM_UP))
    return LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * along))


def centralise(parameters: Iterable[nn.Parameter]) -> None:
    """Takes the mean over all axes but the first out of the gradients of matrices and kernels (arXiv 2004.01461)."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.dim() > 1:
            parameter.grad -= parameter.grad.mean(dim=tuple(range(1, parameter.dim())), keepdim=True)


def sharpness_aware(parameters: Sequence[nn.Parameter], radius: float, backward: Callable[[], Tensor]) -> None:
    """Puts the gradients of the worst point near by in the place of the gradients (SAM, arXiv 2010.01412).

    The point lies `radius` along the gradients that are there. `backward` computes the loss and its gradients.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([p.grad.float().norm() for p in moved if p.grad is not None]).norm()
    if not torch.isfinite(norm):  # the caller sees that too, and moves nothing
        return
    with torch.no_grad():
        steps = [(p.grad.float() * (radius / (norm + 1e-12))).to(p.dtype) for p in moved if p.grad is not None]
        for parameter, step in zip(moved, steps, strict=True):
            parameter.add_(step)
            parameter.grad = None
    backward()
    with torch.no_grad():
        for parameter, step in zip(moved, steps, strict=True):
            parameter.sub_(step)


class RunningMean:
    """An exponential mean of weights, unbiased from the first step."""

    def __init__(self, masters: Masters, decay: float) -> None:
        self.masters = masters
        self.decay = decay
        self.sums = [torch.zeros_like(weight) for weight in masters.weights] if decay else []
        self.weight = 0.0

    def update(self) -> None:
        """Takes in the weights as they are."""
        self.weight = self.decay * self.weight + 1 - self.decay
        for mean, weight in zip(self.sums, self.masters.weights, strict=True):
            mean.mul_(self.decay).add_(weight.detach(), alpha=1 - self.decay)

    def state(self) -> dict[str, Any]:
        """What `load` takes up."""
        return {"sums": self.sums, "weight": self.weight}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from another's state."""
        self.sums = [mean.to(weight.device) for mean, weight in zip(state["sums"], self.masters.weights, strict=False)]
        self.weight = state["weight"]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the mean stands in the place of the weights."""
        own = [weight.detach().clone() for weight in self.masters.weights]
        self.masters.put([mean / self.weight for mean in self.sums] if self.weight else own)
        try:
            yield
        finally:
            self.masters.put(own)
