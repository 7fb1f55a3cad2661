"""Which operations a runtime fuses into the one before them: they cost no launch and no round trip to memory.

Runtimes for inference fold batch norms into convolutions, and run activations and residual additions as the last step
of the convolution or product before them. A price that counted them as kernels would call it a gain to fold a batch
norm that nobody pays for, and would not see that a rewrite keeps a runtime from fusing. What a device's runtime fuses
stands in its profile; the patterns are what runtimes have in common (our reading).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.graph.describe import describe, dtype_name
from lrcompile.graph.graph import packet_of, submodule
from lrcompile.graph.nested import nested
from lrcompile.graph.op import OpDesc

aten = torch.ops.aten
_CLIPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "sigmoid", "tanh", "hardsigmoid")
_ACTIVATIONS = {
    "conv": {getattr(aten, name) for name in _CLIPS},
    "gemm": {aten.relu, aten.gelu},  # the epilogues of cuBLASLt
    "transposed": set(),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CUTS = (aten.unbind, aten.chunk, aten.split, aten.split_with_sizes)  # into several pieces
_PARTS = (*_CUTS, aten.expand, aten.select, aten.slice, aten.narrow)
_PIECES = (aten.view, aten.reshape, *_PARTS)
_COPIES = (aten.clone, aten.contiguous, aten.reshape, aten.flatten)
_ORDER = ("normalization", "addition", "activation")  # each once, and none after a later one


@dataclass(frozen=True)
class _Tail:
    """The last value of a kernel: of a convolution over some axes, or of a product, with what was fused into it."""

    host: str
    axes: int = 0
    done: int = 0  # steps of _ORDER that are no longer possible


_NONE = _Tail("")


def describe_all(gm: fx.GraphModule, fuses: Set[str] = frozenset(), lacks: Set[str] = frozenset()) -> dict[str, OpDesc]:
    """The operations of all nodes by name, on a device that fuses and lacks what these name.

    Those that are fused are of the kind "fused"; a fused addition still reads its other operand, and `activation_bytes`
    says how much. A runtime that fuses anything computes what depends on no input once, when it opens the model.
    """
    found = {node.name: describe(gm, node) for node in gm.graph.nodes}
    for node in gm.graph.nodes:
        if inner := [describe_all(graph, fuses, lacks) for graph in nested(gm, node)]:
            dearest = max(inner, key=lambda ops: sum(op.flops for op in ops.values()))  # of branches one is run
            found |= {f"{node.name}.{name}": op for name, op in dearest.items()}
    if "strided_views" in lacks:
        found |= {node.name: _moved(node, found[node.name]) for node in gm.graph.nodes if node.op == "call_function"}
    if "product_bias" in lacks:
        found |= {f"{node.name}.bias": _bias(node) for node in gm.graph.nodes if _adds_bias_apart(gm, node)}
    if not fuses:
        return found
    for node in constants(gm):
        found[node.name] = replace(found[node.name], kind="view")
    for node in gm.graph.nodes if "skip_layer_norm" in fuses else ():
        if (norm := _norm_of_sum(gm, node)) is not None:
            moved = found[node.name].activation_bytes
            found[node.name] = replace(found[node.name], kind="view")
            found[norm.name] = replace(found[norm.name], activation_bytes=moved, function="skip_layer_norm")
    for node in gm.graph.nodes if "bias_gelu" in fuses else ():
        if (gelu := _gelu_of_biased(gm, node)) is not None:
            found[gelu.name] = replace(found[gelu.name], function="bias_gelu")
    tails: dict[fx.Node, _Tail] = {}
    places = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        op = found[node.name]
        if "conv_padding" in fuses and _is_padding_of_convolutions(gm, node):
            found[node.name] = replace(op, kind="view")
            continue
        if op.conv is not None or (op.gemm is not None and op.gemm.batch == 1):
            tails[node] = _tail(op)
            continue
        hosts = [source for source in node.all_input_nodes if source in tails and set(source.users) == {node}]
        for source in sorted(hosts, key=lambda source: -places[source]):
            tail = tails[source]
            step = _step(gm, node, tail.host)
            if step is None or _ORDER.index(step) < tail.done:
                continue
            images = step == "addition" and all(tails.get(x, _NONE).axes == 2 for x in _operands(node))
            if _fusion(tail.host, step) not in fuses and not (images and "image_addition" in fuses):
                continue
            others = sum(map(_bytes, _operands(node))) - _bytes(source)
            found[node.name] = replace(op, kind="fused", weight_bytes=0.0, activation_bytes=others)
            tails[node] = replace(tail, done=_ORDER.index(step) + 1)
            break
    return found


def _fusion(host: str, step: str) -> str:
    return f"{'conv' if (host, step) == ('transposed', 'normalization') else host}_{step}"


def _tail(op: OpDesc) -> _Tail:
    """Of a convolution or product alone; into a transposed one only a normalisation is folded."""
    if op.conv is None:
        return _Tail("gemm")
    return _Tail("transposed") if op.conv.transposed else _Tail("conv", len(op.conv.kernel))


def _moved(node: fx.Node, op: OpDesc) -> OpDesc:
    """A view that has to be written out: a piece, or a transpose that is neither part of attention nor of a product.

    What was written out is not copied again.
    """
    packet = packet_of(node)
    if packet in _COPIES:
        return replace(op, kind="view", activation_bytes=0.0)
    if packet in _PARTS:
        sizes = [_bytes(node), _bytes(node.args[0])]  # type: ignore[arg-type]
        whole = sizes[0] == sizes[1] and packet not in _CUTS
        return op if whole else replace(op, kind="movement", activation_bytes=sizes[0] + min(sizes))
    if op.kind != "view" or op.function != "transpose" or not op.activation_bytes:
        return op
    source: Any = node.args[0]
    readers = {packet_of(user) for user in _behind_views(node)}
    if readers and readers <= {aten.scaled_dot_product_attention}:
        return op
    if packet_of(source) is aten.scaled_dot_product_attention:
        return op
    if op.row == 1 and readers <= {aten.matmul, aten.bmm, aten.mm}:
        return op
    return replace(op, kind="movement")


def _behind_views(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, or a piece of it."""
    for user in node.users:
        if user.target is operator.getitem or packet_of(user) in _PIECES:
            yield from _behind_views(user)
        else:
            yield user


def _adds_bias_apart(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a linear layer adds its bias apart: on more than two axes, unless what follows takes it in."""
    if not _is_biased_on_axes(gm, node):
        return False
    (user, *others) = node.users or (node,)
    return bool(others) or not (_is_gelu(user) or _norm_of_sum(gm, user))


def _gelu_of_biased(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The GELU that alone reads a linear layer and takes its bias in; that of tanh is as fast with one as without."""
    (user, *others) = node.users or (node,)
    alone = not others and _is_gelu(user) and user.kwargs.get("approximate", "none") == "none"
    return user if alone and _is_biased_on_axes(gm, node) else None


def _is_biased_on_axes(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a linear layer with a bias, on more than two axes."""
    if node.op != "call_module" or not isinstance(linear := submodule(gm, node.target), nn.Linear):
        return False
    return linear.bias is not None and node.meta["val"].dim() > 2


def _is_gelu(node: fx.Node) -> bool:
    return packet_of(node) is aten.gelu


def _norm_of_sum(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The layer norm that alone reads a sum of two values of the same shape, on three axes."""
    if packet_of(node) is not aten.add or len(node.users) != 1:
        return None
    sizes = [tuple(operand.meta["val"].shape) for operand in _operands(node)]
    (user,) = node.users
    is_norm = user.op == "call_module" and isinstance(submodule(gm, user.target), nn.LayerNorm)
    return user if is_norm and len(sizes) == 2 and sizes[0] == sizes[1] and len(sizes[0]) == 3 else None


def _bias(node: fx.Node) -> OpDesc:
    value: Tensor = node.meta["val"]
    row = value.shape[-1]
    return OpDesc(
        "elementwise", dtype_name(value), value.numel(), row * value.element_size(), 2 * _bytes(node),
        function="bias", row=row, label="bias",
    )  # fmt: skip


def constants(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that depend on no input."""
    depend = set[fx.Node]()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or any(source in depend for source in node.all_input_nodes):
            depend.add(node)
        elif node.op in ("call_function", "call_module"):
            yield node


def _is_padding_of_convolutions(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Zeros around a value that only convolutions read, which can add them themselves."""
    if packet_of(node) not in (aten.pad, aten.constant_pad_nd):
        return False
    rest = [*node.args[2:], *node.kwargs.values()]
    return all(value in ("constant", None, 0, 0.0) for value in rest) and all(
        user.op == "call_module" and isinstance(submodule(gm, user.target), _CONVOLUTIONS) for user in node.users
    )


def _step(gm: fx.GraphModule, node: fx.Node, host: str) -> str | None:
    """Which last step of a kernel a node could be."""
    if node.op == "call_module":
        return "normalization" if isinstance(submodule(gm, node.target), _NORMS) else None
    packet = packet_of(node)
    if packet in _ACTIVATIONS[host]:
        return "activation"
    sizes = [tuple(operand.meta["val"].shape) for operand in _operands(node)]
    return "addition" if packet is aten.add and len(sizes) == 2 and sizes[0] == sizes[1] else None


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    return (source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor))


def _bytes(node: fx.Node) -> float:
    return float(sum(part.numel() * part.element_size() for part in pytree.tree_leaves(node.meta["val"])))
