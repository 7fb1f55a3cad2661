"""Merges the outer factors of a Tucker split into the 1×1 convolutions beyond the activations next to it.

In a bottleneck A 1×1, K 3×3, D 1×1 the split of K leaves five convolutions; merged into A and D they are three again
(2407.20266). Where nothing lies between, `compose-linear` does so exactly. An activation between has to be dropped, or
moved into the few channels of the core: both change the model, which should be trained on afterwards. So this happens
only when asked for, and is lossy. How biases are shared out when activations move is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.graph import Graph, Site, aten, owners
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.layers import CONVS, cannot_decompose, check_least, conv, geometry, is_pointwise, joint_path, pads
from lrcompile_passes.low_rank_conv import Sizes, cannot_split, tucker_ranks

ACTIVATIONS = {
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.leaky_relu.default, aten.elu.default,
    aten.gelu.default, aten.silu.default, aten.hardswish.default, aten.mish.default, aten.sigmoid.default,
    aten.tanh.default,
}  # fmt: skip


@dataclass(frozen=True)
class MergePointwise(Pass):
    """A·act·Conv(W)·act·D → Conv(VA) ; Conv(core) ; Conv(DU), with W ≈ U·core·V.

    `through` says what becomes of the activations: "" merges nothing, "drop" leaves them out, "move" applies them in
    the channels of the core. `pairs` bounds how many pairs of Tucker ranks are proposed a site.
    """

    stage = Stage.FACTORIZE
    through: Literal["", "drop", "move"] = ""
    pairs: int = 8

    def __post_init__(self) -> None:
        check_least(self, "pairs", 1)

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Each larger convolution with an activation and then a 1×1 convolution on one side or on both."""
        owner_map, sites = owners(graph), graph.sites()
        for site in graph.modules_of(*CONVS):
            place = _Place.of(graph, site, sites)
            if place is None:
                continue
            reason = self._cannot_merge(graph, place, owner_map)
            if reason:
                yield site.refuse(reason)
                continue
            for rank_out, rank_in in tucker_ranks(site, context, Sizes.of(site), self.pairs):
                params = {"through": self.through, "rank_out": rank_out, "rank_in": rank_in}
                error = partial(_error, place, context, rank_out, rank_in)
                yield Rewrite("", tuple(s.path for s in place.layers), params, error)

    def remark(self, rewrite: Rewrite) -> str:
        """That the model is another one afterwards."""
        done = {"drop": "dropped", "move": "moved"}[str(rewrite.params["through"])]
        return f"needs training: activations were {done}"

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts the three convolutions, and activations that move, in the place of all that was between them."""
        graph, context = rewriter.graph, rewriter.context
        place = _Place.of(graph, rewriter.site(), graph.sites())
        if place is None:
            raise ValueError(f"{rewrite.site[0]} has no activation and 1×1 convolution next to it")
        rank_out, rank_in, moves = (
            rewrite.params["rank_out"],
            rewrite.params["rank_in"],
            rewrite.params["through"] == "move",
        )
        chain = _chain(place, context, rank_out, rank_in, moves)  # type: ignore[arg-type]
        path = rewriter.add_module(joint_path([s.path for s in place.layers]), nn.Sequential(*chain))
        last = (place.after or place.site).nodes[0]
        value = (place.before or place.site).input
        acts = {0: place.act_before, 1: place.act_after} if moves else {}
        for i in range(len(chain)):
            value = rewriter.call_module(f"{path}.{i}", value, before=last)
            act: Any = acts.get(i)
            if act is not None:
                value = rewriter.call_function(act.target, value, *act.args[1:], before=last, **act.kwargs)
        rewriter.replace(last, value)

    def _cannot_merge(self, graph: Graph, place: _Place, owner_map: Mapping[int, frozenset[str]]) -> str | None:
        if not self.through:
            names = " and ".join(act.name for act in place.acts)
            others = " and ".join(site.path for site in place.layers[1:])
            return (
                f"merging it with {others} would drop or move {names}, and change the model; "
                "ask for it with MergePointwise(through='drop') or 'move'"
            )
        for site in place.layers:
            if len(site.nodes) > 1:
                return f"module {site.path} called at {len(site.nodes)} sites"
            reason = cannot_split(site) or cannot_decompose(graph, site, owner_map)
            if reason:
                return reason if site is place.site else f"{site.path}: {reason}"
        return None


@dataclass(frozen=True, eq=False)
class _Place:
    """A convolution with the activations next to it and the 1×1 convolutions beyond them."""

    site: Site
    before: Site | None
    act_before: fx.Node | None
    act_after: fx.Node | None
    after: Site | None

    @classmethod
    def of(cls, graph: Graph, site: Site, sites: Mapping[str, Site]) -> _Place | None:
        """What is around a convolution of a larger kernel, None if that is on neither side what could be merged."""
        if is_pointwise(site.module):
            return None
        act_before = site.input if _activates(site.input) else None
        before = None if act_before is None else _pointwise(graph, act_before.args[0], sites, site)
        if before is not None and len(before.nodes[0].users) > 1:
            before = None
        user = _only_user(site.nodes[0])
        act_after = user if user is not None and _activates(user) else None
        reader = None if act_after is None else _only_user(act_after)
        after = _pointwise(graph, reader, sites, site)
        if before is None and after is None:
            return None
        return cls(site, before, act_before if before else None, act_after if after else None, after)

    @property
    def layers(self) -> list[Site]:
        """The convolution first, then those that are merged into."""
        return [site for site in (self.site, self.before, self.after) if site is not None]

    @property
    def acts(self) -> list[fx.Node]:
        """The activations that are dropped or moved."""
        return [act for act in (self.act_before, self.act_after) if act is not None]


def _activates(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in ACTIVATIONS and len(node.users) == 1


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pointwise(graph: Graph, node: Any, sites: Mapping[str, Site], like: Site) -> Site | None:
    """The 1×1 convolution without padding that a node calls, or None."""
    module: Any = graph.module(node) if isinstance(node, fx.Node) else None
    if not isinstance(module, CONVS) or not is_pointwise(module) or not isinstance(module, type(like.module)):
        return None
    return None if pads(module) else sites[str(node.target)]


def _chain(place: _Place, context: Context, rank_out: int, rank_in: int, moves: bool) -> list[nn.Module]:
    """The three convolutions, computed in float64."""
    module: Any = place.site.module
    up, core, down = (factor.double() for factor in context.tucker(place.site).factors(rank_out, rank_in))
    kind, taps = module.weight.dtype, (1,) * len(module.kernel_size)
    bias = None if module.bias is None else context.constant(module.bias).double()

    def made(like: Any, weight: Tensor, offset: Tensor | None, **options: Any) -> nn.Module:
        shaped = weight if weight.dim() > 2 else weight.unflatten(1, (-1, *taps))
        return conv(like, shaped.to(kind).contiguous(), None if offset is None else offset.to(kind), **options)

    if place.before is None:
        first = made(module, down, None)
    else:
        a: Any = place.before.module
        offset = None if a.bias is None else down @ context.constant(a.bias).double()
        first = made(a, down @ context.constant(a.weight).double().flatten(1), offset, **geometry(a))
    if place.after is None:
        return [first, made(module, core, None, **geometry(module)), made(module, up, bias)]
    d: Any = place.after.module
    outer = context.constant(d.weight).double().flatten(1)
    inner = up.T @ bias if moves and bias is not None else None  # what of the bias the moved activation sees
    left = bias if bias is None or inner is None else bias - up @ inner
    offset = None if d.bias is None else context.constant(d.bias).double()
    if left is not None:
        offset = outer @ left if offset is None else offset + outer @ left
    return [first, made(module, core, inner, **geometry(module)), made(d, outer @ up, offset, **geometry(d))]


def _error(place: _Place, context: Context, rank_out: int, rank_in: int) -> float:
    """A guess that steers the choice: that of the ranks, and for each activation that of leaving it out.

    For the latter, inputs are taken as normally distributed. What it comes to is measured on the model's output.
    """
    z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    density = (-z.square() / 2).exp()
    parts = [context.tucker(place.site).tail(rank_out, rank_in)]
    for act in place.acts:
        target: Any = act.target
        y = target(z, *act.args[1:], **act.kwargs)
        parts.append(float((((y - z).square() @ density) / (y.square() @ density)).sqrt()))
    return math.hypot(*parts)
