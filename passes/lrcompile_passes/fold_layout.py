"""Composes transposes with transposes and reshapes with reshapes; what comes to nothing goes.

Models move axes for one layer and back for the next. Where each of those is an operation, as in ONNX, it copies the
whole value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrcompile.graph.graph import Graph, aten, read_by_strides
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage

RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
}  # fmt: skip
COPIES = {aten.contiguous.default, aten.clone.default}


@dataclass(frozen=True)
class FoldLayout(Pass):
    """Permute(Permute(x, p), q) → Permute(x, p∘q) ; Reshape(Reshape(x)) → Reshape(x) ; nothing where that is x."""

    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Pairs of which neither is part of another pair; the first is read by nothing else unless the two cancel."""
        taken: set[fx.Node] = set()
        for second in graph.nodes:
            first = _before(second)
            if first is None or taken & {first, second}:
                continue
            cancels = _cancels(first, second)
            if cancels and _would_be_output(first, second):
                yield Refusal("", second.name, f"with {first.name} before it: the model's output would be its input")
                continue
            if not cancels and _composed(first, second) is None:
                continue
            reader = next(read_by_strides(second), None)
            if reader is not None:
                yield Refusal("", second.name, f"{reader.name} reads it by its strides")
                continue
            if not cancels and len(first.users) > 1:
                yield Refusal("", second.name, f"{first.name} before it has {len(first.users)} users")
                continue
            taken |= {first, second}
            yield Rewrite("", (first.name, second.name), {"cancels": cancels}, exact=True)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts one operation, or none, in the place of the two."""
        first, second = (rewriter.node(name) for name in rewrite.site)
        source: Any = first.args[0]
        if rewrite.params["cancels"]:
            if not _would_be_output(first, second):  # what was applied before may have made it so
                rewriter.replace(second, source)
            return
        composed = _composed(first, second)
        if composed is None:
            raise ValueError(f"{first.name} and {second.name} do not compose")
        target, argument = composed
        rewriter.replace(second, rewriter.call_function(target, source, argument, before=second))


def _before(node: fx.Node) -> fx.Node | None:
    """The operation of the same kind that a node reads; between permutations there may be a copy."""
    if not _moves(node):
        return None
    first: Any = node.args[0]
    if isinstance(first, fx.Node) and first.target in COPIES and len(first.users) == 1 and _order(node) is not None:
        first = first.args[0]
    same_kind = isinstance(first, fx.Node) and _moves(first) and (_order(first) is None) == (_order(node) is None)
    return first if same_kind else None


def _moves(node: fx.Node) -> bool:
    known = node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
    return known and (node.target in RESHAPES or _order(node) is not None)


def _order(node: fx.Node) -> list[int] | None:
    """The axes of what a node reads, in the order in which it hands them on; None if it is no permutation."""
    if node.op != "call_function" or node.target not in _PERMUTATIONS:
        return None
    axes = list(range(node.meta["val"].dim()))
    _PERMUTATIONS[node.target](axes, *node.args[1:])
    return axes


def _permute(axes: list[int], order: Sequence[int]) -> None:
    axes[:] = [axis % len(axes) for axis in order]


def _transpose(axes: list[int], a: int, b: int) -> None:
    if axes:
        axes[a], axes[b] = axes[b], axes[a]


def _swap_last(axes: list[int]) -> None:
    axes[-2:] = axes[-2:][::-1]


def _move(axes: list[int], source: int, destination: int) -> None:
    moved = axes.pop(source)
    axes.insert(destination % (len(axes) + 1), moved)


_PERMUTATIONS: dict[Any, Any] = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _swap_last,
    aten.mT.default: _swap_last,
    aten.movedim.int: _move,
}


def _cancels(first: fx.Node, second: fx.Node) -> bool:
    """Whether the two together hand on what came in, for every batch size."""
    before, after = _order(first), _order(second)
    if before is not None and after is not None:
        return [before[axis] for axis in after] == list(range(len(after)))
    sizes = second.meta.get("sizes")
    return sizes is not None and sizes == first.args[0].meta.get("sizes")  # type: ignore[union-attr]


def _composed(first: fx.Node, second: fx.Node) -> tuple[Any, list[Any]] | None:
    """(operation, argument) that does what the two do, or None if there is no one such operation."""
    before, after = _order(first), _order(second)
    if before is not None and after is not None:
        return (aten.permute.default, [before[axis] for axis in after]) if second.args[0] is first else None
    if second.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default, list(second.args[1])  # type: ignore[arg-type]
    sizes = second.meta.get("sizes")
    if sizes is None or "0" in sizes:
        return None
    known = [int(size) if size.isdigit() else -1 for size in sizes]
    return (aten.reshape.default, known) if known.count(-1) <= 1 else None


def _would_be_output(first: fx.Node, second: fx.Node) -> bool:
    """Whether without the two an input or a constant, or one value twice, would be the graph's output."""
    outputs = [user for user in second.users if user.op == "output"]
    source: Any = first.args[0]
    return bool(outputs) and (source.op in ("placeholder", "get_attr") or outputs[0] in source.users)
