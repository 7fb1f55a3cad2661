"""Lets attention heads share projections in groups: GQA and MQA, GKVA and MKVA, GQKVA (arXiv 2311.03426).

The layers for q, k and v become narrower; W_o stays as it is, and there are as many heads as before. What is saved:

| form | q, k, v layers | cache of keys and values |
|---|---|---|
| GQA, g groups of k and v (g = 1: MQA) | k and v to g/h | to g/h |
| GKVA, g groups of q (g = 1: MKVA) | q to g/h | not smaller |
| GQKVA, g_q × g_kv = h | q to 1/g_kv, k and v to 1/g_q | to 1/g_q |

It is lossy, and a model whose heads differ usually needs recovery afterwards: the error says so. Averages are taken
of the layers' weights, before rotary embeddings, which turn all heads alike.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from lrcompile.errors import InputError
from lrcompile.graph.graph import Graph, aten, owners, packet_of, shape
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile_passes.attention import (
    ROLES,
    SDPA,
    Attention,
    Projection,
    Role,
    arguments,
    attentions,
    computed_by,
    recognise,
)
from lrcompile_passes.head_groups import INITS, Grouping, error, groupings, shared, similar_order, unusual
from lrcompile_passes.layers import cannot_decompose, cannot_rebuild, linear, with_weight

SAME = 1e-4  # relative error up to which heads that share count as alike


@dataclass(frozen=True)
class GroupHeads(Pass):
    """softmax(Q_o K_oᵀ)V_o → softmax(Q_i(o) K_j(o)ᵀ)V_j(o), i and j being groups of heads.

    `inits` are the ways to start a shared projection: "mean" of its heads, the "first" of them, or "similar": the
    mean, after heads are reordered so that similar ones share, with the columns of W_o.
    """

    stage = Stage.FACTORIZE
    inits: tuple[str, ...] = ("mean", "similar")

    def __post_init__(self) -> None:
        unknown = set(self.inits) - set(INITS)
        if unknown:
            raise InputError(f"group-heads.inits: unknown init {', '.join(sorted(unknown))}; known: {', '.join(INITS)}")

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """For each attention, every grouping of its heads from every start; the error is that of q, k and v."""
        owner_map = owners(graph)
        for path, attention in attentions(graph):
            if isinstance(attention, str):
                yield Refusal("", path, attention)
                continue
            reason = unusual(attention) or _cannot_rebuild(graph, attention, owner_map)
            if reason:
                yield Refusal("", path, reason)
                continue
            can_reorder = attention.output is not None and not cannot_rebuild(graph, attention.output, owner_map)
            for grouping in groupings(attention):
                for init in self.inits:
                    if init != "similar" or (can_reorder and grouping.has_choice):
                        yield _rewrite(attention, grouping, init, context)

    def remark(self, rewrite: Rewrite) -> str:
        """How many heads of keys and values are left to cache, and that heads that differ need training."""
        params: Any = rewrite.params
        queries, keys = params["queries"], params["keys"]
        heads = queries * keys if params["form"] == "GQKVA" else max(queries, keys)
        cache = f"KV cache of {keys} heads for {heads} of queries" if keys < heads else "KV cache as large as before"
        return cache if rewrite.error < SAME else f"{cache}; further training recovers accuracy"

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Narrows the layers, and lets attention read their heads as often as it needs them."""
        node = rewriter.node(rewrite.site[-1])
        heads = shape(node)[1]
        params: Any = rewrite.params
        grouping, init = Grouping(params["form"], params["queries"], params["keys"]), params["init"]
        parts = computed_by(rewriter.graph, node, rewrite.site)
        missing = [role for role in ROLES if grouping.changes(role) and role not in parts]
        if missing:
            raise KeyError(f"no layer that computes {' and '.join(missing)} of {node.name}")
        order: Sequence[int] = range(heads)
        if init == "similar":
            attention = recognise(rewriter.graph, node)
            order = _order(attention, grouping, rewriter.context)
            _reorder_output(rewriter, attention, order)
        inputs: dict[Role, fx.Node] = dict(zip(ROLES, node.args, strict=False))  # type: ignore[arg-type]
        for path in dict.fromkeys(part.site.path for part in parts.values()):
            mine = {role: part for role, part in parts.items() if part.site.path == path}
            inputs |= _narrowed(rewriter, mine, node, grouping, init, order)
        options = arguments(node)
        given = {name: options[name] for name in ("attn_mask", "scale") if options[name] is not None}
        if options["is_causal"]:
            given["is_causal"] = True
        if grouping.form != "GQA":
            inputs = _repeated(rewriter, inputs, grouping, heads, node)
        elif grouping.keys < heads:
            given["enable_gqa"] = True
        rewriter.replace(node, rewriter.call_function(SDPA, *inputs.values(), before=node, **given))


def _cannot_rebuild(graph: Graph, attention: Attention, owner_map: Mapping[int, frozenset[str]]) -> str | None:
    reasons = (cannot_decompose(graph, part.site, owner_map) for part in attention.parts)
    return next((reason for reason in reasons if reason), None)


def _rewrite(attention: Attention, grouping: Grouping, init: str, context: Context) -> Rewrite:
    """Names the layers that become narrower or whose heads move, and the attention's own node last."""
    parts = [p for p, role in zip(attention.parts, ROLES, strict=True) if grouping.changes(role) or init == "similar"]
    paths = [part.site.path for part in parts]
    if init == "similar" and attention.output is not None:
        paths.append(attention.output.path)
    params = {"form": grouping.form, "queries": grouping.queries, "keys": grouping.keys, "init": init}
    sites = (*dict.fromkeys(paths), attention.node.name)
    return Rewrite("", sites, params, partial(error, attention, grouping, init, context))  # type: ignore[arg-type]


def _order(attention: Attention, grouping: Grouping, context: Context) -> Sequence[int]:
    """The old heads in their new order; on trial there are no values to tell, and it makes no difference."""
    weight = context.constant(attention.query.site.module.weight)  # type: ignore[arg-type]
    if weight.is_meta or isinstance(weight, FakeTensor):
        return range(attention.heads)
    return similar_order(attention, grouping, context)


def _narrowed(
    rewriter: Rewriter,
    parts: Mapping[Role, Projection],
    before: fx.Node,
    grouping: Grouping,
    init: str,
    order: Sequence[int],
) -> dict[Role, fx.Node]:
    """Makes one layer narrower; returns what of q, k and v it computes, [batch, groups, length, size]."""
    site = next(iter(parts.values())).site
    module: Any = site.module
    weights, biases, widths = [], [], []
    for role, part in parts.items():
        weights.append(shared(part, _rows(module.weight, part, rewriter.context), grouping, role, init, order))
        widths.append(weights[-1].shape[0] * weights[-1].shape[1])
        if module.bias is not None:
            biases.append(shared(part, _rows(module.bias, part, rewriter.context), grouping, role, init, order))
    weight = torch.cat([w.flatten(0, 1) for w in weights])
    bias = torch.cat([b.flatten() for b in biases]) if biases else None
    rewriter.set_module(site.path, linear(module, weight, bias))
    (call,) = site.nodes
    if "sizes" in call.meta:
        call.meta["sizes"] = (*call.meta["sizes"][:-1], str(len(weight)))
    pieces: list[fx.Node] = [call]
    if len(parts) > 1:
        split = rewriter.call_function(aten.split_with_sizes.default, call, widths, -1, before=before)
        pieces = [rewriter.call_function(operator.getitem, split, i, before=before) for i in range(len(parts))]
    return {
        role: _heads(rewriter, part, piece, len(w), before)
        for (role, part), piece, w in zip(parts.items(), pieces, weights, strict=True)
    }


def _rows(tensor: Tensor, part: Projection, context: Context) -> Tensor:
    """A weight [features × in] or bias [features] by heads: [heads × size × …]."""
    rows = part.rows.flatten()
    values = context.constant(tensor)
    first = int(rows[0])
    if torch.equal(rows, torch.arange(first, first + len(rows), device="cpu")):
        return values[first : first + len(rows)].unflatten(0, part.rows.shape)
    return values.index_select(0, rows.to(values.device)).unflatten(0, part.rows.shape)


def _heads(rewriter: Rewriter, part: Projection, value: fx.Node, groups: int, before: fx.Node) -> fx.Node:
    """What attention reads, [batch, groups, length, size], from a layer's output."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return rewriter.call_function(target, *args, before=before, **kwargs)

    for scale in part.scales:
        value = call(scale.target, value, *scale.args[1:])
    size = part.rows.shape[1]
    if part.sequence_first:
        value = call(aten.reshape.default, value, [part.length, -1, groups, size])
        value = call(aten.permute.default, value, [1, 2, 0, 3] if part.head_axis == 1 else [1, 0, 2, 3])
    else:
        value = call(aten.reshape.default, value, [-1, part.length, groups, size])
        value = call(aten.transpose.int, value, 1, 2) if part.head_axis == 1 else value
    if part.base is not None:
        new = {part.base: value}
        for node in part.body:
            given: Any = (node.args, dict(node.kwargs))
            args, kwargs = fx.node.map_arg(given, lambda n: new.get(n, n))
            if packet_of(node) in (aten.reshape, aten.view) and args[1][part.head_axis] != -1:
                sizes = list(args[1])
                sizes[part.head_axis] = groups
                args = (args[0], sizes)
            new[node] = call(node.target, *args, **kwargs)
        value = new[part.body[-1]]
        value = call(aten.transpose.int, value, 1, 2) if part.head_axis == 2 else value
    for scale in part.late_scales:
        value = call(scale.target, value, *scale.args[1:])
    return value


def _repeated(
    rewriter: Rewriter, inputs: Mapping[Role, fx.Node], grouping: Grouping, heads: int, before: fx.Node
) -> dict[Role, fx.Node]:
    """Queries, keys and values of every head: of each query group in a run, of key groups in turn."""

    def call(target: Any, *args: Any) -> fx.Node:
        return rewriter.call_function(target, *args, before=before)

    def repeat(role: Role, value: fx.Node) -> fx.Node:
        groups = grouping.groups(role)
        if groups == heads:
            return value
        if groups == 1:
            return call(aten.expand.default, value, [-1, heads, -1, -1])
        _, _, length, size = shape(value)
        head = length * size  # side by side, so that no value has five axes
        one = [groups, 1, head] if role == "query" else [1, groups * head]
        many = [groups, heads // groups, head] if role == "query" else [heads // groups, groups * head]
        repeated = call(aten.expand.default, call(aten.reshape.default, value, [-1, *one]), [-1, *many])
        return call(aten.reshape.default, repeated, [-1, heads, length, size])

    return {role: repeat(role, value) for role, value in inputs.items()}


def _reorder_output(rewriter: Rewriter, attention: Attention, order: Sequence[int]) -> None:
    """Gives the layer after attention its columns in the new order of heads."""
    site, columns = attention.output, attention.columns
    assert site is not None
    assert columns is not None
    module: Any = site.module
    weight = rewriter.context.constant(module.weight)
    index = torch.empty(columns.numel(), dtype=torch.int64, device="cpu")
    index[columns.flatten()] = columns[list(order)].flatten()
    bias = None if module.bias is None else rewriter.context.constant(module.bias)
    rewriter.set_module(site.path, with_weight(module, weight.index_select(1, index.to(weight.device)), bias))
