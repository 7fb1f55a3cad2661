"""Follows values through operations that only move them, such as reshape, transpose and split.

The operations are run on positions: integers in place of values. Sizes that export left open, such as the batch,
get a number of their own, so that no two sizes are taken for each other because they happen to be equal.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from lrcompile.graph.graph import aten, packet_of, shape

T = TypeVar("T")

SAMPLES = 3  # stands for every open size while positions are followed: a batch of one would hide the order of axes

_MOVEMENTS = frozenset(
    getattr(aten, name)
    for name in (
        "reshape", "view", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "squeeze", "unsqueeze",
        "contiguous", "clone", "alias", "detach", "select", "split", "split_with_sizes", "chunk", "unbind", "slice",
        "narrow", "expand", "movedim", "swapaxes", "lift_fresh_copy",
    )
    if hasattr(aten, name)
)  # fmt: skip


class NotUnderstoodError(Exception):
    """The reason for which an attention is left alone."""


class _UnknownSizeError(Exception):
    """An open size is read that an extract of a graph does not know."""


def with_sizes(read: Callable[..., T], *args: Any) -> T:
    """What `read` finds where open sizes are `SAMPLES`, or, where these are not known, with sizes as they are."""
    try:
        return read(*args, SAMPLES)
    except _UnknownSizeError:
        return read(*args, None)


def moves_to(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node from which values are only moved or scaled on the way to `node`, and these operations in order."""
    chain: list[fx.Node] = []
    while is_move(node) or is_scale(node):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, chain[::-1]


def is_move(node: fx.Node) -> bool:
    """Whether a node only moves, repeats or leaves out values of its first argument."""
    return node.target is operator.getitem or packet_of(node) in _MOVEMENTS


def is_scale(node: fx.Node) -> bool:
    """Whether a node multiplies by a number, or divides by one."""
    scales = packet_of(node) in (aten.mul, aten.div) and len(node.args) == 2 and not node.kwargs
    return scales and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int | float)


def followed(source: fx.Node, moves: Sequence[fx.Node], symbols: Mapping[str, int]) -> Tensor:
    """For each position after the moves, the position in `source`'s output, flat, that it reads.

    Raises:
        NotUnderstoodError: a move is not possible for other open sizes than those of the example.
    """
    sizes = shape_with(source, symbols)
    values: dict[fx.Node, Any] = {source: torch.arange(math.prod(sizes), device="cpu").reshape(sizes)}
    for node in moves:
        if is_scale(node):
            values[node] = values[node.args[0]]  # type: ignore[index]
            continue
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda n: values[n] if n in values else number_of(n, symbols)
        )
        try:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise NotUnderstoodError(f"{name_of(node)} cannot be followed at other batch sizes") from error
    return values[moves[-1]] if moves else values[source]


def name_of(node: fx.Node) -> str:
    """The short name of what a node calls, for a reason."""
    packet = packet_of(node)
    return packet.__name__ if packet is not None else str(getattr(node.target, "__name__", node.target))


def sizes_of(node: fx.Node) -> tuple[str, ...]:
    """The sizes of a node's output as export knew them, with symbols for open ones; else as they are."""
    known = node.meta.get("sizes")
    return tuple(known) if known is not None else tuple(map(str, shape(node)))


def symbols_of(node: fx.Node, samples: int | None) -> dict[str, int]:
    """A number for each open size of a node's output; none if sizes are to be as they are."""
    if samples is None:
        return {}
    return {name: samples for size in sizes_of(node) for name in re.findall(r"[A-Za-z_]\w*", size)}


def shape_with(node: fx.Node, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a node's output for given open sizes; without any, as it is."""
    return tuple(_evaluated(size, symbols) for size in sizes_of(node)) if symbols else shape(node)


def number_of(node: fx.Node, symbols: Mapping[str, int]) -> int:
    """The value of an integer that the graph computes from open sizes."""
    if not symbols:
        return int(node.meta["val"])
    if node.target is aten.sym_size.int:
        source, axis = node.args
        return _evaluated(sizes_of(source)[axis], symbols)  # type: ignore[arg-type, index]
    if node.target in _ARITHMETIC:
        left, right = (number_of(x, symbols) if isinstance(x, fx.Node) else int(x) for x in node.args)  # type: ignore[arg-type]
        return int(_ARITHMETIC[node.target](left, right))
    if node.op == "placeholder":
        raise _UnknownSizeError
    raise NotUnderstoodError(f"a size is computed by {name_of(node)}")


_ARITHMETIC: dict[Any, Callable[[int, int], int]] = {
    operator.add: operator.add, operator.sub: operator.sub, operator.mul: operator.mul,
    operator.floordiv: operator.floordiv,
}  # fmt: skip
_WRITTEN: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def _evaluated(size: str, symbols: Mapping[str, int]) -> int:
    """The value of a size written with symbols, such as `16*s7`."""

    def value(tree: ast.AST) -> int:
        match tree:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _WRITTEN:
                return _WRITTEN[type(operation)](value(left), value(right))
        raise NotUnderstoodError(f"a size of {size} is open")

    return value(ast.parse(size, mode="eval"))
