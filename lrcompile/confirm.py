"""The end-to-end check of the local target: whole models measured against each other; a loser is not emitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lrcompile.devices.bench import paired
from lrcompile.devices.cost import Cost
from lrcompile.emit.onnx import to_onnx
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import Graph
from lrcompile.planning.search import Choice, Problem, applied

SECONDS = 4.0
WORTH = 0.99  # a lossy model must run in at most this share of the original's time


@dataclass(frozen=True)
class Measured:
    """Whole-model latencies, original and emitted; `overruled` says why the search's choice was not taken."""

    before: Cost
    after: Cost
    overruled: str | None = None
    returned_original: bool = False


def measure(traced: Traced, graph: Graph, seconds: float = SECONDS) -> Measured:
    """Measures a rewritten graph against the original, paired and interleaved, in ONNX Runtime."""
    return _measure(traced, _onnx(traced, traced.graph), graph, seconds)


def confirm(traced: Traced, problem: Problem, choice: Choice) -> tuple[Choice, Measured]:
    """The first of these that is not slower than the original: the choice, its exact rewrites alone, the original."""
    original = _onnx(traced, traced.graph)
    measured = _measure(traced, original, choice.graph, SECONDS)
    ratio = measured.after.latency_s / measured.before.latency_s
    lossy = not all(candidate.exact for candidate in choice.candidates)
    if ratio <= (WORTH if lossy else 1.0) or choice.relaxed:
        return choice, measured
    overruled = f"measured on the whole model, the rewrites took {ratio:.3f}× the original's time: not emitted"
    if lossy:
        exact = [i for i, c in enumerate(problem.candidates) if c.exact and c in choice.candidates]
        choice = applied(problem, problem.candidates, exact)
        measured = _measure(traced, original, choice.graph, SECONDS)
        ratio = measured.after.latency_s / measured.before.latency_s
        if ratio <= 1.0:
            return choice, replace(measured, overruled=overruled)
    same = replace(measured, after=measured.before, overruled=overruled, returned_original=True)
    return Choice((), traced.graph.copy(), 0.0), same


def _measure(traced: Traced, original: bytes, graph: Graph, seconds: float) -> Measured:
    inputs = {name: value.numpy() for name, value in zip(traced.input_names, traced.flat, strict=True)}
    result = paired(original, _onnx(traced, graph), inputs=inputs, seconds=seconds)
    spread = (result.ratio_high - result.ratio_low) / 4
    before = Cost(latency_s=result.median_a_s)
    after = Cost(latency_s=result.median_a_s * result.ratio, sigma_s=result.median_a_s * spread)
    return Measured(before, after)


def _onnx(traced: Traced, graph: Graph) -> bytes:
    return to_onnx(
        graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, dynamic_batch=traced.dynamic_batch,
    ).SerializeToString()  # fmt: skip
