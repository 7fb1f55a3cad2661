"""Which weights are trained in an epoch: factors of splits are frozen regularly or in turn (arXiv 2309.03824).

A split of two factors has an outer and an inner one, U·V with V the first to act; one of three has the first and the
last for outer ones and the core between them for the inner one (our reading).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lrcompile.graph.graph import Graph
from lrcompile.recovery.settings import Freeze


def factors_of(graph: Graph) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(outer, inner) factors of all splits: matrices and kernels; biases are in neither."""
    chains: dict[str, list[nn.Module]] = {}
    for site in graph.sites().values():
        parent, _, last = site.path.rpartition(".")
        if last.isdigit() and all("provenance" in node.meta for node in site.nodes):
            chains.setdefault(parent, []).append(site.module)
    outer: list[nn.Parameter] = []
    inner: list[nn.Parameter] = []
    for modules in chains.values():
        weights = [module.weight for module in modules if isinstance(getattr(module, "weight", None), nn.Parameter)]
        if len(weights) == 2:
            inner.append(weights[1])  # type: ignore[arg-type]
            outer.append(weights[0])  # type: ignore[arg-type]
        elif len(weights) > 2:
            outer += [weights[0], weights[-1]]  # type: ignore[list-item]
            inner += weights[1:-1]  # type: ignore[arg-type]
    return outer, inner


def frozen_in(epoch: int, freeze: Freeze, outer: list[nn.Parameter], inner: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that stay as they are in an epoch, counted from 0."""
    if freeze == "none":
        return []
    return outer if freeze == "regular" or epoch % 2 == 0 else inner


def set_frozen(parameters: Iterable[nn.Parameter], frozen: Iterable[nn.Parameter]) -> None:
    """Freezes some of the parameters and lets the others be trained.

    Gradients of frozen ones are dropped: what is left of one would still move the weight through its momentum.
    """
    still = {id(parameter) for parameter in frozen}
    for parameter in parameters:
        parameter.requires_grad_(id(parameter) not in still)
        if id(parameter) in still:
            parameter.grad = None
