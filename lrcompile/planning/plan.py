"""The plan: the decisions of a compile as a small JSON file that can be read, disputed and replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.devices.target import DEFAULT_TARGET
from lrcompile.errors import PlanError
from lrcompile.graph.rewrite import Rewrite
from lrcompile.planning.budget import Budget

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """Which rewrites, in order, on which graph, for which device and budget.

    `fingerprint` is that of the traced graph with its weights; `calibration` is the digest of the calibration data,
    None where there were none; `options` holds the fields of every pass in use; `sites` is the decision table.
    `recovery` holds the figures of the training that followed, which a replay does not repeat.
    `max_rank` and `io_rank` limit the rank of values inside the graph and at its ends: the graph that is meant, and
    that the fingerprint is of, is the lowered one. `opset` is that of ONNX output, None for the usual one. `held_out`
    counts the calibration batches, from the end, that the factors are not fitted to.
    `metric` holds the figures of the user's metric, as they were then: a replay does not evaluate it. `int8` says what
    was written in 8-bit integers: `written`, the names of layers `left_float`, and `weight_bits` by kind of layer.
    """

    target: str
    dtype: str
    batch: int | None
    fingerprint: str
    calibration: str | None
    seed: int
    budget: Budget
    rewrites: tuple[Rewrite, ...]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sites: Sequence[Mapping[str, Any]] = ()
    max_rank: int | None = None
    io_rank: int | None = None
    opset: int | None = None
    recovery: Mapping[str, Any] | None = None
    metric: Mapping[str, Any] | None = None
    held_out: int = 0
    int8: Mapping[str, Any] | None = None

    def with_int8(self, figures: Mapping[str, Any] | None) -> Plan:
        """The plan with what was written in 8-bit integers, by the figures of `Report.quantization`: None, nothing."""
        keys = ("written", "left_float", "weight_bits")
        return replace(self, int8=None if figures is None else {key: figures[key] for key in keys})

    def dumps(self) -> str:
        """The plan as JSON text; the same plan gives the same text.

        Raises:
            PlanError: an option of a pass, or a parameter of a rewrite, is no JSON value.
        """
        data = {
            "schema": SCHEMA,
            "target": self.target,
            "dtype": self.dtype,
            "batch": self.batch,
            "max_rank": self.max_rank,
            "io_rank": self.io_rank,
            "opset": self.opset,
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "held_out": self.held_out,
            "seed": self.seed,
            "budget": self.budget.to_json(),
            "metric": None if self.metric is None else finite(self.metric),
            "options": {name: dict(options) for name, options in sorted(self.options.items())},
            "rewrites": [rewrite.to_json() for rewrite in self.rewrites],
            "recovery": None if self.recovery is None else finite(self.recovery),
            "int8": None if self.int8 is None else dict(self.int8),
            "sites": finite(list(self.sites)),
        }
        try:
            return json.dumps(data, indent=1, default=_plain) + "\n"
        except TypeError as error:
            raise PlanError(
                f"the plan cannot be written: {error}; a plugin has an option or made a rewrite with such a value, and "
                "both must be JSON values: numbers, text, tuples"
            ) from error

    @classmethod
    def loads(cls, text: str, source: str = "plan") -> Plan:
        """The plan in a JSON text.

        Raises:
            PlanError: the text is no plan of this schema.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not JSON ({error}); expected a file written by --plan-out") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"{source} is no plan of schema {SCHEMA} (got {got}); write a new one with --plan-out")
        if "points" in data or "latency_ms" in data:
            raise PlanError(f"{source} is a report or a front, not a plan; expected a file written by --plan-out")
        try:
            return cls(
                target=data["target"],
                dtype=data["dtype"],
                batch=_batch(data["batch"]),
                fingerprint=data["fingerprint"],
                calibration=data["calibration"],
                seed=int(data["seed"]),
                budget=Budget.from_json(data["budget"]),
                rewrites=tuple(Rewrite.from_json(item) for item in data["rewrites"]),
                options={name: dict(options) for name, options in data["options"].items()},
                sites=[{**site, "site": str(site["site"])} for site in data["sites"]],
                max_rank=data.get("max_rank"),
                io_rank=data.get("io_rank"),
                opset=data.get("opset"),
                recovery=None if data.get("recovery") is None else _recovery(data["recovery"]),
                metric=None if data.get("metric") is None else dict(data["metric"]),
                held_out=int(data.get("held_out", 0)),
                int8=None if data.get("int8") is None else _int8(**data["int8"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"{source} is a damaged plan ({type(error).__name__}: {error}); write a new one with --plan-out"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a file.

        Raises:
            PlanError: the file cannot be read or is no plan.
        """
        try:
            return cls.loads(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError) as error:  # a byte that is no text, or a null byte in the name
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise PlanError(f"cannot read plan {path}: {why}; expected a file written by --plan-out") from error

    def check_decided(self, target: object, skip: Sequence[str], seed: int, budget: Budget | None) -> None:
        """Refuses what a replay would do without a word; defaults ask for nothing.

        Raises:
            PlanError: another target or seed, layers to skip, or a budget is given.
        """
        name = getattr(target, "name", target)
        given = {
            f"target {name!r}": name not in (DEFAULT_TARGET, self.target), f"skip {list(skip)!r}": bool(skip),
            f"seed {seed}": seed not in (0, self.seed), "a budget": budget is not None,
        }  # fmt: skip
        for what, decided in given.items():
            if decided:
                raise PlanError(
                    f"{what} has no meaning with a plan, whose rewrites are applied as they are; leave it out, or "
                    "compile without the plan"
                )

    def check_ranks(self, max_rank: int | None, io_rank: int | None) -> None:
        """Refuses limits that the plan was not made with; None asks for none.

        Raises:
            PlanError: the plan was made for another rank.
        """
        for option, asked, made in (("max-rank", max_rank, self.max_rank), ("io-rank", io_rank, self.io_rank)):
            if asked is not None and asked != made:
                raise PlanError(
                    f"the plan was made with {f'--{option} {made}' if made else f'no --{option}'}, got --{option} "
                    f"{asked}; leave the option out, or make a new plan"
                )

    def check_fits(self, fingerprint: str, calibration: str | None) -> None:
        """Refuses a plan that was made for something else.

        Raises:
            PlanError: the model or the calibration data differ from those that the plan was made with.
        """
        if fingerprint != self.fingerprint:
            raise PlanError(
                f"the plan was made for another model: its fingerprint is {self.fingerprint[:12]}…, this model's is "
                f"{fingerprint[:12]}…; give the original model with the same --dtype, --input and --batch, or make a "
                "new plan"
            )
        if calibration != self.calibration:
            had = f"calibration data {self.calibration[:12]}…" if self.calibration else "no calibration data"
            got = f"calibration data {calibration[:12]}…" if calibration else "none"
            raise PlanError(
                f"the plan was made with {had}, got {got}; the factors depend on them: give the same --calib and "
                "--batch as then, and the same --input"
            )


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def finite(value: Any) -> Any:
    """JSON has no infinity: such figures become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def _batch(size: Any) -> int | None:
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"batch is {size!r}")
    return size


def _recovery(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says of a recovery: of how many steps, and how many batches of which data it was judged by alone."""
    counts = {name: int(figures[name]) for name in ("steps", "kept_out") if name == "steps" or "data" in figures}
    return {**figures, **counts}


def _int8(written: str, left_float: Sequence[str], weight_bits: Mapping[str, int]) -> dict[str, Any]:
    """What a plan says of 8-bit integers, checked."""
    if written not in ("int8", "float") or set(weight_bits.values()) - {7, 8}:
        raise ValueError(f"int8 is {written} with weights of {weight_bits} bits")
    return {"written": written, "left_float": [str(name) for name in left_float], "weight_bits": dict(weight_bits)}
