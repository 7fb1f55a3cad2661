"""What a recovery learns from and is judged by: samples in batches, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import InputError

JUDGED = 0.1  # the share of the batches that are kept out of training, to judge it by
MOST_JUDGED = 128  # samples
IGNORED = -100  # a label that says nothing


@dataclass(frozen=True, eq=False)
class Batch:
    """Flat inputs and, where there are any, labels [samples, …] of the first output."""

    inputs: tuple[Any, ...]
    labels: Tensor | None

    def __len__(self) -> int:
        return next(len(value) for value in self.inputs if isinstance(value, Tensor) and value.dim())

    def to(self, device: torch.device) -> Batch:
        """The same values on a device."""
        inputs = tuple(v.to(device) if isinstance(v, Tensor) else v for v in self.inputs)
        return Batch(inputs, None if self.labels is None else self.labels.to(device))

    def take(self, index: Tensor) -> Batch:
        """Some of the samples, in the order of their numbers."""
        inputs = tuple(v[index] if isinstance(v, Tensor) and v.dim() else v for v in self.inputs)
        return Batch(inputs, None if self.labels is None else self.labels[index])

    def pieces(self, most: int) -> list[Batch]:
        """The batch in pieces of so many samples at most; itself where that is all of it."""
        if len(self) <= most:
            return [self]
        return [self.take(numbers) for numbers in torch.arange(len(self)).split(most)]


@dataclass(frozen=True, eq=False)
class Samples:
    """`training` and `judging` batches; a batch is taken apart and mixed with others only where `mixed`.

    `kept_out` is how many batches, as given, are for judging alone.
    """

    training: tuple[Batch, ...]
    judging: tuple[Batch, ...]
    mixed: bool
    size: int
    kept_out: int

    @property
    def count(self) -> int:
        """How many samples there are to train on."""
        return sum(len(batch) for batch in self.training)

    @property
    def steps_an_epoch(self) -> int:
        """How many steps see every training sample once."""
        return -(-self.count // self.size) if self.mixed else len(self.training)

    def order(self, epoch: int, seed: int, kept: Tensor | None = None) -> list[Tensor]:
        """The numbers of the samples of each step of an epoch; of batches, where they are not mixed.

        `kept` are the numbers of the samples to train on, without it all are.
        """
        chance = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if not self.mixed:
            return list(torch.randperm(len(self.training), generator=chance).split(1))
        kept = torch.arange(self.count) if kept is None else kept
        return list(kept[torch.randperm(len(kept), generator=chance)].split(self.size))

    def batch(self, numbers: Tensor) -> Batch:
        """The batch of some numbers of `order`."""
        return self.training[0].take(numbers) if self.mixed else self.training[int(numbers)]


def samples_of(
    batches: Sequence[Sequence[Any]], labels: Tensor | None, size: int | None, judged: float = JUDGED
) -> Samples:
    """Splits flat input batches, equal in size, into those to train on and, from their end, those to judge by.

    `labels` [samples, …] belong to the samples in order. `size` is that of training batches, None if the model takes
    those that there are only.

    Raises:
        InputError: there are too few batches to keep one out, or not as many labels as samples.
    """
    counts = [next(len(v) for v in batch if isinstance(v, Tensor) and v.dim()) for batch in batches]
    if len(batches) < 2:
        raise InputError(
            f"recovery got one batch of {sum(counts)} samples; it trains on some and is judged by others: "
            "give more calibration data, or a smaller --batch"
        )
    if labels is not None and len(labels) < sum(counts):
        raise InputError(f"there are {len(labels)} labels for {sum(counts)} samples; give one for each sample")
    parts = [None] * len(batches) if labels is None else list(labels[: sum(counts)].split(counts))
    whole = [Batch(tuple(batch), part) for batch, part in zip(batches, parts, strict=True)]
    held = max(1, min(round(judged * len(whole)), MOST_JUDGED // max(counts)))
    training, judging = whole[:-held], whole[-held:]
    layouts = {tuple(v.shape[1:] if isinstance(v, Tensor) else None for v in batch.inputs) for batch in whole}
    if size is None or len(layouts) > 1:
        return Samples(tuple(training), tuple(judging), mixed=False, size=counts[0], kept_out=held)
    size = min(size, sum(counts[:-held]))
    joined, judged_ones = _joined(training), _joined(judging)
    split = torch.arange(len(judged_ones)).split(size)
    judged_by = tuple(judged_ones.take(numbers) for numbers in split)
    return Samples((joined,), judged_by, mixed=True, size=size, kept_out=held)


def few_classes(samples: Samples) -> list[str]:
    """That what a recovery is judged by holds few of the classes that it learns, as of a set sorted by class."""
    learned, judged = (_classes(batches) for batches in (samples.training, samples.judging))
    count = sum(len(batch) for batch in samples.judging)
    if 2 * len(judged) >= len(learned) or count < 2 * len(learned):
        return []
    return [
        f"recovery is judged by the last {count} samples, which hold {len(judged)} of the {len(learned)} classes that "
        "it learns: shuffle the data, with their labels"
    ]


def _classes(batches: Sequence[Batch]) -> set[int]:
    found = [batch.labels.unique() for batch in batches if batch.labels is not None]
    return set(torch.cat(found).tolist()) - {IGNORED} if found else set()


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples; inputs without samples are those of the first."""
    columns = zip(*(batch.inputs for batch in batches), strict=True)
    inputs = tuple(torch.cat(c) if isinstance(c[0], Tensor) and c[0].dim() else c[0] for c in columns)
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(inputs, torch.cat(labels) if labels else None)
