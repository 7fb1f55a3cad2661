"""The end-to-end check of the local target: whole models measured against each other; a loser is not emitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lrcompile.devices.bench import BenchResult, paired
from lrcompile.devices.cost import Cost
from lrcompile.emit.onnx import to_onnx
from lrcompile.errors import InputError
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import Graph
from lrcompile.planning.search import Choice, Problem, applied

SECONDS = 4.0
WORTH = 0.99  # a lossy model must run in at most this share of the original's time
CONTENDED = 0.2  # share of the time spent waiting for a core from which a measurement says so


@dataclass(frozen=True)
class Measured:
    """Whole-model latencies, original and emitted; `overruled` says why the search's choice was not taken.

    `remark` is set where the machine was too busy to trust the figures.
    """

    before: Cost
    after: Cost
    overruled: str | None = None
    returned_original: bool = False
    remark: str | None = None

    @property
    def ratio(self) -> float:
        """Latency of the emitted model over that of the original."""
        return self.after.latency_s / self.before.latency_s


@dataclass(frozen=True, eq=False)
class Reference:
    """The model as it was given, as ONNX: what everything else is measured against, in ONNX Runtime."""

    traced: Traced
    onnx: bytes

    @classmethod
    def of(cls, traced: Traced) -> Reference:
        """Exports the original.

        Raises:
            InputError: ONNX Runtime cannot run its data type on a CPU.
        """
        tensors = [*traced.graph.gm.state_dict().values(), *traced.flat]
        if any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16 for tensor in tensors):
            raise InputError(
                "--target local cannot measure bfloat16: ONNX Runtime has no kernels for it on a CPU; "
                "use --dtype fp32, or a device profile (lrcompile devices lists them)"
            )
        return cls(traced, _onnx(traced, traced.graph))

    def latency(self) -> Cost:
        """The original's latency on its own."""
        result = self._paired(self.onnx, SECONDS / 2)
        return Cost(latency_s=result.median_a_s, sigma_s=result.median_a_s * (result.ratio_high - result.ratio_low) / 4)

    def measure(self, graph: Graph, seconds: float = SECONDS) -> Measured:
        """A rewritten graph against the original, paired and interleaved."""
        result = self._paired(_onnx(self.traced, graph), seconds)
        spread = (result.ratio_high - result.ratio_low) / 4
        before = Cost(latency_s=result.median_a_s)
        after = Cost(latency_s=result.median_a_s * result.ratio, sigma_s=result.median_a_s * spread)
        remark = None
        if result.noisy or result.contention > CONTENDED:
            remark = (
                f"the machine was busy while the whole model was measured (interval {result.ratio_low:.3f}–"
                f"{result.ratio_high:.3f}, {result.contention:.0%} of the time waiting for a core): measure again"
            )
        return Measured(before, after, remark=remark)

    def _paired(self, other: bytes, seconds: float) -> BenchResult:
        named = zip(self.traced.input_names, self.traced.flat, strict=True)
        inputs = {name: value.numpy() for name, value in named if isinstance(value, torch.Tensor)}
        return paired(self.onnx, other, inputs=inputs, seconds=seconds)


def confirm(reference: Reference, problem: Problem, choice: Choice) -> tuple[Choice, Measured]:
    """The first of these that is not slower than the original: the choice, its exact rewrites alone, the original."""
    measured = reference.measure(choice.graph)
    lossy = not all(candidate.exact for candidate in choice.candidates)
    if measured.ratio <= (WORTH if lossy else 1.0) or choice.relaxed:
        return choice, measured
    overruled = f"measured on the whole model, the rewrites took {measured.ratio:.3f}× the original's time: not emitted"
    if lossy:
        exact = [i for i, c in enumerate(problem.candidates) if c.exact and c in choice.candidates]
        choice = applied(problem, problem.candidates, exact)
        measured = reference.measure(choice.graph)
        if measured.ratio <= 1.0:
            return choice, replace(measured, overruled=overruled)
    same = replace(measured, after=measured.before, overruled=overruled, returned_original=True)
    return Choice((), reference.traced.graph.copy(), 0.0), same


def _onnx(traced: Traced, graph: Graph) -> bytes:
    return to_onnx(
        graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, dynamic_batch=traced.dynamic_batch,
    ).SerializeToString()  # fmt: skip
