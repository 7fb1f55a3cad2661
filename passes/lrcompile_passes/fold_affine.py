"""Folds scales and biases by constants into a layer with weights: layer scale, the 1/√d of queries, input ranges.

A constant is a number, or a stored tensor that varies along the features only, such as a parameter or a view of one.
After the layer any such map can go; before it a shift only where no zero padding comes between. Numbers are also
found behind reshapes, which they commute with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lrcompile.graph.graph import Graph, Site, attribute, feature_axis, owners, shape, storage_id
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.affine import (
    LAYERS,
    after,
    before,
    cancels,
    cannot_absorb,
    out_of_range,
    out_of_step,
    readers,
    rebuilt,
    rounds_again,
)
from lrcompile_passes.constants import MOVES, Step, is_constant, needed, read, step_of
from lrcompile_passes.layers import cannot_rebuild


@dataclass(frozen=True)
class FoldAffine(Pass):
    """c·Layer(W, b)x + t → Layer(cW, cb + t)x ; Layer(W, b)(cx + t) → Layer(Wc, b + Wt)x."""

    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """One rewrite a step, into the layer before it if that may be; chains of steps in order."""
        owner_map = owners(graph)
        taken: set[str] = set()
        for site in graph.modules_of(*LAYERS):
            for found in _after(graph, site, owner_map, context):
                yield found
                if isinstance(found, Rewrite):
                    taken.update(found.site[1:])
        sites = graph.sites()
        for node in list(graph.nodes):
            if node.name not in taken and readers(graph, node, sites):
                yield from _before(graph, node, sites, owner_map, taken, context)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Gives the layers new weights, under their old paths, and erases the step."""
        if rewrite.params["layer"] == "before":
            self._apply_after(rewriter, rewrite)
        else:
            self._apply_before(rewriter, rewrite)

    def _apply_after(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        site = rewriter.site()
        nodes = [rewriter.node(name) for name in rewrite.site[1:]]
        if {_moved(needed(node).source) for node in nodes} != set(site.nodes):
            raise ValueError(f"{', '.join(rewrite.site[1:])} does not come right after {site.path}")
        affine = read(rewriter.graph, needed(nodes[0]), rewriter.context)
        weight, bias = after(site.module, affine, rewriter.context)
        rewriter.set_module(site.path, rebuilt(site.module, weight, bias))
        for node in nodes:
            rewriter.replace(node, needed(node).source)

    def _apply_before(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        *paths, name = rewrite.site
        node = rewriter.node(name)
        step = needed(node)
        affine = read(rewriter.graph, step, rewriter.context)
        for path in paths:
            site = rewriter.site(path)
            if any(call.args[0] is not node for call in site.nodes):
                raise ValueError(f"{name} does not come right before {path}")
            weight, bias = before(site.module, affine, rewriter.context)
            rewriter.set_module(path, rebuilt(site.module, weight, bias))
            for call in site.nodes:
                rewriter.replace(call, rewriter.call_module(path, step.source, before=call))


def _moved(node: fx.Node) -> fx.Node:
    """Where a value comes from that is only moved, or the node itself."""
    while node.target in MOVES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _after(
    graph: Graph, site: Site, owner_map: Mapping[int, frozenset[str]], context: Context
) -> Iterator[Rewrite | Refusal]:
    """The steps behind all calls of a layer, in order, up to the first that cannot go into it."""
    ends, reshaped = list(site.nodes), False
    module: Any = site.module
    while True:
        users = [list(end.users) for end in ends]
        if not any(step_of(user) for several in users for user in several):
            if any(len(several) != 1 or several[0].target not in MOVES for several in users):
                return
            ends, reshaped = [several[0] for several in users], True
            if len(set(ends)) < len(users) or any(is_constant(end) for end in ends):
                return
            continue
        reason = _cannot_fold(graph, site, ends, users, reshaped, owner_map)
        if reason is None:
            step = needed(users[0][0])
            affine = read(graph, step, context)
            weight, bias = after(module, affine, context)
            kind = module.weight.dtype
            reason = rounds_again(affine.scale, kind) or out_of_range(weight, bias, kind)
            if affine.shift is not None and bias is not None:
                shift = affine.shift.expand_as(bias)
                for beside in (bias, bias - shift):  # with the constant, and without: of inputs of about one
                    reason = reason or cancels("the constant", shift, torch.cat([weight.flatten(), beside]), kind)
        if reason is not None:
            yield site.refuse(reason)
            return
        module = rebuilt(module, weight, bias)
        ends = [several[0] for several in users]
        operation = {"layer": "before", "operation": str(ends[0].target)}
        yield Rewrite("", (site.path, *(end.name for end in ends)), operation, exact=True)


def _cannot_fold(
    graph: Graph,
    site: Site,
    ends: list[fx.Node],
    users: list[list[fx.Node]],
    reshaped: bool,
    owner_map: Mapping[int, frozenset[str]],
) -> str | None:
    if any(len(several) != 1 for several in users):
        return "its output is used without the constant too"
    steps = [step_of(several[0]) for several in users]
    first = steps[0]
    if first is None or any(step is None or not step.same_as(first) for step in steps):
        return f"module called at {len(site.nodes)} sites, not each followed by the same constant"
    if [step.source for step in steps if step] != ends:
        return "its output is combined with itself"
    return _cannot_use(graph, first, site, reshaped, owner_map) or cannot_rebuild(graph, site, owner_map)


def _cannot_use(
    graph: Graph, step: Step, site: Site, reshaped: bool, owner_map: Mapping[int, frozenset[str]]
) -> str | None:
    """Why a step's constants are none for a layer whose features lie where this layer's do; or None."""
    axis = feature_axis(site.module)
    for node in step.constants:
        sizes = shape(node)
        varies = [i - len(sizes) for i, size in enumerate(sizes) if size != 1]
        if varies and reshaped:
            return "the constant comes behind a reshape"
        if varies not in ([], [axis]):
            return "the constant varies along other axes than the layer's features"
        other = _tied(graph, node, owner_map)
        if other:
            return f"the constant is tied with {other}"
    return None


def _tied(graph: Graph, node: fx.Node, owner_map: Mapping[int, frozenset[str]]) -> str | None:
    """Another owner of a trained parameter that a constant is made from; buffers may be copied."""
    for source in [*node.all_input_nodes, node]:
        if source.op == "get_attr":
            value: Any = attribute(graph.gm, str(source.target))
            others = owner_map.get(storage_id(value), frozenset()) - {str(source.target)}
            if isinstance(value, nn.Parameter) and others:
                return min(others)
        elif source is not node:
            other = _tied(graph, source, owner_map)
            if other:
                return other
    return None


def _before(
    graph: Graph,
    node: fx.Node,
    sites: Mapping[str, Site],
    owner_map: Mapping[int, frozenset[str]],
    taken: set[str],
    context: Context,
) -> Iterator[Rewrite | Refusal]:
    """The steps right before the layers that read a value, the last first."""
    found = readers(graph, node, sites)
    modules: list[Any] = [site.module for site in found]
    end, gain = node, torch.ones(1, dtype=torch.float64)  # of all steps up to the layers: what a shift grows to
    while end.name not in taken:
        step = step_of(end)
        if step is None:
            return
        reason = "its result has other users" if end is not node and len(end.users) > 1 else None
        reason = reason or cannot_absorb(graph, node, found, step.shift is not None, owner_map)
        for site in found:
            reason = reason or _cannot_use(graph, step, site, False, owner_map)
        if reason is None:
            affine = read(graph, step, context)
            kinds = [module.weight.dtype for module in modules]
            folded = [before(module, affine, context) for module in modules]
            reasons = [rounds_again(affine.scale, kind) for kind in kinds]
            reasons += [out_of_range(*parts, kind) for parts, kind in zip(folded, kinds, strict=True)]
            reasons += [out_of_step(None if affine.shift is None else affine.shift * gain, kind) for kind in kinds]
            reason = next((text for text in reasons if text), None)
        if reason is not None:
            yield found[0].refuse(f"{end.name} before it: {reason}")
            return
        modules = [rebuilt(module, *parts) for module, parts in zip(modules, folded, strict=True)]
        gain = gain if affine.scale is None else gain * affine.scale
        operation = {"layer": "after", "operation": str(end.target)}
        yield Rewrite("", (*(site.path for site in found), end.name), operation, exact=True)
        end = step.source
