"""Whole models against published latencies: `python tools/validate_models.py --out docs/cost-model.md`.

The measurements are in `../shared/latency`; see `validate_profiles.py`. A model is compared at every batch size that is
published; for the rank correlation it counts once, at the batch nearest to 8. Image classifiers in eager PyTorch are
compared apart, where the device is the bound and where the host is. Limits that are missed make the command fail.
"""

from __future__ import annotations

import csv
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from lrcompile.devices.analytic import AnalyticCostModel, eager_latency_s
from lrcompile.devices.cost import total
from lrcompile.devices.device import Device
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.layouts import operations_on
from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import Graph, propagate
from lrcompile.graph.op import OpDesc
from tools.published_models import MODELS, RESNET50_IMAGES_S
from tools.validate_profiles import asked, put

START, END = "<!-- models: start -->", "<!-- models: end -->"
NEAR = 8
LIMITS = {"ascend310p": 0.8, "ascend310": None, "t4": None}
EAGER_START, EAGER_END = "<!-- eager: start -->", "<!-- eager: end -->"
EAGER_DEVICES = {"V100": "v100", "T4": "t4"}
EAGER_LIMIT = 0.1  # of ResNet-50's mean error where the device is the bound
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


def in_half(op: OpDesc, dtype: str = "fp16") -> OpDesc:
    """The operation as it is in half precision: "fp16" or "bf16"."""
    if op.dtype != "fp32":
        return op
    return replace(op, dtype=dtype, weight_bytes=op.weight_bytes / 2, activation_bytes=op.activation_bytes / 2)


def points(
    device: Device, rows: Mapping[str, Mapping[int, float]], graphs: dict[str, tuple[Graph, Tensor]]
) -> list[Point]:
    """Predictions for what is published; graphs are made once and kept."""
    model, result = AnalyticCostModel(device), []
    for name, by_batch in rows.items():
        for batch, measured_ms in by_batch.items():
            cost = total([model.cost(in_half(op)) for op in at_batch(name, batch, graphs, device)])
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


def published_eager(folder: Path) -> dict[tuple[str, str, str], dict[int, float]]:
    """Latency in ms of a steady state, batch ÷ throughput, by model, profile, data type and batch."""
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for (profile, dtype), rows in RESNET50_IMAGES_S.items():
        found["resnet50v1.5", profile, dtype] = {batch: 1e3 * batch / images_s for batch, images_s in rows.items()}
    with (folder / "nvidia_dle_infer.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            folder_of, _, name = row["model"].rpartition("/")
            known = folder_of == "PyTorch/Classification/ConvNets" and name in MODELS
            if known and row["device"] in EAGER_DEVICES:
                batch, profile = int(row["batch"]), EAGER_DEVICES[row["device"]]
                found[name, profile, row["dtype"]][batch] = 1e3 * batch / float(row["throughput"])
    return found


def eager_table(folder: Path, graphs: dict[str, tuple[Graph, Tensor]]) -> tuple[list[str], bool]:
    """Lines of the table, and whether the limit holds."""
    lines = [
        "| model | device | dtype | device is the bound | mean error | worst | host is the bound | mean error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    holds = True
    for (name, profile, dtype), rows in published_eager(folder).items():
        device = load_device(profile)
        errors: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        for batch, measured_ms in rows.items():
            ops = [op for op in at_batch(name, batch, graphs) if op.kind != "view"]
            ops = list(map(in_half, ops)) if dtype == "fp16" else ops
            predicted_ms = eager_latency_s(device, ops) * 1e3
            host_ms = device.host_s * len(ops) * 1e3
            errors[predicted_ms > host_ms].append((predicted_ms / measured_ms - 1, batch))
        bound, hosted = ([abs(error) for error, _ in errors[key]] for key in (True, False))
        worst, at = max(errors[True], key=lambda found: abs(found[0]))
        if name == "resnet50v1.5":
            holds &= mean(bound) <= EAGER_LIMIT
        host = f"{len(hosted)} batches | {mean(hosted):.1%}" if hosted else " | "
        lines.append(
            f"| {name} | {profile} | {dtype} | {len(bound)} batches | {mean(bound):.1%} | {worst:+.0%} at {at} "
            f"| {host} |"
        )
        print(lines[-1], flush=True)
    return lines, holds


def at_batch(
    name: str, batch: int, graphs: dict[str, tuple[Graph, Tensor]], device: Device | None = None
) -> list[OpDesc]:
    """All operations of a model, as a device fuses them; graphs are made once and kept."""
    if name not in graphs:
        graphs[name] = prepared(name)
    graph, example = graphs[name]
    gm = propagate(graph.copy().gm, (example.new_empty(batch, *example.shape[1:]),)).gm
    return list((operations_on(device, gm) if device else describe_all(gm)).values())


def main(arguments: Sequence[str] | None = None) -> int:
    options = asked("validate_models", __doc__, arguments)
    if options is None:
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
    eager, holds = eager_table(options.data, graphs)
    failed |= not holds
    if options.out:
        put(options.out, START, "\n".join(lines), END)
        put(options.out, EAGER_START, "\n".join(eager), EAGER_END)
    return int(failed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
