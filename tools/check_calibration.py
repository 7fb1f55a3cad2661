"""How good a profile of this machine is: `python tools/check_calibration.py mine.toml --out docs/calibration.md`.

Operations that were not calibrated on, whole models, rank steps, and rewrites that the profile is sure of, each against
measurements with ONNX Runtime. Nothing else should run meanwhile; it takes some 12 minutes. Missed limits make the
command fail.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lrcompile.confirm import Reference
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost, total
from lrcompile.devices.device import Device
from lrcompile.devices.elsewhere import Elsewhere
from lrcompile.devices.features import family
from lrcompile.devices.measure import LocalCostModel, pace_now, paced
from lrcompile.devices.pace import at, in_step
from lrcompile.devices.profile import load_device
from lrcompile.devices.sampling import operations
from lrcompile.devices.target import Target
from lrcompile.devices.visits import VISITS, Measurement
from lrcompile.errors import DeviceError
from lrcompile.frontend.trace import trace
from lrcompile.graph.op import ConvShape, OpDesc, conv_op
from lrcompile.passes import Context
from lrcompile.planning.price import price
from lrcompile.plugins import discover
from tools import models
from tools.never_slower import TRAINED
from tools.validate_profiles import SURE, by_chance, check_marks, put

SEED = 777  # not that of a calibration
REPEATS = 0.05  # measurements of one operation that differ by more say nothing about a prediction
NEAR = 0.1
PATIENCE = 180  # seconds
LIMITS = {"operations": 0.9, "models": 0.08, "pairs": 60, "sure": 0.9}


@dataclass(frozen=True)
class Checked:
    """A part of the page: its text, a line for the screen, and whether its limit holds."""

    text: str
    line: str
    holds: bool


# --------------------------------------------------------------------------------------------------------- operations


def check_operations(device: Device, count: int) -> Checked:
    """Fresh operations, each measured twice; those that differ from themselves are left out and counted."""
    ops = list(islice(operations(SEED), count))
    first, second = measured(ops, device), measured(ops, device)
    model = AnalyticCostModel(replace(device, network={}))  # as measured
    errors: dict[str, list[float]] = defaultdict(list)
    bars, left = [], 0
    for op, a, b in zip(ops, first, second, strict=True):
        if not abs(a / b - 1) <= REPEATS:
            left += 1
            continue
        truth, cost = (a + b) / 2, model.cost(op)
        errors[family(op) or ""].append(abs(cost.latency_s / truth - 1))
        bars.append(abs(cost.latency_s - truth) <= 2 * cost.sigma_s)
    rows = [*errors.items(), ("all", [error for found in errors.values() for error in found])]
    lines = ["| operations | count | within 10 % | mean error | worst |", "|---|---|---|---|---|"]
    for name, found in rows:
        near = float(np.mean(np.array(found) <= NEAR))
        lines.append(f"| {name} | {len(found)} | {near:.0%} | {np.mean(found):.1%} | {max(found):.0%} |")
    line = (
        f"{count} operations, {left} left out: {near:.1%} within {NEAR:.0%} (asked {LIMITS['operations']:.0%}), "
        f"{np.mean(bars):.0%} within two error bars"
    )
    return Checked("\n".join(lines), line, near >= LIMITS["operations"])


def steadily(device: Device, measure: Callable[[], Cost]) -> Cost:
    """A cost at the profile's pace, measured when threads hand over work as fast as they usually do; it waits for that.

    Where they have not for some minutes, it is what was measured last.
    """
    waited = 0
    while True:
        cost = measure()
        if in_step(device.pace, cost) or waited >= PATIENCE:
            return at(device.pace, cost)
        while waited < PATIENCE and not in_step(device.pace, pace_now()):
            time.sleep(1)
            waited += 1
        waited += 1


def measured(ops: Sequence[OpDesc], device: Device) -> list[float]:
    """Latencies in s: each operation is measured in three processes, with all others between; the median counts.

    They are given for the pace of the machine that the profile's are given for. NaN of one that cannot be measured.
    """
    costs: list[list[Cost]] = [[] for _ in ops]
    for _ in range(VISITS):
        with Elsewhere() as elsewhere:
            for op, known in zip(ops, costs, strict=True):
                try:
                    known.append(steadily(device, partial(elsewhere.cost, op)))
                except DeviceError:  # such as too little memory for it
                    known.append(Cost(math.nan))
    return [Measurement.of(op, known).cost.latency_s for op, known in zip(ops, costs, strict=True)]


# --------------------------------------------------------------------------------------------------------- rank steps


def check_steps(device: Device) -> Checked:
    """What one channel more than a block takes, of a split 1×1 convolution and of a Tucker core."""

    def conv(into: int, out: int, taps: int) -> OpDesc:
        pad = ((taps // 2,) * 2,) * 2
        return conv_op(ConvShape(1, into, out, (28, 28), (28, 28), (taps, taps), (1, 1), pad, (1, 1)), "fp32")

    def split(rank: int) -> list[OpDesc]:
        return [conv(512, rank, 1), conv(rank, 128, 1)]

    def tucker(rank: int) -> list[OpDesc]:
        return [conv(128, rank, 1), conv(rank, rank, 3), conv(rank, 128, 1)]

    model = AnalyticCostModel(replace(device, network={}))
    lines = ["| convolutions at 28×28 | ranks | measured | predicted |", "|---|---|---|---|"]
    seen = []
    for name, made in (("1×1, 512→r→128", split), ("Tucker 3×3, 128→r→r→128", tucker)):
        for rank in (32, 64):
            sides = [made(rank), made(rank + 1)]
            latencies = measured([op for side in sides for op in side], device)
            half = len(sides[0])
            truth = sum(latencies[half:]) / sum(latencies[:half])
            low, high = (total([model.cost(op) for op in side]).latency_s for side in sides)
            lines.append(f"| {name} | {rank} → {rank + 1} | ×{truth:.2f} | ×{high / low:.2f} |")
            seen.append(truth < 1.05 or high / low > 1 + (truth - 1) / 2)
    line = f"rank steps: {sum(seen)} of {len(seen)} are in the predictions, by at least half of their height"
    return Checked("\n".join(lines), line, all(seen))


# ------------------------------------------------------------------------------------------------------- whole models


def panel() -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]:
    """The trained models and those of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from panel import PANEL

    def trained(name: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        return lambda: (*models.trained(name)[0], {})

    return {**{name: trained(key) for name, key in TRAINED.items()}, **PANEL}


def whole(reference: Reference) -> Cost:
    """What a model takes here, with what tells the pace."""
    return paced(lambda: reference.latency().latency_s)


def check_models(device: Device) -> Checked:
    """A run and the sum of the prices of a model's operations, against the model as ONNX Runtime runs it.

    Each is measured as often as operations are, with all others between; the median counts.
    """
    target = Target("calibrated", device, AnalyticCostModel(device))
    predicted, references = dict[str, float](), dict[str, Reference]()
    for name, make in panel().items():
        module, args, kwargs = make()
        traced = trace(module.eval(), args, kwargs)
        predicted[name] = target.whole(target.costs(traced.graph.gm)).latency_s
        references[name] = Reference.of(traced)
    visits = defaultdict[str, list[float]](list)
    for _ in range(VISITS):
        for name, reference in references.items():
            visits[name].append(steadily(device, partial(whole, reference)).latency_s)
    truth = {name: statistics.median(known) for name, known in visits.items()}
    errors = {name: predicted[name] / truth[name] - 1 for name in truth}
    lines = ["| model | measured | predicted | error |", "|---|---|---|---|"]
    for name, error in errors.items():
        lines.append(f"| {name} | {truth[name] * 1e3:.3f} ms | {predicted[name] * 1e3:.3f} ms | {error:+.0%} |")
    middle = statistics.median(map(abs, errors.values()))
    worst = max(errors, key=lambda name: abs(errors[name]))
    line = f"{len(errors)} models: median error {middle:.1%} (asked {LIMITS['models']:.0%}), worst {worst}"
    return Checked("\n".join(lines), f"{line} {errors[worst]:+.0%}", middle <= LIMITS["models"])


# ----------------------------------------------------------------------------------------------------------- rewrites


@dataclass
class Recording:
    """A cost model that keeps what it was asked to compare."""

    model: AnalyticCostModel
    kind: str = "analytic"
    pairs: list[tuple[fx.GraphModule, fx.GraphModule, Cost]] = field(default_factory=list)

    def cost(self, op: OpDesc) -> Cost:
        return self.model.cost(op)

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        costs = self.model.compare(before, after)
        self.pairs.append((before, after, costs[0] - costs[1]))
        return costs


def layers(seed: int) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Linear layers and convolutions of images that are large enough to be split, without end."""
    for op in operations(seed):
        if op.flops < 2e6:
            continue
        if op.conv is not None and family(op) in ("pointwise", "conv"):
            c = op.conv
            module = nn.Conv2d(c.channels_in, c.channels_out, c.kernel[0], c.stride[0], c.padding[0][0])  # all square
            yield module.eval(), torch.randn(c.batch, c.channels_in, *c.size_in)
        elif op.gemm is not None and op.weight_bytes:
            yield nn.Linear(op.gemm.k, op.gemm.n).eval(), torch.randn(op.gemm.m, op.gemm.k)


def pairs_of(device: Device, count: int) -> list[tuple[fx.GraphModule, fx.GraphModule, float]]:
    """Rewrites of random layers with the chance of being faster: of each layer the surest one, and one at random."""
    passes, context, rng = discover().passes, Context(device), np.random.default_rng(SEED)
    found: list[tuple[fx.GraphModule, fx.GraphModule, float]] = []
    for module, example in layers(SEED):
        recording = Recording(AnalyticCostModel(device))
        price(trace(module, (example,)).graph, passes, context, recording)
        if recording.pairs:
            best = max(recording.pairs, key=lambda pair: pair[2].p_positive)
            other = recording.pairs[int(rng.integers(len(recording.pairs)))]
            found += [(a, b, gain.p_positive) for a, b, gain in ((best, other) if other is not best else (best,))]
        if len(found) >= count:
            return found[:count]
    return found


def check_pairs(device: Device, count: int, plot: Path | None) -> Checked:
    """Rewrites with a chance of being faster against what is measured, original and rewrite in turn."""
    chances, faster = [], []
    for before, after, chance in pairs_of(device, count):
        ratios = []
        for _ in range(VISITS):
            model = LocalCostModel(cache_dir=None)
            old, new = model.compare(before, after)
            if model.measured:  # neither a clear loser nor one that has no ONNX form here, which are predicted
                ratios.append(new.latency_s / old.latency_s)
        if not ratios:
            continue
        chances.append(chance)
        faster.append(statistics.median(ratios) < 1)
    p, won = np.array(chances), np.array(faster)
    text, bars = by_chance(p, won, "rewrites")
    accepted = p >= SURE
    share = float(won[accepted].mean()) if accepted.any() else 0.0
    line = f"{accepted.sum()} of {len(p)} rewrites have a chance of {SURE:g} or more; {share:.1%} of them are faster"
    if count > len(p):
        line += f" ({count - len(p)} others cannot be measured or are clear losers, which are not)"
    if plot is not None:
        from lrcompile.report.plots import plot_reliability

        plot_reliability(bars, plot)
    return Checked(text, line, accepted.sum() >= LIMITS["pairs"] and share >= LIMITS["sure"])


# ---------------------------------------------------------------------------------------------------------------- all


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="made by lrcompile calibrate on this machine")
    parser.add_argument("parts", nargs="*", metavar="PART", help="operations, steps, models, pairs (default: all)")
    parser.add_argument("--operations", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=240, help="how many (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="put the tables into this page, between their marks")
    options = parser.parse_args(arguments)
    device = load_device(options.profile)
    plot = options.out.with_name("reliability.svg") if options.out else None
    parts: dict[str, Callable[[], Checked]] = {
        "operations": lambda: check_operations(device, options.operations),
        "steps": lambda: check_steps(device),
        "models": lambda: check_models(device),
        "pairs": lambda: check_pairs(device, options.pairs, plot),
    }
    if options.out:  # before minutes are measured
        for name in options.parts or parts:
            check_marks(options.out, *_marks(name))
    held = True
    for name in options.parts or parts:
        checked = parts[name]()
        print(checked.text, checked.line, "" if checked.holds else "MISSED", sep="\n", flush=True)
        held &= checked.holds
        if options.out:
            text = f"{checked.line[0].upper()}{checked.line[1:]}.\n\n{checked.text}"
            start, end = _marks(name)
            put(options.out, start, text, end)
    return int(not held)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: start -->", f"<!-- {name}: end -->"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
