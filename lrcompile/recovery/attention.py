"""Attention as something to learn: the weights that the original gives to each position (arXiv 2002.10957).

Here those of all layers are compared, not of the last one alone (our reading).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.graph.graph import Graph, packet_of

CALL = torch.ops.aten.scaled_dot_product_attention
Call = tuple[fx.Node, fx.Node]  # of the original and of the rewritten model


def same_calls(teacher: Graph, student: Graph) -> list[Call]:
    """The attention calls that both models have: of one name, and over the same numbers of heads and positions."""
    by_name = {node.name: node for node in teacher.nodes if _is_attention(node)}
    pairs = [(by_name[node.name], node) for node in student.nodes if _is_attention(node) and node.name in by_name]
    return [(ours, theirs) for ours, theirs in pairs if _weights_shape(ours) == _weights_shape(theirs)]


def log_weights_of(graph: fx.Graph, call: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """Adds to `graph`, into which `env` says what was copied, the logarithms of the weights of an attention call."""
    arguments = _arguments(call)
    given = [env[a] if isinstance(a, fx.Node) else a for a in (arguments[n] for n in ("query", "key", "attn_mask"))]
    return graph.call_function(log_weights, (*given, arguments["is_causal"], arguments["scale"]))


def log_weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """[… × heads × queries × keys] of query [… × heads × queries × width], key [… × groups × keys × width].

    Heads come in as many equal groups as there are keys for. A query that may see no key has zeros.
    """
    heads, groups = query.shape[-3], key.shape[-3]
    if groups != heads:
        key = key.repeat_interleave(heads // groups, -3)
    scores = (query.float() @ key.float().transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), -torch.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(blind, 0.0).log_softmax(-1).masked_fill(blind, 0.0)


def divergence(expected: Tensor, got: Tensor, samples: int) -> Tensor:
    """KL(original ‖ rewritten) of the weights, in nats, the mean over heads and queries of each sample, [samples]."""
    p = expected.exp()
    each = (p * (expected - got)).masked_fill(expected == -torch.inf, 0.0).sum(-1)
    if each.shape[0] % samples:
        return each.mean().expand(samples)
    return each.reshape(samples, -1).mean(1)


def _is_attention(node: fx.Node) -> bool:
    return packet_of(node) is CALL


def _arguments(call: fx.Node) -> dict[str, Any]:
    defaults: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return defaults | dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


def _weights_shape(call: fx.Node) -> tuple[Any, ...]:
    arguments = _arguments(call)
    return (*arguments["query"].meta["val"].shape[:-1], arguments["key"].meta["val"].shape[-2])
