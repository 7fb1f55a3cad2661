"""What a recovery makes smaller: the distance from the original, and from labels where there are any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lrcompile.errors import InputError
from lrcompile.recovery.pair import Pair, Scales
from lrcompile.recovery.samples import IGNORED, Batch
from lrcompile.recovery.settings import Recovery


class Loss:
    """The loss of each sample of a batch, on the device that the pair is on.

    `scores` are the first outputs of the batch that was last seen.
    """

    def __init__(self, pair: Pair, recovery: Recovery) -> None:
        self.pair = pair
        self.recovery = recovery
        self.device = pair.device
        self.scores: Tensor | None = None
        self.in_float16 = any(parameter.dtype == torch.float16 for parameter in pair.student.parameters())

    def __call__(self, batch: Batch, inside: bool = True, scales: Scales | None = None) -> Tensor:
        """[samples]; products in bfloat16, if that is asked for, where gradients are wanted.

        Without `inside`, of the outputs alone: that is what a model is judged by. `scales` are those of the batch that
        this one is a part of.

        Raises:
            InputError: a label is no class of the model.
        """
        wanted = self.recovery.in_bfloat16 and not self.in_float16  # layers of float16 take no values of bfloat16
        low = wanted and torch.is_grad_enabled()
        with torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext():
            return self._of(batch.to(self.device), inside, scales)

    def parts(self, batch: Batch, most: int, inside: bool = True) -> Iterator[Tensor]:
        """The losses of a batch, at most so many samples at a time: the same, up to rounding, as of all at once."""
        batch = batch.to(self.device)
        if len(batch) <= most:
            yield self(batch, inside)
            return
        parts = [batch.take(numbers) for numbers in torch.arange(len(batch)).split(most)]
        scales = None if self._labels_alone(batch) else self.pair.scales(part.inputs for part in parts)
        for part in parts:
            yield self(part, inside, scales)

    def _labels_alone(self, batch: Batch) -> bool:
        return batch.labels is not None and not self.recovery.teacher

    def _of(self, batch: Batch, inside: bool, scales: Scales | None) -> Tensor:
        settings = self.recovery
        if batch.labels is not None and self._labels_alone(batch):
            self.scores = self.pair.student(*batch.inputs)[0][0]
            return _of_labels(self.scores, batch.labels, settings.smoothing)
        expected = self.pair.expected(batch.inputs)
        found = self.pair.differences(batch.inputs, expected, settings.outputs, scales, inside)
        self.scores = found.got[0]
        loss = found.outputs + settings.hidden * found.inside + settings.attention * found.attention
        if batch.labels is None:
            return loss
        return settings.teacher * loss + _of_labels(self.scores, batch.labels, settings.smoothing)


def _of_labels(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each sample, [samples]; scores [samples × … × classes], labels [samples × …]."""
    classes = scores.shape[-1] if scores.dim() else 0
    if scores.shape[:-1] != labels.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, but the first output {tuple(scores.shape)}; "
            "expected one label for each of its positions, the last axis being the classes"
        )
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise InputError(f"label {int(wrong[0])} is out of range: the model has {classes} classes, 0 to {classes - 1}")
    each = nn.functional.cross_entropy(
        scores.float().flatten(0, -2), labels.long().flatten(), label_smoothing=smoothing, ignore_index=IGNORED,
        reduction="none",
    )  # fmt: skip
    return each.reshape(len(labels), -1).mean(1)


def probabilities_off(scores: Tensor, labels: Tensor) -> Tensor:
    """‖softmax(scores) − one-hot(labels)‖ of each sample, [samples], of what is labelled: EL2N (arXiv 2107.07075)."""
    wanted = nn.functional.one_hot(labels.long().clamp_min(0), scores.shape[-1])
    off, said = (scores.float().softmax(-1) - wanted).norm(dim=-1), labels != IGNORED
    return (off * said).reshape(len(labels), -1).sum(1) / said.reshape(len(labels), -1).sum(1).clamp_min(1)


def right(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest score is that of the label, of what is labelled, [labels]."""
    said = labels != IGNORED
    return torch.eq(scores.argmax(-1)[said], labels[said])
