"""What a rewrite does to the model's output: measured, by running the rewritten graph on given inputs."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError, is_out_of_memory
from lrcompile.frontend.trace import run
from lrcompile.graph.graph import Graph, prune
from lrcompile.graph.rewrite import Rewrite
from lrcompile.graph.verify import has_nan
from lrcompile.memory import in_pieces, samples_in
from lrcompile.passes import Context, Pass, apply
from lrcompile.planning.calibration import does_not_run
from lrcompile.planning.measures import RELATIVE, Measure
from lrcompile.planning.price import Candidate, Family

PROBE_ERROR = 0.1  # relative output error of a layer, well above rounding and well below losing the layer
FURTHER = 4.0  # times smaller is the error of a layer that is looked at after one that turned whole numbers
ENOUGH_POSITIONS = 512  # to count differences of a few in a thousand
LEAST_ERROR = 1e-12
MISJUDGED = 1.5  # times the error predicted, from which candidates are looked at alone
KEPT_BYTES = 2**30  # of intermediate values, so that a probe runs only what comes after its rewrite


class Evaluator:
    """Measures the output error of graphs against one reference on fixed inputs.

    The error is ‖y − ŷ‖/‖y‖ over all batches together, of the worst floating-point output; infinite where an output
    is not finite or an integer output differs. With another `measure` it is the root of that. Where memory does not
    last for a batch, and the graph takes batches of any size (`divisible`), it is taken in halves from then on.

    Raises:
        InputError: there is not even memory for one sample.
    """

    def __init__(self, graph: Graph, batches: Sequence[Sequence[Any]], divisible: bool = False) -> None:
        self.measure = RELATIVE
        self.batches, self.reference = _outputs(graph, batches, divisible)
        self.evaluations = 0
        self._known: dict[tuple[str, ...], float] = {}
        self._alone: dict[Family, dict[float, float]] = {}  # a layer's own error: that of the model
        self._base: tuple[Graph, dict[str, Any]] | None = None

    def measured_in(self, measure: Measure) -> Evaluator:
        """The same in another measure; what was measured stays known.

        Raises:
            InputError: the outputs have nothing that it measures.
        """
        if measure == self.measure:
            return self
        measure.check(self.reference[0])
        result = self.afresh()
        result.measure = measure
        return result

    def afresh(self) -> Evaluator:
        """The same for one search: what was measured stays known, but `effect` tells of what this one asked for.

        So what a search says does not depend on what came before it.
        """
        result = copy.copy(self)
        result._alone = {}
        return result

    @property
    def quick_batches(self) -> int:
        """How many batches a quick look takes: the first, or where differences are counted, as many as count enough."""
        positions = self.measure.positions(self.reference[0])
        return 1 if positions is None else min(len(self.batches), -(-ENOUGH_POSITIONS // max(1, positions)))

    @property
    def resolution(self) -> float:
        """The error below which outputs cannot be told apart in a quick look."""
        positions = self.measure.positions(self.reference[0])
        return LEAST_ERROR if positions is None else 0.5 / max(1, positions * self.quick_batches)

    def margin(self, root: float, *, exact: bool = False) -> float:
        """By how much a share counted on all batches may be larger; 0 of what is measured, and of exact rewrites."""
        return 0.0 if exact else self.measure.margin(root, self.reference)

    def at_most(self, root: float, *, exact: bool = False) -> float:
        """An error on all batches with its margin."""
        return root + self.margin(root, exact=exact)

    def error(self, graph: Graph, first: int | None = None) -> float:
        """The error of a graph on all batches, or on the first few."""
        self.evaluations += 1
        batches = list(zip(self.batches, self.reference, strict=True))[:first]
        return self.measure.root(self.measure.total((y, run(graph.gm, x)) for x, y in batches))

    def error_after(
        self,
        graph: Graph,
        candidates: Sequence[Candidate],
        passes: Mapping[str, Pass],
        context: Context,
        quick: bool = False,
    ) -> float:
        """The error of `graph` with candidates applied, on all batches or on those of a `quick` look; measured once.

        The graph must be the same in all calls, and free of writes in place: what comes before the candidates in it
        is not computed again on the first batch.
        """
        count = self.quick_batches if quick else len(self.batches)
        key = (
            self.measure.name,
            str(count),
            *(str(rewrite) for candidate in candidates for rewrite in candidate.rewrites),
        )
        if key not in self._known:
            self.evaluations += 1
            trial = rewritten(graph, [r for candidate in candidates for r in candidate.rewrites], passes, context)
            touched = frozenset[str]().union(*(candidate.footprint for candidate in candidates))
            results = [_resumed(trial, self.batches[0], self._values(graph), touched)]
            results += [run(trial.gm, batch) for batch in self.batches[1:count]]
            self._known[key] = self.measure.root(self.measure.total(zip(self.reference, results, strict=False)))
        if len(candidates) == 1 and count == self.quick_batches and candidates[0].error > 0:
            self._alone.setdefault(candidates[0].family, {})[candidates[0].error] = self._known[key]
        return self._known[key]

    def effect(self, candidate: Candidate) -> float | None:
        """What a candidate alone does to the outputs, as far as this search has asked for it in quick looks.

        That is the error of the model with it; where it was not measured, that with one of its family, in proportion to
        their own errors. None where none was.
        """
        if candidate.error == 0:
            return 0.0
        known = self._alone.get(candidate.family)
        return in_proportion(candidate, known, self.resolution) if known else None

    def _values(self, graph: Graph) -> dict[str, Any]:
        """The values of the graph's nodes on the first batch, none of them if they are too many."""
        if self._base is None or self._base[0] is not graph:
            self._base = graph, _recorded(graph, self.batches[0])
        return self._base[1]


def _outputs(
    graph: Graph, batches: Sequence[Sequence[Any]], divisible: bool
) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
    """(batches, what the graph makes of each), in batches that memory lasts for."""
    ran: list[Sequence[Any]] = []
    outputs: list[Sequence[Any]] = []
    left, most = list(batches), sys.maxsize
    while left:
        batch = left.pop(0)
        try:
            outputs.append(run(graph.gm, batch))
            ran.append(batch)
            continue
        except Exception as error:  # whatever an operation raises for values that it does not take
            if not is_out_of_memory(error):
                raise does_not_run(error) from error
        most = samples_in(batch) // 2 if divisible else 0
        if not most:
            raise InputError(
                f"not enough memory to run the model on {samples_in(batch)} samples at a time: give a smaller --batch, "
                "smaller samples, or close other programs"
            )
        left = [part for whole in (batch, *left) for part in in_pieces(whole, most)]
    for i, batch in enumerate(outputs):
        if has_nan(batch):
            raise InputError(
                f"the model gives NaN on batch {i + 1} of the {len(outputs)} that it is judged by, so no rewrite can "
                "be checked there; take such samples out of the data given with --calib or --recover-data"
            )
    return ran, outputs


def _recorded(graph: Graph, batch: Sequence[Any]) -> dict[str, Any]:
    leaves = pytree.tree_leaves([node.meta.get("val") for node in graph.nodes])
    if sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor)) > KEPT_BYTES:
        return {}
    interpreter = fx.Interpreter(graph.gm, garbage_collect_values=False)
    try:
        with torch.no_grad():
            interpreter.run(*batch, enable_io_processing=False)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return {}
        raise
    return {node.name: value for node, value in interpreter.env.items() if node.op != "output"}


def _resumed(graph: Graph, batch: Sequence[Any], values: Mapping[str, Any], touched: frozenset[str]) -> tuple[Any, ...]:
    """The outputs of a rewritten graph, with the values before the first node that is new or touched as they were."""
    start = {}
    for node in graph.nodes:
        if node.name not in values or node.name in touched:
            break
        start[node] = values[node.name]
    with torch.no_grad():
        result = fx.Interpreter(graph.gm).run(*batch, initial_env=start, enable_io_processing=False)
    return tuple(pytree.tree_leaves(result))


def rewritten(graph: Graph, rewrites: Iterable[Rewrite], passes: Mapping[str, Pass], context: Context) -> Graph:
    """A copy of the graph with rewrites applied in order, and what they left unused dropped."""
    result = graph.copy()
    for rewrite in rewrites:
        apply(result, passes[rewrite.pass_name], rewrite, context)
    result.gm.graph.lint()
    prune(result.gm)
    result.gm.recompile()
    return result


class Sensitivities:
    """The output error of the model with each candidate alone, as `errors`, in a quick look.

    One candidate a family is measured: of all `rivals`, which hold the candidates, the one whose own error is nearest
    to `PROBE_ERROR`. The others follow from it in proportion to their own error, unless the family was looked at closer
    since. Exact candidates have none.
    """

    def __init__(
        self,
        graph: Graph,
        candidates: Sequence[Candidate],
        rivals: Sequence[Candidate],
        passes: Mapping[str, Pass],
        context: Context,
        evaluator: Evaluator,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> None:
        self.candidates, self.evaluator = candidates, evaluator
        self._measured = lambda chosen: evaluator.error_after(graph, chosen, passes, context, quick=True)
        wanted = dict.fromkeys(c.family for c in candidates if c.error > 0)  # a set in order
        members: dict[Family, list[Candidate]] = {family: [] for family in wanted}
        for rival in rivals:
            if rival.family in members and rival.error > 0:
                members[rival.family].append(rival)
        self._known: dict[Family, dict[float, float]] = {}  # a layer's own error: that of the model
        for done, family in enumerate(wanted):
            progress("sensitivity", done, len(wanted))
            self._known[family] = self._probed(members[family])
        progress("sensitivity", len(wanted), len(wanted))
        self.errors = self._errors()

    def _probed(self, members: Sequence[Candidate]) -> dict[float, float]:
        """Of a family the error of the member nearest to `PROBE_ERROR`; where that is infinite, of smaller ones too.

        It is where a whole number of an output turned, which need not be so where less is changed.
        """
        known: dict[float, float] = {}
        left = list(members)
        while left and not any(map(math.isfinite, known.values())):
            probe = max(left, key=lambda one: one.error) if known else min(left, key=_remoteness)
            known[probe.error] = self._measured([probe])
            left = [one for one in members if one.error < probe.error / FURTHER]
        return known

    def predicted(self, picked: Iterable[int]) -> float:
        """The error of the model with some candidates, in quadrature."""
        return math.hypot(*(self.errors[i] for i in picked))

    def look_closer(self, picked: Iterable[int]) -> bool:
        """Measures the families that make the error of some candidates far larger than predicted; whether any do.

        They are found by halving, so that few forwards find few of them.
        """
        groups = [[i for i in picked if self.candidates[i].error > 0]]
        found = False
        while groups:
            group = groups.pop()
            measured = self._measured([self.candidates[i] for i in group]) if group else 0.0
            if measured <= MISJUDGED * max(self.predicted(group), self.evaluator.resolution):
                continue
            if len(group) == 1:
                family = self.candidates[group[0]].family
                members = [c for c in self.candidates if c.family == family and c.error > 0]
                self._known[family] |= {c.error: self._measured([c]) for c in members}
                found = True
            else:
                groups += [group[: len(group) // 2], group[len(group) // 2 :]]
        if found:
            self.errors = self._errors()
        return found

    def _errors(self) -> list[float]:
        return [self._error(candidate) if candidate.error > 0 else 0.0 for candidate in self.candidates]

    def _error(self, candidate: Candidate) -> float:
        return in_proportion(candidate, self._known[candidate.family], self.evaluator.resolution)


def in_proportion(candidate: Candidate, known: Mapping[float, float], resolution: float) -> float:
    """The error of the model with a candidate, from those of its family by their own errors: the nearest of them."""
    own = min(known, key=lambda own: abs(math.log(own / candidate.error)))
    return candidate.error * max(known[own], resolution, 1e-9) / own


def _remoteness(candidate: Candidate) -> float:
    return abs(math.log(candidate.error / PROBE_ERROR))
