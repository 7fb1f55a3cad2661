"""Which weights are trained in an epoch: factors of splits are frozen regularly or in turn (arXiv 2309.03824).

A split of two factors has an outer and an inner one, U·V with V the first to act; one of three has the first and the
last for outer ones and the core between them for the inner one (our reading).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from lrcompile.graph.graph import Graph, Site, has_attribute
from lrcompile.recovery.settings import Freeze


def factors_of(graph: Graph, original: fx.GraphModule) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(outer, inner) factors of all splits: matrices and kernels; biases are in neither.

    The factors of a split stand where the original has one layer, or nothing where layers were merged before; a first
    one that was merged with those of others stands where it has nothing.
    """
    sites = {site.path: site for site in graph.sites().values()}
    chains: dict[str, list[Site]] = {}
    for path, site in sites.items():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and _weight(site) is not None and not _is_container(original, parent):
            chains.setdefault(parent, []).append(site)
    outer: list[nn.Parameter] = []
    inner: list[nn.Parameter] = []
    merged: dict[str, nn.Parameter] = {}  # one that several splits share counts once
    for parent, chain in chains.items():
        weights = [weight for site in chain if (weight := _weight(site)) is not None]
        if f"{parent}.0" not in sites:
            inner += weights[:1]
            before = str(_source(chain[0].nodes[0]).target)
            first = _weight(sites[before]) if before in sites and not has_attribute(original, before) else None
            if first is not None:
                merged[before] = first
        elif len(weights) == 2:
            inner.append(weights[1])
            outer.append(weights[0])
        elif len(weights) > 2:
            outer += [weights[0], weights[-1]]
            inner += weights[1:-1]
    return [*merged.values(), *outer], inner


def _weight(site: Site) -> nn.Parameter | None:
    weight = getattr(site.module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _is_container(gm: fx.GraphModule, path: str) -> bool:
    return not path or (has_attribute(gm, path) and not has_attribute(gm, f"{path}.weight"))


def _source(node: fx.Node) -> fx.Node:
    """What computes the value that a layer takes a part of."""
    node = node.all_input_nodes[0]
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


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
