"""Makes a GPU's profile of what `tools/measure_gpu.py` measured, and checks it: `python -m tools.gpu_profile h200`.

Read are `hardware_profiles/measured/h200.jsonl`, and beside it `h200-fresh.jsonl`, operations that nothing is fitted
to, `h200-pairs.jsonl` and `h200-networks.jsonl`; `h200-start.toml` is the profile that the fit starts from. Limits that
are missed make the command fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.calibrate import Calibration, calibrated, fitted_to, with_starts
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.features import family
from lrcompile.devices.profile import load_device
from lrcompile.devices.profile_text import profile_text
from lrcompile.devices.repeated import chain
from lrcompile.devices.visits import Measurement
from lrcompile.graph.op import AttentionShape, ConvShape, GemmShape, OpDesc, attention_op, conv_op, gemm_op
from tools.validate_profiles import SURE, by_chance, put

SHAPES: dict[str, Any] = {"gemm": GemmShape, "conv": ConvShape, "attention": AttentionShape}
FOLDER = Path(__file__).parents[1] / "hardware_profiles"
REPEATS = 0.05  # measurements of one operation that differ by more say nothing
FEW = 10
ENOUGH = 60  # splits that it is sure of
LIMITS = {"gemm-half": 0.08, "of images, half": 0.15}


def row_of(op: OpDesc) -> list[Any]:
    """An operation as plain values: its type and shape, or its function, row and bytes."""
    for kind in SHAPES:
        if (shape := getattr(op, kind)) is not None:
            return [kind, op.dtype, list(astuple(shape)), *([op.weight_bytes > 0] if kind == "gemm" else [])]
    return [op.function, op.dtype, [op.row, op.flops, op.activation_bytes]]


def op_of(row: Sequence[Any]) -> OpDesc:
    """The operation that `row_of` wrote."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    kind, dtype, values, *weight = row
    if kind == "gemm":
        m, n, k, batch, layout = values
        return gemm_op(m, n, k, dtype, batch=batch, weight=weight[0], layout=layout)
    if kind == "conv":
        return conv_op(ConvShape(*tuples(values)), dtype)
    if kind == "attention":
        return attention_op(AttentionShape(*values), dtype)
    each, flops, moved = values
    return OpDesc("elementwise", dtype, flops, 0, moved, function=kind, row=each)


def read(path: Path) -> list[Measurement]:
    """Operations that were measured once or twice, without those that differ from themselves."""
    found = []
    for row in _rows(path):
        op, timings = op_of(row["op"]), row["timings_s"]
        if max(t for t, _ in timings) <= (1 + REPEATS) * min(t for t, _ in timings):
            costs = [Cost(t, sigma, op.flops, op.weight_bytes, op.activation_bytes) for t, sigma in timings]
            found.append(Measurement.of(op, costs))
    return found


def left_out(found: Calibration) -> tuple[str, dict[str, float]]:
    """A table of errors on operations left out, by family; the mean errors, of some groups too."""
    rows, errors = [], dict[str, float]()
    for row in sorted(found.summary(), key=lambda row: row["family"]):
        errors[row["family"]] = row["error"]
        rows.append(
            f"| {row['family']} | {row['count']} | {row['error']:.1%} | {row['sigma_robust']:.1%} "
            f"| {row['within_10']:.0%} | {row['formula']:.1%} |"
        )
    convolutions = [name for name in found.held_out if name in ("conv-half", "pointwise-half")]
    every = np.concatenate([np.abs(np.expm1(-found.held_out[name])) for name in convolutions])
    ops = [m.op.conv for name in convolutions for m in found.measurements if family(m.op) == name]
    whole = np.array([c is not None and (c.channels_in | c.channels_out) % 8 == 0 for c in ops])
    for name, some in (("of images, half", every), ("of them with channels in eights", every[whole])):
        errors[name] = float(some.mean())
        rows.append(f"| {name} | {len(some)} | {some.mean():.1%} |  | {(some <= 0.1).mean():.0%} |  |")
    head = "| operations | measured | error on those left out | robust σ | within 10 % | formula alone |"
    return "\n".join((head, "|---|---|---|---|---|---|", *rows)), errors


def fresh(device: Device, measurements: Sequence[Measurement]) -> str:
    """Errors of predictions of operations that nothing was fitted to, of families with ten or more."""
    model, errors = AnalyticCostModel(device), dict[str, list[float]]()
    for m in measurements:
        errors.setdefault(family(m.op) or "", []).append(model.cost(m.op).latency_s / m.cost.latency_s - 1)
    lines = ["| operations | count | mean error | median | within 10 % |", "|---|---|---|---|---|"]
    for name, found in sorted(errors.items()):
        e = np.abs(found)
        if len(e) >= FEW:
            lines.append(f"| {name} | {len(e)} | {e.mean():.1%} | {np.median(e):.1%} | {(e <= 0.1).mean():.0%} |")
    return "\n".join(lines)


def pairs(device: Device, path: Path) -> tuple[str, int, float]:
    """(a table of splits by their chance of being faster, how many have one of 0.9 or more, how many of these are)."""
    model, chances, faster = AnalyticCostModel(device), [], []
    for row in _rows(path):
        sides = [chain([op_of(op) for op in side]) for side in row["pair"]]
        old, new = model.compare(sides[0], sides[1])
        chances.append((old - new).p_positive)
        faster.append(row["timings_s"][1][0] < row["timings_s"][0][0])
    p, won = np.array(chances), np.array(faster)
    sure = p >= SURE
    return by_chance(p, won, "splits")[0], int(sure.sum()), float(won[sure].mean())


def networks(device: Device, path: Path) -> str:
    """Whole models: the sum of their operations, nothing fused, beside the graph replayed and the eager calls."""
    from tools.validate_models import at_batch, in_half  # which loads architectures

    model, graphs = AnalyticCostModel(device), dict[str, Any]()
    lines = ["| model | type | batch | CUDA graph | eager calls | predicted |", "|---|---|---|---|---|---|"]
    for row in _rows(path):
        ops = [op for op in at_batch(row["model"], row["batch"], graphs) if op.kind != "view"]
        if row["dtype"] != "fp32":
            ops = [in_half(op, row["dtype"]) for op in ops]
        predicted, (measured, _) = sum(model.cost(op).latency_s for op in ops), row["graph_s"]
        times = " | ".join(f"{seconds * 1e3:.2f} ms" for seconds in (measured, row["eager_s"], predicted))
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['batch']} | {times} ({predicted / measured - 1:+.0%}) |"
        )
    return "\n".join(lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "problem" not in row]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the shipped profile; measured/NAME*.jsonl are read beside it")
    parser.add_argument("--source", help="where the figures come from, in words: writes the profile anew")
    parser.add_argument("--out", type=Path, help="put the tables into this page, between their marks")
    options = parser.parse_args(arguments)
    start = FOLDER / "measured" / f"{options.name}-start.toml"
    files = {part: start.with_name(f"{options.name}{part}.jsonl") for part in ("", "-fresh", "-pairs", "-networks")}
    found = fitted_to(with_starts(load_device(str(start))), read(files[""]), 0)
    device = replace(found.device, residuals=found.residuals)
    kept, errors = left_out(found)
    table, count, share = pairs(device, files["-pairs"])
    line = f"{count} splits have a chance of {SURE:g} or more; {share:.1%} of them are faster."
    parts = {
        "left out": kept, "fresh": fresh(device, read(files["-fresh"])), "splits": f"{line}\n\n{table}",
        "networks": networks(device, files["-networks"]),
    }  # fmt: skip
    for name, text in parts.items():
        print(text, end="\n\n")
        if options.out:
            put(options.out, f"<!-- {options.name} {name}: start -->", text, f"<!-- {options.name} {name}: end -->")
    if options.source:
        shipped = load_device(options.name)
        source = f"measured here ({options.source}, {len(found.measurements)} operations)"
        text = profile_text(calibrated(found, options.name, shipped.description, source), f"{shipped.description}.")
        (FOLDER / f"{options.name}.toml").write_text(text, encoding="utf-8")
    missed = [f"{name}: {errors[name]:.1%} > {most:.0%}" for name, most in LIMITS.items() if errors[name] > most]
    missed += [] if count >= ENOUGH and share >= SURE else [line]
    print(*(f"MISSED {text}" for text in missed), sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
