"""The command line: `lrcompile model.pt --target v100 --out model_lr.onnx`, and what belongs to it."""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lrcompile.errors import InputError, LrcompileError, PlanError, is_out_of_memory
from lrcompile.report.console import Screen, discard, prepare_streams

app = typer.Typer(
    name="lrcompile",
    help="Rewrites a trained model where that makes it faster on a device.  "
    "Main form: lrcompile MODEL --target NAME --out FILE.  "
    "A front of latency against error: lrcompile tradeoff MODEL --target NAME",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS = ("compile", "tradeoff", "devices", "passes", "predict", "bench", "calibrate", "explain")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Target = Annotated[str, typer.Option(help="A device profile (see `lrcompile devices`), or its path.")]


def run(arguments: Sequence[str]) -> int:
    """Runs a command line; returns its exit code: 0 done, 1 budget not met, 2 bad usage or input, 130 interrupted."""
    words = list(arguments)
    prepare_streams()
    errors = _screen(stderr=True, soft_wrap=True)
    try:
        if words and words[0] not in (*COMMANDS, "--help", "--version"):
            _check_not_a_command(words[0])
            words.insert(0, "compile")
        code = app(args=words, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except LrcompileError as error:
        errors.print(f"lrcompile: {error}")
        return error.exit_code
    except BrokenPipeError:
        discard(sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            errors.print("lrcompile: out of memory; try a smaller --batch or fewer calibration samples")
            return 2
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            discard(sys.stdout.fileno())
            where = error.filename or "standard output"
            with suppress(OSError):  # where errors go may be on the same disk
                errors.print(f"lrcompile: cannot write {where}: {error.strerror}; make room, or write elsewhere")
            return 2
        if hasattr(error, "format_message"):  # a usage error of the option parser
            command = words[0] if words and words[0] in COMMANDS else ""
            message = error.format_message().rstrip(".")
            errors.print(f"lrcompile: {message}; see: {' '.join(['lrcompile', command]).strip()} --help")
            return 2
        raise


def _check_not_a_command(model: str) -> None:
    """Refuses as a model what is a misspelt command."""
    near = difflib.get_close_matches(model, COMMANDS, 1, 0.7) if model.isalpha() else []
    if near and not os.path.exists(model):
        raise InputError(f"there is no command or file {model}; did you mean: lrcompile {near[0]}")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"lrcompile {installed('lrcompile')}")
        raise typer.Exit


@app.command("compile")
def compile_command(
    model: Annotated[str, typer.Argument(help="An exported archive, TorchScript, state dict, or pkg.mod:factory.")],
    target: Annotated[
        str | None,
        typer.Option(help="A device profile (see `lrcompile devices`), its path, or local.", show_default="v100"),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Output: .onnx, .pt2, or a folder.")] = None,
    arch: Annotated[str | None, typer.Option(help="pkg.mod:factory that builds the module of a state dict.")] = None,
    trust_pickle: Annotated[bool, typer.Option(help="Unpickle a whole module: runs code from the file.")] = False,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="name=float32[1,3,224,224]; repeat.")] = None,
    calib: Annotated[
        str | None, typer.Option(help="Calibration data: .npz, .pt, .safetensors, pkg.mod:loader.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size to compile for.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision: fp32, fp16 or bf16.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Highest rank of tensors inside the graph, 4.")] = None,
    io_rank: Annotated[int | None, typer.Option(help="The same for its inputs and outputs.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23; 20 if not given, 22 in bf16.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Largest relative output error.")] = None,
    measure: Annotated[
        str | None, typer.Option(help="What --max-error is of: error (the default), kl (nats) or top1 (share).")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Weight size: 0.5, 50% or 12MB.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Least speed-up, such as 1.5.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Largest latency, such as 12ms.")] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval", help="pkg.mod:fn, from the model to a number, higher is better, or one for each sample."
        ),
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="How far that number may fall.")] = None,
    eval_by_site: Annotated[
        bool, typer.Option("--eval-by-site", help="Evaluate with each rewrite alone too: how far the number falls.")
    ] = False,
    confidence: Annotated[float | None, typer.Option(help="Least P(faster) of a rewrite.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="What chooses: milp (the default), beam, latency-step, energy or uniform.")
    ] = None,
    passes: Annotated[str | None, typer.Option(help="Comma-separated passes to use; -name leaves one out.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="An option of a pass: PASS.OPTION=VALUE; repeat.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Glob of sites to leave alone; repeat.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of made-up inputs.", show_default="0")] = None,
    plan: Annotated[Path | None, typer.Option(help="Replay this plan.")] = None,
    plan_out: Annotated[Path | None, typer.Option(help="Save the plan here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Save the report here, .html, to look at in a browser.")] = None,
    report_json: Annotated[Path | None, typer.Option(help="Save the report's figures here, as JSON.")] = None,
    recover: Annotated[int | None, typer.Option(help="Train what was rewritten, so many steps, on --calib.")] = None,
    recover_minutes: Annotated[float | None, typer.Option(help="The same, for so many minutes.")] = None,
    recover_data: Annotated[str | None, typer.Option(help="Inputs to train on instead, read as --calib is.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels to train on too: .npy, .npz, .pt or .safetensors.")] = None,
    loss: Annotated[str | None, typer.Option(help="pkg.mod:fn, of outputs and --labels, to train on.")] = None,
    progressive: Annotated[
        str | None,
        typer.Option(help="Falling sizes 0.8,0.6,0.4: a family, each made of the last and trained."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: the ONNX output in 8-bit integers, within --max-error; needs --calib.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compiles a model for a target; the word `compile` may be left out."""
    from lrcompile.session import Request, compile_files, family_files

    request = Request(
        model=model, target=target, out=out, arch=arch, trust_pickle=trust_pickle, inputs=tuple(inputs or ()),
        calib=calib, batch=batch, dtype=dtype, max_rank=max_rank, io_rank=io_rank, opset=opset,
        max_error=max_error, size=size, speedup=speedup, max_latency=max_latency, eval=evaluation, max_drop=max_drop,
        eval_by_site=eval_by_site or None,
        measure=measure, confidence=confidence, strategy=strategy, passes=passes,
        options=tuple(options or ()), skip=tuple(skip or ()), seed=seed, plan=plan, plan_out=plan_out,
        report=report, report_json=report_json, recover=recover, recover_minutes=recover_minutes,
        recover_data=recover_data, labels=labels, loss=loss, progressive=progressive, quantize=quantize,
    )  # fmt: skip
    from lrcompile.report.progress import ProgressDisplay
    from lrcompile.report.terminal import print_family, print_report

    with ProgressDisplay(_screen(stderr=True)) as display, _prints_aside(as_json):
        family = family_files(request, display) if progressive is not None else None
        done = compile_files(request, display) if family is None else None
    if family is not None:
        _print_json(family) if as_json else print_family(_console(), family)
    if done is None:
        return
    if as_json:
        _print_json(done.to_json())
        return
    console = _console()
    print_report(console, done)
    for path in (out, plan_out, report, report_json):
        if path is not None:
            console.print(f"wrote     {path}")


def _with_options_of(command: Callable[..., Any], names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command that takes `**asked` the options of these names of another, ahead of its own."""

    def extended(function: Callable[..., None]) -> Callable[..., None]:
        known = {**_parameters(command), **_parameters(function)}
        chosen = {name: known[name] for name in (*names.split(), *_parameters(function))}
        function.__annotations__ = {name: parameter.annotation for name, parameter in chosen.items()}
        function.__signature__ = inspect.Signature(list(chosen.values()))  # type: ignore[attr-defined]
        return function

    return extended


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a function, their annotations evaluated."""
    signature = inspect.signature(function, eval_str=True)
    return {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}


@app.command("tradeoff")
@_with_options_of(
    compile_command,
    "model target arch trust_pickle inputs calib batch dtype max_rank io_rank opset max_error confidence strategy "
    "passes options skip seed",
)
def tradeoff_command(
    points: Annotated[int, typer.Option(help="Latencies to try, evenly spread over what can be reached.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Save the front here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A plot of it: .svg, .png or .pdf; needs matplotlib.")] = None,
    plans: Annotated[Path | None, typer.Option(help="A folder for one plan a point: 1.json, 2.json …")] = None,
    as_json: Json = False,
    **asked: Any,
) -> None:
    """The front of latency against error of one model: the most accurate model at each of several latencies.

    With --max-error it ends there, else at the fastest that can be reached at any error.
    """
    from lrcompile.report.progress import ProgressDisplay
    from lrcompile.report.terminal import print_front
    from lrcompile.session import FrontFiles, Request, tradeoff_files

    lists = {name: tuple(asked.pop(name) or ()) for name in ("inputs", "options", "skip")}
    with ProgressDisplay(_screen(stderr=True)) as progress, _prints_aside(as_json):
        figures = tradeoff_files(Request.of(**asked, **lists), points, FrontFiles(out, plot, plans), progress)
    if as_json:
        _print_json(figures)
        return
    console = _console()
    print_front(console, figures, points)
    for path in (out, plot, plans):
        if path is not None:
            console.print(f"wrote     {path}")


@app.command()
def devices(as_json: Json = False) -> None:
    """Lists the device profiles."""
    from lrcompile.devices.profile import available_devices, load_device
    from lrcompile.report.terminal import plain_table

    found = [load_device(name) for name in available_devices()]
    if as_json:
        _print_json([{"name": d.name, "kind": d.kind, "description": d.description} for d in found])
        return
    rows = [(d.name, d.kind, d.description) for d in found]
    rows.append(("local", "cpu", "this machine, measured with ONNX Runtime"))
    _console().print(plain_table(("name", "kind", "description"), rows))


@app.command()
def passes(as_json: Json = False) -> None:
    """Lists the passes that are installed, in pipeline order."""
    from lrcompile.plugins import discover
    from lrcompile.report.terminal import plain_table

    with _prints_aside(as_json):
        found = discover()
    rows = [
        (
            p.name,
            p.stage.value,
            (p.__doc__ or "").strip().split("\n")[0],
            " ".join(f"{f.name}={_option(getattr(p, f.name))}" for f in fields(p)),
            found.origins[p.name],
        )
        for p in found.passes
    ]
    if as_json:
        keys = ("name", "stage", "equation", "options", "origin")
        listed = [dict(zip(keys, row, strict=True)) for row in rows]
        _print_json({"passes": listed, "problems": list(found.problems)})
        return
    console = _console()
    console.print(plain_table(("name", "stage", "equation", "options", "from"), rows))
    for problem in found.problems:
        console.print(f"note      {problem}")


@app.command()
def predict(
    operations: Annotated[Path, typer.Argument(help="CSV of operations, one a row.")],
    out: Annotated[Path, typer.Option(help="CSV to write: the same rows with predicted_ms and sigma.")],
    target: Target = "v100",
    dtype: Annotated[str | None, typer.Option(help="Precision: fp32, fp16, bf16 or int8.")] = None,
    as_json: Json = False,
) -> None:
    """Predicts the latency of single operations, in milliseconds."""
    from lrcompile.devices.predict import predict_csv
    from lrcompile.devices.profile import load_device

    device = load_device(target)
    count = predict_csv(operations, out, device, dtype)
    if as_json:
        _print_json({"rows": count, "out": str(out), "target": target, "kind": "analytic"})
    else:
        _console().print(f"predicted {count} operations on {target} (analytic); wrote {out}")


@app.command()
def bench(
    first: Annotated[Path, typer.Argument(help="An ONNX model.")],
    second: Annotated[Path, typer.Argument(help="Another, with the same inputs.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="An input of random values, as NAME=float32[1,128].")
    ] = None,
    batch: Annotated[int, typer.Option(help="Size of open batch dimensions.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    as_json: Json = False,
) -> None:
    """Measures two ONNX models against each other on this machine, paired and interleaved."""
    from lrcompile.devices.bench import paired
    from lrcompile.report.progress import ProgressDisplay
    from lrcompile.report.terminal import print_bench

    with ProgressDisplay(_screen(stderr=True)) as progress:
        given = None
        if inputs:  # only then, as it takes seconds to import torch
            from lrcompile.frontend.inputs import as_arrays, example_inputs, parse_inputs

            given = as_arrays(example_inputs(parse_inputs(inputs), seed, int_high=2))  # fits any table of an embedding
        result = paired(first, second, inputs=given, batch=batch, seconds=seconds, seed=seed, progress=progress)
    if as_json:
        _print_json(result.to_json())
    else:
        print_bench(_console(), first, second, result)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The profile to write, .toml: a --target from then on.")],
    minutes: Annotated[float, typer.Option(help="How long to measure, at most.")] = 15.0,
    runtime: Annotated[
        str,
        typer.Option(
            help="What runs them: onnxruntime, torch (eager), torch-compile; on a GPU torch-cuda, onnxruntime-cuda"
        ),
    ] = "onnxruntime",
    seed: Annotated[
        int, typer.Option(help="Seed of what is measured; the same one goes on where it was stopped.", min=0)
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="A plot of predicted against measured: .svg, .png or .pdf; needs matplotlib.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measures this machine's CPU or GPU and writes a profile that predicts it."""
    from lrcompile.report.progress import ProgressDisplay
    from lrcompile.report.terminal import plain_table
    from lrcompile.session import calibrate_file

    with ProgressDisplay(_screen(stderr=True)) as progress:
        found = calibrate_file(out, minutes * 60, seed, progress, plot, runtime)
    rows = found.summary()
    if as_json:
        counts = {"measured": len(found.measurements), "noisy": found.noisy, "within_10": found.within_10}
        _print_json({"out": str(out), **counts, "doubt": found.doubt, "families": rows})
        return
    shares = ("error", "within_10", "sigma", "sigma_robust", "formula")
    cells = [(row["family"], str(row["count"]), *(f"{row[key]:.1%}" for key in shares)) for row in rows]
    names = ("operations", "measured", "error on operations left out", "within 10 %", "σ", "robust σ", "formula alone")
    console = _console()
    console.print(plain_table(names, cells))
    console.print(f"measured {len(found.measurements)} operations, left {found.noisy} noisy ones out; wrote {out}")
    if found.doubt:
        console.print(f"do not trust it: {found.doubt}")


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="A plan written by --plan-out.")],
    site: Annotated[str | None, typer.Argument(help="One site: everything that was considered there.")] = None,
    as_json: Json = False,
) -> None:
    """Says what a plan decided, and why."""
    from lrcompile.planning.plan import Plan, finite
    from lrcompile.report.report import Decision
    from lrcompile.report.terminal import print_decisions, print_site

    loaded = Plan.load(plan)
    known = {item["site"]: item for item in loaded.sites}
    if site is not None and site not in known:
        near = difflib.get_close_matches(site, known, 3, 0.3)
        hint = f"did you mean {', '.join(near)}" if near else f"see: lrcompile explain {plan}"
        raise PlanError(f"{plan} has no site {site!r}; {hint}")
    if as_json:
        _print_json(finite(known[site] if site is not None else json.loads(loaded.dumps())))
        return
    console = _console()
    made = f"{len(loaded.rewrites)} rewrites, chosen by {loaded.budget.strategy_name}"
    try:
        if site is not None:
            print_site(console, Decision.from_json(known[site]))
            return
        decisions = [Decision.from_json(item) for item in loaded.sites]
        console.print(f"plan for {loaded.target}, {loaded.dtype}, batch {loaded.batch}: {made}")
        print_decisions(console, decisions)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{plan} is a damaged plan ({type(error).__name__}: {error}); write a new one") from error


def _option(value: Any) -> str:
    """An option's value as `--option` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_option, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _console() -> Screen:
    """Standard output; as wide as the terminal, or wide enough for a table where there is none."""
    console = _screen()
    return console if console.is_terminal else _screen(width=max(console.width, 160), soft_wrap=False)


def _screen(**options: Any) -> Screen:
    """Where text goes as it is: names of users have brackets and colons, which Rich takes for styles and pictures."""
    return Screen(highlight=False, markup=False, emoji=False, **options)


def _prints_aside(as_json: bool) -> AbstractContextManager[Any]:
    """Where what the user's own code prints goes: not between the lines of JSON."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _print_json(data: Any) -> None:
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    try:
        sys.stdout.write(text)
    except BrokenPipeError:  # which the option parser would end with exit code 1
        discard(sys.stdout.fileno())
