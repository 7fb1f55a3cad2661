"""A compiled model in 8-bit integers: within which error, whether it keeps what was asked, and is faster here.

`emit/int8.py` makes the file, `layers.py` says of which layers, on data that its ranges were not calibrated with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.confirm import Reference
from lrcompile.devices.bench import BenchResult, paired
from lrcompile.emit.int8 import KINDS, Quantizer, stored_bytes
from lrcompile.emit.verify import emitted_error, open_onnx, runner
from lrcompile.emit.write import Refine, other_sizes
from lrcompile.errors import BudgetError, InputError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.frontend.trace import Traced, run
from lrcompile.graph.graph import weight_bytes
from lrcompile.planning.budget import EXACT_ERROR, Budget
from lrcompile.planning.calibration import Split
from lrcompile.planning.metric import AFTERWARDS, Metric
from lrcompile.planning.plan import Plan
from lrcompile.quantization.layers import Choice, Judge, LayerSearch, check_finite, tensors
from lrcompile.report.clock import Progress

SECONDS = 4.0
RESERVE = 0.5  # the share of the squared error that rewrites leave to a quantisation that is to follow
WIDER = (1.0, 2.0, 4.0, 8.0, math.inf)  # times the default limit, until size and latency are kept

Placed = tuple[dict[str, Any], list[str]]
"""Figures and notes."""


@dataclass(frozen=True, eq=False)
class Quantization:
    """What `Result.save` needs to write 8-bit integers: data to calibrate with and to judge by.

    `max_error` takes the place of the one that the model was compiled with. `original` is what errors and latencies
    are held against where that is not the model that was compiled.
    """

    data: CalibrationData
    max_error: float | None = None
    original: Traced | None = None

    def __post_init__(self) -> None:
        Budget(max_error=self.max_error)  # refuses what is no limit


def check_float32(given: Iterable[Tensor], dtype: str | None = None) -> None:
    """Refuses to quantise anything but single precision.

    Raises:
        InputError: it is asked for, or a tensor is, of another floating-point type.
    """
    kinds = {str(t.dtype).removeprefix("torch.") for t in given if t.is_floating_point()} - {"float32"}
    got = dtype if dtype not in (None, "fp32") else ", ".join(sorted(kinds)) if dtype is None else ""
    if got:
        raise InputError(f"--quantize int8 starts from single precision, got {got}; give --dtype fp32")


def quantizer(
    wanted: Quantization, gm: fx.GraphModule, traced: Traced, plan: Plan, split: Split, progress: Progress,
    *, metric: Metric | None = None, replayed: bool = False,
) -> Refine:  # fmt: skip
    """What makes an 8-bit file of a float one, for `emit`; the float file stays where nothing else is within the limit.

    The file's error is against the original, and within the limit on `split.judged`. Where only other things than the
    error are limited, it is against the compiled graph, and within the default, or as much more as it takes to keep
    those. Where the user's metric is limited, the file is held to that. With the target "local", what is surely slower
    than the float file is not written, but where a size is asked of integers. With `budget.int8` the file is held to
    size and latency, unless it is `replayed`: then the plan says which layers are quantised.

    Raises:
        InputError: the model is not in single precision.
        BudgetError: the file is too large or surely too slow, or the float file, which stays, is over the limit itself.
        PlanError: the plan that is replayed says something of layers that the model has not.
    """
    check_float32([*gm.state_dict().values(), *(t for t in traced.flat if isinstance(t, Tensor))])
    budget = replace(plan.budget, int8=plan.budget.int8 and not replayed)
    again = plan.int8 if replayed and wanted.max_error is None else None

    def refine(path: Path) -> tuple[Mapping[str, Any], Sequence[str]]:
        original = wanted.original or traced
        judge = Judge.of(path, original, gm, budget, wanted.max_error, split)
        file = _File(
            path, gm, traced, original, judge, budget, plan.target == "local", again is not None, progress,
        )  # fmt: skip
        with Quantizer(path, [judge.feeds(batch) for batch in split.fitted]) as int8:
            search = LayerSearch(int8, judge, progress)
            if again is not None:
                choice, times, placed = search.again(again), 1.0, None
            elif metric is not None and int8.nodes:
                choice, times, placed = *_held_to_metric(search, metric, budget.max_drop or 0.0), None
            else:
                choice, times, placed = _held_to_limits(search, file)
            figures, notes = placed or file.place(choice, len(int8.nodes))
        return _figures(choice, int8, judge, split, times) | {"evaluations": search.evaluations} | figures, notes

    return refine


def _held_to_limits(search: LayerSearch, file: _File) -> tuple[Choice, float, Placed]:
    """The choice of the least error that keeps size and latency; times the limit on that; its file is in place.

    Raises:
        BudgetError: none keeps them.
    """
    layers = len(search.int8.nodes)
    for times in WIDER:
        choice = search.choose(times)
        try:
            figures, notes = file.place(choice, layers)
            break
        except BudgetError:
            if search.judge.whole or len(choice.nodes) == layers:
                raise
    if times > 1:
        notes.append("int8 was let cost more than its default limit, so that size and latency are as asked for")
    return choice, times, (figures, notes)


def _held_to_metric(search: LayerSearch, metric: Metric, max_drop: float) -> tuple[Choice, float]:
    """The choice of most error with which the user's metric holds, and times the limit on the error that is."""
    judge, least = search.judge, metric.least(max_drop)
    times = search.everything.root / judge.limit if judge.limit else 1.0
    times = min(1.0, times) if judge.whole else times
    seen = ""
    for evaluations in range(AFTERWARDS):
        choice = search.choose(times)
        if choice.model is None:
            return replace(choice, evaluations=evaluations, reason=seen or choice.reason), times
        value = metric.value_of(("int8", str(evaluations)), runner(open_onnx(choice.model), judge.names))
        if value.sure >= least:
            return replace(choice, metric=value, evaluations=evaluations + 1), times
        counts = f"{len(choice.nodes)} of {len(search.int8.nodes)} layers in int8"
        seen = f"{metric.evaluation.name} fell to {value.sure:.6g} with {counts}, below {least:.6g}"
        times /= 2
        while 0 < choice.root <= judge.limit * times < math.inf:  # within that the same layers would be chosen again
            times /= 2
    return Choice(reason=seen, evaluations=AFTERWARDS), times


@dataclass(frozen=True, eq=False)
class _File:
    """A float file, which a file in 8-bit integers may take the place of."""

    path: Path
    gm: fx.GraphModule
    traced: Traced
    original: Traced
    judge: Judge
    budget: Budget
    local: bool
    decided: bool  # by a plan, whatever is measured now
    progress: Progress

    def place(self, choice: Choice, layers: int) -> Placed:
        """Puts the file of a choice into its place, if that is better.

        Raises:
            BudgetError: size or latency, or the error of a float file that stays, are not as asked for.
        """
        if choice.model is None:
            return self._kept(f"not quantised: {choice.reason or 'nothing in the model can be quantised'}", {})
        left = f"{layers - len(choice.nodes)} of {layers} layers stay in float"
        self._check_size(stored_bytes(choice.model), left)
        self._check_other_sizes(choice.model)
        figures: dict[str, Any] = {"bytes": [self.path.stat().st_size, len(choice.model)]}
        notes = []
        if not self.local:
            notes.append("the latency of the int8 file was not predicted: measure it")
        else:
            self.progress("confirm", 0, 0)
            against = paired(self.path, choice.model, inputs=self.example, seconds=SECONDS)
            of_original = self._of_original(choice.model)
            figures["latency_ms"] = _latency(against, of_original)
            if against.ratio_low > 1 and not self.decided and not (self.budget.int8 and self.budget.size):
                times = f"{against.ratio:.2f}× the time of the float model"
                why = f"not quantised: int8 takes {times} ({against.ratio_low:.2f}–{against.ratio_high:.2f}) here"
                return self._kept(why, figures)
            self._check_latency(of_original, left)
            if against.ratio_high >= 1:
                notes.append("int8 was not measured to be faster than the float model here")
        self.path.write_bytes(choice.model)
        return {**figures, "written": "int8"}, notes

    def _kept(self, why: str, figures: dict[str, Any]) -> Placed:
        """The float file, which is held to the same limits, and was confirmed in integers alone."""
        self._check_size(weight_bytes(self.gm), why)
        self._check_error(why)
        notes = [f"{why}; the float model is written"]
        if self.local and self.budget.int8:
            measured = self._of_original(self.path)
            self._check_latency(measured, why)
            if measured.ratio_low > 1:
                raise BudgetError(f"{why}, and the float model is slower than the original; compile without --quantize")
            figures = {**figures, "float_of_original": [measured.ratio, measured.ratio_low, measured.ratio_high]}
            notes[0] += (
                f": {measured.ratio:.3f}× the original's time ({measured.ratio_low:.3f}–{measured.ratio_high:.3f})"
            )
        return {**figures, "written": "float"}, notes

    @cached_property
    def example(self) -> Mapping[str, Any]:
        """The example by the names of the file's inputs."""
        return self.judge.feeds(self.traced.flat)

    @cached_property
    def _reference(self) -> bytes:
        return Reference.of(self.original).onnx

    def _of_original(self, model: Path | bytes) -> BenchResult:
        return paired(self._reference, model, inputs=self.example, seconds=SECONDS)

    def _check_size(self, got: int, why: str) -> None:
        limit = self.budget.bytes_limit(weight_bytes(self.original.graph.gm))
        if self.budget.int8 and got > limit:
            raise BudgetError(
                f"the file has {got / 1e6:.4g} MB of weights, {limit / 1e6:.4g} MB asked for: {why}; allow more error "
                "with --max-error, or a larger --size"
            )

    def _check_error(self, why: str) -> None:
        judge = self.judge
        if judge.asked and not self.decided and judge.spent > max(judge.limit, EXACT_ERROR):
            got, most = (judge.measure.value(root) for root in (judge.spent, judge.limit))
            raise BudgetError(
                f"{why}, and the float model has a {judge.measure.label} of {got:.3g} itself, above the {most:g} "
                "allowed: allow that with --max-error, or compile anew within what is allowed"
            )

    def _check_latency(self, of_original: BenchResult, why: str) -> None:
        limit = self.budget.latency_limit_s(of_original.median_a_s) / of_original.median_a_s
        if self.budget.int8 and of_original.ratio_low > limit:
            raise BudgetError(
                f"the file takes {of_original.ratio:.3f}× the original's time as measured ({of_original.ratio_low:.3f}–"
                f"{of_original.ratio_high:.3f}), {limit:.3f} asked for: {why}; allow more error with --max-error, or "
                "ask for less"
            )

    def _check_other_sizes(self, model: bytes) -> None:
        """Runs the file on the example, and at other sizes of what it leaves open.

        Raises:
            VerificationError: it fails there, or is further off than elsewhere.
        """
        session, flat = open_onnx(model), self.traced.flat
        open_axes = iter(
            tuple(axis for axis, size in enumerate(port.shape) if not isinstance(size, int))
            for port in session.get_inputs()
        )
        kept = tuple(next(open_axes) if isinstance(value, Tensor) else () for value in flat)
        emitted = runner(session, [port.name for port in session.get_inputs()])
        with torch.no_grad():
            check_finite(tensors(run(self.gm, flat)), emitted(flat))
        emitted_error(emitted, self.gm, flat, **other_sizes(self.traced, kept), limit=1.0, rounded=True)


def metric_after(metric: Mapping[str, Any] | None, figures: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A report's figures of the user's metric, with what the int8 file came to where it was asked."""
    if metric is None or figures is None:
        return metric
    value = figures["metric_value"] if figures["written"] == "int8" else None
    more = {} if value is None else {"after": value, "standard_error": figures["metric_standard_error"]}
    count = metric["evaluations"] + figures["metric_evaluations"]
    most = max(metric["most_evaluations"], count)  # a budget without a reserve has kept none back
    return {**metric, "evaluations": count, "most_evaluations": most, **more}


def _figures(choice: Choice, int8: Quantizer, judge: Judge, split: Split, times: float) -> dict[str, Any]:
    chosen = set(choice.nodes)
    return {
        "type": "int8",
        "error": choice.error,
        "error_whole": choice.whole,
        "metric": judge.measure.label,
        "budget": judge.measure.value(judge.limit * times) if math.isfinite(times) else None,
        "budget_of": "whole" if judge.whole else "error",
        "batches_fitted": len(split.fitted),
        "batches_judged": len(split.judged),
        "held_out": split.held_out > 0,
        "layers": len(int8.nodes),
        "left_float": [node.layer for node in int8.nodes if node not in chosen],
        "weight_bits": {kind: 7 if kind in choice.narrow else 8 for kind in KINDS if kind in {n.kind for n in chosen}},
        "metric_value": choice.metric.number if choice.metric else None,
        "metric_standard_error": choice.metric.error if choice.metric else None,
        "metric_evaluations": choice.evaluations,
        "bytes": None,
        "latency_ms": None,
    }


def _latency(against: BenchResult, original: BenchResult) -> dict[str, Any]:
    return {
        "kind": "measured",
        "int8": against.median_b_s * 1e3,
        "float": against.median_a_s * 1e3,
        "original": original.median_a_s * 1e3,
        "of_float": [against.ratio, against.ratio_low, against.ratio_high],
        "of_original": [original.ratio, original.ratio_low, original.ratio_high],
    }
