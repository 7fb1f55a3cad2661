"""Whether budgets hold on unseen data: `python -m tools.bench_budgets --out docs/planning.md`.

Trained models at budgets on their error, on what their outputs choose, and on how far a metric falls. Half the
multiply-adds count as half the time, so that nothing depends on the machine. A compile measures on its own data; what
judges was seen by none.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.frontend.trace import trace
from lrcompile.planning.budget import Budget
from lrcompile.planning.sensitivity import Evaluator
from lrcompile.planning.strategies import search
from tools import models, novels
from tools.bench_accuracy import TASKS
from tools.bench_planner import macs_target, prepared, sentences, small_cnn
from tools.bench_recovery import learned, perceptron
from tools.recipes import correct, fashion, trained_on_fashion
from tools.validate_profiles import check_marks, put

BUDGETS = (0.05, 0.1, 0.2, 0.3)  # on the relative error of the output
CLASSES = (("top1", 0.02), ("top1", 0.05), ("kl", 0.01))
OVER = 0.1  # of the budget, that the error on unseen data may be over it
MARKS = "<!-- budgets -->", "<!-- end of budgets -->"
Batches = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Trained:
    """A trained model, batches to calibrate with, and others that judge; with `values`, a metric of the user's.

    `values` gives a number for each of some samples, and `drops` how far their mean may fall: what evaluates while the
    model is compiled are the `evaluated`, what judges afterwards the `judging`.
    """

    name: str
    model: nn.Module
    calibration: Batches
    unseen: Batches
    classes: bool = True
    values: Callable[[nn.Module, Any], Tensor] | None = None
    evaluated: Any = None
    judging: Any = None
    drops: Sequence[float] = ()


def trained_examples() -> Iterator[Trained]:
    """All that there are. Images to calibrate with are none that networks were trained on: of those they are surer."""
    (trained_on, seen), (_, unseen) = fashion(held_out=True), fashion()

    def batches(data: Tensor) -> Batches:
        return [(part,) for part in data.split(8)]

    def of_images(name: str, model: nn.Module) -> Trained:
        parts = batches(seen[0][:512]), batches(unseen[0][:1024])
        return Trained(f"{name}, Fashion-MNIST", model, *parts, True, points, seen, unseen, (0.5, 1.0))

    yield Trained("MiniLM-L6", models.minilm()[0], sentences(0, 64), sentences(5000, 128), classes=False)
    torch.manual_seed(0)
    yield of_images("perceptron", learned(perceptron(784, 10, 256, 3), trained_on, 2))
    yield of_images("small CNN", small_cnn())
    task = TASKS["efficientnet-lite0"]()
    things = [tuple(batch.values()) for batch in task.calibration.batches]
    yield Trained("EfficientNet-Lite0", task.model, things, batches(models.object_images(400, unseen=True)))
    train, test = novels.windows()
    yield Trained(
        "GPT, novels", novels.trained_on_novels(), batches(train[::39, :-1]), batches(test[::10, :-1]), True,
        lambda model, windows: -novels.losses(model, windows), test[1::10], test[6::10], (0.01, 0.03),
    )  # fmt: skip
    yield of_images("ViT", trained_on_fashion("vit"))
    yield of_images("residual network", trained_on_fashion("resnet"))


def points(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Of each image, so that the mean is the accuracy in percent."""
    return 100.0 * correct(model, data)


def table() -> Iterator[str]:
    """A row for each model and budget: what is limited as measured in the compile, and on unseen data."""
    yield "| model | measure | budget | measured | unseen | over | speed-up |"
    yield "|---|---|---|---|---|---|---|"
    over = count = 0
    for trained in trained_examples():
        for what, budget, measured, unseen, gained in (*held_to_errors(trained), *held_to_drops(trained)):
            excess = max(0.0, unseen / budget - 1)
            over, count = over + (round(excess, 9) > OVER), count + 1  # not what rounding adds
            figures = f"{budget} | {measured:.4f} | {unseen:.4f} | {excess:.0%} | {gained:.3f}×"
            yield f"| {trained.name} | {what} | {figures} |"
    yield ""
    yield f"{over} of {count} are over their budget by more than {OVER:.0%} of it."


Held = tuple[str, float, float, float, float]
"""(what is limited, the limit, what it is as measured, on unseen data, the speed-up)."""


def held_to_errors(trained: Trained) -> Iterator[Held]:
    """A model at limits on its error and on what its outputs choose."""
    traced, problem = prepared((trained.model, trained.calibration[0]), macs_target(), trained.calibration)
    judge = Evaluator(traced.graph, trained.unseen)
    for measure, budget in (*(("error", budget) for budget in BUDGETS), *CLASSES * trained.classes):
        wanted = Budget(max_error=budget, measure=measure)
        of = judge.measured_in(wanted.measure_in_use)
        choice = search(replace(problem, evaluator=problem.evaluator.measured_in(of.measure)), wanted)
        unseen, measured = (of.measure.value(root) for root in (of.error(choice.graph), choice.error))
        yield measure, budget, measured, unseen, problem.original_s / (problem.base.latency_s - choice.gain_s)


def held_to_drops(trained: Trained) -> Iterator[Held]:
    """A model at limits on how far a metric falls."""
    if (values := trained.values) is None:
        return

    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return float(values(model, trained.judging).double().mean())

    inputs = torch.cat([batch[0] for batch in trained.calibration])
    names = trace(trained.model, trained.calibration[0]).input_names
    ready = lrcompile.prepare_model(
        trained.model, trained.calibration[0], target=macs_target(),
        calibration=lrcompile.calibration_from(dict.fromkeys(names, inputs), names, 8, max_batches=None),
        metric=lambda model: values(model, trained.evaluated),
    )  # fmt: skip
    before = value(trained.model)
    for drop in trained.drops:
        found = lrcompile.solve(ready, Budget(max_drop=drop))
        figures = found.report.metric
        assert figures is not None
        fallen = before - value(found.model)
        yield "drop", drop, figures["before"] - figures["after"], fallen, found.report.latency_ms["speedup"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    if options.out:
        check_marks(options.out, *MARKS)
    warnings.simplefilter("ignore")
    lines = []
    for line in table():
        lines.append(line)
        print(line, flush=True)
    if options.out:
        put(options.out, MARKS[0], "\n" + "\n".join(lines) + "\n", MARKS[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
