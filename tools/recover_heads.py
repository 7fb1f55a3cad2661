"""What an epoch of training gives back to a model whose heads were grouped: `python tools/recover_heads.py --seeds 3`.

A small vision transformer learns Fashion-MNIST and is kept in the user's cache. `GroupHeads` groups the heads of all
its blocks, the rewritten graph is trained for one epoch, on the labels or on what the base makes of the images, and
its accuracy on the test images is compared with the base's. Nothing is chosen on the test images: the learning rate
comes from `--choose-rate`, on images held out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lrcompile_passes import GroupHeads
from torch import Tensor, nn

from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import parameter_count
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, apply, proposals
from lrcompile.planning.calibration import collect
from tools.fetch_data import DataMissing, cache_directory
from tools.models import fashion_mnist

Data = tuple[Tensor, Tensor]

HEADS = 6
BATCH = 128
HELD_OUT = 5000
EPOCHS = 10
RATE = 1e-3
RECOVERY_RATE = 1e-3
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
MARKS = (50, 200)
CALIBRATION = 512
TEMPERATURE = 2.0
TEACHERS = ("labels", "base")


class SmallViT(nn.Module):
    """Blocks of attention over the 16 patches of an image of 28 × 28 pixels."""

    def __init__(self, width: int = 96, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(torch.randn(16, width) / 10)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch × 1 × 28 × 28] to scores [batch × 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Block(nn.Module):
    """Attention of six heads, then two layers, each on top of its normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.layers(self.between(x))


@dataclass(frozen=True)
class Variant:
    """A grouping as the pass names it: `queries` and `keys` heads are computed afterwards."""

    name: str
    form: str
    queries: int
    keys: int


VARIANTS = {
    v.name: v
    for v in (
        Variant("MQA", "GQA", 6, 1),
        Variant("GQA-2", "GQA", 6, 2),
        Variant("GQA-3", "GQA", 6, 3),
        Variant("MKVA", "GKVA", 1, 6),
        Variant("GKVA-2", "GKVA", 2, 6),
        Variant("GKVA-3", "GKVA", 3, 6),
        Variant("GQKVA-2.3", "GQKVA", 2, 3),
        Variant("GQKVA-3.2", "GQKVA", 3, 2),
    )
}
CLAIMED = {"GQA-3": 0.5, "GKVA-3": 0.5, "GQKVA-3.2": 1.5}


@dataclass(frozen=True)
class Recovery:
    """Accuracies in percent after so many steps; the last of them are the epoch. `error` is the pass's estimate."""

    variant: str
    start: str
    teacher: str
    seed: int
    parameters: int
    error: float
    base: float
    accuracies: dict[int, float]

    @property
    def before(self) -> float:
        return self.accuracies[0]

    @property
    def after(self) -> float:
        return self.accuracies[max(self.accuracies)]


@dataclass(frozen=True)
class Task:
    """Images to train on, and images to judge by."""

    train: Data
    test: Data

    @classmethod
    def fashion(cls, *, held_out: bool = False) -> Task:
        """55,000 images to train on; the 10,000 test images, or the 5,000 that are left of the training images."""
        images, labels = fashion_mnist("train")
        train, rest = ((images[s], labels[s]) for s in (slice(-HELD_OUT), slice(-HELD_OUT, None)))
        return cls(train, rest if held_out else fashion_mnist("t10k"))


# ------------------------------------------------------------------------------------------------------- training


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    rate: float,
    seed: int,
    watch: Callable[[int], None] = lambda step: None,
    teacher: nn.Module | None = None,
) -> None:
    """AdamW, its rate on a cosine to zero, on images mirrored at random; `watch` gets the number of steps done.

    It learns the labels, or, with a `teacher`, the teacher's scores; the labels are not read then.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(labels) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            x = torch.where(mirrored, images[batch].flip(-1), images[batch])
            optimizer.zero_grad()
            scores = model(x)
            loss = distance(scores, teacher, x) if teacher else nn.functional.cross_entropy(scores, labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            watch(done)


def distance(scores: Tensor, teacher: nn.Module, images: Tensor) -> Tensor:
    """The divergence from what a teacher makes of the images, softened (Hinton et al., arXiv 1503.02531)."""
    with torch.no_grad():
        expected = (teacher(images) / TEMPERATURE).log_softmax(1)
    got = (scores / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * nn.functional.kl_div(got, expected, log_target=True, reduction="batchmean")


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """In percent."""
    parts = zip(*(tensor.split(500) for tensor in data), strict=True)
    hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
    return 100 * hits / len(data[1])


SOURCES: tuple[Any, ...] = (SmallViT, Block, train)  # what the kept bases depend on


def trained_base(task: Task, seed: int) -> SmallViT:
    """The trained model of a seed, from the user's cache or made now and kept there."""
    recipe = [EPOCHS, RATE, BATCH, HELD_OUT, HEADS, *(inspect.getsource(part) for part in SOURCES)]
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    path = cache_directory().parent / "models" / f"fashion-vit-{key}-{seed}.pt"
    torch.manual_seed(seed)
    model = SmallViT()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, task.train, EPOCHS, RATE, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model.eval()


# ------------------------------------------------------------------------------------------------------- recovery


def grouped(base: nn.Module, variant: Variant, start: str, images: Tensor, seed: int) -> tuple[nn.Module, float]:
    """(a rewritten copy of the base, the mean error that the pass states).

    Starts: "mean" and "similar" are those of the pass, judged on `images`; "random" draws the grouped layers anew.
    """
    base = copy.deepcopy(base).eval()  # a graph shares its modules with the model it was traced from
    graph = trace(base, (images[:8],)).graph
    context = Context(load_device("v100"), grams=collect(graph, [(images,)]).grams)
    transform = GroupHeads(inits=("similar" if start == "similar" else "mean",))
    wanted = (variant.form, variant.queries, variant.keys, *transform.inits)
    found = [p for p in proposals(graph, transform, context) if isinstance(p, Rewrite)]
    rewrites = [r for r in found if (*r.params.values(),) == wanted]
    blocks = sum(isinstance(module, Block) for module in base.modules())
    if len(rewrites) != blocks:
        raise ValueError(f"{variant.name} from {start}: proposed for {len(rewrites)} of {blocks} blocks")
    widths = {
        path: site.module.out_features for path, site in graph.sites().items() if isinstance(site.module, nn.Linear)
    }
    for rewrite in rewrites:
        apply(graph, transform, rewrite, context)
    graph.gm.recompile()
    if start == "random":
        torch.manual_seed(seed)
        for path, width in widths.items():
            module: Any = graph.site(path).module
            if module.out_features < width:
                module.reset_parameters()
    return graph.gm, sum(rewrite.error for rewrite in rewrites) / len(rewrites)


def recover(
    task: Task, name: str, start: str, seed: int, teacher: str = "labels", rate: float = RECOVERY_RATE
) -> Recovery:
    """Groups the heads of the base of that seed and trains it for one epoch, on "labels" or on the "base".

    The variant "none" leaves the heads as they are. The start "scratch" is a model of the variant's shape that has
    learned nothing; it trains with the base's own rate.
    """
    base = trained_base(task, seed)
    original = accuracy(base, task.test)
    images = task.train[0][:CALIBRATION]
    model: nn.Module = copy.deepcopy(base)
    error = 0.0
    if start == "scratch":
        torch.manual_seed(1000 + seed)
        model, rate = SmallViT(), RATE
    if name != "none":
        given = "random" if start == "scratch" else start
        model, error = grouped(model, VARIANTS[name], given, images, seed)
    accuracies = {0: accuracy(model, task.test)}
    last = math.ceil(len(task.train[1]) / BATCH)

    def watch(step: int) -> None:
        if step in (*MARKS, last):
            accuracies[step] = accuracy(model, task.test)

    train(model, task.train, 1, rate, 100 + seed, watch, base if teacher == "base" else None)
    return Recovery(name, start, teacher, seed, parameter_count(model), error, original, accuracies)


def starts(name: str) -> tuple[str, ...]:
    """With one group there is no choice of which heads are together."""
    return (
        ("mean", "random") if min(VARIANTS[name].queries, VARIANTS[name].keys) == 1 else ("mean", "similar", "random")
    )


def all_runs(task: Task, seeds: int) -> Iterator[Recovery]:
    """Everything from the first seed; from the others what the claim is about."""
    for seed in range(seeds):
        yield from (recover(task, "none", "as it is", seed, teacher) for teacher in TEACHERS)
        for name in VARIANTS if seed == 0 else CLAIMED:
            for teacher in TEACHERS if name in CLAIMED else TEACHERS[:1]:
                yield from (recover(task, name, start, seed, teacher) for start in starts(name))
            if seed == 0 and name in CLAIMED:
                yield recover(task, name, "scratch", seed)


def choose_rate(task: Task) -> Iterator[str]:
    """Accuracy on the held-out images of two variants at each rate, from the first seed."""
    for teacher in TEACHERS:
        for rate in RATES:
            found = {name: recover(task, name, "mean", 0, teacher, rate).after for name in ("GQA-3", "GQKVA-3.2")}
            figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            yield f"from {teacher}, rate {rate:g}: {figures}"


# ------------------------------------------------------------------------------------------------------------- page


def page(rows: Sequence[Recovery], command: str) -> str:
    """The tables and what they say about the claim, as Markdown."""
    count = len({row.seed for row in rows})
    seeds = f"{count} {'seeds' if count > 1 else 'seed'}"
    base = mean(row.base for row in _select(rows, "none", "as it is"))
    steps = " | ".join(str(step) for step in rows[0].accuracies)
    rule = "---|" * len(rows[0].accuracies)
    lines = [
        "# Recovery of grouped heads",
        "",
        f"Made by `{command}`. A vision transformer of {rows[0].parameters:,} parameters (four blocks, six heads, 16 "
        f"patches) learns Fashion-MNIST in {EPOCHS} epochs to {base:.2f} % of the 10,000 test images. Then "
        "`group-heads` groups the heads of all blocks, and the rewritten graph trains for one epoch more: "
        f"{max(rows[0].accuracies)} steps of {BATCH} images, AdamW, {RECOVERY_RATE:g} on a cosine to zero. It learns "
        f"from the *labels*, or from the *base*: its scores at temperature {TEMPERATURE:g}, no labels. The rate is the "
        f"best of {', '.join(f'{rate:g}' for rate in RATES)} on 5,000 training images held out (`--choose-rate`), the "
        "same for all. The standard error of one accuracy is 0.3 points.",
        "",
        f"## Against the base, after one epoch ({seeds})",
        "",
        "A seed is a base of its own, another order of the images, and other random numbers. Points are after − base, "
        "the mean and each seed; the last column compares with a base that trained for the same extra epoch.",
        "",
        "| variant | start | from | asked | after − base | seeds | holds on average | in each "
        "| − the base trained as long |",
        "|---|---|---|---|---|---|---|---|---|",
        *_against_base(rows),
        "",
        f"## Mean against random ({seeds})",
        "",
        "*Random* draws the grouped layers anew and keeps the rest. Accuracy after so many steps of the epoch.",
        "",
        f"| variant | start | from | {steps} |",
        f"|---|---|---|{rule}",
        *_against_random(rows),
        "",
        *_readings(rows),
        "",
        "## All variants (first seed)",
        "",
        "*Error* is what the pass states for q, k and v, the mean of the blocks, on 512 training images. With one "
        "group there is nothing to sort, and no *similar*. *Scratch* draws the whole model anew and trains it with "
        f"the base's rate, {RATE:g}.",
        "",
        f"| variant | start | from | parameters | error | {steps} | after − base |",
        f"|---|---|---|---|---|{rule}---|",
    ]
    for row in (row for row in rows if row.seed == 0):
        error = f"{row.error:.3f}" if row.start in ("mean", "similar") else ""
        lines.append(
            f"| {row.variant} | {row.start} | {row.teacher} | {row.parameters:,} | {error} | {_cells(row.accuracies)} "
            f"| {row.after - row.base:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def _against_base(rows: Sequence[Recovery]) -> Iterator[str]:
    for teacher in TEACHERS:
        gained = [row.after - row.base for row in _select(rows, "none", "as it is", teacher)]
        yield f"| none | | {teacher} | | {_spread(gained)} | | | |"
    for name, limit in CLAIMED.items():
        for teacher in TEACHERS:
            longer = {row.seed: row.after for row in _select(rows, "none", "as it is", teacher)}
            for start in ("mean", "similar"):
                mine = _select(rows, name, start, teacher)
                gained = [row.after - row.base for row in mine]
                holds = ("yes" if value >= -limit else "no" for value in (mean(gained), min(gained)))
                yield (
                    f"| {name} | {start} | {teacher} | ≥ −{limit:g} | {_spread(gained)} | {' | '.join(holds)} "
                    f"| {mean(row.after - longer[row.seed] for row in mine):+.2f} |"
                )


def _against_random(rows: Sequence[Recovery]) -> Iterator[str]:
    for name in CLAIMED:
        for teacher in TEACHERS:
            for start in ("mean", "random"):
                yield f"| {name} | {start} | {teacher} | {_cells(_curve(_select(rows, name, start, teacher)))} |"
            yield f"| {name} | mean − random | {teacher} | {_cells(_lead(rows, name, 'random', teacher), '+.1f')} |"


def _readings(rows: Sequence[Recovery]) -> Iterator[str]:
    """For which variants the mean leads by ten points, and when."""
    for other, teacher, what in (
        ("random", "labels", "random grouped layers, both from labels"),
        ("random", "base", "random grouped layers, both from the base"),
        ("scratch", "labels", "a random model, first seed, both from labels"),
    ):
        leads = {name: _lead(rows, name, other, teacher) for name in CLAIMED}
        for step in rows[0].accuracies:
            held = [f"{name} ({lead[step]:+.1f})" for name, lead in leads.items() if lead[step] >= 10]
            missed = [f"{name} ({lead[step]:+.1f})" for name, lead in leads.items() if lead[step] < 10]
            verdicts = [f"holds for {', '.join(held)}"] * bool(held) + [f"not for {', '.join(missed)}"] * bool(missed)
            when = f"after {step} steps" if step else "before training"
            yield f"- Mean at least 10 points above {what}, {when}: {'; '.join(verdicts)}."


def _lead(rows: Sequence[Recovery], name: str, other: str, teacher: str) -> dict[int, float]:
    """Points by which the mean is ahead, of the seeds that have both."""
    theirs = _select(rows, name, other, teacher)
    seeds = {row.seed for row in theirs}
    ours = _curve([row for row in _select(rows, name, "mean", teacher) if row.seed in seeds])
    return {step: ours[step] - value for step, value in _curve(theirs).items()}


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):+.2f} | {', '.join(f'{value:+.2f}' for value in values)}"


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _select(rows: Sequence[Recovery], variant: str, start: str, teacher: str = "labels") -> list[Recovery]:
    return [row for row in rows if (row.variant, row.start, row.teacher) == (variant, start, teacher)]


def _curve(rows: Sequence[Recovery]) -> dict[int, float]:
    return {step: mean(row.accuracies[step] for row in rows) for step in rows[0].accuracies}


def _cells(values: Mapping[int, float], form: str = ".2f") -> str:
    return " | ".join(format(value, form) for value in values.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="of what the claim is about (default: %(default)s)")
    parser.add_argument("--choose-rate", action="store_true", help="compare rates on held-out images, and end")
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model is too small to gain from more
    try:
        task = Task.fashion(held_out=options.choose_rate)
    except DataMissing as problem:
        print(f"recover_heads: {problem}", file=sys.stderr)
        return 1
    if options.choose_rate:
        for line in choose_rate(task):
            print(line, flush=True)
        return 0
    rows = []
    for row in all_runs(task, options.seeds):
        rows.append(row)
        name = f"{row.variant} {row.start} from {row.teacher}"
        print(f"{name:30} seed {row.seed}  base {row.base:.2f}  {_cells(row.accuracies)}", flush=True)
    out = f" --out {options.out}" if options.out else ""
    text = page(rows, f"python tools/recover_heads.py --seeds {options.seeds}{out}")
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
