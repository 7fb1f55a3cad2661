"""One command-line compile: from the words of the user to files; used by `lrcompile.cli`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from lrcompile.compile import compile as compile_model
from lrcompile.emit.write import check_writable, write_text
from lrcompile.errors import InputError
from lrcompile.frontend.calibration_data import CalibrationData, load_calibration
from lrcompile.frontend.export import batch_size
from lrcompile.frontend.inputs import call_inputs, example_inputs, input_names, parse_inputs
from lrcompile.frontend.load import Source, load
from lrcompile.planning.budget import Budget, parse_latency, parse_size
from lrcompile.planning.metric import Evaluation, check_metric
from lrcompile.planning.plan import Plan
from lrcompile.plugins import configure, discover, select
from lrcompile.report.plots import check_plottable, plot_calibration
from lrcompile.report.report import Report

if TYPE_CHECKING:  # fitting imports what a compile does without
    from lrcompile.devices.calibrate import Calibration, Progress


@dataclass(frozen=True)
class Request:
    """What the user asked for, as given."""

    model: str
    target: str
    out: str | None
    arch: str | None
    trust_pickle: bool
    inputs: tuple[str, ...]
    calib: str | None
    batch: int | None
    dtype: str | None
    max_rank: int | None
    io_rank: int | None
    opset: int | None
    max_error: float | None
    size: str | None
    speedup: float | None
    max_latency: str | None
    eval: str | None
    max_drop: float | None
    measure: str
    confidence: float | None
    passes: str | None
    options: tuple[str, ...]
    skip: tuple[str, ...]
    seed: int
    plan: Path | None
    plan_out: Path | None
    report_json: Path | None


def compile_files(request: Request, progress: Callable[[str, int, int], None]) -> Report:
    """Compiles as asked and writes what was asked for; nothing is written unless all of it succeeds.

    Raises:
        LrcompileError: the one of its kinds that says what the user can do.
    """
    if request.out is not None:
        check_writable(request.out)
    for path in (request.plan_out, request.report_json):
        if path is not None:
            check_writable(path, text=True)
    plan = Plan.load(request.plan) if request.plan else None
    budget = _budget(request)
    metric = check_metric(None if request.eval is None else Evaluation.load(request.eval), budget, plan)
    found = discover()
    passes = configure(found.passes, request.options)
    passes = select(passes, request.passes.split(",")) if request.passes else passes
    source = load(request.model, arch=request.arch, trust_pickle=request.trust_pickle)
    calibration = _calibration(request, source)
    args, kwargs = _inputs(request, source, calibration)
    result = compile_model(
        source.program, args, kwargs, target=request.target, budget=budget, calibration=calibration, passes=passes,
        plan=plan, skip=request.skip, dtype=request.dtype, batch=request.batch,
        max_rank=request.max_rank, io_rank=request.io_rank, opset=request.opset, seed=request.seed,
        metric=metric, progress=progress,
    )  # fmt: skip
    report = replace(result.report, notes=[*found.problems, *result.report.notes])
    if request.out is not None:
        progress("emit", 0, 0)
        report = replace(result, report=report).save(request.out)
    if request.plan_out is not None:
        write_text(request.plan_out, result.plan.dumps())
    if request.report_json is not None:
        write_text(request.report_json, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    return report


def _budget(request: Request) -> Budget:
    options: dict[str, Any] = {"max_error": request.max_error, "speedup": request.speedup}
    options |= {"max_drop": request.max_drop, "measure": request.measure}
    if request.size is not None:
        options["size"] = parse_size(request.size)
    if request.max_latency is not None:
        options["max_latency_s"] = parse_latency(request.max_latency)
    if request.confidence is not None:
        options["confidence"] = request.confidence
    return Budget(**options)


def _calibration(request: Request, source: Source) -> CalibrationData | None:
    if request.calib is None:
        return None
    example = batch_size(pytree.tree_leaves((source.args, source.kwargs)))
    return load_calibration(request.calib, input_names(source.program), request.batch or example or 8)


def _inputs(
    request: Request, source: Source, calibration: CalibrationData | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs: from --input, else from the model's own archive, else the first calibration batch."""
    if request.inputs:
        return call_inputs(source.program, example_inputs(parse_inputs(request.inputs), request.seed))
    if source.args is not None or source.kwargs is not None:
        return source.args or (), source.kwargs or {}
    if calibration is not None:
        return call_inputs(source.program, calibration.batches[0])
    names = ", ".join(input_names(source.program))
    raise InputError(
        f"{source.name} holds no example inputs; give one --input for each of {names}, "
        "such as --input x=float32[1,3,224,224], or --calib data.npz"
    )


def calibrate_file(
    out: Path, seconds: float, seed: int, progress: Progress, plot: Path | None = None, runtime: str = "onnxruntime"
) -> Calibration:
    """Calibrates this machine and writes its profile, and a plot of it if asked for.

    Raises:
        InputError: a file cannot be written, or there is no such runtime.
        DeviceError: there was too little time, or the machine was too busy.
    """
    if out.suffix != ".toml":
        raise InputError(f"cannot write {out}: a profile's name ends in .toml; give --out {out.stem}.toml")
    check_writable(out, text=True)
    if plot is not None:
        check_plottable(plot)
        check_writable(plot, text=True)
    from lrcompile.devices.calibrate import calibrate_here

    found, text = calibrate_here(out.stem, seconds, seed, progress, runtime)
    write_text(out, text)
    if plot is not None:
        plot_calibration(found.predicted_without(), plot)
    return found
