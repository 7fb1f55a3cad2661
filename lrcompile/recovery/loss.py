"""What a recovery makes smaller: the distance from the original, and from labels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import InputError, first_line, is_out_of_memory
from lrcompile.recovery.pair import Pair, Scales
from lrcompile.recovery.samples import IGNORED, Batch
from lrcompile.recovery.settings import Recovery


@dataclass(frozen=True)
class OwnLoss:
    """The user's own loss, in the place of cross-entropy, and its name as the user knows it.

    `function` takes what the model gives (the output, or a tuple of them where there are several; in single precision
    at least) and the labels of the same samples, and returns one number, the mean of the samples, or one for each.
    """

    function: Callable[[Any, Tensor], Any]
    name: str

    @classmethod
    def of(cls, function: Any, name: str | None = None) -> OwnLoss:
        """The loss by a Python function; its name is its own where none is given.

        Raises:
            InputError: it cannot be called.
        """
        if not callable(function):
            given = "the loss" if name is None else f"--loss {name}"
            raise InputError(f"{given} is a {type(function).__name__}; expected a function of outputs and labels")
        kind = type(function)
        own = getattr(function, "__qualname__", kind.__qualname__)
        return cls(function, name or f"{getattr(function, '__module__', kind.__module__)}:{own}")

    def __call__(self, outputs: Sequence[Tensor], labels: Tensor, each: bool, alone: bool = False) -> Tensor:
        """[samples]; with `each`, one number for all is not enough; trained on `alone`, it has to have a gradient.

        Raises:
            InputError: the function raised, or gave something else.
        """
        try:
            value = self.function(outputs[0] if len(outputs) == 1 else tuple(outputs), labels)
        except Exception as error:  # the user's own function can raise anything: it is quoted
            if is_out_of_memory(error):
                raise
            raise InputError(f"the loss {self.name} raised {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(
                f"the loss {self.name} returned {_kind(value)}; expected a tensor of numbers, not of labels"
            )
        if alone and torch.is_grad_enabled() and any(y.requires_grad for y in outputs) and not value.requires_grad:
            raise InputError(
                f"the loss {self.name} returned a tensor that has no gradient; compute it of the outputs by operations "
                "of torch that have one, not by argmax or in numpy"
            )
        samples = len(labels)
        if value.numel() == 1 and not (each and samples > 1):
            return value.reshape(1).expand(samples)
        if value.shape[:1] != (samples,):
            wanted = "one number for each sample" + ("" if each else ", or their mean")
            why = ": a subset of the samples is chosen by it" if each else ""
            raise InputError(
                f"the loss {self.name} returned a tensor of shape {list(value.shape)} for {samples} samples; expected "
                f"{wanted}{why}"
            )
        return value.reshape(samples, -1).mean(1)


class Loss:
    """The loss of each sample of a batch, on the device that the pair is on; `own` is the user's, of labels.

    `scores` are the first outputs of the batch that was last seen.
    """

    def __init__(self, pair: Pair, recovery: Recovery, own: OwnLoss | None = None) -> None:
        self.pair = pair
        self.recovery = recovery
        self.own = own
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
        parts = batch.pieces(most)
        if len(parts) == 1:
            yield self(batch, inside)
            return
        scales = None if self._labels_alone(batch) else self.pair.scales(part.inputs for part in parts)
        for part in parts:
            yield self(part, inside, scales)

    def _labels_alone(self, batch: Batch) -> bool:
        return batch.labels is not None and not self.recovery.teacher

    def _of(self, batch: Batch, inside: bool, scales: Scales | None) -> Tensor:
        settings = self.recovery
        if batch.labels is not None and self._labels_alone(batch):
            return self._of_labels(self.pair.student(*batch.inputs)[0], batch.labels)
        expected = self.pair.expected(batch.inputs)
        found = self.pair.differences(batch.inputs, expected, settings.outputs, scales, inside)
        loss = found.outputs + settings.hidden * found.inside + settings.attention * found.attention
        if batch.labels is None:
            return loss
        return settings.teacher * loss + self._of_labels(found.got, batch.labels)

    def _of_labels(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        self.scores = outputs[0]
        if self.own is not None:
            with torch.autocast(self.device.type, enabled=False):  # which refuses some losses of torch
                return self.own(
                    list(map(_in_single, outputs)), labels, self.recovery.subset < 1, not self.recovery.teacher
                )
        return _cross_entropy(self.scores, labels, self.recovery.smoothing)


def _in_single(output: Tensor) -> Tensor:
    """An output, in single precision where it has less."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def check_classes(labels: Tensor, scores: Tensor) -> None:
    """Refuses labels of classes that the model does not have.

    Raises:
        InputError: a label is below 0 or no class, and not one that says nothing.
    """
    classes = scores.shape[-1] if scores.dim() else 0
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise InputError(f"label {int(wrong[0])} is out of range: the model has {classes} classes, 0 to {classes - 1}")


def _kind(value: Any) -> str:
    return (
        f"a tensor of {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else repr(type(value).__name__)
    )


def _cross_entropy(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each sample, [samples]; scores [samples × … × classes], labels [samples × …]."""
    if scores.shape[:-1] != labels.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, but the first output {tuple(scores.shape)}; "
            "expected one label for each of its positions, the last axis being the classes"
        )
    check_classes(labels, scores)
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
