"""How attention is written in ONNX: as `torch.onnx.export(dynamo=True)` writes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from lrcompile.devices.onnx_graph import ATTENTION_OPSET, Arguments, Builder, UnsupportedRegion, tensor_of


def lower_attention(b: Builder, node: fx.Node, a: Arguments) -> str:
    """Scaled dot-product attention: one operator from `ATTENTION_OPSET` on, before that the operators it is made of."""
    query, key = tensor_of(a["query"]), tensor_of(a["key"])
    dtype, axes = query.dtype, key.dim()
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(query.shape[-1])
    if scale < 0:
        raise UnsupportedRegion(node, "attention with a negative scale")
    q, k, v = (b.name(a[name], node) for name in ("query", "key", "value"))
    if b.region.opset >= ATTENTION_OPSET and query.dim() == 4:
        mask_input = [b.name(a["attn_mask"], node)] if a["attn_mask"] is not None else []
        options = {} if a["scale"] is None else {"scale": float(a["scale"])}
        return b.emit("Attention", q, k, v, *mask_input, is_causal=int(a["is_causal"]), **options)
    leading = tuple(key.shape[:-2])
    if a["enable_gqa"] and query.shape[-3] != key.shape[-3]:
        k, v = (b.repeat_heads(x, tensor_of(a[role]), query.shape[-3], node) for x, role in ((k, "key"), (v, "value")))
        leading = (*key.shape[:-3], query.shape[-3])
    turned = [*leading, key.shape[-1], key.shape[-2]]
    if axes > 3:
        k = b.reshape(k, [math.prod(leading), *key.shape[-2:]], node)
    k = b.emit("Transpose", k, perm=[0, 2, 1] if axes > 2 else [1, 0])
    if axes > 3:
        k = b.reshape(k, turned, node)
    factor = b.constant(math.sqrt(scale), dtype, node)
    scores = b.emit("MatMul", b.emit("Mul", q, factor), b.emit("Mul", k, factor))
    mask, boolean = _mask(b, node, a, query, key)
    weights = b.emit("Softmax", b.emit("Add", scores, mask) if mask else scores, axis=-1)
    if boolean:
        weights = b.emit("Where", b.emit("IsNaN", weights), b.constant(0.0, dtype, node), weights)
    return b.emit("MatMul", weights, v)


def _mask(b: Builder, node: fx.Node, a: Arguments, query: Tensor, key: Tensor) -> tuple[str | None, bool]:
    """The additive mask's name, and whether it came from a boolean one, which can mask a whole row."""
    if a["is_causal"]:
        shape = (query.shape[-2], key.shape[-2])
        return b.constant(torch.full(shape, -torch.inf).triu(1).numpy(), query.dtype, node), False
    if a["attn_mask"] is None:
        return None, False
    mask = b.name(a["attn_mask"], node)
    if tensor_of(a["attn_mask"]).dtype != torch.bool:
        return mask, False
    zero, never = b.constant(0.0, query.dtype, node), b.constant(-math.inf, query.dtype, node)
    return b.emit("Where", mask, zero, never), True
