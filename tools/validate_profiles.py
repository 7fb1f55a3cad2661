"""How near predictions come to published measurements: `python tools/validate_profiles.py --out docs/cost-model.md`.

The measurements are tables beside the project, in `../shared/latency`; none of their rows is kept here. What was fitted
on a table is fitted again without a part of its shapes, and judged on that part; other devices are judged as their
profiles are. A set that misses its limits makes the command fail.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from lrcompile.devices.correlation import REACH, SHARED
from lrcompile.devices.device import Device
from lrcompile.devices.features import sizes
from lrcompile.devices.fit import fit
from lrcompile.devices.predict import describe_rows, predict_rows
from lrcompile.devices.profile import load_device
from lrcompile.devices.visits import ROBUST

LATENCY = Path(__file__).resolve().parents[1].parent / "shared" / "latency"
HALF_US_MS = 0.0005  # DeepBench cuts to whole µs
EAGER = {"linear": (1.2, 2.1), "bmm": (0.5, 1.3), "conv2d_fwd": (0.5, 1.3), "gemm": (0.73, 0.0)}
"""What an eager call takes of a device's launch floor: besides the kernel, and at least (fitted to NeuSight V100)."""
FOLDS = 10
OTHERS = 0.2  # how much a further table counts beside the first
START, END = "<!-- validation: start -->", "<!-- validation: end -->"
ALIKE_START, ALIKE_END = "<!-- alike: start -->", "<!-- alike: end -->"
DISTANCES = (0, 1, 2, 3, 4.5, 7)  # between sizes, in factors of two
FEWEST_PAIRS = 20
SURE = 0.9  # the chance of being faster from which a rewrite is taken for sure
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)  # of chances

Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of a table of measurements; `eager` tables time single calls of a framework."""

    file: str
    device: str
    dtype: str
    ops: tuple[str, ...]
    eager: bool = False

    def rows(self, folder: Path) -> list[Row]:
        """Its rows in the folder, or in one with other shapes of the same sources."""
        with (folder / f"{self.file}.csv").open(newline="") as file:
            wanted = (self.device, self.dtype)
            rows = [row for row in csv.DictReader(file) if (row["device"], row["dtype"]) == wanted]
        return [row for row in rows if row["op"] in self.ops]

    def measured_ms(self, rows: Sequence[Row]) -> np.ndarray:
        cut = 0.0 if self.eager else HALF_US_MS
        return np.array([float(row["ms"]) + cut for row in rows])

    def predicted_ms(self, rows: Sequence[Row], device: Device, floor_ms: float) -> np.ndarray:
        predicted = np.array([latency_ms for latency_ms, _ in predict_rows(rows, device, self.dtype)])
        if not self.eager:
            return predicted
        besides, least = np.array([EAGER[row["op"]] for row in rows]).T
        return np.maximum(predicted + besides * floor_ms, least * floor_ms)

    def floor_ms(self, folder: Path) -> float:
        """What launching an eager call takes on this device."""
        with (folder / "devices.csv").open(newline="") as file:
            floors = {row["device"]: row["launch_us_eager"] for row in csv.DictReader(file)}
        names = (self.device, *(name for name in floors if name.split("-")[0] == self.device.split("-")[0]))
        return float(next((floors[name] for name in names if floors.get(name)), 0)) / 1e3


@dataclass(frozen=True)
class Set:
    """A profile against tables. With `fitted`, figures of the device that are fitted anew for each part left out.

    `mape` (%) and `tau` are limits, where there are any; they are for the first table.
    """

    name: str
    profile: str
    tables: tuple[Table, ...]
    fitted: tuple[str, ...] = ()
    mape: float = math.inf
    tau: float = -1.0


@dataclass(frozen=True)
class Score:
    """How near predictions come: n, mean and median absolute error in %, rank correlation, and of logarithms of errors
    the mean, the standard deviation, and a robust one that does not mind a few outliers.
    """

    n: int
    mape: float
    median: float
    tau: float
    bias: float
    sigma: float
    sigma_robust: float

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> Score:
        errors, logs = 100 * abs(predicted / measured - 1), np.log(predicted / measured)
        tau = float(kendalltau(predicted, measured).statistic)
        robust = ROBUST * float(np.median(abs(logs - np.median(logs))))
        return cls(len(errors), float(errors.mean()), float(np.median(errors)), tau, logs.mean(), logs.std(), robust)

    def holds(self, limits: Set) -> bool:
        return self.mape <= limits.mape and self.tau >= limits.tau


def _deepbench(kind: str, device: str, dtype: str, *ops: str) -> Table:
    return Table(f"deepbench_{kind}", device, dtype, ops or ("gemm",))


def _neusight(kind: str, device: str, *ops: str) -> Table:
    return Table(f"neusight_{kind}", device, "fp32", ops, eager=True)


SXM = "V100-SXM2-16GB"
CONV = ("conv2d_fwd", "conv2d_bwd_data", "conv2d_bwd_weight")
TENSOR, CUDA = "engines.tensor_core", "engines.cuda_core"
_GEMM = ("efficiency", "tile_exponent", "prologue", "overlap", "skinny_bandwidth_bytes_s")
_CONV16 = ("efficiency", "tile_exponent", "prologue", "overlap", "few_channels")
_WINOGRAD = ("five", "fused", "filter_bandwidth")
SETS = (
    Set("V100 GEMM fp16", "v100", (_deepbench("gemm", SXM, "fp16"),),
        ("launch_s.gemm", *(f"{TENSOR}.gemm.{key}" for key in _GEMM)), 9, 0.94),
    Set("V100 GEMM fp32", "v100", (_deepbench("gemm", SXM, "fp32"), _neusight("gemm", "V100-PCIE-32GB", "linear")),
        (f"{CUDA}.gemm.setup_s", *(f"{CUDA}.gemm.{key}" for key in _GEMM)), 7, 0.97),
    Set("V100 convolution fp16", "v100", (_deepbench("conv", SXM, "fp16", CONV[0]),),
        ("launch_s.conv", *(f"{TENSOR}.conv.{key}" for key in _CONV16)), 19, 0.84),
    Set("V100 convolution fp32", "v100", (_deepbench("conv", SXM, "fp32", CONV[0]),),
        (*(f"{CUDA}.conv.{key}" for key in ("efficiency", "tile_exponent", "setup_s")),
         *(f"{CUDA}.winograd.{key}" for key in _WINOGRAD)), 14, 0.88),
    Set("V100 input gradient fp16", "v100", (_deepbench("conv", SXM, "fp16", CONV[1]),),
        (f"{TENSOR}.conv_data.setup_s",), 25),
    Set("V100 input gradient fp32", "v100", (_deepbench("conv", SXM, "fp32", CONV[1]),),
        (f"{CUDA}.conv_data.setup_s",), 25),
    Set("V100 weight gradient fp16", "v100", (_deepbench("conv", SXM, "fp16", CONV[2]),),
        tuple(f"{TENSOR}.conv_weight.{key}" for key in ("efficiency", "tile_exponent", "setup_s")), 25),
    Set("V100 weight gradient fp32", "v100", (_deepbench("conv", SXM, "fp32", CONV[2]),),
        tuple(f"{CUDA}.conv_weight.{key}" for key in ("efficiency", "bandwidth", "setup_s")), 25),
    Set("T4 GEMM fp16", "t4", (_deepbench("gemm", "T4", "fp16"),), (), 11, 0.94),
    Set("T4 GEMM fp32", "t4", (_deepbench("gemm", "T4", "fp32"),), (), 14, 0.94),
    Set("T4 GEMM int8", "t4", (_deepbench("gemm", "T4", "int8"),)),
    *(Set(f"T4 {op.removeprefix('conv2d_')} {dtype}", "t4", (_deepbench("conv", "T4", dtype, op),))
      for op in CONV for dtype in ("fp16", "fp32")),
    Set("A100 linear fp32", "a100", (_neusight("gemm", "A100-PCIE-40GB", "linear"),), (), 13, 0.95),
    Set("A100 bmm fp32", "a100", (_neusight("gemm", "A100-PCIE-40GB", "bmm"),),
        tuple(f"{CUDA}.batched.{key}" for key in ("efficiency", "prologue", "overlap", "setup_s")), 6, 0.95),
    Set("A100 GEMM fp16", "a100", (Table("llmcompass_gemm", "A100-SXM4-80GB", "fp16", ("gemm",), eager=True),),
        ("l2_bandwidth_bytes_s",), 6),
    Set("H100 linear fp32", "h100", (_neusight("gemm", "H100-80GB-HBM3", "linear"),), (), 13, 0.95),
    Set("H100 bmm fp32", "h100", (_neusight("gemm", "H100-80GB-HBM3", "bmm"),), (), 13, 0.95),
    Set("T4 linear fp32", "t4", (_neusight("gemm", "T4", "linear"),), (), 24, 0.92),
    Set("V100 bmm fp32", "v100", (_neusight("gemm", "V100-PCIE-32GB", "bmm"),),
        tuple(f"{CUDA}.batched.{key}" for key in ("efficiency", "prologue", "overlap")), 15, 0.89),
    Set("V100 3×3 convolution, eager", "v100", (_neusight("conv", "V100-PCIE-32GB", CONV[0]),)),
)  # fmt: skip


def score(limits: Set, folder: Path = LATENCY) -> Score:
    """The profile as it is shipped, on the first of its tables."""
    table = limits.tables[0]
    rows = table.rows(folder)
    predicted = table.predicted_ms(rows, load_device(limits.profile), table.floor_ms(folder))
    return Score.of(predicted, table.measured_ms(rows))


def held_out(limits: Set, folder: Path = LATENCY) -> Score:
    """The first of the tables, each part predicted by a profile whose figures were fitted without it."""
    device = load_device(limits.profile)
    tables = [(table, table.rows(folder), table.floor_ms(folder)) for table in limits.tables]
    parts = [_parts(rows) for _, rows, _ in tables]
    first, rows, floor_ms = tables[0]
    predicted = np.zeros(len(rows))
    for part in range(FOLDS):
        training = [
            (table, [row for row, p in zip(rows, where, strict=True) if p != part], floor)
            for (table, rows, floor), where in zip(tables, parts, strict=True)
        ]
        fitted = fitted_to(device, limits.fitted, training)
        left = [i for i, p in enumerate(parts[0]) if p == part]
        predicted[left] = first.predicted_ms([rows[i] for i in left], fitted, floor_ms)
    return Score.of(predicted, first.measured_ms(rows))


def _parts(rows: Sequence[Row]) -> list[int]:
    """A part for each row, the same for rows that differ in nothing but layouts."""
    shapes = [tuple(v for k, v in row.items() if k not in ("ta", "tb", "ms", "algo", "source")) for row in rows]
    known = sorted(set(shapes))
    order = np.random.default_rng(0).permutation(len(known)) % FOLDS
    part = dict(zip(known, map(int, order), strict=True))
    return [part[shape] for shape in shapes]


def fitted_to(device: Device, names: Sequence[str], tables: Sequence[tuple[Table, list[Row], float]]) -> Device:
    """The device with figures that fit the tables best."""

    def differences(candidate: Device) -> np.ndarray:
        parts = []
        for table, rows, floor_ms in tables:
            ratio = table.predicted_ms(rows, candidate, floor_ms) / table.measured_ms(rows)
            count = 1.0 if table is tables[0][0] else OTHERS * len(tables[0][1]) / len(rows)
            parts.append(np.log(ratio) * math.sqrt(count))
        return np.concatenate(parts)

    return fit(device, names, differences)


def table_of(scores: Sequence[tuple[Set, Score, Score | None]]) -> str:
    """Markdown: what was judged, as shipped and on held-out shapes."""
    lines = [
        "| set | rows | error as shipped | held out | median | τ | bias | σ | robust σ | limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for limits, shipped, unseen in scores:
        judged = unseen or shipped
        bounds = f"≤ {limits.mape:g} %" if limits.mape < math.inf else ""
        bounds += f", τ ≥ {limits.tau:g}" if limits.tau >= 0 else ""
        out = f"{unseen.mape:.1f} %" if unseen else "nothing fitted on it"
        lines.append(
            f"| {limits.name} | {judged.n} | {shipped.mape:.1f} % | {out} | {judged.median:.1f} % | {judged.tau:.3f} "
            f"| {math.expm1(judged.bias):+.0%} | {judged.sigma:.1%} | {judged.sigma_robust:.1%} | {bounds} |"
        )
    return "\n".join(lines)


def alike(sets: Sequence[Set], folder: Path) -> str:
    """Markdown: the correlation of errors of two operations of a set, by how far apart their sizes are."""
    bounds = [*pairwise(DISTANCES)]
    names = " | ".join(f"{low:g} to {high:g}" for low, high in bounds)
    lines = [f"| set | {names} |", f"|{'---|' * (len(bounds) + 1)}"]
    for limits in sets:
        table = limits.tables[0]
        rows = table.rows(folder)
        device = load_device(limits.profile)
        ratio = table.predicted_ms(rows, device, table.floor_ms(folder)) / table.measured_ms(rows)
        errors = np.log(ratio)
        points = np.array([sizes(op) for op in describe_rows(rows, table.dtype)])
        away = np.linalg.norm(points[:, None] - points[None], axis=-1)
        products = np.outer(errors, errors) / (errors**2).mean()
        upper = np.triu(np.ones_like(away, dtype=bool), 1)
        cells = []
        for low, high in bounds:
            inside = upper & (away >= low) & (away < high)
            cells.append(f"{products[inside].mean():.2f} ({inside.sum()})" if inside.sum() >= FEWEST_PAIRS else "")
        lines.append(f"| {limits.name} | {' | '.join(cells)} |")
    expected = [SHARED * math.exp(-(low + high) / 2 / REACH) for low, high in bounds]
    lines.append(f"| assumed, in the middle | {' | '.join(f'{value:.2f}' for value in expected)} |")
    return "\n".join(lines)


def by_chance(p: np.ndarray, won: np.ndarray, what: str) -> tuple[str, list[tuple[float, float, int]]]:
    """(a table, its rows) of what was faster by its predicted chance: the mean chance, the share that was, how many."""
    lines = [f"| chance of being faster | {what} | mean chance | faster |", "|---|---|---|---|"]
    bars = []
    for low, high in pairwise(BINS):
        inside = (p >= low) & ((p < high) | (high == 1.0))
        if inside.any():
            bars.append((float(p[inside].mean()), float(won[inside].mean()), int(inside.sum())))
            lines.append(f"| {low:g} to {high:g} | {bars[-1][2]} | {bars[-1][0]:.2f} | {bars[-1][1]:.0%} |")
    return "\n".join(lines), bars


def check_marks(page: Path, start: str, end: str) -> None:
    """Refuses a page without the marks that text is put between."""
    if start not in page.read_text() or end not in page.read_text():
        raise ValueError(f"{page} has no marks {start} and {end}: write them where the text belongs")


def put(page: Path, start: str, text: str, end: str) -> None:
    """Writes text into a page, between two marks that it has."""
    check_marks(page, start, end)
    before, _, rest = page.read_text().partition(start)
    page.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def asked(name: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace | None:
    """The folder of tables and the page to write to; None, with a word about it, where there is no such folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=LATENCY, help="the folder of tables (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        print(f"{name}: no folder {options.data}; give --data", file=sys.stderr)
        return None
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = asked("validate_profiles", __doc__, arguments)
    if options is None:
        return 1
    scores, missed = [], 0
    for limits in SETS:
        shipped = score(limits, options.data)
        unseen = held_out(limits, options.data) if limits.fitted else None
        judged = unseen or shipped
        scores.append((limits, shipped, unseen))
        verdict = "" if judged.holds(limits) else "  MISSED"
        missed += bool(verdict)
        print(f"{limits.name:30} n {judged.n:4} error {judged.mape:5.1f} % τ {judged.tau:.3f}{verdict}", flush=True)
    likeness = alike([limits for limits in SETS if limits.mape < math.inf], options.data)
    if options.out:
        put(options.out, START, table_of(scores), END)
        put(options.out, ALIKE_START, likeness, ALIKE_END)
    else:
        print(table_of(scores), likeness, sep="\n\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
