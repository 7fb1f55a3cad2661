"""How fast trained models become at which accuracy: `python tools/bench_accuracy.py minilm --out docs/accuracy.md`.

A model is compiled for this machine (`--target local`) at each of some speed-ups, as accurate as that allows, or
within each of some errors (`--max-errors`), as fast as that allows, and trained for some minutes on inputs without
labels. What comes out is judged on data that neither saw, and measured in ONNX Runtime against the original, paired.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import lrcompile
from lrcompile import CalibrationData, calibration_from
from lrcompile.devices.bench import paired
from lrcompile.devices.measure import cpu_name, usable_cores
from lrcompile.errors import BudgetError
from lrcompile.planning.measures import MEASURES, RELATIVE
from lrcompile.report.progress import ProgressDisplay
from tools import models, novels
from tools.fetch_data import DataMissing
from tools.recipes import accuracy, fashion, trained_on_fashion
from tools.validate_profiles import check_marks, put

SENTENCE = 48  # tokens
TRAINING = 9000  # sentences
BENCH_S = 12.0


@dataclass(frozen=True)
class Task:
    """A trained model; what it is calibrated and trained with, by the names of its inputs; and who judges it.

    `classes` says that the last axis of the output counts classes; `measure` is that of errors, and `recovery` holds
    settings of the training, where other ones than the defaults fit the task.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: CalibrationData
    training: CalibrationData
    judge: Callable[[Callable[..., Tensor]], Mapping[str, float]]
    settings: str
    classes: bool = True
    measure: str = RELATIVE.name
    recovery: Mapping[str, Any] = field(default_factory=dict)


def minilm() -> Task:
    """MiniLM-L6 on film reviews: 9,000 sentences to learn from, the other 1,605 judge."""
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression

    bert, _ = models.minilm(SENTENCE, 8)
    model = models.SentenceEncoder(bert).eval()
    texts, scores = models.movie_sentences()
    ids, mask = models.tokenise(texts, SENTENCE)
    names = ("input_ids", "attention_mask")
    upper = torch.triu_indices(512, 512, 1)
    clear = (scores.abs() > 0.5).nonzero().flatten()
    learned, asked = clear[clear < TRAINING][-3000:], clear[clear >= TRAINING][:1000]

    def embedded(model: Callable[..., Tensor], index: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(ids[part], mask[part]) for part in index.split(64)])

    def similarities(vectors: Tensor) -> Tensor:
        return (vectors @ vectors.T)[upper[0], upper[1]]

    unseen = torch.arange(TRAINING, TRAINING + 512)
    expected = similarities(embedded(model, unseen))

    def judge(model: Callable[..., Tensor]) -> dict[str, float]:
        rank = spearmanr(similarities(embedded(model, unseen)).numpy(), expected.numpy()).statistic
        known = (scores > 0).long().numpy()
        probe = LogisticRegression(C=10, max_iter=1000).fit(embedded(model, learned).numpy(), known[learned])
        right = probe.score(embedded(model, asked).numpy(), known[asked])
        return {"Spearman": float(rank), "sentiment %": 100 * float(right)}

    def data(count: int) -> CalibrationData:
        given = dict(zip(names, (ids[:count], mask[:count]), strict=True))
        return calibration_from(given, names, 8, max_batches=None)

    words = f"batch 8 × {SENTENCE} tokens; probe on 3,000 sentences, 1,000 others asked"
    return Task(model, (ids[:8], mask[:8]), data(1024), data(TRAINING), judge, words, classes=False)


def of_fashion(name: str) -> Task:
    """A network of `tools/recipes.py` on Fashion-MNIST: training images without labels to learn from."""
    model = trained_on_fashion(name, say=lambda line: print(line, file=sys.stderr, flush=True))
    (images, _), test = fashion()

    def data(part: Tensor) -> CalibrationData:
        return calibration_from({"images": part}, ["images"], 8, max_batches=None)

    def judge(model: Callable[..., Tensor]) -> dict[str, float]:
        return {"accuracy %": accuracy(model, test)}

    return Task(model, (images[:8],), data(images[:512]), data(images[512:]), judge, "batch 8; the 10,000 test images")


def gpt() -> Task:
    """The GPT of `tools/novels.py`: windows of five novels to learn from, without the next tokens; the sixth judges."""
    model = novels.trained_on_novels(say=lambda line: print(line, file=sys.stderr, flush=True))
    train, unseen = novels.windows()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    tokens, judged = train[order, :-1], unseen[:: max(1, len(unseen) // 512)]

    def data(part: Tensor) -> CalibrationData:
        return calibration_from({"input_ids": part}, ["input_ids"], 8, max_batches=None)

    def judge(model: Callable[..., Tensor]) -> dict[str, float]:
        return {"perplexity": novels.perplexity(model, judged)}

    words = f"batch 8 × {novels.CONTEXT} tokens; {len(judged)} windows of the unseen novel"
    how = {"outputs": "kl", "batch": 16}
    return Task(
        model, (tokens[:8],), data(tokens[:256]), data(tokens[256:]), judge, words, measure="kl", recovery=how
    )  # fmt: skip


def efficientnet() -> Task:
    """EfficientNet-Lite0 on pictures of things; those of things of other kinds judge by the class the original says."""
    model, (images,) = models.efficientnet_lite0(8)
    unseen = models.object_images(400, unseen=True)
    with torch.no_grad():
        expected = torch.cat([model(part).argmax(1) for part in unseen.split(20)])

    def judge(model: Callable[..., Tensor]) -> dict[str, float]:
        with torch.no_grad():
            same = torch.cat([model(part).argmax(1) for part in unseen.split(20)]) == expected
        return {"agreement %": 100 * float(same.float().mean())}

    def data(part: Tensor) -> CalibrationData:
        return calibration_from({"inputs": part}, ["inputs"], 8, max_batches=None)

    known = models.object_images(800)
    shown = len(models.objects(unseen=False))
    by_object = sorted(range(len(known)), key=lambda i: i % shown)  # so that its end, kept out, shows others
    words = f"batch 8; 400 pictures of {len(models.objects(unseen=True))} unseen objects"
    return Task(model, (images,), data(known[:200]), data(known[by_object]), judge, words, measure="top1")


TASKS: dict[str, Callable[[], Task]] = {
    "minilm": minilm,
    "resnet": lambda: of_fashion("resnet"),
    "vit": lambda: of_fashion("vit"),
    "gpt": gpt,
    "efficientnet-lite0": efficientnet,
}


@dataclass(frozen=True)
class Row:
    """What was asked for, and what came of it: time over the original's with its interval of 95 %, and figures."""

    asked: str
    ratio: tuple[float, float, float]
    size: float
    error: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    minutes: float
    steps: int


def rows(task: Task, budgets: Mapping[str, lrcompile.Budget], minutes: Sequence[float], folder: Path) -> Iterator[Row]:
    """One for each budget, by its name; `minutes` of training for each, 0 where layers are only fitted anew."""
    with ProgressDisplay(Console(stderr=True)) as progress:
        prepared = lrcompile.prepare_model(
            task.model, task.example, target="local", calibration=task.calibration, progress=progress
        )
        assert prepared.reference is not None
        for (asked, budget), length in zip(budgets.items(), minutes, strict=True):
            try:
                found = lrcompile.solve(prepared, budget)
            except BudgetError as problem:
                print(f"{asked}: {problem}", file=sys.stderr)
                continue
            start = time.monotonic()
            how = {**task.recovery, "minutes": length} if length else {"steps": 0}
            after = lrcompile.recover(found, task.training, progress=progress, **how)
            taken = (time.monotonic() - start) / 60
            path = folder / "found.onnx"
            after.save(path)
            result = paired(prepared.reference.onnx, path, batch=len(task.example[0]), seconds=BENCH_S)
            figures = after.report.recovery
            yield Row(
                asked, (result.ratio, result.ratio_low, result.ratio_high),
                found.report.model["weight_bytes_after"] / found.report.model["weight_bytes_before"],
                found.report.error["measured"], task.judge(found.model), task.judge(after.model),
                taken, int(figures["steps"]) if figures else 0,
            )  # fmt: skip


def table(task: Task, found: Sequence[Row], measure: str) -> Iterator[str]:
    """The rows as Markdown, under what the original is judged at; their errors are in a measure."""
    base = task.judge(task.model)
    names = list(base)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in base.items())
    yield f"Original: {figures}; {task.settings}. {cpu_name()}, {usable_cores()} cores."
    yield ""
    columns = [f"{name}, {when}" for name in names for when in ("rewritten", "recovered")]
    error = MEASURES[measure].label
    yield f"| asked | measured | weights | {error} | {' | '.join(columns)} | minutes | steps |"
    yield "|" + "---|" * (6 + len(columns))
    for row in found:
        ratio, low, high = row.ratio
        cells = [f"{figures[name]:.4g}" if figures else "" for name in names for figures in (row.before, row.after)]
        yield (
            f"| {row.asked} | {1 / ratio:.2f}× ({1 / high:.2f}–{1 / low:.2f}) | {row.size:.0%} | {row.error:.3f} | "
            f"{' | '.join(cells)} | {row.minutes:.1f} | {row.steps} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TASKS))
    limits = parser.add_mutually_exclusive_group(required=True)
    limits.add_argument("--speedups", type=float, nargs="+")
    limits.add_argument("--max-errors", type=float, nargs="+")
    parser.add_argument("--measure", choices=list(MEASURES), help="of errors (default: as it fits the task)")
    parser.add_argument(
        "--minutes", type=float, nargs="+", required=True, help="of training, for each; 0: fitted anew only"
    )
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    asked, minutes = options.speedups or options.max_errors, options.minutes
    if len(minutes) != len(asked) or len(set(asked)) < len(asked):
        parser.error(f"expected --minutes for each of {_words(asked)}, all different; got {_words(minutes)}")
    marks = f"<!-- {options.name} -->", f"<!-- end of {options.name} -->"
    if options.out:
        check_marks(options.out, *marks)
    warnings.simplefilter("ignore")
    try:
        task = TASKS[options.name]()
    except DataMissing as problem:
        print(f"bench_accuracy: {problem}", file=sys.stderr)
        return 1
    measure = options.measure or task.measure
    if options.speedups:
        budgets = {f"{value:g}×": lrcompile.Budget(speedup=value, measure=measure) for value in options.speedups}
        words = f"--speedups {_words(options.speedups)}"
    else:
        errors = options.max_errors
        budgets = {f"{measure} {value:g}": lrcompile.Budget(max_error=value, measure=measure) for value in errors}
        words = f"--max-errors {_words(errors)}"
    words += f" --measure {measure}" if options.measure else ""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(task, budgets, options.minutes, Path(folder)):
            found.append(row)
            print(row, flush=True)
    command = f"python tools/bench_accuracy.py {options.name} {words} --minutes {_words(options.minutes)}"
    text = "\n".join([*table(task, found, measure), "", f"    {command}"])
    print(text)
    if options.out:
        put(options.out, marks[0], f"\n{text}\n", marks[1])
    return 0


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
