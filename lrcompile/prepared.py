"""A model ready for decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lrcompile.confirm import Measured, Reference, contradicts
from lrcompile.devices.cost import Cost
from lrcompile.devices.target import Target
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import Graph, weight_bytes
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, Pass
from lrcompile.planning.budget import Budget
from lrcompile.planning.distribution import Spread
from lrcompile.planning.metric import DropLimit, Metric
from lrcompile.planning.price import Pricing, price
from lrcompile.planning.search import Choice, Problem
from lrcompile.planning.sensitivity import Evaluator
from lrcompile.planning.strategies import search, strategy_of
from lrcompile.report.clock import Clock

MEASURED_AGAIN = "layers were measured again: what was remembered of them does not seem to be of now"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready for decisions: everything that does not depend on the budget, so that it is computed once."""

    traced: Traced
    graph: Graph
    canonical: tuple[Rewrite, ...]
    target: Target
    passes: Mapping[str, Pass]
    context: Context
    evaluator: Evaluator
    held_out: int
    pricing: Pricing
    base: Cost
    original: Cost
    reference: Reference | None
    calibration: CalibrationData | None
    skipped: tuple[str, ...]
    seed: int
    notes: tuple[str, ...]
    clock: Clock
    metric: Metric | None = None
    seen: Mapping[str, Spread] = field(default_factory=dict)

    @cached_property
    def cleaned(self) -> Cost:
        """The latency of the graph after exact clean-up; with a reference, as measured when it is first asked for."""
        if self.reference is None or not self.canonical:
            return self.base
        with self.clock("clean-up"):
            ratio = min(1.0, self.reference.measure(self.graph).ratio)
        return replace(self.base, latency_s=self.base.latency_s * ratio)

    @cached_property
    def anew(self) -> Prepared:
        """The same with the original measured again, and its layers where timings were remembered.

        What a busy machine took, or a faster hour, says little of now: whole models and their layers must be of the
        same hours. Without a reference nothing is measured, and it is the same.
        """
        if self.reference is None:
            return self
        clock = Clock(self.clock.progress, dict(self.clock.seconds))
        target, pricing = self.target, self.pricing
        with clock("price"):
            base = self.reference.latency()
            if target.recalls:
                target = target.of_now()
                transforms, keep = tuple(self.passes.values()), kept(self.skipped)
                priced = price(self.graph, transforms, self.context, target.model, keep, clock.progress)
                pricing = replace(pricing, candidates=priced.candidates)
        notes = (*self.notes, *([MEASURED_AGAIN] if self.target.recalls else []))
        return replace(self, target=target, pricing=pricing, base=base, original=base, notes=notes, clock=clock)

    @property
    def latest(self) -> Prepared:
        """Itself, or what was measured `anew` since."""
        return self.anew.latest if "anew" in vars(self) else self

    @property
    def probed(self) -> Prepared:
        """The latest, or `anew` where a model halfway to the fastest contradicts what is remembered of its layers.

        For those who cannot make their choice twice, as a metric is not evaluated so often.
        """
        latest = self.latest
        return latest.anew if latest._is_contradicted else latest

    def contradicted(self, choice: Choice, measured: Measured) -> bool:
        """Whether a choice takes far from what its prices say; whether they count clean-up is seen where it matters."""

        def off(base: Cost) -> bool:
            return contradicts(measured, (base.latency_s - choice.gain_s) / self.original.latency_s)

        return off(self.base) and off(self.cleaned)

    @cached_property
    def _is_contradicted(self) -> bool:
        if self.reference is None or not self.target.recalls:
            return False
        problem = self.problem(Budget())
        base_s, reached_s = problem.base.latency_s, strategy_of(Budget()).reach_s(problem, Budget())
        halfway_s = max(base_s / 10, (base_s + reached_s) / 2)  # more may be remembered to be saved than there is
        with self.clock("confirm"):
            choice = search(problem, Budget(max_latency_s=halfway_s))
            measured = self.reference.measure(choice.graph)
        return self.contradicted(choice, measured)

    def problem(self, budget: Budget, drop: DropLimit | None = None) -> Problem:
        """What is searched for a budget; where that limits the latency, what clean-up gains counts towards it."""
        original_s = self.original.latency_s
        base = self.cleaned if budget.limits_latency else self.base
        return Problem(
            self.graph, self.pricing.candidates, self.passes, self.context,
            self.evaluator.measured_in(budget.measure_in_use).afresh(), base, original_s,
            self.clock.progress, drop, weight_bytes(self.traced.graph.gm),
        )  # fmt: skip


def kept(skipped: Sequence[str]) -> Callable[[str], bool]:
    """Whether a site may be rewritten, where some are left as they are with all that is in them."""
    return lambda site: not any(site == s or site.startswith(s + ".") for s in skipped)
