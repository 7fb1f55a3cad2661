"""Drops what does nothing in inference: dropout, casts to the same type, reshapes to the same shape, copies.

A shape counts as the same only where export says so for every batch size: `meta["sizes"]` holds its symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lrcompile.graph.graph import Graph, aten, dtype
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage

MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity
)  # fmt: skip


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Identity(x) → x."""

    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Modules by path; single operations by node name."""
        for site in graph.modules_of(*MODULES):
            if site.module.training and not isinstance(site.module, nn.Identity):
                yield site.refuse("in training mode")
            elif not any(_passes_through(node) for node in site.nodes):
                yield site.rewrite(exact=True, operation="module")
        for node in graph.nodes:
            test = _IDENTITIES.get(node.target) if node.op == "call_function" else None
            if test is not None and node.args and test(node) and not _passes_through(node):
                yield Rewrite("", (node.name,), {"operation": str(node.target)}, exact=True)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Lets the users of the node, or of every call of the module, read its input."""
        is_module = rewrite.params["operation"] == "module"
        nodes = rewriter.site().nodes if is_module else (rewriter.node(rewrite.site[0]),)
        for node in nodes:
            if not _passes_through(node):  # what was applied before may have made it so
                rewriter.replace(node, _source(node))


def _source(node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _passes_through(node: fx.Node) -> bool:
    """Whether without the node an input or a constant, or one value twice, would be the graph's output."""
    outputs = [user for user in node.users if user.op == "output"]
    source = _source(node)
    return bool(outputs) and (source.op in ("placeholder", "get_attr") or outputs[0] in source.users)


def _same_type(node: fx.Node) -> bool:
    return dtype(node) is not None and dtype(node) == dtype(_source(node))


def _same_shape(node: fx.Node) -> bool:
    sizes = node.meta.get("sizes")
    return sizes is not None and sizes == _source(node).meta.get("sizes") and _same_type(node)


def _same_layout(node: fx.Node) -> bool:
    if not _same_shape(node):
        return False
    value, source = node.meta["val"], _source(node).meta["val"]
    return value.stride() == source.stride() and value.device == source.device


def _inactive(node: fx.Node) -> bool:
    return len(node.args) > 2 and node.args[2] is False


def _keeps_order(node: fx.Node) -> bool:
    order: Any = node.args[1]
    return _same_shape(node) and all(axis % len(order) == i for i, axis in enumerate(order))


def _swaps_nothing(node: fx.Node) -> bool:
    rank = max(1, node.meta["val"].dim())
    return _same_shape(node) and (node.args[1] - node.args[2]) % rank == 0  # type: ignore[operator]


def _by_one(node: fx.Node) -> bool:
    return _same_shape(node) and isinstance(node.args[1], int | float) and node.args[1] == 1 and not node.kwargs


def _pads_nothing(node: fx.Node) -> bool:
    return _same_shape(node) and all(isinstance(amount, int) and amount == 0 for amount in node.args[1])  # type: ignore[union-attr]


_IDENTITIES: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys((aten.alias.default, aten.detach.default), _same_type),
    **dict.fromkeys(
        (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
         aten.feature_alpha_dropout.default), _inactive
    ),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor,
         aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _same_shape
    ),
    **dict.fromkeys(
        (aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
         aten._to_copy.default, aten.type_as.default), _same_layout
    ),
    aten.permute.default: _keeps_order,
    aten.transpose.int: _swaps_nothing,
    aten.mul.Tensor: _by_one,
    aten.div.Tensor: _by_one,
    aten.pad.default: _pads_nothing,
    aten.constant_pad_nd.default: _pads_nothing,
}  # fmt: skip
