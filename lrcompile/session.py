"""Compiles and fronts of the command line: from the words of the user to files; used by `lrcompile.cli`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrcompile.compile import compile as compile_model
from lrcompile.devices.target import DEFAULT_TARGET
from lrcompile.emit.write import check_writable
from lrcompile.errors import InputError
from lrcompile.front import front_figures, tradeoff
from lrcompile.frontend.calibration_data import MOST_BATCHES, CalibrationData, load_calibration, load_labels
from lrcompile.frontend.export import batch_size
from lrcompile.frontend.imports import import_attribute
from lrcompile.frontend.inputs import call_inputs, example_inputs, flat_names, input_names, parameters, parse_inputs
from lrcompile.frontend.load import Source, load
from lrcompile.frontend.trace import Traced
from lrcompile.planning.budget import parse_sizes
from lrcompile.planning.metric import Evaluation, check_metric
from lrcompile.planning.plan import Plan, finite
from lrcompile.plugins import configure, discover, select
from lrcompile.progressive import Member, members
from lrcompile.quantization.quantize import Quantization, check_float32
from lrcompile.recover import reached, recover, until_error
from lrcompile.recovery.checkpoint import Checkpoint
from lrcompile.recovery.loss import OwnLoss
from lrcompile.recovery.processes import Processes
from lrcompile.report.page import check_page
from lrcompile.report.plots import check_plottable, plot_calibration, plot_front
from lrcompile.report.report import Report
from lrcompile.request import OF_RECOVERY, Request, check_apart, check_opset, check_quantize, check_replay
from lrcompile.writing import check_file, check_plans_folder, placed_whole, write_text

if TYPE_CHECKING:  # fitting imports what a compile does without
    from lrcompile.devices.calibrate import Calibration, Progress

MOST_LEARNED = 100_000  # batches of a loader that a recovery learns from, as it may have no end


def compile_files(request: Request, progress: Callable[[str, int, int], None]) -> Report | None:
    """Compiles as asked and writes what was asked for, each file whole, once all of the work is done.

    None in a process that trains along with another, which writes and reports.

    Raises:
        LrcompileError: the one of its kinds that says what the user can do.
    """
    if request.out is not None:
        check_writable(request.out)
    if request.report is not None:
        check_page(request.report)
    texts = {"--plan-out": request.plan_out, "--report": request.report, "--report-json": request.report_json}
    for path in texts.values():
        if path is not None:
            check_file(path)
    check_apart(request, {"--out": request.out, **texts})
    check_opset(request)
    plan = Plan.load(request.plan) if request.plan else None
    check_replay(request, plan)
    if plan is not None:
        batch = plan.batch if request.batch is None and not request.inputs else request.batch
        measure = None if request.max_error is None else plan.budget.measure
        request = replace(request, batch=batch, seed=plan.seed, measure=measure, target=plan.target)
    whole, recovery = request.budget(), request.recovery()
    budget, training = until_error(whole, recovery, replayed=plan is not None)
    evaluation = None if request.eval is None else Evaluation.load(request.eval)
    metric = check_metric(evaluation, budget, plan, bool(request.eval_by_site))
    check_quantize(request)
    asked = _asked(request, progress)
    processes = Processes.here() if recovery is not None else Processes()
    if processes.count > 1 and plan is None:
        raise InputError(
            "several processes were launched, and each would decide for itself; compile in one with --plan-out "
            "plan.json, then launch them with --plan plan.json and --recover"
        )
    learned = _learned(request, asked) if recovery is not None else None
    finished: list[Checkpoint] = []
    options = {**asked.options, "budget": budget} if plan is None else {**asked.options, "plan": plan}
    result = compile_model(*asked.inputs, metric=metric, progress=progress, **options)
    if learned is not None:
        result = recover(result, recovery=training, finished=finished, progress=progress, **learned)
        result = reached(result, whole, recovery, replayed=plan is not None)
    report = replace(result.report, notes=[*asked.problems, *result.report.notes])
    if not processes.first:
        return None
    if request.plan_out is not None:
        result.plan.dumps()  # what a plugin has that no plan can hold is said before anything is written
    if request.out is not None:
        progress("emit", 0, 0)
        quantize = _quantization(request, asked)
        report = replace(result, report=report).save(request.out, quantize=quantize, progress=progress)
    if request.plan_out is not None:
        write_text(request.plan_out, replace(result.plan.with_int8(report.quantization), metric=report.metric).dumps())
    if request.report is not None:
        write_text(request.report, report.to_html(f"{request.model} on {report.target}"))
    if request.report_json is not None:
        write_text(request.report_json, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    for checkpoint in finished:
        checkpoint.drop()
    return report


@dataclass(frozen=True)
class FrontFiles:
    """Where a front goes: its figures as JSON, a plot, and a folder with a plan for each point; None is not written."""

    out: Path | None = None
    plot: Path | None = None
    plans: Path | None = None


def tradeoff_files(
    request: Request, points: int, files: FrontFiles, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """The front of a model, written where asked once it is known, each file whole; returns its figures.

    Raises:
        LrcompileError: the one of its kinds that says what the user can do.
    """
    if files.plot is not None:
        check_plottable(files.plot)
    for path in (files.out, files.plot):
        if path is not None:
            check_file(path)
    if files.plans is not None:
        check_plans_folder(files.plans)
    check_apart(request, {"--out": files.out, "--plot": files.plot, "--plans": files.plans})
    budget = request.budget()
    if any(word.startswith(OF_RECOVERY) for word in request.options):
        raise InputError("--option recover.… belongs to a recovery, and a front has none; leave it out")
    asked = _asked(request, progress)
    results = tradeoff(
        *asked.inputs, points=points, max_error=budget.max_error, confidence=budget.confidence,
        strategy=budget.strategy, progress=progress, **asked.options,
    )  # fmt: skip
    names = [f"{number}.json" for number in range(1, len(results) + 1)]
    figures = front_figures(results, [str(files.plans / name) if files.plans else None for name in names])
    figures = finite({**figures, "notes": [*asked.problems, *figures["notes"]]})
    if files.plans is not None:
        with placed_whole(files.plans) as folder:
            folder.mkdir()
            for name, result in zip(names, results, strict=True):
                (folder / name).write_text(result.plan.dumps(), encoding="utf-8")
    if files.plot is not None:
        with placed_whole(files.plot) as path:
            plot_front(figures, path)
    if files.out is not None:
        write_text(files.out, json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return figures


def family_files(request: Request, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """A family of models, each of a size, beside a manifest that says what was made of what; returns the manifest.

    A member is written when it is there, and a manifest of those that are; each of them whole.

    Raises:
        LrcompileError: the one of its kinds that says what the user can do.
    """
    sizes = parse_sizes(request.progressive or "")
    recovery = request.recovery()
    if recovery is None or request.out is None:
        raise InputError("--progressive makes several models and trains each; give --out, and --recover STEPS for each")
    for name in ("plan", "plan_out", "report", "report_json", "size", "eval", "eval_by_site", "max_drop"):
        if getattr(request, name) is not None:
            option = "--" + name.replace("_", "-")
            raise InputError(f"--progressive sets the sizes, and makes several plans and reports; leave out {option}")
    check_opset(request)
    out = Path(request.out)
    if out.name in ("", ".."):
        raise InputError(
            f"cannot write {request.out}: --progressive writes a file or a folder for each size, whose names begin "
            "with that of --out, and this has none; give a name, such as --out small.onnx"
        )
    budget = replace(request, size=(request.progressive or "").split(",")[0]).budget()  # each member's own is set later
    folders = request.out.endswith("/") or not out.suffix
    stem, ends = (out.name, "/") if folders else (out.stem, out.suffix)
    manifest = out.with_name(f"{stem}.family.json")
    paths = [f"{out.with_name(f'{stem}-{size:g}')}{ends}" for size in sizes]
    for path in paths:
        check_writable(path)
    check_file(manifest)
    check_apart(request, {f"a size of {size}": path for size, path in zip(sizes, paths, strict=True)})
    check_quantize(request)
    if Processes.here().count > 1:
        raise InputError("several processes were launched, and each would make a family of its own; run it in one")
    asked = _asked(request, progress)
    learned = _learned(request, asked)
    finished: list[Checkpoint] = []
    family: list[Member] = []
    written: list[dict[str, Any]] = []
    figures = {
        "model": request.model,
        "target": asked.options["target"],
        "sizes": sizes,
        "notes": list(asked.problems),
        "members": written,
    }
    made = members(
        *asked.inputs, sizes=sizes, recovery=recovery, data=learned["data"], labels=learned["labels"],
        loss=learned["loss"], budget=budget, finished=finished, progress=progress, **asked.options,
    )  # fmt: skip
    for member, path in zip(made, paths, strict=True):
        family.append(member)
        progress("emit", len(written), len(paths))
        quantize = _quantization(request, asked, family[0].result.traced)
        report = member.result.save(path, quantize=quantize, progress=progress)
        more = {"verification": dict(report.verification), "quantization": report.quantization}
        written.append({**member.to_json(), "file": Path(path).name, **more, "notes": list(report.notes)})
        write_text(manifest, json.dumps(finite(figures), indent=1, allow_nan=False) + "\n")
    for checkpoint in finished:
        checkpoint.drop()
    return finite({**figures, "manifest": str(manifest)})


@dataclass(frozen=True)
class _Asked:
    """What a request comes to: (model, args, kwargs), options of `prepare_model`, and what is wrong with plugins."""

    source: Source
    inputs: tuple[Any, tuple[Any, ...], dict[str, Any]]
    options: dict[str, Any]
    problems: tuple[str, ...]


def _asked(request: Request, progress: Callable[[str, int, int], None]) -> _Asked:
    found = discover()
    for problem in found.problems:  # said before the work: it may be why a budget cannot be met
        progress(problem, 0, 0)
    words = [word for word in request.options if not word.startswith(OF_RECOVERY)]
    passes = configure(found.passes, words)
    passes = passes if request.passes is None else select(passes, request.passes.split(","))
    for word in words:
        if word.partition(".")[0].strip() not in {transform.name for transform in passes}:
            raise InputError(f"--option {word} is of a pass that --passes {request.passes} leaves out; leave out one")
    source = load(request.model, arch=request.arch, trust_pickle=request.trust_pickle)
    calibration = _calibration(request, source, request.calib)
    args, kwargs = _inputs(request, source, calibration)
    options: dict[str, Any] = {"target": request.target or DEFAULT_TARGET, "calibration": calibration, "passes": passes}
    names = ("skip", "dtype", "batch", "max_rank", "io_rank", "opset")
    options |= {name: getattr(request, name) for name in names} | {"seed": request.seed or 0}
    if request.quantize is not None:
        state = source.program.state_dict  # an exported program's is no method
        values = (state() if callable(state) else state).values()
        check_float32([value for value in values if isinstance(value, Tensor)], request.dtype)
    return _Asked(source, (source.program, args, kwargs), options, found.problems)


def _quantization(request: Request, asked: _Asked, original: Traced | None = None) -> Quantization | None:
    if request.quantize is None:
        return None
    return Quantization(asked.options["calibration"], request.max_error, original)


def _learned(request: Request, asked: _Asked) -> dict[str, Any]:
    """What a recovery trains on, as `recover` takes it: inputs, and labels and a loss of them if there are any."""
    data = _calibration(request, asked.source, request.recover_data, MOST_LEARNED) or asked.options["calibration"]
    if data is None:
        raise InputError("--recover has no inputs to learn from; give --calib, or --recover-data, which it alone reads")
    if request.loss is not None and request.labels is None:
        raise InputError(f"--loss {request.loss} compares outputs with labels, and there are none; give --labels too")
    loss = None if request.loss is None else OwnLoss.of(import_attribute(request.loss), request.loss)
    labels = None if request.labels is None else load_labels(request.labels, whole=loss is None)
    return {"data": data, "labels": labels, "loss": loss}


def _calibration(
    request: Request, source: Source, path: str | None, max_batches: int | None = MOST_BATCHES
) -> CalibrationData | None:
    if path is None:
        return None
    required, optional = parameters(source.program)
    example = _example(request, source)
    size = batch_size(pytree.tree_leaves(example))
    if example is not None and isinstance(source.program, nn.Module) and source.kind == "module":
        required, optional = flat_names(source.program, *example), ()
    if not required and not optional:
        raise InputError(
            f"{source.name} takes no input by name, so data cannot be told apart; save it with torch.export.save and "
            "give the archive"
        )
    return load_calibration(path, required, request.batch or size or 8, max_batches=max_batches, optional=optional)


def _inputs(
    request: Request, source: Source, calibration: CalibrationData | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs: from --input, else from the model's own archive, else the first calibration batch."""
    example = _example(request, source)
    if example is not None:
        return example
    if calibration is not None:
        return call_inputs(source.program, calibration.batches[0])
    names = ", ".join(input_names(source.program))
    raise InputError(
        f"{source.name} holds no example inputs; give one --input for each of {names}, "
        "such as --input x=float32[1,3,224,224], or --calib data.npz"
    )


def _example(request: Request, source: Source) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Example inputs from --input, else from the model's own archive, or None."""
    if request.inputs:
        return call_inputs(source.program, example_inputs(parse_inputs(request.inputs), request.seed or 0))
    if source.args is not None or source.kwargs is not None:
        return source.args or (), source.kwargs or {}
    return None


def calibrate_file(
    out: Path, seconds: float, seed: int, progress: Progress, plot: Path | None = None, runtime: str = "onnxruntime"
) -> Calibration:
    """Calibrates this machine and writes its profile, and a plot of it if asked for.

    Raises:
        InputError: a file cannot be written, or there is no such runtime.
        DeviceError: there was too little time, or the machine was too busy.
    """
    if out.suffix != ".toml":
        raise InputError(f"cannot write {out}: a profile's name ends in .toml; give --out {out.stem or 'mine'}.toml")
    if not 0 < seconds < math.inf:
        raise InputError(f"--minutes {seconds / 60:g} is no time to measure; expected more than 0, such as 15")
    check_file(out)
    if plot is not None:
        check_plottable(plot)
        check_file(plot)
    from lrcompile.devices.calibrate import calibrate_here

    found, text = calibrate_here(out.stem, seconds, seed, progress, runtime)
    write_text(out, text)
    if plot is not None:
        plot_calibration(found.predicted_without(), plot)
    return found
