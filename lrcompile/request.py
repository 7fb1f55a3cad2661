"""What the user of the command line asked for, and what of it is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lrcompile.emit.write import check_onnx
from lrcompile.errors import InputError
from lrcompile.frontend.files import exists
from lrcompile.planning.budget import Budget, parse_latency, parse_size
from lrcompile.planning.measures import RELATIVE
from lrcompile.planning.plan import Plan
from lrcompile.plugins import parsed_option
from lrcompile.quantization.quantize import RESERVE, check_float32
from lrcompile.recovery.settings import Recovery
from lrcompile.writing import is_device

OF_RECOVERY = "recover."  # begins the options that are of no pass, but of a recovery


@dataclass(frozen=True)
class Request:
    """What the user asked for, as given."""

    model: str
    target: str | None
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
    eval_by_site: bool | None
    max_drop: float | None
    measure: str | None
    confidence: float | None
    strategy: str | None
    passes: str | None
    options: tuple[str, ...]
    skip: tuple[str, ...]
    seed: int | None
    plan: Path | None
    plan_out: Path | None
    report: Path | None
    report_json: Path | None
    recover: int | None
    recover_minutes: float | None
    recover_data: str | None
    labels: str | None
    loss: str | None
    progressive: str | None
    quantize: str | None

    def __post_init__(self) -> None:
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"--seed {self.seed} is too large; expected a whole number of 64 bits")

    @classmethod
    def of(cls, **given: Any) -> Request:
        """A request of which the rest is left open."""
        left_open: dict[str, Any] = dict.fromkeys(f.name for f in fields(cls))
        return cls(**left_open | given)

    def budget(self) -> Budget:
        """What is asked of the choice."""
        options: dict[str, Any] = {"max_error": self.max_error, "speedup": self.speedup}
        options |= {"max_drop": self.max_drop, "measure": self.measure or RELATIVE.name}
        if self.size is not None:
            options["size"] = parse_size(self.size)
        if self.max_latency is not None:
            options["max_latency_s"] = parse_latency(self.max_latency)
        if self.confidence is not None:
            options["confidence"] = self.confidence
        if self.quantize is not None:
            options |= {"reserve": RESERVE, "int8": self.progressive is None}  # a family's sizes are those of floats
        if self.strategy is not None:
            options["strategy"] = self.strategy
        return Budget(**options)

    def recovery(self) -> Recovery | None:
        """What is asked of a recovery."""
        words = [word.removeprefix(OF_RECOVERY) for word in self.options or () if word.startswith(OF_RECOVERY)]
        asked = self.recover is not None or self.recover_minutes is not None
        extras = {"--option recover.…": words, "--recover-data": self.recover_data, "--labels": self.labels}
        extras |= {"--loss": self.loss}
        for name, given in extras.items():
            if given and not asked:
                raise InputError(f"{name} belongs to a recovery; give --recover STEPS or --recover-minutes MINUTES too")
        if not asked:
            return None
        settings: dict[str, Any] = {"steps": self.recover, "minutes": self.recover_minutes, "seed": self.seed or 0}
        for word in words:
            option, _, text = word.partition("=")
            if option.strip() in ("steps", "minutes"):
                raise InputError(f"--option recover.{word} is said by --recover and --recover-minutes; leave it out")
            settings |= parsed_option(Recovery, "recover", option.strip(), text)
        return Recovery(**settings)


def check_apart(request: Request, outputs: Mapping[str, str | Path | None]) -> None:
    """Refuses outputs in one place, or in that of an input; a plan may be written where it was read."""
    inputs = {
        "the model": request.model, "--plan": request.plan, "--calib": request.calib,
        "--recover-data": request.recover_data, "--labels": request.labels,
    }  # fmt: skip
    taken = {Path(path).resolve(): name for name, path in inputs.items() if path is not None and exists(Path(path))}
    for name, path in outputs.items():
        if path is None or is_device(path):
            continue
        if Path(path).resolve() == Path.cwd():  # also an empty word, as of a variable that is not set
            raise InputError(f"cannot write {name} {path}: it is the folder that you are in; give a name")
        other = taken.setdefault(Path(path).resolve(), name)
        if other != name and (other, name) != ("--plan", "--plan-out"):
            raise InputError(f"cannot write {name} {path}: it is the file of {other}; give another path")


def check_replay(request: Request, plan: Plan | None) -> None:
    """Refuses what a replay would do without a word: its plan has decided."""
    if plan is None:
        return
    later = request.quantize is not None or request.recover is not None or request.recover_minutes is not None
    names = ["size", "speedup", "max_latency", "strategy", "confidence", "passes", *["max_error"] * (not later)]
    given = next((name for name in names if getattr(request, name) is not None), "skip" if request.skip else None)
    of_passes = [word for word in request.options if not word.startswith(OF_RECOVERY)]
    if given is not None or of_passes:
        option = "--" + given.replace("_", "-") if given else f"--option {of_passes[0]}"
        raise InputError(
            f"{option} has no meaning with --plan, whose rewrites are applied as they are; leave it out, or compile "
            "without --plan"
        )
    if request.measure not in (None, plan.budget.measure):
        raise InputError(
            f"the plan was made with --measure {plan.budget.measure}, got --measure {request.measure}; leave it out"
        )
    if request.seed not in (None, plan.seed):
        raise InputError(
            f"the plan was made with --seed {plan.seed}, got --seed {request.seed}; leave it out, or compile without "
            "--plan"
        )
    if request.target is not None and not _same_target(request.target, plan.target):
        raise InputError(
            f"the plan was made for --target {plan.target}, got --target {request.target}; leave it out, or compile "
            "without --plan"
        )


def _same_target(one: str, other: str) -> bool:
    """Whether two words name one profile, which may be a path."""
    both_paths = one.endswith(".toml") and other.endswith(".toml")
    return one == other or (both_paths and Path(one).resolve() == Path(other).resolve())


def check_opset(request: Request) -> None:
    """Refuses before the work what has no operators of ONNX."""
    if request.opset is not None and request.out is not None and not request.out.endswith(".onnx"):
        raise InputError(
            f"--opset {request.opset} is a version of ONNX, got --out {request.out}; leave it out, or give --out with "
            "a name that ends in .onnx"
        )


def check_quantize(request: Request) -> None:
    """Refuses before the work what cannot be quantised."""
    if request.quantize is None:
        return
    if request.quantize != "int8":
        raise InputError(f"--quantize {request.quantize} is unknown; expected int8")
    check_onnx(request.out)
    check_float32((), request.dtype)
    if request.calib is None:
        raise InputError("--quantize int8 needs inputs to calibrate with and to judge by; give --calib data.npz")
