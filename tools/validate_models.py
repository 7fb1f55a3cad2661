"""Whole models against published latencies: `python tools/validate_models.py --out docs/cost-model.md`.

The measurements are in `../shared/latency`; see `validate_profiles.py`. A model is compared at every batch size that is
published; for the rank correlation it counts once, at the batch nearest to 8. Profiles whose limit is missed make the
command fail.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import total
from lrcompile.devices.device import Device, load_device
from lrcompile.devices.fusion import describe_all
from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import Graph, propagate
from lrcompile.graph.op import OpDesc
from tools.published_models import MODELS
from tools.validate_profiles import LATENCY, put

START, END = "<!-- models: start -->", "<!-- models: end -->"
NEAR = 8
LIMITS = {"ascend310p": 0.8, "ascend310": None, "t4": None}
DEVICES = {"ascend310p": "Ascend310P", "ascend310": "Ascend310", "t4": "T4"}


@dataclass(frozen=True)
class Point:
    """A model at a batch size: what was published and what is predicted, in ms, and half of the error bar's width."""

    model: str
    batch: int
    measured_ms: float
    predicted_ms: float
    sigma_ms: float


def published(folder: Path, device: str) -> dict[str, dict[int, float]]:
    """Latency in ms by model and batch, for models that can be made here; the median of several."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (folder / "ascend_modelzoo_infer.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["device"] == device and row["quality"] == "ok" and row["model"] in MODELS:
                found[row["model"]][int(row["batch"])].append(float(row["ms"]))
    return {name: {batch: median(values) for batch, values in sorted(rows.items())} for name, rows in found.items()}


def prepared(name: str) -> tuple[Graph, Tensor]:
    """A model's graph, and an input of one sample."""
    make, example = MODELS[name]
    torch.manual_seed(0)
    return trace(make().eval(), (example,)).graph, example


def in_half(op: OpDesc) -> OpDesc:
    """The operation as it is in half precision."""
    if op.dtype != "fp32":
        return op
    return replace(op, dtype="fp16", weight_bytes=op.weight_bytes / 2, activation_bytes=op.activation_bytes / 2)


def points(
    device: Device, rows: Mapping[str, Mapping[int, float]], graphs: dict[str, tuple[Graph, Tensor]]
) -> list[Point]:
    """Predictions for what is published; graphs are made once and kept."""
    model, result = AnalyticCostModel(device), []
    for name, by_batch in rows.items():
        if name not in graphs:
            graphs[name] = prepared(name)
        graph, example = graphs[name]
        for batch, measured_ms in by_batch.items():
            gm = propagate(graph.copy().gm, (example.new_empty(batch, *example.shape[1:]),)).gm
            cost = total([model.cost(in_half(op)) for op in describe_all(gm, device.fuses).values()])
            result.append(Point(name, batch, measured_ms, cost.latency_s * 1e3, cost.sigma_s * 1e3))
    return result


def one_each(found: Sequence[Point]) -> list[Point]:
    """Of each model the point nearest to a batch of 8."""
    by_model: dict[str, list[Point]] = defaultdict(list)
    for point in found:
        by_model[point.model].append(point)
    return [min(group, key=lambda p: abs(math.log(p.batch / NEAR))) for group in by_model.values()]


def summary(profile: str, found: Sequence[Point]) -> tuple[str, bool]:
    """A row of the table, and whether the limit holds."""
    each = one_each(found)
    measured, predicted = ([getattr(p, name) for p in each] for name in ("measured_ms", "predicted_ms"))
    rho, tau = float(spearmanr(predicted, measured).statistic), float(kendalltau(predicted, measured).statistic)
    errors = [abs(p.predicted_ms / p.measured_ms - 1) for p in found]
    bias = median(math.log(p.predicted_ms / p.measured_ms) for p in found)
    limit = LIMITS[profile]
    holds = limit is None or (rho >= limit and len(each) >= 30)
    bound = f"≥ {limit}" if limit else ""
    row = (
        f"| {profile} | {len(each)} | {len(found)} | {rho:.3f} | {tau:.3f} | {100 * median(errors):.0f} % "
        f"| {math.expm1(bias):+.0%} | {bound} |"
    )
    return row, holds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=LATENCY, help="the folder of tables (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        print(f"validate_models: no folder {options.data}; give --data", file=sys.stderr)
        return 1
    lines = [
        "| profile | models | points | Spearman's ρ | Kendall's τ | median error | median bias | limit of ρ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    graphs: dict[str, tuple[Graph, Tensor]] = {}
    failed = False
    for profile, device in DEVICES.items():
        found = points(load_device(profile), published(options.data, device), graphs)
        for p in one_each(found):
            print(
                f"{profile:11} {p.model:30} batch {p.batch:3} {p.measured_ms:9.2f} ms, predicted {p.predicted_ms:9.2f}"
            )
        row, holds = summary(profile, found)
        lines.append(row)
        failed |= not holds
        print(row, flush=True)
    if options.out:
        put(options.out, START, "\n".join(lines), END)
    return int(failed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
