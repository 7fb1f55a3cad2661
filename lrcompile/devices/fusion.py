"""Which operations a runtime fuses into the one before them: they cost no launch and no round trip to memory.

Runtimes for inference fold batch norms into convolutions, and run activations and residual additions as the last step
of the convolution or product before them. A price that counted them as kernels would call it a gain to fold a batch
norm that nobody pays for, and would not see that a rewrite keeps a runtime from fusing. What a device's runtime fuses
stands in its profile; the patterns are what runtimes have in common (our reading).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.describe import describe
from lrcompile.graph.graph import submodule
from lrcompile.graph.op import OpDesc

aten = torch.ops.aten
_CLIPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "sigmoid", "tanh", "hardsigmoid")
_ACTIVATIONS = {
    "conv": {getattr(aten, name) for name in _CLIPS},
    "gemm": {aten.relu, aten.gelu},  # the epilogues of cuBLASLt
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ORDER = ("normalization", "addition", "activation")  # each once, and none after a later one


@dataclass(frozen=True)
class _Tail:
    """The last value of a kernel: of a convolution over some axes, or of a product, with what was fused into it."""

    host: str
    axes: int = 0
    done: int = 0  # steps of _ORDER that are no longer possible


_NONE = _Tail("")


def describe_all(gm: fx.GraphModule, fuses: Set[str] = frozenset()) -> dict[str, OpDesc]:
    """The operations of all nodes by name; those that are fused are of the kind "fused".

    A fused addition still reads its other operand; `activation_bytes` says how much.
    """
    found = {node.name: describe(gm, node) for node in gm.graph.nodes}
    if not fuses:
        return found
    tails: dict[fx.Node, _Tail] = {}
    places = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        op = found[node.name]
        if op.conv is not None or (op.gemm is not None and op.gemm.batch == 1):
            tails[node] = _Tail("gemm") if op.conv is None else _Tail("conv", len(op.conv.kernel))
            continue
        hosts = [source for source in node.all_input_nodes if source in tails and set(source.users) == {node}]
        for source in sorted(hosts, key=lambda source: -places[source]):
            tail = tails[source]
            step = _step(gm, node, tail.host)
            if step is None or _ORDER.index(step) < tail.done:
                continue
            images = step == "addition" and all(tails.get(x, _NONE).axes == 2 for x in _operands(node))
            if f"{tail.host}_{step}" not in fuses and not (images and "image_addition" in fuses):
                continue
            others = sum(map(_bytes, _operands(node))) - _bytes(source)
            found[node.name] = replace(op, kind="fused", weight_bytes=0.0, activation_bytes=others)
            tails[node] = replace(tail, done=_ORDER.index(step) + 1)
            break
    return found


def _step(gm: fx.GraphModule, node: fx.Node, host: str) -> str | None:
    """Which last step of a kernel a node could be."""
    if node.op == "call_module":
        return "normalization" if isinstance(submodule(gm, node.target), _NORMS) else None
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _ACTIVATIONS[host]:
        return "activation"
    sizes = [tuple(operand.meta["val"].shape) for operand in _operands(node)]
    return "addition" if packet is aten.add and len(sizes) == 2 and sizes[0] == sizes[1] else None


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    return (source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor))


def _bytes(node: fx.Node) -> float:
    value: Any = node.meta["val"]
    return float(value.numel() * value.element_size())
