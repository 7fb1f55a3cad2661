"""The end-to-end check of the local target: whole models measured against each other; a loser is not emitted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lrcompile.devices.bench import OPENINGS, BenchResult, paired
from lrcompile.devices.cost import Cost
from lrcompile.devices.onnx_graph import PROTOBUF_BYTES
from lrcompile.emit.int8 import in_int8
from lrcompile.emit.onnx import to_onnx
from lrcompile.emit.verify import arrays
from lrcompile.errors import BudgetError, InputError
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import Graph, fingerprint, weight_bytes
from lrcompile.planning.budget import Budget
from lrcompile.planning.search import Choice, Problem, applied, metric_holds
from lrcompile.planning.sensitivity import rewritten
from lrcompile.planning.strategies import search

SECONDS = 4.0
TRIAL_SECONDS, TRIAL_OPENINGS = 2.0, 2
TRIALS = 9  # groups of rewrites that are measured to find out which of them help
WORTH = 0.99  # a lossy model must run in at most this share of the original's time, and surely in less than all of it
LEAST_OF_GAIN = 0.5  # the share of the predicted gain below which some of the rewrites are suspected
ATTEMPTS = 5  # to meet a latency as measured
SAFETY = 0.98
WELL_SPENT = 0.95  # the share of a latency that the most accurate model is to take
CONTRADICTS = 1.15  # times as long as predicted, or as short, from which remembered timings are not of now
LEAST_OFF = 0.03  # of the original's time, within which nothing is told of them
CONTENDED = 0.2  # share of the time spent waiting for a core from which a measurement says so


class ContradictionError(Exception):
    """A choice made by what is remembered of layers takes far longer or shorter as measured on the whole model."""


@dataclass(frozen=True)
class Measured:
    """Whole-model latencies, original and emitted; `overruled` says why the search's choice was not taken.

    `remark` is set where the machine was too busy to trust the figures; with `int8` the emitted one was measured in
    8-bit integers.
    """

    before: Cost
    after: Cost
    overruled: str | None = None
    returned_original: bool = False
    remark: str | None = None
    int8: bool = False

    @property
    def ratio(self) -> float:
        """Latency of the emitted model over that of the original."""
        return self.after.latency_s / self.before.latency_s

    @property
    def most(self) -> float:
        """The upper end of the ratio's interval of 95 %."""
        return self.ratio + 2 * self.after.sigma_s / self.before.latency_s

    @property
    def least(self) -> float:
        """The lower end."""
        return 2 * self.ratio - self.most

    def __str__(self) -> str:
        return f"{self.ratio:.3f}× the original's time ({self.least:.3f}–{self.most:.3f})"


@dataclass(frozen=True, eq=False)
class Reference:
    """The model as it was given, as ONNX: what everything else is measured against, in ONNX Runtime.

    With `int8`, all that can be is put into 8-bit integers before it is measured. `share` is the time of what was not
    cut over that of the original, and `share_open` the least that its measurement leaves open.
    """

    traced: Traced
    onnx: bytes
    int8: bool = False
    share: float = 1.0
    share_open: float = 1.0

    @classmethod
    def of(cls, traced: Traced) -> Reference:
        """Exports the original.

        Raises:
            InputError: ONNX Runtime cannot run its data type on a CPU, or it is too large to be measured.
        """
        tensors = [*traced.graph.gm.state_dict().values(), *traced.flat]
        if any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16 for tensor in tensors):
            raise InputError(
                "--target local cannot measure bfloat16: ONNX Runtime has no kernels for it on a CPU; "
                "use --dtype fp32, or a device profile (lrcompile devices lists them)"
            )
        held = weight_bytes(traced.graph.gm)
        if held > PROTOBUF_BYTES:
            raise InputError(
                f"--target local cannot measure {held / 2**30:.1f} GiB of weights, as ONNX holds at most 2 in one "
                "piece; use a device profile (lrcompile devices lists them)"
            )
        return cls(traced, _onnx(traced, traced.graph))

    def latency(self) -> Cost:
        """The original's latency on its own, by the fastest quarter of its runs, as those of regions."""
        result = self._paired(self.onnx, SECONDS / 2, TRIAL_OPENINGS)
        return Cost(latency_s=result.low_a_s, sigma_s=result.low_a_s * (result.ratio_high - result.ratio_low) / 4)

    def in_int8(self, exact: Graph) -> Reference:
        """A reference for models in 8-bit integers, where those make the graph of exact rewrites faster here, or this.

        Raises:
            VerificationError: the quantizer fails.
        """
        example = example_of(self.traced)
        floats = _onnx(self.traced, exact)
        integers = in_int8(floats, example)
        if paired(floats, integers, inputs=example, seconds=SECONDS).ratio_high >= 1:
            return self
        result = self._paired(integers, SECONDS, OPENINGS)
        return replace(self, int8=True, share=result.ratio, share_open=left_open(result.ratio, result.ratio_low))

    def measure(self, graph: Graph, seconds: float = SECONDS) -> Measured:
        """A rewritten graph against the original, paired and interleaved."""
        openings = OPENINGS if seconds >= SECONDS else TRIAL_OPENINGS
        emitted = int8_of(self.traced, graph) if self.int8 else _onnx(self.traced, graph)
        result = self._paired(emitted, seconds, openings)
        spread = (result.ratio_high - result.ratio_low) / 4
        before = Cost(latency_s=result.median_a_s)
        after = Cost(latency_s=result.median_a_s * result.ratio, sigma_s=result.median_a_s * spread)
        remark = None
        if result.noisy or result.contention > CONTENDED:
            remark = (
                f"the machine was busy while the whole model was measured (interval {result.ratio_low:.3f}–"
                f"{result.ratio_high:.3f}, {result.contention:.0%} of the time waiting for a core): measure again"
            )
        return Measured(before, after, remark=remark, int8=self.int8)

    def _paired(self, other: bytes, seconds: float, openings: int) -> BenchResult:
        return paired(self.onnx, other, inputs=example_of(self.traced), seconds=seconds, openings=openings)


def left_open(ratio: float, least: float) -> float:
    """The lower end of a ratio's interval, and no more below the ratio than `SAFETY`."""
    return max(least, SAFETY * ratio)


def confirm(
    reference: Reference,
    problem: Problem,
    choice: Choice,
    budget: Budget,
    asked: Budget,
    doubts: Callable[[Choice, Measured], bool] | None = None,
) -> tuple[Choice, Measured]:
    """The choice as measured on the whole model, or what of it is worth its while; in the end the original.

    A choice made for a size is kept. One made for a latency is made again with tighter limits until the latency holds
    as measured. `asked` is the budget that the choice was made for: another one than `budget` where that is of a file
    in 8-bit integers. `doubts` says whether prices contradict a measurement.

    Raises:
        BudgetError: the latency asked for is not reached as measured.
        ContradictionError: what was remembered does not fit what is measured.
    """
    measured = reference.measure(choice.graph)
    if doubts is not None and doubts(choice, measured):
        raise ContradictionError
    if budget.limits_latency:
        return _within(reference, problem, choice, measured, budget, asked)
    if budget.size is not None:
        slower = f"measured on the whole model it takes {measured}"
        return choice, measured if measured.ratio <= 1 else replace(measured, remark=f"{slower}; kept for its size")
    if not choice.candidates and not measured.int8 and _is_original(choice.graph, reference):
        return choice, replace(measured, after=measured.before)  # measured against itself
    measured = _settled(reference, choice, measured)
    promised = choice.gain_s / problem.base.latency_s
    if _gains(choice, measured, reference) and measured.ratio <= reference.share * (1 - LEAST_OF_GAIN * promised):
        return choice, measured
    overruled = f"measured on the whole model, all of the rewrites took {measured}"
    better, better_measured = _pruned(reference, problem, choice, measured, budget)
    better_measured = _settled(reference, better, better_measured)
    if _gains(better, better_measured, reference) and metric_holds(problem, better.candidates):
        if len(better.candidates) < len(choice.candidates):
            better_measured = replace(better_measured, overruled=f"{overruled}: some were dropped")
        return better, better_measured
    same_time = replace(measured, after=measured.before, returned_original=True)
    return Choice((), reference.traced.graph.copy(), 0.0), replace(same_time, overruled=f"{overruled}: not emitted")


def contradicts(measured: Measured, predicted: float) -> bool:
    """Whether a model surely takes far from the share of the original's time that was predicted.

    Nothing is sure of what was measured on a busy machine.
    """
    times = max(predicted + LEAST_OFF, predicted * CONTRADICTS)
    part = min(predicted - LEAST_OFF, predicted / CONTRADICTS)
    return measured.remark is None and not (measured.least <= times and measured.most >= part)


def _is_original(graph: Graph, reference: Reference) -> bool:
    return fingerprint(graph.gm) == fingerprint(reference.traced.graph.gm)


def _settled(reference: Reference, choice: Choice, measured: Measured) -> Measured:
    """The measurement, or one that takes longer where its interval leaves open whether the choice gains."""
    is_open = measured.ratio <= WORTH * reference.share and not _gains(choice, measured, reference)
    return reference.measure(choice.graph, 2 * SECONDS) if is_open else measured


def _gains(choice: Choice, measured: Measured, reference: Reference) -> bool:
    """Whether a choice is worth emitting: an error must buy time for sure."""
    if all(candidate.exact for candidate in choice.candidates):
        return measured.ratio <= 1
    return measured.ratio <= WORTH * reference.share and measured.most <= reference.share


def _within(
    reference: Reference, problem: Problem, choice: Choice, measured: Measured, budget: Budget, asked: Budget
) -> tuple[Choice, Measured]:
    """A choice within a latency as measured, found by asking for less as predicted.

    Where the most accurate choice is sought, more is asked for too, until the latency is well spent. A speed-up is
    held against the original as it was in the same measurement: the machine's own speed changes from one to the next.
    What holds after others did not is measured again, because the best of several figures flatters. Where
    8-bit integers reach it in the measurement's interval, nothing is cut: for a percent that is a poor bargain.
    """

    def spent(choice: Choice, measured: Measured) -> float:
        """The share of the latency allowed."""
        uncut = measured.int8 and all(candidate.exact for candidate in choice.candidates)
        ratio = left_open(measured.ratio, measured.least) if uncut else measured.ratio
        return ratio / allowed(measured)

    def allowed(measured: Measured) -> float:
        return budget.latency_limit_s(measured.before.latency_s) / measured.before.latency_s

    fastest, asked_s = measured, asked.latency_limit_s(problem.original_s)
    slack = WELL_SPENT if budget.error_limit is None and problem.drop is None else 0.0
    held: tuple[Choice, Measured] | None = None
    missed = 0
    for attempt in range(ATTEMPTS + 1):
        if attempt and spent(choice, measured) <= 1:
            measured = _mean(measured, reference.measure(choice.graph))
        holds = spent(choice, measured) <= 1
        missed += not holds
        if holds and (held is None or choice.error < held[0].error):
            held = choice, measured
        if attempt == ATTEMPTS or (holds and spent(choice, measured) >= slack):
            break
        asked_s *= SAFETY ** (1 if holds else missed) / spent(choice, measured)
        try:
            other = search(problem, replace(asked, speedup=None, max_latency_s=asked_s))
        except BudgetError:
            break
        if holds and other.error >= choice.error:
            break
        choice, measured = other, reference.measure(other.graph)
        fastest = min(fastest, measured, key=lambda m: m.ratio)
    if held is not None:
        choice, measured = held
        if measured.ratio > allowed(measured) and measured.remark is None:
            asked_for = f"the {allowed(measured):.3f} asked for is in the interval, so no layer was cut for it"
            measured = replace(measured, remark=f"measured on the whole model it takes {measured}: {asked_for}")
        return choice, measured
    limit_s = budget.latency_limit_s(fastest.before.latency_s)
    raise BudgetError(
        f"latency of {limit_s * 1e3:.4g} ms (speed-up {fastest.before.latency_s / limit_s:.3g}) is not reached as "
        f"measured on the whole model: the best that was tried took {fastest.after.latency_s * 1e3:.4g} ms "
        f"(speed-up {1 / fastest.ratio:.3g}); ask for less, or allow more error"
    )


def _mean(one: Measured, other: Measured) -> Measured:
    """Two measurements of the same models as one."""
    sigmas = [m.after.sigma_s / m.before.latency_s for m in (one, other)]
    before_s = other.before.latency_s
    after = Cost(before_s * (one.ratio + other.ratio) / 2, before_s * math.hypot(*sigmas) / 2)
    return replace(other, after=after, remark=other.remark or one.remark)


def _pruned(
    reference: Reference, problem: Problem, choice: Choice, measured: Measured, budget: Budget
) -> tuple[Choice, Measured]:
    """The fastest of what is found by leaving candidates out: all, none, and groups that help, by halving.

    What makes a region faster can make the model slower, where the runtime no longer fuses across its border.
    """
    known: dict[tuple[int, ...], float] = {}

    def ratio(picked: tuple[int, ...]) -> float:
        if picked not in known:
            rewrites = [r for i in picked for r in choice.candidates[i].rewrites]
            graph = rewritten(problem.graph, rewrites, problem.passes, problem.context)
            known[picked] = reference.measure(graph, TRIAL_SECONDS).ratio
        return known[picked]

    everything = tuple(range(len(choice.candidates)))
    known[everything] = measured.ratio
    exact = tuple(i for i in everything if choice.candidates[i].exact)
    least = min(ratio(()), ratio(exact))
    ratio(worthwhile(everything, ratio, least * WORTH, TRIALS))
    for picked in sorted(known, key=lambda picked: known[picked]):
        is_exact = set(picked) <= set(exact)
        if known[picked] > least * WORTH and not is_exact:
            continue  # an error for nothing
        better = applied(problem, choice.candidates, picked)
        error = problem.evaluator.at_most(better.error, exact=is_exact)
        within = budget.error_limit is None or error <= max(budget.error_limit, choice.error)
        if within and metric_holds(problem, better.candidates):
            return better, reference.measure(better.graph)
    return applied(problem, choice.candidates, ()), reference.measure(problem.graph)


def worthwhile(
    picked: tuple[int, ...], ratio: Callable[[tuple[int, ...]], float], limit: float, trials: int
) -> tuple[int, ...]:
    """Those in groups within the limit: halves of all, and halves of halves beyond it, at most `trials` groups."""
    kept: list[int] = []
    groups = deque(_halves(picked))
    while groups and trials > 0:
        group = groups.popleft()
        trials -= 1
        if ratio(group) <= limit:
            kept += group
        else:
            groups += _halves(group)
    return tuple(sorted(kept))


def _halves(group: tuple[int, ...]) -> list[tuple[int, ...]]:
    middle = len(group) // 2
    return [group[:middle], group[middle:]] if middle else []


def int8_of(traced: Traced, graph: Graph) -> bytes:
    """A graph as ONNX with all that can be in 8-bit integers, whose ranges are those of the example.

    Raises:
        VerificationError: the quantizer fails.
    """
    return in_int8(_onnx(traced, graph), example_of(traced))


def example_of(traced: Traced) -> dict[str, Any]:
    """The example's tensors by the names of inputs."""
    named = zip(traced.input_names, traced.flat, strict=True)
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    return dict(zip(tensors, arrays(list(tensors.values())), strict=True))


def _onnx(traced: Traced, graph: Graph) -> bytes:
    return to_onnx(
        graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, open_axes=traced.open_axes,
        opset=traced.opset,
    ).SerializeToString()  # fmt: skip
