"""What planning costs, and what it is worth: the figures of docs/planning.md, each from one command.

python -m tools.bench_planner speed       CPU time of each stage, and of a second budget
python -m tools.bench_planner strategies  every strategy at the same predicted latencies, judged on data not seen
python -m tools.bench_planner defaults    what a compile without options gains on trained models
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.devices.cost import Cost, total
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.target import Target, resolve_target
from lrcompile.errors import BudgetError
from lrcompile.frontend.trace import Traced, trace
from lrcompile.graph.describe import describe
from lrcompile.graph.graph import Graph
from lrcompile.graph.op import OpDesc
from lrcompile.passes import Context
from lrcompile.planning.budget import STRATEGY_NAMES, Budget
from lrcompile.planning.calibration import collect
from lrcompile.planning.canonicalize import canonicalize
from lrcompile.planning.price import price
from lrcompile.planning.search import Problem
from lrcompile.planning.sensitivity import Evaluator
from lrcompile.planning.strategies import search
from lrcompile.plugins import discover
from tools import models

Example = tuple[nn.Module, tuple[Tensor, ...]]


# ------------------------------------------------------------------------------------------------------- one problem


class MacsModel:
    """A device whose time is the number of multiply-adds: with it, `speedup=2` asks for half of them."""

    kind = "analytic"

    def cost(self, op: OpDesc) -> Cost:
        """One second a multiply-add."""
        return Cost(op.flops / 2, 0.0, op.flops, op.weight_bytes, op.activation_bytes)

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        """The multiply-adds of both sides."""
        first, second = (total([self.cost(describe(gm, n)) for n in gm.graph.nodes]) for gm in (before, after))
        return first, second


def macs_target() -> Target:
    """A target that counts multiply-adds, with the rank steps of a V100."""
    return Target("macs", resolve_target("v100").device, MacsModel())


@dataclass(frozen=True)
class Stage:
    """One stage of planning and the CPU time that it took."""

    name: str
    cpu_s: float


class Stages:
    """Runs stages one after the other and keeps their CPU times."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        self.done.append(Stage(name, time.process_time() - start))
        return result


def prepared(
    example: Example, target: Target, calibration: Sequence[Sequence[Any]] = (), stages: Stages | None = None
) -> tuple[Traced, Problem]:
    """A model up to the choice, as `lrcompile.compile` prepares it, with the time of each stage."""
    stage = stages or Stages()
    model, args = example
    passes = discover().passes
    traced = stage("trace", lambda: trace(model, args))
    context = Context(target.device)
    graph, _, _ = stage("canonicalize", lambda: canonicalize(traced.graph, passes, context))
    if calibration:
        found = stage("calibrate", lambda: collect(graph, calibration))
        context = Context(target.device, grams=found.grams, token_counts=found.token_counts)
    evaluator = stage("evaluator", lambda: Evaluator(traced.graph, calibration or [traced.flat]))
    pricing = stage("price", lambda: price(graph, passes, context, target.model))
    by_name = {transform.name: transform for transform in passes}
    base, original = latency(graph, target), latency(traced.graph, target)
    return traced, Problem(graph, pricing.candidates, by_name, context, evaluator, base, original.latency_s)


def latency(graph: Graph, target: Target) -> Cost:
    """The predicted cost of a whole graph."""
    return total(
        [target.model.cost(op) for op in describe_all(graph.gm, target.device.fuses, target.device.lacks).values()]
    )


# ------------------------------------------------------------------------------------------------------------- speed


def resnet(depths: Sequence[int], layer: str, widths: Sequence[int]) -> Example:
    """A ResNet of the transformers library with random weights, and one image of 224 × 224."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(depths=list(depths), layer_type=layer, hidden_sizes=list(widths))
    return ResNetForImageClassification(config).eval(), (torch.randn(1, 3, 224, 224),)


def speed() -> Iterator[str]:
    """Planning ResNet-18 to half its multiply-adds and ResNet-50 for a V100, then again for another budget."""
    jobs: list[tuple[str, Example, Target, list[Budget]]] = [
        (
            "ResNet-18, half the multiply-adds",
            resnet([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
            macs_target(),
            [Budget(speedup=2), Budget(speedup=1.6), Budget(max_error=0.3)],
        ),
        (
            "ResNet-50, V100",
            resnet([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
            resolve_target("v100"),
            [Budget(), Budget(max_error=0.2), Budget(size=0.6), Budget(size=0.5)],
        ),
    ]
    yield f"{'model':36}{'stage':44}{'CPU s':>8}"
    for name, example, target, budgets in jobs:
        stages = Stages()
        _, problem = prepared(example, target, stages=stages)
        for i, budget in enumerate(budgets):
            given = ", ".join(
                f"{k}={v}" for k, v in budget.to_json().items() if v and k not in ("confidence", "strategy")
            )
            words = f"{'choose' if i == 0 else 'choose again'} ({given or 'default budget'})"
            stages(words, partial(search, problem, budget))
        yield from (f"{name:36}{stage.name:44}{stage.cpu_s:8.2f}" for stage in stages.done)
        planning = sum(stage.cpu_s for stage in stages.done[1 : -len(budgets) + 1])
        yield f"{name:36}{f'from traced graph to plan, {len(problem.candidates)} candidates':44}{planning:8.2f}"


# -------------------------------------------------------------------------------------------------------- strategies


@dataclass(frozen=True)
class Outcome:
    """A strategy at one latency: what it takes, predicted, as a share of the original, its error and CPU time."""

    strategy: str
    asked: float
    latency: float
    calibration_error: float
    error: float
    cpu_s: float


def sentences(first: int, count: int, batch: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches of tokenised film reviews."""
    ids, mask = models.tokenise(models.movie_sentences()[0][first : first + count])
    return [(ids[i : i + batch], mask[i : i + batch]) for i in range(0, count, batch)]


def compare_strategies(
    shares: Sequence[float], target: Target, calibration: int = 64, unseen: int = 64
) -> Iterator[Outcome]:
    """Each strategy on MiniLM at each share of the original latency; errors on sentences that none has seen.

    All rewrites that are rather faster than not are admitted. A share that a strategy does not reach is left out.
    """
    traced, problem = prepared(models.minilm(), target, sentences(0, calibration))
    judge = Evaluator(traced.graph, sentences(5000, unseen))
    for share in shares:
        for name in STRATEGY_NAMES:
            start = time.process_time()
            try:
                choice = search(problem, Budget(speedup=1 / share, confidence=0.5, strategy=name))
            except BudgetError:
                continue
            cpu_s = time.process_time() - start
            got = latency(choice.graph, target).latency_s / problem.original_s
            yield Outcome(name, share, got, choice.error, judge.error(choice.graph), cpu_s)


def strategies(shares: Sequence[float], device: str) -> Iterator[str]:
    """The table of `compare_strategies`."""
    yield f"MiniLM-L6, {device}, batch 8 × 128 tokens; relative output error on 64 unseen sentences"
    yield f"{'latency asked':>14}{'strategy':>14}{'latency':>10}{'error':>10}{'on calibration':>16}{'CPU s':>8}"
    for o in compare_strategies(shares, resolve_target(device)):
        yield (
            f"{o.asked:14.2f}{o.strategy:>14}{o.latency:10.3f}{o.error:10.4f}{o.calibration_error:16.4f}{o.cpu_s:8.1f}"
        )


# ---------------------------------------------------------------------------------------------------------- defaults


def defaults() -> Iterator[str]:
    """What the default budget gains on trained models, with and without calibration data."""
    yield f"{'model':20}{'device':12}{'calibration':14}{'speed-up':>9}{'error':>8}{'rewrites':>10}{'lossy':>7}"
    examples: dict[str, tuple[Callable[[], Example], Callable[[], list[tuple[Tensor, ...]]]]] = {
        "MiniLM-L6": (models.minilm, lambda: list(sentences(0, 64))),
        "EfficientNet-Lite0": (
            models.efficientnet_lite0,
            lambda: [(part,) for part in models.calibration_images(32).split(8)],
        ),
    }
    for name, (example, data) in examples.items():
        for device in ("v100", "ascend310"):
            for batches in ([], data()):
                target = resolve_target(device)
                _, problem = prepared(example(), target, batches)
                choice = search(problem, Budget())
                after = latency(choice.graph, target).latency_s
                lossy = sum(not candidate.exact for candidate in choice.candidates)
                yield (
                    f"{name:20}{device:12}{'yes' if batches else 'no':14}{problem.original_s / after:9.3f}"
                    f"{choice.error:8.4f}{len(choice.candidates):10}{lossy:7}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("speed", "strategies", "defaults"))
    parser.add_argument("--device", default="v100", help="for strategies (default: %(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7], help="for strategies")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads that wait for each other would count as CPU time
    tables = {"speed": speed, "defaults": defaults, "strategies": lambda: strategies(options.shares, options.device)}
    try:
        for line in tables[options.table]():
            print(line, flush=True)
    except models.DataMissing as problem:
        print(f"bench_planner: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
