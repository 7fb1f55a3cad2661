"""A compiled model in 8-bit integers: which of its layers, within which error, and whether that is faster here.

`emit/int8.py` makes the file; here it is judged, on data that its ranges were not calibrated with, and measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.confirm import Reference
from lrcompile.devices.bench import BenchResult, paired
from lrcompile.emit.int8 import DYNAMIC, STATIC, Quantizable, Quantizer
from lrcompile.emit.verify import arrays, emitted_error, open_onnx, runner
from lrcompile.emit.write import Refine, other_sizes
from lrcompile.errors import InputError, VerificationError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.frontend.trace import Traced, run
from lrcompile.planning.budget import DEFAULT_MAX_ERROR, Budget
from lrcompile.planning.calibration import Split
from lrcompile.planning.measures import OF_FLOATS, Measure
from lrcompile.report.clock import Progress

PROBES = 16  # groups of layers that are quantised alone, to find out which of them cost most
CHECKS = 6  # choices of layers that are held against the limit
SAFETY = 0.95
VOTES = 4  # parts of the layers that say how many bits the weights should have
SECONDS = 4.0
RESERVE = 0.5  # the share of the squared error that rewrites leave to a quantisation that is to follow


@dataclass(frozen=True, eq=False)
class Quantization:
    """What `Result.save` needs to write 8-bit integers: data to calibrate with and to judge by.

    `max_error` takes the place of the one that the model was compiled with. `original` is what errors and latencies
    are held against where that is not the model that was compiled.
    """

    data: CalibrationData
    max_error: float | None = None
    original: Traced | None = None


def check_float32(tensors: Iterable[Tensor], dtype: str | None = None) -> None:
    """Refuses to quantise anything but single precision.

    Raises:
        InputError: it is asked for, or a tensor is, of another floating-point type.
    """
    kinds = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"}
    got = dtype if dtype not in (None, "fp32") else ", ".join(sorted(kinds)) if dtype is None else ""
    if got:
        raise InputError(f"--quantize int8 starts from single precision, got {got}; give --dtype fp32")


def quantizer(
    wanted: Quantization, gm: fx.GraphModule, traced: Traced, budget: Budget, split: Split, local: bool,
    progress: Progress,
) -> Refine:  # fmt: skip
    """What makes an 8-bit file of a float one, for `emit`; the float file stays where nothing else is within the limit.

    The file's error is against the original, and within the limit on `split.judged`; where only other things than the
    error are limited, it is against the compiled graph, and within the default. With `local`, what is surely slower
    than the float file is not written.

    Raises:
        InputError: the model is not in single precision.
    """
    check_float32([*gm.state_dict().values(), *(t for t in traced.flat if isinstance(t, Tensor))])

    def refine(path: Path) -> tuple[Mapping[str, Any], Sequence[str]]:
        judge = _Judge.of(path, wanted, gm, traced, budget, split)
        with Quantizer(path, [judge.feeds(batch) for batch in split.fitted]) as int8:
            search = _Search(int8, judge, progress)
            choice = search.choose()
        figures = _figures(choice, int8, judge, split) | {"evaluations": search.evaluations}
        if choice.model is None:
            reason = choice.reason or "nothing in the model can be quantised"
            return {**figures, "written": "float"}, [f"not quantised: {reason}; the float model is written"]
        _check_other_sizes(choice.model, gm, traced, judge)
        figures["bytes"] = [path.stat().st_size, len(choice.model)]
        if not local:
            path.write_bytes(choice.model)
            return {**figures, "written": "int8"}, ["the latency of the int8 file was not predicted: measure it"]
        progress("measure int8", 0, 0)
        against, original = _measured(path, choice.model, judge, wanted.original or traced, traced)
        figures["latency_ms"] = _latency(against, original)
        if against.ratio_low > 1:
            times = (
                f"{against.ratio:.2f}× the time of the float model ({against.ratio_low:.2f}–{against.ratio_high:.2f})"
            )
            return {**figures, "written": "float"}, [
                f"not quantised: int8 takes {times} here; the float model is written"
            ]
        path.write_bytes(choice.model)
        remark = [] if against.ratio_high < 1 else ["int8 was not measured to be faster than the float model here"]
        return {**figures, "written": "int8"}, remark

    return refine


@dataclass(frozen=True)
class _Choice:
    """Which nodes are quantised, with the weights of which kinds in 7 bits, and the file; None where there is none."""

    nodes: tuple[Quantizable, ...] = ()
    narrow: frozenset[str] = frozenset()
    model: bytes | None = None
    error: float | None = None
    whole: float | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class _Judge:
    """Holds files against the compiled graph and the original, on flat batches.

    `limit` is that on the root of `measure`, against the original if `whole`, else against the compiled graph;
    `room` is what of it a quantisation may take, were its error to add to that of the rewrites in quadrature.
    """

    names: tuple[str, ...]
    measure: Measure
    limit: float
    whole: bool
    room: float
    probed: Sequence[Any]
    judged: Sequence[Sequence[Any]]
    of_probe: Sequence[Any]
    compiled: Sequence[Sequence[Any]]
    original: Sequence[Sequence[Any]]

    @classmethod
    def of(
        cls, path: Path, wanted: Quantization, gm: fx.GraphModule, traced: Traced, budget: Budget, split: Split
    ) -> _Judge:
        """The judge of a float file, which lies at the path, by the data of a split."""
        measure = budget.measure_in_use
        limit = budget.whole_limit if wanted.max_error is None else measure.root(wanted.max_error)
        compiled = [_tensors(run(gm, batch)) for batch in split.judged]
        source = (wanted.original or traced).graph.gm
        original = [_tensors(run(source, batch)) for batch in split.judged]
        spent = measure.root(measure.total(zip(original, compiled, strict=True)))
        whole = limit is not None
        limit = limit if limit is not None else measure.root(DEFAULT_MAX_ERROR)
        room = math.sqrt(max(0.0, limit**2 - spent**2)) if whole else limit
        names = tuple(port.name for port in open_onnx(path).get_inputs())
        of_probe = _tensors(run(gm, split.fitted[0]))
        return cls(
            names, measure, limit, whole, room, split.fitted[0], split.judged, of_probe, compiled, original
        )  # fmt: skip

    def feeds(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Flat inputs by the names of the file."""
        return dict(zip(self.names, arrays(flat), strict=True))

    def probe(self, model: bytes) -> float:
        """The root of the measure against the compiled graph, on one of the batches that ranges are calibrated with."""
        outputs = runner(open_onnx(model), self.names)(self.probed)
        return self.measure.root(self.measure.total([(self.of_probe, outputs)]))

    def check(self, model: bytes) -> tuple[float, float, float]:
        """(relative error against the compiled graph, root of the measure that is limited, that against the original).

        Raises:
            VerificationError: an output is not finite where that of the compiled graph is.
        """
        outputs = [runner(open_onnx(model), self.names)(batch) for batch in self.judged]
        for expected, got in zip(self.compiled, outputs, strict=True):
            check_finite(expected, got)
        own, total = (
            self.measure.root(self.measure.total(zip(reference, outputs, strict=True)))
            for reference in (self.compiled, self.original)
        )
        relative = OF_FLOATS.total(zip(self.compiled, outputs, strict=True))
        return relative, total if self.whole else own, total


def check_finite(expected: Sequence[Any], got: Sequence[Any]) -> None:
    """Holds outputs of an 8-bit file to be numbers where those of the compiled graph are.

    Raises:
        VerificationError: one is not.
    """
    for i, (y, other) in enumerate(zip(expected, got, strict=True)):
        if y.is_floating_point() and bool((y.isfinite() & ~other.isfinite()).any()):
            raise VerificationError(
                f"output {i} of the int8 model is NaN or infinite where that of the float model is not; nothing is "
                "written: compile without --quantize, or give calibration data that the model was made for"
            )


class _Search:
    """Looks for the layers to quantise; counts what it tries."""

    def __init__(self, int8: Quantizer, judge: _Judge, progress: Progress) -> None:
        self.int8 = int8
        self.judge = judge
        self.progress = progress
        self.evaluations = 0

    def choose(self) -> _Choice:
        """All layers if that holds, else without those that cost most; no model where nothing holds."""
        nodes = self.int8.nodes
        if not nodes:
            return _Choice()
        narrow = self._narrow(nodes)
        choice, root = self._checked(nodes, narrow)
        if root <= self.judge.limit:
            return choice
        least, target = choice, self.judge.room
        groups = sorted(self._groups(nodes, narrow), key=lambda group: group[1] / math.sqrt(len(group[0])))
        for _ in range(CHECKS):
            picked, predicted = _within(groups, target)
            if not picked:
                break
            chosen = tuple(node for node in nodes if node in picked)
            choice, root = self._checked(chosen, narrow)
            if root <= self.judge.limit:
                return choice
            least = choice
            own = math.sqrt(max(0.0, root**2 - self.judge.limit**2 + self.judge.room**2))
            target = SAFETY * predicted * min(1.0, self.judge.room / own)
        limit = self.judge.measure.value(self.judge.limit)
        against = "the original" if self.judge.whole else "the float model"
        got = self.judge.measure.value(root)
        reason = (
            f"{self.judge.measure.label} against {against} {got:.3g} with {len(least.nodes)} of {len(nodes)} layers in "
            f"int8, over {limit:g} (see --max-error)"
        )
        return _Choice(reason=reason)

    def _narrow(self, nodes: Sequence[Quantizable]) -> frozenset[str]:
        """The kinds whose weights had better have 7 bits here.

        A processor without VNNI adds two products in 16 bits, in which those of 8-bit numbers do not always fit. Parts
        of the layers vote, because one layer that costs much would hide the others.
        """
        narrow = set()
        for kind in (STATIC, DYNAMIC):
            group = [node for node in nodes if node.kind == kind]
            size = math.ceil(len(group) / VOTES)
            parts = [group[start : start + size] for start in range(0, len(group), max(1, size))]
            if sum(math.log(self._times_of_narrow(part, kind)) for part in parts) < 0:
                narrow.add(kind)
        return frozenset(narrow)

    def _times_of_narrow(self, part: Sequence[Quantizable], kind: str) -> float:
        """The error with weights of 7 bits over that with 8; 1 where both are nothing or beyond measure."""
        narrow, full = (self._probe(part, frozenset(kinds)) for kinds in ((kind,), ()))
        return min(1e3, max(1e-3, narrow / full)) if 0 < narrow < math.inf and 0 < full < math.inf else 1.0

    def _groups(
        self, nodes: tuple[Quantizable, ...], narrow: frozenset[str]
    ) -> list[tuple[tuple[Quantizable, ...], float]]:
        """Groups of layers with the error of each in int8 alone; what costs most is halved, as long as that goes."""
        groups = [(nodes, math.inf)]
        left = PROBES
        while left >= 2 and any(len(group) > 1 for group, _ in groups):
            worst = max((item for item in groups if len(item[0]) > 1), key=lambda item: item[1])
            groups.remove(worst)
            middle = len(worst[0]) // 2
            for half in (worst[0][:middle], worst[0][middle:]):
                groups.append((half, self._probe(half, narrow)))
                left -= 1
        return groups if len(nodes) > 1 else []

    def _probe(self, nodes: Sequence[Quantizable], narrow: frozenset[str]) -> float:
        self._tick()
        return self.judge.probe(self.int8.quantized(nodes, narrow))

    def _checked(self, nodes: tuple[Quantizable, ...], narrow: frozenset[str]) -> tuple[_Choice, float]:
        """A choice, and the root that is limited."""
        self._tick()
        model = self.int8.quantized(nodes, narrow)
        relative, root, total = self.judge.check(model)
        return _Choice(nodes, narrow, model, relative, self.judge.measure.value(total)), root

    def _tick(self) -> None:
        self.progress("quantize", self.evaluations, PROBES + CHECKS + 2 * VOTES)
        self.evaluations += 1


def _within(
    groups: Sequence[tuple[tuple[Quantizable, ...], float]], target: float
) -> tuple[Collection[Quantizable], float]:
    """The first groups whose errors are within the target in quadrature, as one set, and what they come to."""
    picked: set[Quantizable] = set()
    squares = 0.0
    for nodes, error in groups:
        if not squares + error**2 <= target**2:
            break
        squares += error**2
        picked |= set(nodes)
    return picked, math.sqrt(squares)


def _check_other_sizes(model: bytes, gm: fx.GraphModule, traced: Traced, judge: _Judge) -> None:
    """Runs the file on the example, and at other sizes of what it leaves open.

    Raises:
        VerificationError: it fails there, or is further off than elsewhere.
    """
    session = open_onnx(model)
    open_axes = iter(
        tuple(axis for axis, size in enumerate(port.shape) if not isinstance(size, int))
        for port in session.get_inputs()
    )
    kept = tuple(next(open_axes) if isinstance(value, Tensor) else () for value in traced.flat)
    emitted = runner(session, judge.names)
    with torch.no_grad():
        check_finite(_tensors(run(gm, traced.flat)), emitted(traced.flat))
    emitted_error(emitted, gm, traced.flat, **other_sizes(traced, kept), limit=1.0)


def _figures(choice: _Choice, int8: Quantizer, judge: _Judge, split: Split) -> dict[str, Any]:
    chosen = set(choice.nodes)
    return {
        "type": "int8",
        "error": choice.error,
        "error_whole": choice.whole,
        "metric": judge.measure.label,
        "budget": judge.measure.value(judge.limit),
        "budget_of": "whole" if judge.whole else "error",
        "batches_fitted": len(split.fitted),
        "batches_judged": len(split.judged),
        "held_out": split.held_out > 0,
        "layers": len(int8.nodes),
        "left_float": [node.layer for node in int8.nodes if node not in chosen],
        "weight_bits": {
            kind: 7 if kind in choice.narrow else 8 for kind in (STATIC, DYNAMIC) if kind in {n.kind for n in chosen}
        },
        "bytes": None,
        "latency_ms": None,
    }


def _measured(
    path: Path, model: bytes, judge: _Judge, original: Traced, traced: Traced
) -> tuple[BenchResult, BenchResult]:
    """The file against the float one and against the original, on the example inputs, paired."""
    inputs = judge.feeds(traced.flat)
    return (
        paired(path, model, inputs=inputs, seconds=SECONDS),
        paired(Reference.of(original).onnx, model, inputs=inputs, seconds=SECONDS),
    )


def _latency(against: BenchResult, original: BenchResult) -> dict[str, Any]:
    return {
        "kind": "measured",
        "int8": against.median_b_s * 1e3,
        "float": against.median_a_s * 1e3,
        "original": original.median_a_s * 1e3,
        "of_float": [against.ratio, against.ratio_low, against.ratio_high],
        "of_original": [original.ratio, original.ratio_low, original.ratio_high],
    }


def _tensors(outputs: Sequence[Any]) -> list[Tensor]:
    return [value for value in outputs if isinstance(value, Tensor)]
