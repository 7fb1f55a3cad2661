"""Grouped heads after an epoch of training on Fashion-MNIST; the figures of several seeds are in `docs/recovery.md`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools import recover_heads
from tools.fetch_data import DataMissing, ensure
from tools.recover_heads import (
    CLAIMED,
    VARIANTS,
    Recovery,
    SmallViT,
    Task,
    grouped,
    mean,
    page,
    recover,
    trained_base,
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def task() -> Task:
    """Few images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (300,), generator=generator)
    return Task((images[:200], labels[:200]), (images[200:], labels[200:]))


def test_only_the_grouped_layers_are_drawn_anew(task: Task) -> None:
    torch.manual_seed(0)
    base = SmallViT(width=24, blocks=2)
    images, variant = task.train[0], VARIANTS["GQA-3"]
    means, _ = grouped(base, variant, "mean", images, 0)
    drawn, _ = grouped(base, variant, "random", images, 0)
    changed = {path for path, value in means.state_dict().items() if not torch.equal(value, drawn.state_dict()[path])}
    assert changed == {f"blocks.{i}.{role}.{kind}" for i in (0, 1) for role in "kv" for kind in ("weight", "bias")}
    assert means.state_dict()["blocks.0.k.weight"].shape == (12, 24)
    assert base.state_dict()["blocks.0.k.weight"].shape == (24, 24)


def test_bases_are_kept(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(recover_heads, "EPOCHS", 1)
    first = trained_base(task, 0)
    (path,) = (tmp_path / "lrcompile" / "models").iterdir()
    monkeypatch.setattr(recover_heads, "train", None)
    again = trained_base(task, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert path.name.endswith("-0.pt")


def test_page_says_which_readings_hold() -> None:
    def row(name: str, start: str, teacher: str, *accuracies: float) -> Recovery:
        return Recovery(name, start, teacher, 0, 1000, 0.5, 90.0, dict(zip((0, 50, 430), accuracies, strict=True)))

    rows = [row("none", "as it is", "labels", 90.0, 89.0, 90.2), row("none", "as it is", "base", 90.0, 89.0, 90.0)]
    for name in CLAIMED:
        for teacher, more in (("labels", 0.0), ("base", 0.2)):
            rows.append(row(name, "mean", teacher, 60.0, 85.0, 89.4 + more))
            rows.append(row(name, "similar", teacher, 65.0, 86.0, 89.6 + more))
            rows.append(row(name, "random", teacher, 30.0, 74.0, 88.0))
        rows.append(row(name, "scratch", "labels", 10.0, 50.0, 80.0))
    text = page(rows, "this command")
    assert "| GQA-3 | mean | labels | ≥ −0.5 | -0.60 | -0.60 | no | no | -0.80 |" in text
    assert "| GQA-3 | mean | base | ≥ −0.5 | -0.40 | -0.40 | yes | yes | -0.40 |" in text
    assert "| GQKVA-3.2 | mean | labels | ≥ −1.5 | -0.60 | -0.60 | yes | yes | -0.80 |" in text
    held = "both from labels, after 50 steps: holds for GQA-3 (+11.0), GKVA-3 (+11.0), GQKVA-3.2 (+11.0)."
    assert f"random grouped layers, {held}" in text
    assert "both from the base, after 430 steps: not for GQA-3 (+1.6), GKVA-3 (+1.6), GQKVA-3.2 (+1.6)." in text


# -------------------------------------------------------------------------------------------------------- real data


@functools.cache
def recovered(name: str, start: str, teacher: str, seed: int = 0) -> Recovery:
    """A variant after an epoch, from the base of a seed, which is trained if it is not in the cache."""
    return recover(_fashion(), name, start, seed, teacher)


@functools.cache
def _fashion() -> Task:
    return Task.fashion()


@pytest.fixture
def fashion(one_thread: None) -> None:
    """Skips the test unless Fashion-MNIST is in the cache."""
    try:
        ensure("fashion-mnist", download=False)
    except DataMissing as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.usefixtures("fashion")
@pytest.mark.parametrize("name", CLAIMED)
def test_an_epoch_brings_grouped_heads_near_the_base(name: str) -> None:
    """From the base's own scores, on average of three seeds: one accuracy has a standard error of 0.3 points.

    On labels GQA-3 stays 0.2 points short: see docs/recovery.md.
    """
    seeds = [recovered(name, "mean", "base", seed) for seed in range(3)]
    for found in seeds:
        print(f"{name}: base {found.base:.2f} %, untrained {found.before:.2f} %, after an epoch {found.after:.2f} %")
        assert found.base > 88
    assert mean(found.after - found.base for found in seeds) >= -CLAIMED[name]


@pytest.mark.slow
@pytest.mark.usefixtures("fashion")
@pytest.mark.parametrize("name", ["GQA-3", "GKVA-3"])
def test_a_mean_is_a_better_start_than_random(name: str) -> None:
    """By ten points before training; random layers catch up within the epoch, to two points: see docs/recovery.md."""
    means, random = recovered(name, "mean", "base"), recovered(name, "random", "base")
    leads = {step: means.accuracies[step] - random.accuracies[step] for step in means.accuracies}
    print(f"{name}: points by which the mean leads random after so many steps: {leads}")
    assert leads[0] >= 10
    assert leads[50] > 0
    assert means.after > random.after
