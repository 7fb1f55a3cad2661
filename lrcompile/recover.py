"""Recovery of a compiled model: the rewritten graph is trained to do again what the original does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.compile import Result
from lrcompile.errors import BudgetError, InputError, is_out_of_memory
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.graph.graph import Graph, attribute, fingerprint
from lrcompile.lower.batches import model_batches
from lrcompile.planning.budget import Budget
from lrcompile.planning.distribution import entering, unlike_calibration, unlike_training
from lrcompile.planning.measures import RELATIVE, Measure
from lrcompile.planning.sensitivity import Evaluator
from lrcompile.recovery.checkpoint import Checkpoint
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.loss import OwnLoss
from lrcompile.recovery.pair import pair
from lrcompile.recovery.processes import Processes
from lrcompile.recovery.refit import refit
from lrcompile.recovery.samples import Samples, few_classes, samples_of
from lrcompile.recovery.settings import DEFAULT_BATCH, Recovery
from lrcompile.recovery.train import Progress, Trained, train
from lrcompile.report.clock import silent

REFIT_SAMPLES = 1024
APART = "attention was not compared: the model was not rewritten from its original directly"
NO_CALLS = "attention was not compared: the models have no call of scaled_dot_product_attention in common"


def recover(
    result: Result,
    data: CalibrationData,
    recovery: Recovery | None = None,
    *,
    labels: Tensor | None = None,
    loss: Callable[[Any, Tensor], Any] | OwnLoss | None = None,
    original: Graph | Lineage | None = None,
    checkpoints: str | Path | None = None,
    finished: list[Checkpoint] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Trains a compiled model on inputs, to agree with the original or with labels; `result` is not changed.

    `settings` are the fields of `Recovery`: `recover(result, data, minutes=15)`. `labels` [samples, …] are classes of
    the first output, whose last axis they count on; or whatever `loss` compares what the model gives with: it takes
    outputs and labels, and returns one number, or one for each sample (see `OwnLoss`). A tenth of the batches is kept
    out to judge by; what is judged worse than what was there is not kept, and neither is what raises the error above
    the budget's `max_error`, or lets the user's metric fall. A training that was stopped goes on where it was when it
    is started again; `checkpoints` is the folder that it is kept in until then. Where `finished` is given, a training
    that has ended is kept too and put there, for the caller to drop when all is written: until then, starting again
    costs nothing. `original` is what it learns from, where that is not what was compiled, and then it is trained
    whatever was rewritten: a traced graph, of which outputs alone are compared, or a lineage, which says what values
    inside are the same. Where memory runs out, steps are made of smaller parts, which gives the same up to rounding.

    Raises:
        InputError: the settings, the data, the labels or the loss cannot be used.
    """
    own = loss if loss is None or isinstance(loss, OwnLoss) else OwnLoss.of(loss)
    if own is not None and labels is None:
        raise InputError(f"the loss {own.name} compares outputs with labels, and there are none; give labels too")
    recovery = Recovery(**settings) if recovery is None else replace(recovery, **settings)
    lineage = _lineage(result.traced.graph, original)
    teacher, student = lineage.original, Graph(result.model, result.traced.graph.fake_mode)
    if lineage.direct and all(rewrite.exact for rewrite in result.plan.rewrites):
        note = "nothing to recover: no lossy rewrite was made"
        return replace(result, report=replace(result.report, notes=[*result.report.notes, note]))
    start = time.perf_counter()
    batches = model_batches(result.traced, data)
    size = (recovery.batch or DEFAULT_BATCH) if result.traced.takes_any_batch() else None
    only = "recovery: the model takes batches of one size, or of multiples of a number, only, so"
    if size is None and recovery.batch is not None:
        raise InputError(f"{only} its batch cannot be set")
    if size is None and recovery.subset < 1:
        raise InputError(f"{only} no subset of samples can be chosen")
    values = (node.meta.get("val") for node in teacher.gm.graph.output_node().all_input_nodes)
    shapes = [tuple(y.shape) for y in values if isinstance(y, Tensor) and y.is_floating_point()]
    if not shapes:
        raise InputError("recovery: no output is of real numbers, so that none tells of a direction to train in")
    if recovery.outputs == "kl" and all(shape[-1:] in ((), (1,)) for shape in shapes):
        raise InputError('recovery: outputs="kl" compares classes on the last axis, and there is one; use "mse"')
    labels = None if labels is None else data.in_batches(torch.as_tensor(labels))
    if own is None and labels is not None and (labels.is_floating_point() or labels.is_complex()):
        raise InputError(
            f"recovery: labels are {str(labels.dtype).removeprefix('torch.')}; expected whole numbers, one class for "
            "each position: give a loss of your own with labels of another kind"
        )
    unlike = _unlike(result, data, batches)
    samples = samples_of(batches, labels, size)
    unlike += [] if own else few_classes(samples)
    if data.cut:
        unlike.append(f"recovery learns from the first {data.samples} samples of {data.source}: memory holds no more")
    measure = result.plan.budget.measure_in_use
    judging = [batch.inputs for batch in samples.judging]
    evaluator = Evaluator(teacher, judging, result.traced.dynamic_batch).measured_in(measure)
    before, at_most = evaluator.error(student), evaluator.at_most
    fitted, refitted = student, tuple[str, ...]()
    if recovery.refit:
        try:
            fitted, refitted = _refitted(lineage, student, samples, evaluator, before)
        except (MemoryError, RuntimeError) as problem:
            if not is_out_of_memory(problem):
                raise
            unlike.append("memory ran out while layers were fitted anew: they are trained alone")  # with less at a time
    attention = lineage.direct and recovery.attention > 0
    apart = [APART] if recovery.attention > 0 and not attention else []
    couple = pair(teacher, fitted, batches[0], lineage.substitutes(student), attention=attention)
    apart += [NO_CALLS] if attention and not couple.attends else []
    facts = [
        data.digest, _digest(labels), recovery.to_json(), own and own.name,
        measure.name if recovery.until is not None else None,
        *([fingerprint(graph.gm), _constants(graph.gm)] for graph in (teacher, fitted)), list(couple.inside), attention,
    ]  # fmt: skip
    checkpoint = Checkpoint.of(*facts, folder=checkpoints, outlives=finished is not None)
    if finished is not None:
        finished.append(checkpoint)
    processes = Processes.here()
    until = None if recovery.until is None else measure.root(recovery.until)
    if until is not None and until < (least := at_most(0.0)):
        raise InputError(
            f"recovery: of the samples that judge it a share of {recovery.until:.3g} cannot be told from {least:.2g}; "
            "allow more, or limit another measure than top1"
        )
    trained = train(
        couple, samples, recovery, checkpoint, progress or silent, processes,
        lambda: until is not None and at_most(evaluator.error(couple.trained)) <= until, own,
    )  # fmt: skip
    for parameter in couple.trained.gm.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    after = evaluator.error(couple.trained)
    if _breaks(result.plan.budget, at_most(before), at_most(after), until if result.replayed else None):
        return _as_it_was(result, _rise(measure, before, after))
    figures = {
        "processes": processes.count, "device": trained.device, "seconds": trained.seconds,
        "steps": trained.steps, "epochs": trained.steps / samples.steps_an_epoch,
        "data": data.digest, "kept_out": samples.kept_out, "samples": samples.count,
        "judged_by": sum(len(batch) for batch in samples.judging),
        "rate": trained.rate, "kept_step": trained.kept_step, "rolled_back": trained.rolled_back,
        "scored": trained.scored,
        "values_inside": len(couple.inside), "refitted": list(refitted), "settings": recovery.to_json(),
        "loss": [trained.loss_before, trained.loss_after], "error": [measure.value(before), measure.value(after)],
        "margin": measure.value(evaluator.margin(after)),
    }  # fmt: skip
    basis = f"{figures['judged_by']} samples kept out of the recovery"
    relative = after if measure is RELATIVE else evaluator.measured_in(RELATIVE).error(couple.trained)
    judged = {"batches_fitted": len(batches) - samples.kept_out, "batches_judged": samples.kept_out}
    error = {**result.report.error, **judged, "measured": measure.value(after), "basis": basis}
    report = replace(
        result.report,
        error=error,
        recovery=figures,
        verification={**result.report.verification, "torch_vs_original": relative},
        timings_s={**result.report.timings_s, "recover": time.perf_counter() - start},
        notes=[
            *result.report.notes,
            *unlike,
            *apart,
            *trained.notes,
            *_remarks(trained, recovery, until, at_most(after), refitted),
        ],
    )
    planned = {name: value for name, value in figures.items() if name != "seconds"}  # equal runs make equal plans
    plan = replace(result.plan, recovery=planned)
    return _held_to_metric(result, replace(result, model=couple.trained.gm, report=report, plan=plan))


def until_error(budget: Budget, recovery: Recovery | None, *, replayed: bool = False) -> tuple[Budget, Recovery | None]:
    """A limit on the error beside one on size or latency is what a recovery has to reach, not what it begins with."""
    until = _to_reach(budget, recovery, replayed)
    if recovery is None or until is None:
        return budget, recovery
    until = until if recovery.until is None else min(until, recovery.until)
    return budget if replayed else replace(budget, max_error=None), replace(recovery, until=until)


def reached(result: Result, budget: Budget, recovery: Recovery | None, *, replayed: bool = False) -> Result:
    """The result of a recovery, held to the error that the budget, as given to `until_error`, asked it to reach.

    Raises:
        BudgetError: it did not reach that.
    """
    until = _to_reach(budget, recovery, replayed)
    if until is None:
        return result
    error = result.report.error["measured"] + (result.report.recovery or {}).get("margin", 0.0)
    if error <= until:
        figures = {**result.report.error, "budget": budget.max_error}
        return replace(result, report=replace(result.report, error=figures))
    share = f" that rewrites and training may take of {budget.max_error:g}" if budget.reserve else " allowed"
    why = "" if result.report.recovery is not None else f" ({result.report.notes[-1]})"
    raise BudgetError(
        f"after recovery the error is {error:.3g}, above the {until:.3g}{share}{why}; allow more, ask for less "
        "speed-up or a larger size, train longer, or leave out --max-error to take what comes"
    )


def _to_reach(budget: Budget, recovery: Recovery | None, replayed: bool) -> float | None:
    """The error that a recovery has to reach; what a quantisation is left is not for the training."""
    others = (budget.size, budget.speedup, budget.max_latency_s)
    if recovery is None or budget.max_error is None or not (replayed or any(others)):
        return None
    assert budget.error_limit is not None
    return budget.measure_in_use.value(budget.error_limit)


def _held_to_metric(before: Result, after: Result) -> Result:
    """What was recovered, or what was there where the user's metric fell by more than its noise."""
    if before.metric is None or before.report.metric is None:
        return after
    graph = Graph(after.model, after.traced.graph.fake_mode)
    known = dict(before.report.metric)
    value = before.metric.value(("recovered", fingerprint(after.model)), lambda: graph)
    allowed = before.metric.least(before.plan.budget.max_drop or 0.0)
    if value.number < known["after"] - known["noise"] or value.sure < allowed:
        return _as_it_was(before, f"recovery let the metric fall from {known['after']:.6g} to {value.number:.6g}")
    counts = {name: known[name] + 1 for name in ("evaluations", "most_evaluations")}  # this one is not the search's
    metric = known | counts | {"after": value.number, "standard_error": value.error}
    return replace(after, report=replace(after.report, metric=metric), plan=replace(after.plan, metric=metric))


def _breaks(budget: Budget, before: float, after: float, until: float | None) -> bool:
    """Whether training has raised the root of what a budget was asked to limit, and above that limit and `until`."""
    asked = budget.error_limit if budget.max_error is not None else None
    return asked is not None and after > max(before, asked, until or 0.0)


def _rise(measure: Measure, before: float, after: float) -> str:
    return (
        f"recovery let the {measure.label} rise from {measure.value(before):.3g} to {measure.value(after):.3g} on what "
        "it is judged by, above what is allowed"
    )


def _as_it_was(result: Result, why: str) -> Result:
    """What was compiled, with a note that says why it is not what was trained."""
    note = f"{why}: the weights are as they were"
    return replace(result, report=replace(result.report, notes=[*result.report.notes, note]))


def _unlike(result: Result, data: CalibrationData, batches: Sequence[Sequence[Any]]) -> list[str]:
    """Notes if what it learns from is unlike the calibration data, or what the model was trained on."""
    if data.digest == result.plan.calibration:
        return []
    got, what = entering(result.traced.graph, batches, result.traced.dynamic_batch), "recovery data"
    return [*unlike_training(result.traced.graph, got, what), *unlike_calibration(result.seen, got, what)]


def _lineage(compiled: Graph, original: Graph | Lineage | None) -> Lineage:
    if isinstance(original, Lineage):
        return original
    return Lineage.of(compiled) if original is None or original is compiled else Lineage(original, compiled)


def _refitted(
    lineage: Lineage, student: Graph, samples: Samples, evaluator: Evaluator, before: float
) -> tuple[Graph, tuple[str, ...]]:
    """The rewritten graph with layers fitted anew, and which, if that makes it better on what it is judged by."""
    count = max(1, min(REFIT_SAMPLES, samples.count) // samples.size)
    batches = [samples.batch(numbers).inputs for numbers in samples.order(0, 0)[:count]]
    fitted, paths = refit(lineage.original, student, batches, lineage.counterparts(student))
    return (fitted, paths) if paths and evaluator.error(fitted) < before else (student, ())


def _remarks(
    trained: Trained, recovery: Recovery, until: float | None, after: float, refitted: Sequence[str]
) -> Sequence[str]:
    is_reached = until is not None and after <= until
    if trained.steps == 0 and not refitted and is_reached:
        return ["the error asked for held without any training: the weights are as they were"]
    if trained.steps == 0 and recovery.minutes is not None and not is_reached:
        so_far = "layers were fitted anew alone" if refitted else "the weights are as they were"
        return [
            f"the {recovery.minutes:g} minutes of the recovery were over before its first step, as judging the model "
            f"and timing a step took them: {so_far}; give more minutes, or less data"
        ]
    if trained.kept_step == 0 and not refitted:
        return ["recovery made nothing better on the data that it is judged by: the weights are as they were"]
    return ["the weights were recovered: the plan replays the rewrites, not the recovery"]


def _constants(gm: fx.GraphModule) -> list[Any]:
    """What tells the tensors that a fingerprint leaves out from others: those that are not in the state dict."""
    saved = gm.state_dict()
    read = ((str(node.target), attribute(gm, str(node.target))) for node in gm.graph.find_nodes(op="get_attr"))
    found = {name: value for name, value in (*gm.named_buffers(), *read) if isinstance(value, Tensor)}
    return [[name, _digest(value)] for name, value in sorted(found.items()) if name not in saved]


def _digest(tensor: Tensor | None) -> list[Any] | None:
    """What tells a tensor from others."""
    if tensor is None:
        return None
    data = tensor.detach().cpu().contiguous()
    held = data.flatten().view(torch.uint8).numpy().tobytes()
    return [list(data.shape), str(data.dtype), hashlib.sha256(held).hexdigest()]
