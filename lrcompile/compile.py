"""The way of the data: trace → lower → canonicalize → calibrate → propose, price → choose → apply → confirm → emit.

Every stage is a function of values; nothing is kept between them but what one hands to the next, and the order of
the passes is the order in which they are given.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lrcompile.cache import cache_folder
from lrcompile.confirm import ContradictionError, Measured, Reference, confirm
from lrcompile.devices.cost import total
from lrcompile.devices.target import DEFAULT_TARGET, Target, resolve_target
from lrcompile.emit.write import check_opset, emit
from lrcompile.errors import BudgetError, InputError, LatencyError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.frontend.export import batch_size
from lrcompile.frontend.prepare import prepare
from lrcompile.frontend.trace import Traced, trace
from lrcompile.graph.graph import Graph, fingerprint
from lrcompile.lower.batches import model_batches
from lrcompile.lower.rank4 import check_rank, to_rank
from lrcompile.passes import Context, Pass, Stage, remark
from lrcompile.planning.budget import Budget
from lrcompile.planning.calibration import Split, collect
from lrcompile.planning.canonicalize import canonicalize, check_exact, check_finite, or_as_it_was, rounding
from lrcompile.planning.distribution import Spread, entering, unlike_training
from lrcompile.planning.measures import OF_FLOATS, RELATIVE
from lrcompile.planning.metric import DropLimit, Evaluation, Metric, check_metric
from lrcompile.planning.plan import Plan
from lrcompile.planning.price import price
from lrcompile.planning.search import Choice
from lrcompile.planning.sensitivity import Evaluator, rewritten
from lrcompile.planning.store import Store
from lrcompile.planning.strategies import search
from lrcompile.plugins import as_planned, discover, given
from lrcompile.prepared import Prepared, kept
from lrcompile.quantization.limits import search_for_int8
from lrcompile.quantization.quantize import Quantization, metric_after, quantizer
from lrcompile.remarks import remarks
from lrcompile.report.clock import Clock, Progress, silent
from lrcompile.report.report import Decision, Report, decide, error_figures, latency_figures, model_figures, told_of


@dataclass(frozen=True, eq=False)
class Result:
    """A compiled model: `model` is the rewritten graph as a module, `plan` the decisions, `report` the figures.

    `metric` is the user's own, where the search was held to it; `seen` is what entered the layers of the traced graph
    on calibration data, where there were any. `replayed`: the plan was made before, maybe on another machine, so that
    what is written is not held to its size and latency.
    """

    model: fx.GraphModule
    plan: Plan
    report: Report
    traced: Traced
    metric: Metric | None = None
    seen: Mapping[str, Spread] = field(default_factory=dict)
    replayed: bool = False

    def save(
        self, path: str | Path, *, quantize: Quantization | None = None, progress: Progress = silent
    ) -> Report:  # fmt: skip
        """Writes `.onnx`, `.pt2` or a folder, verified and atomically; returns the report with the verification.

        With `quantize`, ONNX is written in 8-bit integers, within the plan's budget; what came of it is in the report.

        Raises:
            InputError: the path has another suffix or cannot be written, or the model cannot be quantised.
            BudgetError: the 8-bit file does not keep the size or latency that the budget limits.
            VerificationError: what was emitted does not compute what the model computes; nothing is written.
        """
        start = time.perf_counter()
        refine = None
        if quantize is not None:
            trained = self.plan.recovery or {}
            kept_out = trained["kept_out"] if trained.get("data") == quantize.data.digest else None
            split = Split.of(model_batches(self.traced, quantize.data), kept_out)
            refine = quantizer(
                quantize, self.model, self.traced, self.plan, split, progress,
                metric=self.metric, replayed=self.replayed,
            )  # fmt: skip
        emitted = emit(path, self.model, self.traced, refine)
        return replace(
            self.report,
            verification={**self.report.verification, **emitted.verification},
            timings_s={**self.report.timings_s, "emit": time.perf_counter() - start},
            notes=[*self.report.notes, *emitted.notes],
            quantization=emitted.refined,
            metric=metric_after(self.report.metric, emitted.refined),
        )


def compile(  # the name that users look for
    model: nn.Module | ExportedProgram | torch.jit.ScriptModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Target = DEFAULT_TARGET,
    budget: Budget | None = None,
    calibration: CalibrationData | None = None,
    passes: Sequence[Pass] | None = None,
    plan: Plan | None = None,
    skip: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    batch: int | None = None,
    max_rank: int | None = None,
    io_rank: int | None = None,
    opset: int | None = None,
    seed: int = 0,
    metric: Callable[[nn.Module], Any] | None = None,
    metric_by_site: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Rewrites a model where that makes it faster on the target, within the budget.

    `args` and `kwargs` are example inputs; what is priced is the model at their shapes. `target` is the name or path
    of a profile, or "local". `skip` holds glob patterns of sites to leave alone. With `max_rank=4` no value inside the
    graph has more than four axes, with `io_rank=4` its inputs and outputs have not either: [B, C, T, H, W] is taken as
    [B, C·T, H, W]. `opset` is the version of ONNX operators, 18 to 23. With `plan`, its rewrites are applied and
    nothing is searched. Without `calibration`, decompositions see the weights alone and the output error is measured
    on the example inputs. `metric` takes a model, called as the one given is, and returns a number, higher is better,
    or one for each sample; it, or their mean, may fall by `budget.max_drop`. It is evaluated at most 25 times, and with
    `metric_by_site` once more for each rewrite alone, for the report.

    Raises:
        InputError: the model, inputs, metric or options cannot be used.
        BudgetError: the budget cannot be met; the message holds the range that can.
        PlanError: the plan belongs to another model or to other calibration data.
        VerificationError: a rewrite changed what the model computes.
    """
    options: dict[str, Any] = {"calibration": calibration, "passes": passes, "dtype": dtype, "batch": batch}
    options |= {"max_rank": max_rank, "io_rank": io_rank, "opset": opset}
    evaluation = check_metric(metric, budget, plan, metric_by_site)
    if plan is not None:
        plan.check_decided(target, skip, seed, budget)
        return replay(model, args, kwargs, plan=plan, progress=progress, **options)
    options |= {"target": target, "skip": skip, "seed": seed, "metric": evaluation, "progress": progress}
    return solve(prepare_model(model, args, kwargs, **options), budget or Budget())


def prepare_model(
    model: nn.Module | ExportedProgram | torch.jit.ScriptModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Target = DEFAULT_TARGET,
    calibration: CalibrationData | None = None,
    passes: Sequence[Pass] | None = None,
    skip: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    batch: int | None = None,
    max_rank: int | None = None,
    io_rank: int | None = None,
    opset: int | None = None,
    seed: int = 0,
    metric: Callable[[nn.Module], Any] | None = None,
    metric_by_site: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Everything up to the choice; see `compile`. The result can be solved for one budget after another."""
    clock = Clock(progress or silent)
    target = target if isinstance(target, Target) else resolve_target(target)
    transforms, problems = _passes(passes)
    torch.manual_seed(seed)
    with clock("trace"):
        model, args, kwargs, dtype = prepare(model, args, kwargs, dtype, batch)
        traced = trace(model, args, kwargs)
    with clock("lower"):
        traced = to_rank(traced, target.max_rank if max_rank is None else max_rank, io_rank, rounding(dtype))
    traced = replace(traced, opset=check_opset(opset, traced.graph.gm))
    base = None
    if metric is not None:
        with clock("evaluate"):
            base = Metric.on(traced, Evaluation.of(metric, metric_by_site), seed, clock.progress)
    target = target.for_model(traced.dynamic_batch, opset)
    reference = Reference.of(traced) if target.is_local else None
    skipped = _skipped(traced.graph, skip)
    keep = kept(skipped)
    data = Split.of(model_batches(traced, calibration))
    with clock("canonicalize"):
        context = Context(target.device, dtype)
        graph, canonical, refusals = canonicalize(traced.graph, transforms, context, keep)
        evaluator = Evaluator(traced.graph, data.judged, traced.dynamic_batch)
        by_name = {transform.name: transform for transform in transforms}
        floats = evaluator.measured_in(OF_FLOATS)  # rounding may change classes whose scores are next to equal
        check_exact(traced.graph, canonical, by_name, context, floats, floats.error(graph, first=1))
    seen: Mapping[str, Spread] = {}
    if calibration:
        with clock("calibrate"):
            context = _calibrated(graph, data, context, clock, traced.dynamic_batch)
            seen = entering(traced.graph, data.fitted, traced.dynamic_batch)
    with clock("price"):
        pricing = price(graph, transforms, context, target.model, keep, clock.progress)
        costs = {} if target.is_local else target.costs(graph.gm)
        pricing = replace(pricing, refusals=(*refusals, *pricing.refusals), node_costs=costs)
        cost = reference.latency() if reference else target.whole(costs)
        original = cost if reference else target.whole(target.costs(traced.graph.gm))
    return Prepared(
        traced=traced, graph=graph, canonical=canonical, target=target, passes=by_name, context=context,
        evaluator=evaluator, held_out=data.held_out, pricing=pricing, base=cost, original=original,
        reference=reference, calibration=calibration, skipped=skipped, seed=seed, clock=clock, metric=base, seen=seen,
        notes=(*problems, *traced.notes, *unlike_training(traced.graph, seen, "calibration data")),
    )  # fmt: skip


def solve(prepared: Prepared, budget: Budget) -> Result:
    """The best model within a budget; `prepared` is not changed and can be solved again.

    On this machine the choice is made once more of what is measured anew, where a latency seems out of reach, or where
    the whole model contradicts what was remembered of its layers: that may be of a busier or a faster hour.

    Raises:
        InputError: the budget limits a metric, and the model was prepared without one.
        BudgetError: the budget cannot be met; the message holds the range that can.
    """
    once = budget.max_drop is not None or budget.int8
    latest = prepared.probed if once else prepared.latest
    remembered = latest.target.recalls and not once and (budget.limits_latency or budget.size is None)
    try:
        return _solve(latest, budget, latest.contradicted if remembered else None)
    except ContradictionError:
        pass
    except BudgetError as error:
        if latest.reference is None or not (isinstance(error, LatencyError) or (remembered and budget.limits_latency)):
            raise
    return _solve(latest.anew, budget)


def _solve(p: Prepared, budget: Budget, doubts: Callable[[Choice, Measured], bool] | None = None) -> Result:
    drop = DropLimit.of(p.metric, budget)
    problem = p.problem(budget, drop.kept_back() if drop and p.reference else drop)
    clock = Clock(p.clock.progress, dict(p.clock.seconds))
    asked, reference = budget, p.reference
    with clock("choose"):
        if budget.int8:
            choice, asked, reference = search_for_int8(problem, budget, p.traced, p.reference)
        else:
            choice = search(problem, budget)
        floats = p.evaluator.measured_in(OF_FLOATS)  # whole numbers that differ are no sign of an overflow
        of_floats = choice.error if math.isfinite(choice.error) else floats.error(choice.graph)
        check_finite(p.graph, choice.rewrites, p.passes, p.context, floats, of_floats)
        exact = [rewrite for rewrite in choice.rewrites if rewrite.exact]
        if exact and len(exact) == len(choice.rewrites):
            error = _relative_error(p, budget, choice)
            error = error if math.isfinite(error) else floats.error(choice.graph)
            check_exact(p.graph, exact, p.passes, p.context, floats, error)
        choice = or_as_it_was(choice, p.traced.graph, budget, p.context.dtype)
    measured: Measured | None = None
    wanted = choice.candidates
    if reference and not choice.untouched:
        with clock("confirm"):
            problem = replace(problem, drop=drop)
            choice, measured = confirm(reference, problem, choice, budget, asked, doubts)
    untouched = bool(choice.untouched or (measured and measured.returned_original))
    canonical = () if untouched else p.canonical
    metric = drop.result(None if untouched else choice.rewrites).to_json() if drop else None
    left = {id(candidate) for candidate in choice.candidates}
    dropped = [site for candidate in wanted if id(candidate) not in left for site in candidate.sites]
    overruled = dict.fromkeys(dropped, measured.overruled or "") if measured else {}
    told, drops = told_of(p.graph, p.pricing, choice.candidates, budget, p.skipped), dict[str, float]()
    if drop and drop.metric.evaluation.by_site:
        with clock("evaluate by site"):
            drops = drop.metric.drops(told, lambda one: rewritten(p.graph, one.rewrites, p.passes, p.context))
    decisions = decide(
        p.graph, p.pricing, choice.candidates, told, budget, p.skipped, canonical, overruled,
        remark=lambda rewrite: remark(p.passes[rewrite.pass_name], rewrite), effect=problem.evaluator.effect,
        drops=drops,
    )  # fmt: skip
    check_rank(choice.graph, p.traced)
    rewrites = (*canonical, *choice.rewrites)
    plan = Plan(
        target=p.target.name,
        dtype=p.context.dtype,
        batch=batch_size(p.traced.flat),
        max_rank=p.traced.max_rank,
        io_rank=p.traced.io_rank,
        opset=p.traced.opset,
        held_out=p.held_out,
        fingerprint=fingerprint(p.traced.graph.gm),
        calibration=p.calibration.digest if p.calibration else None,
        seed=p.seed,
        budget=budget,
        rewrites=rewrites,
        options={name: asdict(p.passes[name]) for name in sorted({r.pass_name for r in rewrites})},
        sites=[decision.to_json() for decision in decisions],
        metric=metric,
    )
    if measured:
        latency = latency_figures("measured", measured.before, measured.after)
    else:
        after = p.original if untouched else p.base - total([c.gain for c in choice.candidates])
        sigma_s = p.target.saving_sigma_s(p.traced.graph.gm, choice.graph.gm)
        latency = latency_figures(p.target.model.kind, p.original, after, sigma_s)
    report = Report(
        target=p.target.name,
        model=model_figures(p.traced, choice.graph),
        latency_ms=latency,
        error=error_figures(budget, p.calibration, choice.error, p.held_out),
        sites=decisions,
        verification={"torch_vs_original": _relative_error(p, budget, choice), "onnx_vs_torch": None},
        timings_s=dict(clock.seconds),
        notes=(*p.notes, *remarks(p, budget, choice, measured)),
        rewrites=rewrites,
        settings=_settings(p.context.dtype, p.traced, p.seed, budget),
        metric=metric,
    )
    return Result(choice.graph.gm, plan, report, p.traced, p.metric if drop else None, p.seen)


def _settings(dtype: str, traced: Traced, seed: int, budget: Budget) -> dict[str, Any]:
    return {"dtype": dtype, "batch": batch_size(traced.flat), "seed": seed, "strategy": budget.strategy_name}


def _relative_error(p: Prepared, budget: Budget, choice: Choice) -> float:
    """The relative output error of a choice, in whatever measure it was made."""
    return choice.error if budget.measure == RELATIVE.name else p.evaluator.error(choice.graph)


def replay(
    model: nn.Module | ExportedProgram | torch.jit.ScriptModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan,
    calibration: CalibrationData | None = None,
    passes: Sequence[Pass] | None = None,
    dtype: str | torch.dtype | None = None,
    batch: int | None = None,
    max_rank: int | None = None,
    io_rank: int | None = None,
    opset: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Applies a plan's rewrites to the model that it was made for; nothing is priced or searched.

    Raises:
        PlanError: the plan belongs to another model, rank or calibration data, or names a pass that is not installed.
    """
    plan.check_ranks(max_rank, io_rank)
    sites = [Decision.from_json(site) for site in plan.sites]
    clock = Clock(progress or silent)
    target = resolve_target(plan.target)
    transforms, problems = _passes(passes)
    by_name = as_planned(transforms, (rewrite.pass_name for rewrite in plan.rewrites), plan.options)
    torch.manual_seed(plan.seed)
    with clock("trace"):
        model, args, kwargs, dtype = prepare(model, args, kwargs, dtype or plan.dtype, batch)
        traced = trace(model, args, kwargs)
    with clock("lower"):
        traced = to_rank(traced, plan.max_rank, plan.io_rank, rounding(dtype))
    traced = replace(traced, opset=check_opset(plan.opset if opset is None else opset, traced.graph.gm))
    plan.check_fits(fingerprint(traced.graph.gm), calibration.digest if calibration else None)
    data = Split.of(model_batches(traced, calibration), plan.held_out)
    context = Context(target.device, dtype)
    canonical_names = {name for name, transform in by_name.items() if transform.stage is Stage.CANONICALIZE}
    count = next(
        (i for i, r in enumerate(plan.rewrites) if r.pass_name not in canonical_names), len(plan.rewrites)
    )  # canonical rewrites come first: what calibration data are collected on
    seen: Mapping[str, Spread] = {}
    with clock("apply"):
        graph = rewritten(traced.graph, plan.rewrites[:count], by_name, context)
        if calibration:
            context = _calibrated(graph, data, context, clock, traced.dynamic_batch)
            seen = entering(traced.graph, data.fitted, traced.dynamic_batch)
        graph_after = rewritten(graph, plan.rewrites[count:], by_name, context)
        evaluator = Evaluator(traced.graph, data.judged, traced.dynamic_batch)
        measured_error = evaluator.measured_in(plan.budget.measure_in_use).error(graph_after)
        error = measured_error if plan.budget.measure == RELATIVE.name else evaluator.error(graph_after)
    check_rank(graph_after, traced)
    measured: Measured | None = None
    if target.is_local:
        measured = Reference.of(traced).measure(graph_after)
        latency = latency_figures("measured", measured.before, measured.after)
    else:
        before, after = (target.whole(target.costs(g.gm)) for g in (traced.graph, graph_after))
        sigma_s = target.saving_sigma_s(traced.graph.gm, graph_after.gm)
        latency = latency_figures(target.model.kind, before, after, sigma_s)
    report = Report(
        target=plan.target,
        model=model_figures(traced, graph_after),
        latency_ms=latency,
        error=error_figures(plan.budget, calibration, measured_error, plan.held_out),
        sites=sites,
        verification={"torch_vs_original": error, "onnx_vs_torch": None},
        timings_s=dict(clock.seconds),
        notes=(
            *problems,
            *traced.notes,
            *unlike_training(traced.graph, seen, "calibration data"),
            *_replayed(plan),
            *([measured.remark] if measured and measured.remark else []),
        ),
        rewrites=plan.rewrites,
        settings=_settings(dtype, traced, plan.seed, plan.budget),
        metric=plan.metric,
    )
    made = replace(plan, batch=batch_size(traced.flat), opset=traced.opset, recovery=None)
    return Result(graph_after.gm, made, report, traced, seen=seen, replayed=True)


def _replayed(plan: Plan) -> list[str]:
    """What a replay does not do again."""
    notes = [f"replayed from a plan{', the metric is as it was then' if plan.metric else ''}"]
    if plan.recovery is not None:
        notes.append(
            f"the plan's model was trained for {plan.recovery['steps']} steps; this one is not: give --recover"
        )
    return notes


def _passes(passes: Sequence[Pass] | None) -> tuple[tuple[Pass, ...], tuple[str, ...]]:
    if passes is not None:
        return given(passes), ()
    found = discover()
    return found.passes, found.problems


def _calibrated(graph: Graph, data: Split, context: Context, clock: Clock, divisible: bool) -> Context:
    """The context with the statistics of calibration data, and decompositions remembered from other compiles."""
    found = collect(graph, data.fitted, clock.progress, weighted=True, divisible=divisible)
    store = Store(cache_folder("decompositions"))
    return Context(context.device, context.dtype, found.grams, found.token_counts, store, found.gradients)


def _skipped(graph: Graph, skip: Sequence[str]) -> tuple[str, ...]:
    """The sites that --skip names."""
    sites = list(graph.sites())
    skip = [skip] if isinstance(skip, str) else skip
    for pattern in skip:
        if not fnmatch.filter(sites, pattern):
            some = ", ".join(sites[:5])
            raise InputError(f"--skip {pattern!r} matches no site; sites are paths such as {some}")
    return tuple(site for site in sites if any(fnmatch.fnmatchcase(site, pattern) for pattern in skip))
