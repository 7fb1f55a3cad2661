"""What the methods of training are worth, each against training without it: the tables of docs/training.md.

python -m tools.bench_recovery freeze       time and loss of a step with frozen factors
python -m tools.bench_recovery subset       a quarter of the steps on the samples that matter
python -m tools.bench_recovery stable-rank  a penalty on spectra before the split
python -m tools.bench_recovery progressive  a family of three against one split, at equal steps
python -m tools.bench_recovery device       time of a step on each device here, in each precision
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, CalibrationData, Recovery, Result, StableRank, calibration_from
from lrcompile.recovery.settings import DEFAULT_BATCH
from tools import novels
from tools.fetch_data import DataMissing
from tools.models import fashion_mnist
from tools.recipes import accuracy
from tools.validate_profiles import put

TARGET = "rpi5"  # what is trained does not depend on it: budgets are of size
WIDTH = 512


# -------------------------------------------------------------------------------------------------- what is trained


def perceptron(into: int, out: int, width: int, hidden: int) -> nn.Sequential:
    """`hidden` square layers between an input and an output layer."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(into, width), nn.ReLU()]
    for _ in range(hidden):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, out))


def learned(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    seed: int = 0,
    penalty: Callable[[float], Tensor] | None = None,
) -> nn.Module:
    """Trains by cross-entropy, in batches of 128."""
    x, y = data
    chance = torch.Generator().manual_seed(seed)
    steps, done = epochs * (len(x) // 128), 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=chance).split(128)[: len(x) // 128]:
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if penalty is not None:
                loss = loss + penalty(done / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    return model.eval()


def inputs_of(x: Tensor, batch: int = 64) -> CalibrationData:
    return calibration_from({"input": x}, ["input"], batch, max_batches=None)


def split(model: nn.Module, x: Tensor, size: float) -> Result:
    """The model at a share of its weights."""
    return lrcompile.compile(model, (x[:64],), target=TARGET, budget=Budget(size=size), calibration=inputs_of(x[:1024]))


def recovered(result: Result, x: Tensor, y: Tensor | None, **settings: Any) -> Result:
    options: dict[str, Any] = {
        "rate": 1e-3,
        "refit": False,
        "precision": "fp32",
        "batch": 64,
        "teacher": float(y is None),
    }
    return lrcompile.recover(result, inputs_of(x), labels=y, **options | settings)


def figures(result: Result) -> dict[str, Any]:
    assert result.report.recovery is not None
    return dict(result.report.recovery)


# ----------------------------------------------------------------------------------------------------------- freeze


def freeze(seeds: int) -> Iterator[str]:
    """Step time and loss with frozen factors over those without, in turn in one run."""
    torch.manual_seed(0)
    x, y = fashion_mnist("train")
    unseen, classes = fashion_mnist("t10k")
    width = 2 * WIDTH
    original = learned(perceptron(784, 10, width, 4), (x[:8000], y[:8000]), 2)
    found = split(original, x, 0.5)
    part, steps, batch = slice(10000, 42768), 128, 512

    @torch.no_grad()
    def loss(result: Result, labels: Tensor | None) -> float:
        scores = result.model(unseen)
        if labels is not None:
            return float(nn.functional.cross_entropy(scores, classes))
        expected = original(unseen)
        return float((scores - expected).square().sum() / expected.square().sum())

    yield f"Four layers {width} × {width}, two epochs on 8,000 images; at half its weights {steps} steps"
    yield f"of {batch} others, rate 0.001, single precision, {seeds} seeds in turn. The loss is that on the 10,000 test"
    yield "images: cross-entropy, or the squared difference from the original. Steps are those of the fastest training"
    yield "of each kind, as other work on the machine only ever adds time; the range is that of the pairs."
    yield ""
    yield "| learned from | frozen | step, of that without | range | loss, of that without | range |"
    yield "|---|---|---|---|---|---|"
    recovered(found, x[part], None, steps=steps, batch=batch)  # the first one in a process is slower
    for name, labels in (("labels", y[part]), ("original", None)):
        runs: dict[str, list[tuple[float, float]]] = {"none": [], "sequential": [], "regular": []}
        for seed in range(seeds):
            for kind, rows in runs.items():
                how: dict[str, Any] = {"steps": steps, "batch": batch, "freeze": kind, "seed": seed}
                after = recovered(found, x[part], labels, **how)
                rows.append((figures(after)["seconds"], loss(after, labels)))
        for kind in ("sequential", "regular"):
            pairs = list(zip(runs[kind], runs["none"], strict=True))
            times, losses = ([one[i] / other[i] for one, other in pairs] for i in (0, 1))
            fastest = min(one[0] for one, _ in pairs) / min(other[0] for _, other in pairs)
            yield f"| {name} | {kind} | {fastest:.3f} | {_range(times)} | {_ratio(losses)} |"


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} | {_range(values)}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f}–{max(values):.3f}"


# ----------------------------------------------------------------------------------------------------------- subset


def clusters(noise: float, wrong: float, count: int = 10240) -> tuple[Tensor, Tensor]:
    """Points [count × 32] around 40 centres, and the class of their centre; a share `wrong` has another class."""
    chance = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=chance)
    which = torch.randint(40, (count,), generator=chance)
    x = centres[which] + noise * torch.randn(count, 32, generator=chance)
    y = which % 10
    replaced = torch.rand(count, generator=chance) < wrong
    return x, torch.where(replaced, torch.randint(10, (count,), generator=chance), y)


def subset(seeds: int) -> Iterator[str]:
    """All samples, a tenth of them by importance or by chance, at full and at a quarter of the steps."""
    yield "A perceptron of two layers 256 × 256 at 8 % of its weights; 8,192 points, and 2,048 others that judge;"
    yield f"{seeds} seeds. *Scored*: samples that were run forward alone to choose the tenth, in steps of 32 samples."
    yield ""
    yield "| set | learned from | steps | scored | accuracy % | − all, points | guard |"
    yield "|---|---|---|---|---|---|---|"
    sets = {"redundant: 40 clusters": (0.25, 0.0), "hard: 40 % of the labels at random": (0.25, 0.4)}
    for name, (noise, wrong) in sets.items():
        x, y = clusters(noise, wrong)
        known, judged = (x[:8192], y[:8192]), (x[8192:], y[8192:])
        torch.manual_seed(0)
        found = split(learned(perceptron(32, 10, 256, 2), known, 10), known[0], 0.08)
        by_chance = torch.randperm(8192, generator=torch.Generator().manual_seed(1))[:820]
        runs: dict[str, tuple[int, dict[str, float], tuple[Tensor, Tensor]]] = {
            "all": (2048, {}, known),
            "all, a quarter of the steps": (512, {}, known),
            "a tenth by importance": (512, {"subset": 0.1}, known),
            "a tenth by chance": (512, {}, (x[by_chance], y[by_chance])),
        }
        best = 0.0
        for kind, (steps, settings, data) in runs.items():
            after = [recovered(found, data[0], data[1], steps=steps, seed=seed, **settings) for seed in range(seeds)]
            value = statistics.mean(accuracy(result.model, judged) for result in after)
            best = best or value
            fired = any("would mislead" in note for result in after for note in result.report.notes)
            scored = statistics.mean(figures(result)["scored"] for result in after) / DEFAULT_BATCH
            row = (name, kind, steps, f"{scored:.0f}" if scored else "", f"{value:.2f}", f"{value - best:+.2f}")
            yield f"| {' | '.join(map(str, row))} | {'fired' if fired else ''} |"


# ------------------------------------------------------------------------------------------------------- stable rank


def stable_rank(seeds: int) -> Iterator[str]:
    """Tails of spectra and accuracy after plain truncation, trained without and with the penalty."""
    x, y = fashion_mnist("train")
    test = fashion_mnist("t10k")
    rank = WIDTH // 8  # a quarter of the weights
    yield f"A perceptron of four layers {WIDTH} × {WIDTH}, 3 epochs, cut by plain SVD to rank {rank}: a quarter of"
    yield f"these layers' weights; {seeds} seeds. *Tail*: the share of squared singular values beyond the rank."
    yield ""
    yield "| strength | tail | of that without | accuracy %, whole | accuracy %, cut |"
    yield "|---|---|---|---|---|"
    plain = 0.0
    for strength in (0.0, 0.01, 0.1):
        rows = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = perceptron(784, 10, WIDTH, 4)
            hidden = {str(3 + 2 * i): rank for i in range(4)}
            penalty = StableRank(model, hidden, strength=strength) if strength else None
            learned(model, (x[:30000], y[:30000]), 3, seed, penalty)
            whole = accuracy(model, test)
            tail = statistics.mean(_cut(model.get_submodule(path), rank) for path in hidden)
            rows.append((tail, whole, accuracy(model, test)))
        tail, whole, cut = (statistics.mean(values) for values in zip(*rows, strict=True))
        plain = plain or tail
        yield f"| {strength:g} | {tail:.4f} | {tail / plain:.2f} | {whole:.2f} | {cut:.2f} |"


@torch.no_grad()
def _cut(layer: nn.Module, rank: int) -> float:
    """Truncates a layer's weight in place; the share of its squared singular values that is lost."""
    weight: Any = layer.weight
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    weight.copy_(u[:, :rank] * s[:rank] @ v[:rank])
    return float(s[rank:].square().sum() / s.square().sum())


# ------------------------------------------------------------------------------------------------------- progressive


def progressive(seeds: int, steps: int, sizes: Sequence[float]) -> Iterator[str]:
    """Perplexity of a family's members, and of one split to the size of the last, trained as long as the family.

    Both are chosen for the divergence of the distributions of the next token.
    """
    model = novels.trained_on_novels(say=lambda line: print(line, file=sys.stderr, flush=True))
    train, unseen = novels.windows()
    tokens, judged = train[:, :-1], unseen[:: max(1, len(unseen) // 256)]

    def data(part: Tensor) -> CalibrationData:
        return calibration_from({"input_ids": part}, ["input_ids"], 8, max_batches=None)

    options: dict[str, Any] = {"target": TARGET, "calibration": data(tokens[:256])}
    count = sum(p.numel() for p in model.parameters())
    perplexity = novels.perplexity(model, judged)
    yield f"GPT of {count:,} parameters, perplexity {perplexity:.3f} on {len(judged)} unseen windows, `--measure kl`;"
    yield f"{len(sizes) * steps} steps of 16 windows, from the original alone, rate 0.001; {seeds} seeds."
    yield ""
    yield "| seed | " + " | ".join(f"{size:.0%} of the bytes" for size in sizes) + f" | {sizes[-1]:.0%} in one go |"
    yield "|---|" + "---|" * (len(sizes) + 1)
    table = []
    for seed in range(seeds):
        how: dict[str, Any] = {"rate": 1e-3, "batch": 16, "seed": seed, "refit": False, "outputs": "kl"}
        family = lrcompile.progressive(
            model, (tokens[:8],), sizes=sizes, recovery=Recovery(steps=steps, **how), data=data(tokens[256:]),
            budget=Budget(size=sizes[0], measure="kl"), **options,
        )  # fmt: skip
        once = lrcompile.compile(model, (tokens[:8],), budget=Budget(size=sizes[-1], measure="kl"), **options)
        untrained = novels.perplexity(once.model, judged)
        once = lrcompile.recover(once, data(tokens[256:]), steps=len(sizes) * steps, **how)
        row = [novels.perplexity(result.model, judged) for result in (*(member.result for member in family), once)]
        table.append(row)
        yield f"| {seed} | " + " | ".join(f"{value:.2f}" for value in row) + " |"
    means = [statistics.mean(column) for column in zip(*table, strict=True)]
    yield "| mean | " + " | ".join(f"{value:.2f}" for value in means) + " |"
    lengths = [member.result.report.recovery["steps"] for member in family if member.result.report.recovery]
    yield ""
    yield f"The members train {', '.join(map(str, lengths))} steps. The one that is cut in one go has a perplexity of"
    yield f"{untrained:.2f} before its training."


def device(steps: int) -> Iterator[str]:
    """A transformer's encoder of BERT's width with random weights, of 4 layers, on sequences of 128 tokens."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    x = torch.randn(128, 128, 768)
    split_one = lrcompile.compile(model, (x[:2],), target=TARGET, budget=Budget(size=0.5))
    yield "| device | precision | seconds a step |"
    yield "|---|---|---|"
    on_gpu = [("cuda", "fp32"), ("cuda", "bf16")] if torch.cuda.is_available() else []
    data = calibration_from({"src": x}, ["src"], 32)
    for where, precision in (("cpu", "fp32"), *on_gpu):
        how: dict[str, Any] = {"device": where, "precision": precision, "rate": 1e-3, "batch": 32, "refit": False}
        seconds = []
        for count in (1, 1 + steps):
            report = lrcompile.recover(split_one, data, steps=count, **how).report
            seconds.append(report.recovery["seconds"] if report.recovery else 0.0)
        yield f"| {where} | {precision} | {(seconds[1] - seconds[0]) / steps:.3f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("freeze", "subset", "stable-rank", "progressive", "device"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of each training, for progressive and device")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.4, 0.2, 0.1], help="of the family")
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    tables: dict[str, Callable[[], Iterator[str]]] = {
        "freeze": lambda: freeze(options.seeds),
        "subset": lambda: subset(options.seeds),
        "stable-rank": lambda: stable_rank(options.seeds),
        "progressive": lambda: progressive(options.seeds, options.steps, options.sizes),
    }
    tables["device"] = lambda: device(options.steps)
    lines = []
    try:
        for line in tables[options.table]():
            print(line, flush=True)
            lines.append(line)
    except DataMissing as problem:
        print(f"bench_recovery: {problem}", file=sys.stderr)
        return 1
    more = f" --steps {options.steps}" if options.table in ("progressive", "device") else ""
    if options.table != "device":
        more = f" --seeds {options.seeds}{more}"
    if options.table == "progressive":
        more += f" --sizes {' '.join(map(str, options.sizes))}"
    lines += ["", f"    python -m tools.bench_recovery {options.table}{more}"]
    if options.out:
        put(
            options.out, f"<!-- {options.table} -->", "\n" + "\n".join(lines) + "\n", f"<!-- end of {options.table} -->"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
