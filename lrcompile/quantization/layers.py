"""Which layers of a model are put into 8-bit integers: all, or those that cost least, within a limit on the error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from lrcompile.emit.int8 import DYNAMIC, STATIC, Quantizable, Quantizer
from lrcompile.emit.verify import arrays, open_onnx, runner
from lrcompile.errors import PlanError, VerificationError
from lrcompile.frontend.trace import Traced, run
from lrcompile.planning.budget import DEFAULT_MAX_ERROR, Budget
from lrcompile.planning.calibration import Split
from lrcompile.planning.measures import OF_FLOATS, Measure
from lrcompile.planning.metric import Value
from lrcompile.report.clock import Progress

PROBES = 16  # groups of layers that are quantised alone, to find out which of them cost most
CHECKS = 6  # choices of layers that are held against the limit
SAFETY = 0.95
ROUNDING = 1e-9
VOTES = 4  # parts of the layers that say how many bits the weights should have


@dataclass(frozen=True)
class Choice:
    """Which nodes are quantised, with the weights of which kinds in 7 bits, and the file; None where there is none.

    `error` is against the compiled graph, `whole` against the original, `root` that of the measure that is limited,
    `metric` the user's own, which took so many `evaluations`.
    """

    nodes: tuple[Quantizable, ...] = ()
    narrow: frozenset[str] = frozenset()
    model: bytes | None = None
    error: float | None = None
    whole: float | None = None
    root: float = math.inf
    metric: Value | None = None
    evaluations: int = 0
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Judge:
    """Holds files against the compiled graph and the original, on flat batches.

    `limit` is that on the root of `measure`, against the original if `whole`, else against the compiled graph; `asked`
    says that it was given and is no default. `spent` is the same root of the compiled graph against the original, and
    `room` what of the limit a quantisation may take, were its error to add to that of the rewrites in quadrature.
    """

    names: tuple[str, ...]
    measure: Measure
    limit: float
    whole: bool
    asked: bool
    spent: float
    room: float
    probed: Sequence[Any]
    judged: Sequence[Sequence[Any]]
    of_probe: Sequence[Any]
    compiled: Sequence[Sequence[Any]]
    original: Sequence[Sequence[Any]]

    @classmethod
    def of(
        cls, path: Path, original: Traced, gm: fx.GraphModule, budget: Budget, max_error: float | None, split: Split
    ) -> Judge:
        """The judge of a float file, which lies at the path, by the data of a split; `max_error` overrides a budget."""
        measure = budget.measure_in_use
        limit = budget.whole_limit if max_error is None else measure.root(max_error)
        asked = max_error is not None or budget.max_error is not None
        compiled = [tensors(run(gm, batch)) for batch in split.judged]
        wanted = [tensors(run(original.graph.gm, batch)) for batch in split.judged]
        spent = measure.root(measure.total(zip(wanted, compiled, strict=True)))
        whole = limit is not None
        limit = limit if limit is not None else measure.root(DEFAULT_MAX_ERROR)
        room = math.sqrt(max(0.0, limit**2 - spent**2)) if whole else limit
        names = tuple(port.name for port in open_onnx(path).get_inputs())
        of_probe = tensors(run(gm, split.fitted[0]))
        return cls(
            names, measure, limit, whole, asked, spent, room, split.fitted[0], split.judged, of_probe, compiled, wanted
        )  # fmt: skip

    def feeds(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Flat inputs by the names of the file."""
        return dict(zip(self.names, arrays(flat), strict=True))

    def probe(self, model: bytes, measure: Measure) -> float:
        """The root of a measure against the compiled graph, on one of the batches that ranges are calibrated with."""
        outputs = runner(open_onnx(model), self.names)(self.probed)
        return measure.root(measure.total([(self.of_probe, outputs)]))

    def check(self, model: bytes) -> tuple[float, float, float]:
        """(relative error against the compiled graph, root of the measure that is limited, that against the original).

        The second has a margin for chance where positions are counted.

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
        limited = total if self.whole else own
        return relative, limited + self.measure.margin(limited, self.compiled), total


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


class LayerSearch:
    """Looks for the layers to quantise; counts what it tries."""

    def __init__(self, int8: Quantizer, judge: Judge, progress: Progress) -> None:
        self.int8 = int8
        self.judge = judge
        self.progress = progress
        self.evaluations = 0

    def choose(self, times: float = 1.0) -> Choice:
        """All layers if that holds, else without those that cost most; no model where nothing holds.

        `times` is how many times the limit an error may be.
        """
        nodes = self.int8.nodes
        if not nodes:
            return Choice()
        limit = self.judge.limit * times * (1 + ROUNDING)  # `times` may be the error of all layers over the limit
        room = self.judge.room * times
        choice = self.everything
        if choice.root <= limit:
            return choice
        target = room
        for _ in range(CHECKS):
            picked, predicted = _within(self._groups, target)
            if not picked:
                break
            halved = {node.layer for node in nodes if node not in picked}  # weights that are read twice
            choice = self._checked(tuple(node for node in nodes if node.layer not in halved))
            if choice.root <= limit:
                return choice
            own = math.sqrt(max(0.0, choice.root**2 - limit**2 + room**2))
            target = SAFETY * predicted * min(1.0, room / own)
        against = "the original" if self.judge.whole else "the float model"
        got, most = self.judge.measure.value(choice.root), self.judge.measure.value(self.judge.limit * times)
        counted = self.judge.measure.counts and self.judge.whole and choice.whole is not None and choice.whole <= most
        unsure = f" (as counted {choice.whole:.3g}, of too few to be sure: give more data)" if counted else ""
        reason = (
            f"{self.judge.measure.label} against {against} {got:.3g} with {len(choice.nodes)} of {len(nodes)} layers "
            f"in int8, over {most:g}{unsure} (see --max-error)"
        )
        return Choice(reason=reason)

    def again(self, plan: Mapping[str, Any]) -> Choice:
        """What a plan says was quantised; no model where that was nothing.

        Raises:
            PlanError: it names layers that the model has not.
        """
        if plan["written"] != "int8":
            return Choice(reason="the plan's model was written in float")
        left, known = set(plan["left_float"]), {node.layer for node in self.int8.nodes}
        if left - known:
            raise PlanError(
                f"the plan leaves {sorted(left - known)[0]} in float, which is no layer that could be quantised; "
                "make a new plan, or give --max-error to choose the layers anew"
            )
        narrow = frozenset(kind for kind, bits in plan["weight_bits"].items() if bits < 8)
        return self._checked(tuple(node for node in self.int8.nodes if node.layer not in left), narrow)

    @cached_property
    def everything(self) -> Choice:
        """All layers, with weights of as many bits as cost least."""
        kinds = {node.kind for node in self.int8.nodes} & {STATIC, DYNAMIC}
        tried = [
            self._checked(self.int8.nodes, frozenset(narrow))
            for count in range(len(kinds) + 1)
            for narrow in combinations(sorted(kinds), count)
        ]
        counted = self.judge.measure.counts  # too few inputs to tell by their classes
        return min(tried, key=lambda found: found.error or 0.0 if counted else found.root)

    @cached_property
    def _narrow(self) -> frozenset[str]:
        """The kinds whose weights had better have 7 bits here, where not all layers are quantised.

        A processor without VNNI adds two products in 16 bits, in which those of 8-bit numbers do not always fit. Parts
        of the layers vote, because one layer that costs much would hide the others: by the error of floats, since the
        classes of one batch are too few to count.
        """
        narrow = set()
        for kind in (STATIC, DYNAMIC):
            group = [node for node in self.int8.nodes if node.kind == kind]
            size = math.ceil(len(group) / VOTES)
            parts = [group[start : start + size] for start in range(0, len(group), max(1, size))]
            if sum(math.log(self._times_of_narrow(part, kind)) for part in parts) < 0:
                narrow.add(kind)
        return frozenset(narrow)

    def _times_of_narrow(self, part: Sequence[Quantizable], kind: str) -> float:
        """The error with weights of 7 bits over that with 8; 1 where both are nothing or beyond measure."""
        narrow, full = (self._probe(part, frozenset(kinds), OF_FLOATS) for kinds in ((kind,), ()))
        return min(1e3, max(1e-3, narrow / full)) if 0 < narrow < math.inf and 0 < full < math.inf else 1.0

    @cached_property
    def _groups(self) -> list[tuple[tuple[Quantizable, ...], float]]:
        """Groups of layers with the error of each in int8 alone, those first that cost the least a layer.

        What costs most is halved, as long as that goes.
        """
        groups = [(self.int8.nodes, math.inf)]
        left = PROBES
        while left >= 2 and any(len(group) > 1 for group, _ in groups):
            worst = max((item for item in groups if len(item[0]) > 1), key=lambda item: item[1])
            groups.remove(worst)
            middle = len(worst[0]) // 2
            for half in (worst[0][:middle], worst[0][middle:]):
                groups.append((half, self._probe(half, self._narrow, self.judge.measure)))
                left -= 1
        groups.sort(key=lambda group: group[1] / math.sqrt(len(group[0])))
        return groups if len(self.int8.nodes) > 1 else []

    def _probe(self, nodes: Sequence[Quantizable], narrow: frozenset[str], measure: Measure) -> float:
        self._tick()
        return self.judge.probe(self.int8.quantized(nodes, narrow), measure)

    def _checked(self, nodes: tuple[Quantizable, ...], narrow: frozenset[str] | None = None) -> Choice:
        narrow = self._narrow if narrow is None else narrow
        model = self.int8.quantized(nodes, narrow)
        self._tick()
        relative, root, total = self.judge.check(model)
        return Choice(nodes, narrow, model, relative, self.judge.measure.value(total), root)

    def _tick(self) -> None:
        expected = PROBES + CHECKS + 2 * VOTES  # more where the limit is widened
        self.progress("quantize", self.evaluations, max(expected, self.evaluations + CHECKS))
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


def tensors(outputs: Sequence[Any]) -> list[Tensor]:
    """Those of a model's outputs that are tensors."""
    return [value for value in outputs if isinstance(value, Tensor)]
