"""What a rewrite does to the model's output: measured, by running the rewritten graph on given inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lrcompile.frontend.trace import run
from lrcompile.graph.graph import Graph, prune
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, Pass, apply
from lrcompile.planning.price import Candidate

PROBE_ERROR = 0.1  # relative output error of a layer, well above rounding and well below losing the layer


class Evaluator:
    """Measures the relative output error of graphs against one reference on fixed inputs.

    The error is ‖y − ŷ‖/‖y‖ over all batches together, of the worst floating-point output; infinite where an output
    is not finite or an integer output differs.
    """

    def __init__(self, graph: Graph, batches: Sequence[Sequence[Any]]) -> None:
        self.batches = batches
        self.reference = [run(graph.gm, batch) for batch in batches]
        self.evaluations = 0

    def error(self, graph: Graph, first: int | None = None) -> float:
        """The error of a graph on all batches, or on the first few."""
        self.evaluations += 1
        difference: dict[int, float] = defaultdict(float)
        size: dict[int, float] = defaultdict(float)
        for batch, expected in list(zip(self.batches, self.reference, strict=True))[:first]:
            for i, (y, got) in enumerate(zip(expected, run(graph.gm, batch), strict=True)):
                if not isinstance(y, torch.Tensor):
                    continue
                if not y.is_floating_point():
                    difference[i] += 0.0 if torch.equal(y, got) else float("inf")
                    size[i] += 1.0
                    continue
                difference[i] += float((y.double() - got.double()).square().sum())
                size[i] += float(y.double().square().sum())
        worst = 0.0
        for i, squared in difference.items():
            error = (squared / max(size[i], 1e-300)) ** 0.5
            worst = max(worst, error if error == error else float("inf"))
        return worst


def rewritten(graph: Graph, rewrites: Iterable[Rewrite], passes: Mapping[str, Pass], context: Context) -> Graph:
    """A copy of the graph with rewrites applied in order, and what they left unused dropped."""
    result = graph.copy()
    for rewrite in rewrites:
        apply(result, passes[rewrite.pass_name], rewrite, context)
    result.gm.graph.lint()
    prune(result.gm)
    result.gm.recompile()
    return result


def model_errors(
    graph: Graph,
    candidates: Sequence[Candidate],
    passes: Mapping[str, Pass],
    context: Context,
    evaluator: Evaluator,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[float]:
    """The output error of the model with each candidate alone.

    One candidate a footprint is measured, the one whose own error is nearest to `PROBE_ERROR`, on the first batch;
    the others follow from it in proportion to their own error. Exact candidates have none.
    """
    groups: dict[frozenset[str], list[int]] = defaultdict(list)
    for i, candidate in enumerate(candidates):
        if not candidate.exact:
            groups[candidate.footprint].append(i)
    factor: dict[frozenset[str], float] = {}
    for done, (footprint, members) in enumerate(groups.items()):
        progress("sensitivity", done, len(groups))
        probe = min((candidates[i] for i in members), key=lambda c: abs(math.log(max(c.error, 1e-12) / PROBE_ERROR)))
        if probe.error <= 0:
            factor[footprint] = 1.0
            continue
        trial = rewritten(graph, probe.rewrites, passes, context)
        factor[footprint] = max(evaluator.error(trial, first=1), 1e-9) / probe.error
    progress("sensitivity", len(groups), len(groups))
    return [0.0 if c.exact else c.error * factor[c.footprint] for c in candidates]
