"""One streaming pass over calibration data: the statistics that make decompositions activation-aware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.errors import PlanError
from lrcompile.graph.graph import Graph

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
    """`grams[node, axis]` is XᵀX [features × features], float64; `token_counts[node]` counts each looked-up row."""

    grams: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    token_counts: dict[str, Tensor] = field(default_factory=dict)


def collect(
    graph: Graph,
    batches: Sequence[Sequence[Any]],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Statistics:
    """Runs the graph over flat input batches and sums up the inputs of linear, convolution and embedding layers.

    Memory is bounded by the Gram matrices: each batch is added and let go.
    """
    statistics = Statistics()
    wanted: dict[fx.Node, set[int]] = {}
    rows: dict[fx.Node, int] = {}
    for site in graph.modules_of(nn.Linear, nn.Embedding, *CONVS):
        for node in site.nodes:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if isinstance(site.module, nn.Embedding):
                rows[source] = site.module.num_embeddings
            else:
                wanted.setdefault(source, set()).add(-1 if isinstance(site.module, nn.Linear) else 1)
    for i, batch in enumerate(batches):
        progress("calibrate", i, len(batches))
        with torch.no_grad():
            _Collector(graph.gm, statistics, wanted, rows).run(*batch, enable_io_processing=False)
    progress("calibrate", len(batches), len(batches))
    return statistics


class _Collector(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, statistics: Statistics, wanted: dict[fx.Node, set[int]], rows: dict[fx.Node, int]
    ) -> None:
        super().__init__(gm)
        self.statistics = statistics
        self.wanted = wanted
        self.rows = rows

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for axis in sorted(self.wanted.get(n, ())):
            features = value.movedim(axis, -1).flatten(0, -2).float()
            gram = (features.T @ features).double()
            key = (n.name, axis)
            known = self.statistics.grams.get(key)
            self.statistics.grams[key] = gram if known is None else known + gram
        if n in self.rows:
            counts = torch.bincount(value.flatten(), minlength=self.rows[n])
            known = self.statistics.token_counts.get(n.name)
            self.statistics.token_counts[n.name] = counts if known is None else known + counts
        return value
