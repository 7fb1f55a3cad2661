"""The contract of devices that hold tensors of rank 4 at most: no value of higher rank inside the graph.

A graph that was traced is rewritten as a whole, before anything is priced, so that prices, statistics, rewrites and
errors are those of what is emitted. A contract cannot be half kept: what has no exact form of rank 4 is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError, VerificationError
from lrcompile.frontend.export import batch_size
from lrcompile.frontend.rounding import of_rounding
from lrcompile.frontend.trace import Traced, at_other_batch, run
from lrcompile.graph.graph import Graph, aten, propagate, prune
from lrcompile.graph.verify import rounded_error
from lrcompile.lower.folded import RANK, CannotLowerError, Folded, Lowering, identity, merged
from lrcompile.lower.structure import STRUCTURE, Rule, pick_item
from lrcompile.lower.values import VALUES, embedding, on_last_axes, pointwise
from lrcompile.lower.volumes import MODULES
from lrcompile.lower.windows import WINDOWS
from lrcompile.nn.linear import TransposedLinear

OPERATORS: Mapping[Any, Rule] = {**STRUCTURE, **VALUES, **WINDOWS}
LAYERS: Mapping[type[nn.Module], Rule] = {
    **MODULES,
    nn.Dropout: pointwise,
    nn.Identity: pointwise,
    nn.Linear: on_last_axes,
    TransposedLinear: on_last_axes,
    nn.LayerNorm: on_last_axes,
    nn.Embedding: embedding,
}


def rank_of(graph: Graph, *, inside: bool = False) -> int:
    """The highest rank of the graph's values; with `inside` without its inputs and outputs."""
    return max((rank for _, rank in _ranks(graph, inside)), default=0)


def check_rank(graph: Graph, traced: Traced) -> None:
    """Holds a rewritten graph to the contract of the traced one.

    Raises:
        VerificationError: a rewrite made a value of higher rank.
    """
    if traced.max_rank is None:
        return
    for node, rank in _ranks(graph, inside=traced.io_rank is None):
        if rank > traced.max_rank:
            made_by = node.meta.get("provenance", "the model")
            raise VerificationError(
                f"{node.name}, made by {made_by}, has rank {rank}, but at most {traced.max_rank} was asked for; "
                "leave the pass out with --passes=-name and report it"
            )


def folded_io(value: Any) -> Any:
    """A graph's input or output in rank 4: [B, C, T, H, W] as [B, C·T, H, W], the same elements in the same order."""
    return value.flatten(1, -RANK + 1) if isinstance(value, Tensor) and value.dim() > RANK else value


def to_rank(traced: Traced, max_rank: int | None, io_rank: int | None, limit: float) -> Traced:
    """The traced model with no value of rank above 4 inside its graph, and with `io_rank` none at its ends either.

    Nothing is limited where both are None, and a graph that keeps `max_rank` stays as it is. The result is compared
    with the original on the example inputs and, where the batch is open, at another batch size: its outputs may differ
    by `limit` (relative), in half precision by what the model makes of rounding.

    Raises:
        InputError: a limit is below 4, or an operation has no form of rank 4.
        VerificationError: the lowered graph computes something else (a fault of lrcompile).
    """
    for name, rank in (("--max-rank", max_rank), ("--io-rank", io_rank)):
        if rank is not None and rank < RANK:
            raise InputError(f"{name} {rank} cannot be had: pictures have rank {RANK}; give {name} {RANK}")
    if max_rank is None:
        max_rank = io_rank
    if max_rank is None:
        return traced
    fold_io = io_rank is not None and rank_of(traced.graph) > io_rank
    if rank_of(traced.graph) <= max_rank and not fold_io and not (max_rank == RANK and _needs_forms(traced.graph)):
        return replace(traced, max_rank=max_rank, io_rank=io_rank)
    _check_sizes(traced)
    other = _other_batch(traced)
    graph = _lowered(traced, other, fold_io)
    args, kwargs = pytree.tree_map(folded_io, (traced.args, traced.kwargs)) if fold_io else (traced.args, traced.kwargs)
    flat = tuple(map(folded_io, traced.flat)) if fold_io else traced.flat
    result = replace(
        traced, graph=graph, args=args, kwargs=kwargs, flat=flat, max_rank=max_rank, io_rank=io_rank,
        output_shapes=tuple(_folded_shapes(traced.graph)) if fold_io else (),
    )  # fmt: skip
    check_rank(graph, result)
    errors = []
    for batch in [traced.flat, *([other] if other is not traced.flat else [])]:
        inputs = [folded_io(value) for value in batch] if fold_io else batch
        original = run(traced.graph.gm, batch)
        expected = [folded_io(y) for y in original] if fold_io else original
        error = rounded_error(expected, run(graph.gm, inputs))
        errors.append(error)
        if not error <= limit:
            limit = of_rounding(limit, traced.graph, partial(_error_on, batch, original))
        if not error <= limit:
            raise VerificationError(
                f"the model lowered to rank 4 differs from the original by {error:.2e} (relative; at most {limit:.0e} "
                f"expected) at batch size {batch_size(batch)}; this is a fault of lrcompile: leave out --max-rank"
            )
    return replace(result, notes=(*traced.notes, *_notes(traced, fold_io, max(errors))))


def _error_on(batch: Sequence[Any], expected: Sequence[Any], graph: Graph) -> float:
    return rounded_error(expected, run(graph.gm, batch))


def _ranks(graph: Graph, inside: bool) -> Iterator[tuple[fx.Node, int]]:
    ends = set(graph.gm.graph.output_node().all_input_nodes) if inside else set()
    for node in graph.nodes:
        if node.op == "output" or (inside and node.op == "placeholder"):
            continue
        if node in ends and all(user.op == "output" for user in node.users):
            continue
        yield node, _rank(node.meta.get("val"))


def _rank(value: Any) -> int:
    return max((leaf.dim() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), default=0)


def _folded_shapes(graph: Graph) -> Iterator[tuple[int, ...] | None]:
    """The shape of each output that is folded, None for the others."""
    for node in pytree.tree_leaves(list(graph.gm.graph.output_node().args)):
        yield (
            tuple(node.meta["val"].shape) if isinstance(node, fx.Node) and _rank(node.meta.get("val")) > RANK else None
        )


def _notes(traced: Traced, fold_io: bool, error: float) -> Iterator[str]:
    yield (
        f"lowered to rank 4, {error:.1e} from the original (relative): the latency before and all other errors are "
        "against the lowered model"
    )
    if not fold_io:
        return
    for name, value in zip(traced.input_names, traced.flat, strict=True):
        if isinstance(value, Tensor) and value.dim() > RANK:
            shape, folded = list(value.shape), list(folded_io(value).shape)
            yield f"input {name} is taken as {folded} instead of {shape}: {name}.flatten(1, {-RANK + 1})"
    for name, whole in zip(traced.output_names, _folded_shapes(traced.graph), strict=False):
        if whole is not None:
            yield f"output {name} comes as [B, C·T, H, W]: {name}.unflatten(1, {list(whole[1:-2])})"


def _check_sizes(traced: Traced) -> None:
    """Only the batch may be open: how values are folded depends on their other sizes."""
    for name, node in zip(traced.input_names, traced.graph.gm.graph.find_nodes(op="placeholder"), strict=True):
        sizes = node.meta.get("sizes", ())
        found = [str(size) for size in sizes[1:] if not str(size).isdigit()]
        if found:
            raise InputError(
                f"input {name} has open sizes other than the batch, {', '.join(found)}, and cannot be lowered to rank "
                f"{RANK}: export the model with these sizes fixed, or compile without --max-rank {RANK} (--max-rank 8 "
                f"for a device that lacks 5-D tensors)"
            )


def _other_batch(traced: Traced) -> tuple[Any, ...]:
    """The inputs at another batch size, so that open axes show; the same ones where the batch is fixed."""
    size = batch_size(traced.flat)
    if not traced.dynamic_batch or size is None:
        return traced.flat
    return tuple(at_other_batch(traced.graph.gm, traced.flat, size))


def _lowered(traced: Traced, other: tuple[Any, ...], fold_io: bool) -> Graph:
    graph = traced.graph.copy()
    there = propagate(traced.graph.copy().gm, tuple(_larger(a, b) for a, b in zip(traced.flat, other, strict=True)))
    pairs = zip(list(graph.nodes), list(there.nodes), strict=True)
    lengths = {node: _lengths(node.meta.get("val"), again.meta.get("val")) for node, again in pairs}
    lower = Lowering(graph, lengths, {path: site.module for path, site in graph.sites().items()})
    replaced = []
    for node in list(graph.nodes):
        lower.before = node
        if node.op == "output":
            _lower_output(lower, node, fold_io)
        elif node.op in ("placeholder", "get_attr"):
            if _rank(node.meta.get("val")) > RANK:
                _lower_input(lower, node, fold_io)
        elif _concerned(lower, node):
            _lower_node(lower, node)
            replaced.append(node)
    for node in reversed(replaced):
        graph.gm.graph.erase_node(node)
    graph.gm.graph.eliminate_dead_code()
    graph.gm.graph.lint()
    prune(graph.gm)
    graph.gm.recompile()
    return graph


def _larger(value: Any, other: Any) -> Any:
    """The input at seven times its batch, if the other one says that the batch is open; only its shape counts."""
    if not isinstance(value, Tensor) or other is value:
        return value
    return value.new_empty(7 * value.shape[0], *value.shape[1:])


def _lengths(here: Any, there: Any) -> Any:
    if isinstance(here, Tensor):
        if here.dim() != there.dim():
            raise InputError(
                "the model squeezes its batch away at the example's batch size, and cannot be lowered to rank "
                f"{RANK}: give another --batch"
            )
        return tuple((int(a), int(b)) for a, b in zip(here.shape, there.shape, strict=True))
    if isinstance(here, list | tuple):
        return [_lengths(a, b) for a, b in zip(here, there, strict=True)]
    return None


def _concerned(lower: Lowering, node: fx.Node) -> bool:
    if any(source in lower.values for source in node.all_input_nodes) or _rank(node.meta.get("val")) > RANK:
        return True
    return _needs_form(node, lower.module(node))


def _needs_forms(graph: Graph) -> bool:
    return any(_needs_form(node, graph.module(node)) for node in graph.nodes)


def _needs_form(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node of values of rank 4 has to be lowered: torch.onnx would write it with values of higher rank."""
    if node.op == "call_module":
        return isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))  # of a single sample
    if node.target is aten.adaptive_avg_pool2d.default:
        sizes = zip(node.args[0].meta["val"].shape[-2:], node.meta["val"].shape[-2:], strict=True)  # type: ignore[union-attr]
        return any(before % after for before, after in sizes)
    return _packet(node) in WINDOWS and _packet(node) is not aten.adaptive_avg_pool2d


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _lower_input(lower: Lowering, node: fx.Node, fold_io: bool) -> None:
    sizes = lower.sizes(node)
    groups = identity(len(sizes))
    if fold_io and node.op == "placeholder":
        groups = merged(groups)
        with lower.graph.fake_mode:
            node.meta["val"] = folded_io(node.meta["val"])
        node.meta.pop("sizes", None)
    lower.values[node] = Folded(node, sizes, groups)


def _lower_output(lower: Lowering, node: fx.Node, fold_io: bool) -> None:
    def held(source: fx.Node) -> fx.Node:
        value = lower.values.get(source)
        if not isinstance(value, Folded):
            return source
        groups = identity(value.rank)
        return lower.refold(value, merged(groups) if fold_io else groups).node

    node.args = fx.node.map_arg(node.args, held)


def _lower_node(lower: Lowering, node: fx.Node) -> None:
    try:
        value = _rule(lower, node)(lower, node)
        if isinstance(value, Folded) and value.rank <= RANK:
            plain = lower.plain(value)
            lower.lengths[plain] = lower.lengths[node]
            if "sizes" in node.meta:
                plain.meta.setdefault("sizes", node.meta["sizes"])
            node.replace_all_uses_with(plain)
            return
    except CannotLowerError as error:
        raise _refusal(lower, node, str(error)) from error
    except (RuntimeError, ValueError, TypeError, StopIteration) as error:  # an argument that a rule did not expect
        raise _refusal(lower, node, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    lower.values[node] = value


def _rule(lower: Lowering, node: fx.Node) -> Rule:
    if node.op == "call_module":
        module = lower.module(node)
        rule = LAYERS.get(type(module)) if module is not None else None
        if rule is None:
            raise CannotLowerError("there is no form of rank 4 for it yet")
        return rule
    if getattr(node.target, "__name__", "") == "getitem":
        return pick_item
    rule = OPERATORS.get(_packet(node))
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    if rule is None:
        raise CannotLowerError("there is no form of rank 4 for it yet")
    return rule


def _refusal(lower: Lowering, node: fx.Node, reason: str) -> InputError:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    site = str(node.target) if node.op == "call_module" else stack[-1][0] if stack and stack[-1][0] else node.name
    module = lower.module(node)
    what = type(module).__name__ if module is not None else str(node.target).removeprefix("aten.").rpartition(".")[0]
    shapes = [list(n.meta["val"].shape) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    on = f" on {shapes[0]}" if shapes else ""
    return InputError(
        f"{site}: {what}{on} cannot be lowered to rank 4: {reason}; change the model there, or compile without "
        "--max-rank 4 (--max-rank 8 for a device that lacks 5-D tensors)"
    )
