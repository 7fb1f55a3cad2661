"""What planning costs, and what it is worth: the figures of docs/planning.md, each from one command.

python -m tools.bench_planner speed       CPU time of each stage, and of a second budget
python -m tools.bench_planner strategies  every strategy at the same predicted latencies, judged on data not seen
python -m tools.bench_planner unseen      measured errors against errors on unseen data, with and without held-out data
python -m tools.bench_planner felt        splits that count by what the output feels, against those that do not
python -m tools.bench_planner windows     splits of convolutions fitted to patches, against those fitted to channels
python -m tools.bench_planner defaults    what a compile without options gains on trained models
python -m tools.bench_planner lapack      which part of a compile decompositions are
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from lrcompile.devices.cost import Cost, total
from lrcompile.devices.target import Target, resolve_target
from lrcompile.errors import BudgetError
from lrcompile.frontend.trace import Traced, trace
from lrcompile.graph.describe import describe
from lrcompile.graph.graph import Graph
from lrcompile.graph.op import OpDesc
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, proposals
from lrcompile.planning.budget import STRATEGY_NAMES, Budget
from lrcompile.planning.calibration import Split, collect
from lrcompile.planning.canonicalize import canonicalize
from lrcompile.planning.price import price
from lrcompile.planning.search import Problem
from lrcompile.planning.sensitivity import Evaluator, rewritten
from lrcompile.planning.strategies import search
from lrcompile.plugins import discover
from tools import models
from tools.bench_accuracy import SENTENCE

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
    example: Example,
    target: Target,
    calibration: Sequence[Sequence[Any]] = (),
    stages: Stages | None = None,
    held_out: int | None = None,
) -> tuple[Traced, Problem]:
    """A model up to the choice, as `lrcompile.compile` prepares it, with the time of each stage.

    `held_out` is how many of the calibration batches errors are measured on alone, by default as in a compile.
    """
    stage = stages or Stages()
    model, args = example
    passes = discover().passes
    traced = stage("trace", lambda: trace(model, args))
    context = Context(target.device)
    graph, _, _ = stage("canonicalize", lambda: canonicalize(traced.graph, passes, context))
    data = Split.of(calibration or [traced.flat], held_out)
    if calibration:
        found = stage("calibrate", lambda: collect(graph, data.fitted, weighted=True))
        context = Context(target.device, grams=found.grams, token_counts=found.token_counts, gradients=found.gradients)
    evaluator = stage("evaluator", lambda: Evaluator(traced.graph, data.judged))
    pricing = stage("price", lambda: price(graph, passes, context, target.model))
    by_name = {transform.name: transform for transform in passes}
    base, original = latency(graph, target), latency(traced.graph, target)
    return traced, Problem(graph, pricing.candidates, by_name, context, evaluator, base, original.latency_s)


def latency(graph: Graph, target: Target) -> Cost:
    """The predicted cost of a whole graph."""
    return total(list(target.costs(graph.gm).values()))


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
                f"{k}={v}" for k, v in budget.to_json().items() if v and k not in ("confidence", "strategy", "measure")
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


# ------------------------------------------------------------------------------------------------------------ unseen


def unseen(budgets: Sequence[float], device: str) -> Iterator[str]:
    """Budgets on MiniLM: the error as measured in a compile, and on 128 sentences that nothing was fitted to."""
    yield f"MiniLM-L6, {device}, batch 8 × 128 tokens; relative output error"
    yield f"{'fitted':>8}{'judged':>8}{'budget':>8}{'measured':>10}{'unseen':>8}{'ratio':>7}{'speed-up':>10}"
    calibration = sentences(0, 64)
    for held_out in (0, None):
        traced, problem = prepared(models.minilm(), resolve_target(device), calibration, held_out=held_out)
        judged = len(problem.evaluator.batches)
        fitted = len(calibration) - (judged if held_out is None else 0)
        judge = Evaluator(traced.graph, sentences(5000, 128))
        for budget in budgets:
            choice = search(problem, Budget(max_error=budget))
            error, gained = judge.error(choice.graph), problem.original_s / (problem.base.latency_s - choice.gain_s)
            ratio = error / choice.error if choice.error else 1.0
            yield f"{fitted:8}{judged:8}{budget:8}{choice.error:10.4f}{error:8.4f}{ratio:7.2f}{gained:10.3f}"


# -------------------------------------------------------------------------------------------------------------- felt


def felt(shares: Sequence[float] = (0.9, 0.7, 0.5)) -> Iterator[str]:
    """All linear layers of MiniLM split at a share of their weights: errors of embeddings of 256 unseen sentences."""
    model = models.SentenceEncoder(models.minilm()[0]).eval()
    ids, mask = models.tokenise(models.movie_sentences()[0][:5256], SENTENCE)
    batches = [(ids[i : i + 8], mask[i : i + 8]) for i in range(0, 512, 8)]
    graph = trace(model, batches[0]).graph
    judge = Evaluator(graph, [(ids[i : i + 32], mask[i : i + 32]) for i in range(5000, 5256, 32)])
    device = resolve_target("v100").device
    inputs, weighted = (collect(graph, batches, weighted=choice) for choice in (False, True))
    contexts = {
        "weights alone": Context(device),
        "inputs": Context(device, grams=inputs.grams),
        "inputs that are felt": Context(device, grams=weighted.grams),
        "and outputs": Context(device, grams=weighted.grams, gradients=weighted.gradients),
    }
    passes = {transform.name: transform for transform in discover().passes}
    yield "".join(f"{name:>22}" for name in ("share of the weights", *contexts))
    for share in shares:
        rewrites = []
        for site in graph.modules_of(nn.Linear):
            rows, columns = site.module.weight.shape  # type: ignore[union-attr, misc]
            rank = int(share * rows * columns / (rows + columns))
            rewrites.append(Rewrite("low-rank-linear", (site.path,), {"rank": rank}))
        errors = [judge.error(rewritten(graph, rewrites, passes, context)) for context in contexts.values()]
        yield f"{share:22}" + "".join(f"{error:22.3f}" for error in errors)


# ----------------------------------------------------------------------------------------------------------- windows


def small_cnn(steps: int = 200) -> nn.Module:
    """A convolutional net of three 3×3 layers, trained on a part of Fashion-MNIST with a fixed seed."""
    torch.manual_seed(0)
    sizes = [(1, 32, 1), (32, 64, 2), (64, 128, 2)]
    layers = [[nn.Conv2d(c, s, 3, stride, 1), nn.ReLU()] for c, s, stride in sizes]
    model = nn.Sequential(*(layer for pair in layers for layer in pair), nn.Flatten(), nn.Linear(128 * 49, 10))
    images, labels = models.fashion_mnist("train")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        batch = slice(128 * step, 128 * (step + 1))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def windows() -> Iterator[str]:
    """Each split of one layer of a trained net alone: the error of its output on 256 unseen images, at equal rank."""
    model, (images, _), (unseen, _) = small_cnn(), models.fashion_mnist("train"), models.fashion_mnist("t10k")
    graph = trace(model, (images[:32],)).graph
    grams = collect(graph, [(part,) for part in images[-256:].split(32)]).grams
    device = resolve_target("v100").device
    split = next(transform for transform in discover().passes if transform.name == "low-rank-conv")
    fitted, blind = Context(device, grams=grams), Context(device, grams={k: m for k, m in grams.items() if k[1] == 1})
    judge = Evaluator(graph, [(unseen[:256],)])
    yield f"{'layer':7}{'split':42}{'channels':>10}{'patches':>10}  (errors of the model's output, one layer split)"
    for rewrite in proposals(graph, split, fitted):
        if isinstance(rewrite, Rewrite):
            errors = [judge.error(rewritten(graph, [rewrite], {split.name: split}, c)) for c in (blind, fitted)]
            words = ", ".join(f"{key}={value}" for key, value in rewrite.params.items())
            yield f"{rewrite.site[0]:7}{words:42}{errors[0]:10.4f}{errors[1]:10.4f}"


# ----------------------------------------------------------------------------------------------- defaults and LAPACK

PUBLISHED: dict[str, tuple[Callable[[], Example], Callable[[], list[tuple[Tensor, ...]]]]] = {
    "MiniLM-L6": (models.minilm, lambda: list(sentences(0, 64))),
    "EfficientNet-Lite0": (
        models.efficientnet_lite0,
        lambda: [(part,) for part in models.calibration_images(32).split(8)],
    ),
}
"""Published models, and data to calibrate them with."""
LAPACK = ("eigh", "qr", "cholesky_ex", "solve_triangular")  # of torch.linalg: all that decompositions call


def defaults() -> Iterator[str]:
    """What the default budget gains on trained models, with and without calibration data."""
    yield f"{'model':20}{'device':12}{'calibration':14}{'speed-up':>9}{'error':>8}{'rewrites':>10}{'lossy':>7}"
    for name, (example, data) in PUBLISHED.items():
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


def lapack() -> Iterator[str]:
    """Time in decompositions, of that up to a choice: nothing is known from disk, and one thread works."""
    yield f"{'model':20}{'calls':>7}{'in them s':>11}{'all s':>8}{'share':>8}"
    for name, (example, data) in PUBLISHED.items():
        calls, spent_s = 0, 0.0

        def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls, spent_s
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls, spent_s = calls + 1, spent_s + time.perf_counter() - start

        batches = data()
        with mock.patch.dict(vars(torch.linalg), {key: partial(timed, getattr(torch.linalg, key)) for key in LAPACK}):
            start = time.perf_counter()
            _, problem = prepared(example(), resolve_target("x86-ort"), batches)
            search(problem, Budget(max_error=0.1))
            all_s = time.perf_counter() - start
        yield f"{name:20}{calls:7}{spent_s:11.2f}{all_s:8.2f}{spent_s / all_s:8.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("speed", "strategies", "unseen", "felt", "windows", "defaults", "lapack"))
    parser.add_argument("--device", default="v100", help="for strategies, unseen (default: %(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7], help="for strategies")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3], help="for unseen")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads that wait for each other would count as CPU time
    tables = {
        "speed": speed,
        "felt": felt,
        "windows": windows,
        "defaults": defaults,
        "lapack": lapack,
        "strategies": lambda: strategies(options.shares, options.device),
        "unseen": lambda: unseen(options.budgets, options.device),
    }
    try:
        for line in tables[options.table]():
            print(line, flush=True)
    except models.DataMissing as problem:
        print(f"bench_planner: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
