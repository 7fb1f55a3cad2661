"""One streaming pass over calibration data: the statistics that make decompositions activation-aware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.errors import InputError, PlanError
from lrcompile.graph.graph import Graph
from lrcompile.planning.moments import Moments, Window, is_out_of_memory, moments

HELD_OUT = 4  # one batch in so many is kept for judging
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    """

    grams: dict[tuple[str, int | Window], Moments] = field(default_factory=dict)
    token_counts: dict[str, Tensor] = field(default_factory=dict)


def collect(
    graph: Graph,
    batches: Iterable[Sequence[Any]],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Statistics:
    """Runs the graph over flat input batches and sums up the inputs of linear, convolution and embedding layers.

    Memory is bounded by the Gram matrices and one batch's activations: each batch is added in pieces and let go.

    Raises:
        InputError: memory runs out, or a layer's inputs are not finite.
    """
    statistics = Statistics()
    wanted: dict[fx.Node, dict[int | Window, None]] = {}
    rows: dict[fx.Node, int] = {}
    readers: dict[str, str] = {}
    for site in graph.modules_of(nn.Linear, nn.Embedding, *CONVS):
        window = Window.of(site.module)
        for node in site.nodes:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if isinstance(site.module, nn.Embedding):
                rows[source] = site.module.num_embeddings
                continue
            readers.setdefault(source.name, site.path)
            keys = wanted.setdefault(source, {})
            keys[-1 if isinstance(site.module, nn.Linear) else 1] = None
            if window is not None and source.meta["val"].dim() == len(window.size) + 2:
                keys[window] = None
    total = len(batches) if isinstance(batches, Sized) else 0
    for i, batch in enumerate(batches):
        progress("calibrate", i, total)
        try:
            with torch.no_grad():
                _Collector(graph.gm, statistics, wanted, rows).run(*batch, enable_io_processing=False)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                "not enough memory to run the model on a calibration batch: give a smaller --batch, or close other "
                "programs"
            ) from error
    progress("calibrate", total, total)
    for (name, _), known in statistics.grams.items():
        if not known.gram.trace().isfinite():  # by Cauchy and Schwarz, then all of it is
            raise InputError(
                f"the inputs of {readers[name]} are infinite, NaN or beyond 1e19 on the calibration data: "
                "compile with --dtype fp32, or give data that the model was made for"
            )
    return statistics


class _Collector(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        statistics: Statistics,
        wanted: Mapping[fx.Node, Iterable[int | Window]],
        rows: dict[fx.Node, int],
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # fx would write the node and its traceback into a message for the user
        self.statistics = statistics
        self.wanted = wanted
        self.rows = rows

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for seen in self.wanted.get(n, ()):
            if isinstance(seen, Window):
                found = moments(seen.patches(value), features=1 + len(seen.size))
            else:
                found = moments(value.movedim(seen, -1))
            known = self.statistics.grams.get((n.name, seen))
            self.statistics.grams[n.name, seen] = found if known is None else known + found
        if n in self.rows:
            counts = torch.bincount(value.flatten(), minlength=self.rows[n])
            known_counts = self.statistics.token_counts.get(n.name)
            self.statistics.token_counts[n.name] = counts if known_counts is None else known_counts + counts
        return value
