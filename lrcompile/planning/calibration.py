"""One streaming pass over calibration data: the statistics that make decompositions activation-aware."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError, LrcompileError, PlanError, first_line, is_out_of_memory
from lrcompile.graph.graph import ALL_CONVS, Graph
from lrcompile.memory import in_pieces, samples_in
from lrcompile.planning.moments import Moments, Window, moments

HELD_OUT = 4  # one batch in so many is kept for judging


_NO_MEMORY = (
    "not enough memory to run the model forward and back on calibration samples, {size} at a time: give a smaller "
    "--batch, smaller samples, or close other programs"
)


@dataclass(frozen=True, eq=False)
class Split:
    """Flat input batches that decompositions are fitted to, and those that errors are measured on.

    Where there are `HELD_OUT` batches or more, the last quarter judges alone, so that what is reported is an error on
    data that the factors have not seen; with fewer, all batches do both.
    """

    fitted: Sequence[Sequence[Any]]
    judged: Sequence[Sequence[Any]]
    held_out: int

    @classmethod
    def of(cls, batches: Sequence[Sequence[Any]], held_out: int | None = None) -> Split:
        """The split of some batches; `held_out` is how many judge alone, by default a quarter.

        Raises:
            PlanError: so many cannot be held out of these.
        """
        held_out = len(batches) // HELD_OUT if held_out is None else held_out
        if not 0 <= held_out < len(batches):
            raise PlanError(
                f"the plan holds {held_out} calibration batches out, but there are {len(batches)}; make a new plan"
            )
        kept = len(batches) - held_out
        return cls(batches[:kept], batches[kept:] or batches, held_out)


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration inputs.

    `grams[node, axis]` are the moments of a value's features, over all positions; `grams[node, window]` those of the
    patches [channels × taps] that a convolution's window sees of it. `token_counts[node]` counts each looked-up row.
    `gradients[node]` are the moments of what the model's outputs feel of a layer's output, where that was asked for;
    then rows of `grams` count by what the outputs feel of them.
    """

    grams: dict[tuple[str, int | Window], Moments] = field(default_factory=dict)
    token_counts: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Moments] = field(default_factory=dict)

    def add(self, key: tuple[str, int | Window], found: Moments) -> None:
        """Adds to the moments of a value."""
        known = self.grams.get(key)
        self.grams[key] = found if known is None else known + found


def collect(
    graph: Graph,
    batches: Iterable[Sequence[Any]],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    weighted: bool = False,
    divisible: bool = False,
) -> Statistics:
    """Runs the graph over flat input batches and sums up the inputs of linear, convolution and embedding layers.

    With `weighted`, rows count by what the model's outputs feel of them, so that padded tokens, say, count for nothing:
    by the squares of gradients of a random combination of the outputs, one backward pass a batch. Where the graph has
    no gradients, or is in half precision, which is too coarse for them, all rows count alike.

    Memory is bounded by the Gram matrices and one batch's activations: each batch is added in pieces and let go. Where
    that is too much, and the graph takes batches of any size (`divisible`), the rest is done with half the samples at a
    time, down to one.

    Raises:
        InputError: memory runs out all the same, or a layer's inputs are not finite.
    """
    statistics = Statistics()
    wanted, rows, readers = _wanted(graph)
    weighted = weighted and _has_gradients(graph)
    total = len(batches) if isinstance(batches, Sized) else 0
    most = sys.maxsize
    for i, batch in enumerate(batches):
        progress("calibrate", i, total)
        whole, left = samples_in(batch), [(piece, frozenset[Any]()) for piece in in_pieces(batch, most)]
        while left:
            piece, done = left.pop(0)
            collector = (_Sensing if weighted else _Collector)(graph, statistics, wanted, rows, done)
            size = samples_in(piece)
            try:
                collector.see_all(piece, seed=i, share=size / whole)
                continue
            except LrcompileError:
                raise
            except Exception as error:  # whatever an operation raises for values that it does not take
                if is_out_of_memory(error):
                    most = size // 2 if divisible else 0
                elif isinstance(error, RuntimeError) and weighted and not i:
                    weighted = False  # an operation without a gradient: rows count alike
                else:
                    raise does_not_run(error) from error
            again = [piece]
            if most < size:
                if not most:
                    raise InputError(_NO_MEMORY.format(size=size))
                again = in_pieces(piece, most)
                left = [(part, had) for other, had in left for part in in_pieces(other, most)]
            left = [*((part, frozenset(collector.seen)) for part in again), *left]
    progress("calibrate", total, total)
    for (name, _), known in statistics.grams.items():
        if not known.gram.trace().isfinite():  # by Cauchy and Schwarz, then all of it is
            raise InputError(
                f"the inputs of {readers[name]} are infinite, NaN or beyond 1e19 on the calibration data: "
                "compile with --dtype fp32, or give data that the model was made for"
            )
    return statistics


def does_not_run(error: Exception) -> InputError:
    """What is said where the model fails on data that were given, as it does not on the example inputs."""
    return InputError(
        f"the model does not run on the data given with --calib or --recover-data: {type(error).__name__}: "
        f"{first_line(error)}; take out the samples that it was not made for"
    )


def _wanted(graph: Graph) -> tuple[dict[fx.Node, dict[int | Window, None]], dict[fx.Node, int], dict[str, str]]:
    """(what is to be seen of which value, rows of looked-up embeddings, a layer that reads each value)."""
    wanted: dict[fx.Node, dict[int | Window, None]] = {}
    rows: dict[fx.Node, int] = {}
    readers: dict[str, str] = {}
    for site in graph.modules_of(nn.Linear, nn.Embedding, *ALL_CONVS):
        window = Window.of(site.module)
        for node in site.nodes:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if isinstance(site.module, nn.Embedding):
                rows[source] = max(rows.get(source, 0), site.module.num_embeddings)  # of several tables
                continue
            if _is_unseen(site.module, node):
                continue
            readers.setdefault(source.name, site.path)
            keys = wanted.setdefault(source, {})
            keys[_axis(site.module)] = None
            if window is not None:
                keys[window] = None
    return wanted, rows, readers


def _is_unseen(module: Any, call: fx.Node) -> bool:
    """Whether a call is left out: of a convolution on one sample without a batch axis, whose channels are another axis,
    or of a layer of complex numbers, which no pass takes apart.
    """
    value = call.meta["val"]
    return value.is_complex() or (not isinstance(module, nn.Linear) and value.dim() != len(module.kernel_size) + 2)


def _has_gradients(graph: Graph) -> bool:
    """Whether the outputs have gradients, in a precision that can hold them."""
    values = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    kinds = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return bool(kinds) and all(kind.itemsize >= 4 for kind in kinds)


class _Collector(fx.Interpreter):
    """Runs a graph on a batch and adds up what is wanted; all rows count alike.

    `seen` grows by what is added, so that a run that failed halfway can be done again without what it has added.
    """

    def __init__(
        self,
        graph: Graph,
        statistics: Statistics,
        wanted: Mapping[fx.Node, Iterable[int | Window]],
        rows: Mapping[fx.Node, int],
        seen: Collection[Any] = (),
    ) -> None:
        super().__init__(graph.gm)
        self.extra_traceback = False  # fx would write the node and its traceback into a message for the user
        self.graph_of_layers = graph
        self.statistics = statistics
        self.wanted = wanted
        self.rows = rows
        self.seen = set(seen)

    def see_all(self, batch: Sequence[Any], seed: int, share: float = 1.0) -> None:
        """Runs the batch, a share of the samples of a whole one; `seed` draws what is random."""
        with torch.no_grad():
            self.run(*batch, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.count(n, value)
        for seen in self.wanted.get(n, ()):
            self.add((n.name, seen), lambda seen=seen: _moments(value, seen, None))  # type: ignore[misc]
        return value

    def add(self, key: tuple[str, int | Window], found: Callable[[], Moments]) -> None:
        """Adds moments, unless they were added."""
        if key not in self.seen:
            self.statistics.add(key, found())
            self.seen.add(key)

    def count(self, n: fx.Node, value: Tensor) -> None:
        """Counts looked-up rows."""
        if n in self.rows and n.name not in self.seen:
            self.seen.add(n.name)
            counts = torch.bincount(value.flatten(), minlength=self.rows[n])
            known = self.statistics.token_counts.get(n.name)
            self.statistics.token_counts[n.name] = counts if known is None else known + counts


class _Sensing(_Collector):
    """The same with a backward pass: rows count by the squared gradient of the outputs with respect to them.

    An output's gradient is that of its product with random signs, over its norm: what relative errors of outputs feel,
    on average. What has a gradient that is no number, as a root has at zero, counts for nothing; where the first batch
    has such gradients already, nothing is weighted.
    """

    def see_all(self, batch: Sequence[Any], seed: int, share: float = 1.0) -> None:
        """Runs the batch forward and back; the norm of a whole batch's outputs is guessed from its share."""
        layers = {
            node: site.module for site in self.graph_of_layers.modules_of(nn.Linear, *ALL_CONVS) for node in site.nodes
            if not _is_unseen(site.module, node)
        }  # fmt: skip
        self.felt: dict[fx.Node, Tensor] = {}
        self.sensed = {*self.wanted, *layers}
        chance = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            outputs = pytree.tree_leaves(self.run(*batch, enable_io_processing=False))
            total = torch.zeros(())
            for y in outputs:
                if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad:
                    signs = torch.randint(2, y.shape, generator=chance).to(y.dtype) * 2 - 1
                    total = total + (y * signs).sum() / (y.detach().norm() * share**-0.5).clamp_min(1e-30)
            found = torch.autograd.grad(total, list(self.felt.values()), allow_unused=True)
        if not seed and not all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
            raise RuntimeError("gradients are no numbers")
        gradients = {
            node: None if gradient is None else gradient.where(gradient.isfinite(), 0.0)
            for node, gradient in zip(self.felt, found, strict=True)
        }
        for node, module in layers.items():
            gradient = gradients[node]
            if gradient is not None and ("felt", node.name) not in self.seen:
                known, got = self.statistics.gradients.get(node.name), _moments(gradient, _axis(module), None)
                self.statistics.gradients[node.name] = got if known is None else known + got
                self.seen.add(("felt", node.name))
        for node, keys in self.wanted.items():
            for seen in keys:
                weights = _squares(gradients[node], seen) if isinstance(seen, int) else self._at(node, seen, gradients)
                value = self.felt[node].detach()
                self.add((node.name, seen), lambda v=value, s=seen, w=weights: _moments(v, s, w))  # type: ignore[misc]

    def run_node(self, n: fx.Node) -> Any:
        value = fx.Interpreter.run_node(self, n)
        self.count(n, value)
        if n in self.sensed:
            value = value if value.requires_grad or not value.is_floating_point() else value.detach().requires_grad_()
            self.felt[n] = value
        return value

    def _at(self, node: fx.Node, window: Window, gradients: Mapping[fx.Node, Tensor | None]) -> Tensor | None:
        """What is felt at each position of a window, of all layers that see the value through it."""
        readers = [user for user in node.users if user in gradients and user.op == "call_module"]
        felt = [
            _squares(gradients[user], 1) for user in readers
            if Window.of(self.graph_of_layers.module(user) or nn.Identity()) == window
        ]  # fmt: skip
        known = [weights for weights in felt if weights is not None]
        return sum(known[1:], known[0]) if known else None


def _axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _squares(gradient: Tensor | None, axis: int) -> Tensor | None:
    return None if gradient is None else gradient.square().sum(axis)


def _moments(value: Tensor, seen: int | Window, weights: Tensor | None) -> Moments:
    if isinstance(seen, Window):
        return moments(seen.patches(value), 1 + len(seen.size), weights)
    return moments(value.movedim(seen, -1), 1, weights)
