"""Measures of what rewrites do to the output: the relative error, and two for outputs that stand for classes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrcompile.errors import InputError
from lrcompile.graph.verify import is_float, ratio, squared_difference

Pairs = Iterable[tuple[Sequence[Any], Sequence[Any]]]  # of flat outputs, expected and got


@dataclass(frozen=True)
class Measure:
    """A measure over batches of outputs: 0 where nothing changed, infinite where outputs are no longer finite.

    It grows with the `power` of the difference of outputs. Its *root*, of that degree, is what the search works with,
    because roots of several rewrites add up in quadrature.
    """

    name: str
    label: str
    total: Callable[[Pairs], float]
    power: int = 1
    of_classes: bool = True
    counts: bool = False

    def root(self, value: float) -> float:
        """What the search compares, of a value that users see."""
        return value ** (1 / self.power)

    def value(self, root: float) -> float:
        """What users see, of what the search compares."""
        return root**self.power

    def positions(self, expected: Sequence[Any]) -> int | None:
        """How many positions of one batch are counted; None where differences are not counted but measured."""
        return _logits(expected)[..., 0].numel() if self.counts else None

    def margin(self, root: float, batches: Iterable[Sequence[Any]]) -> float:
        """By how much a share counted on batches of expected outputs may be larger; 0 of what is measured.

        Wilson's interval (1927) of one standard error, which does not call a share certain of which nothing was seen.
        """
        positions = sum(self.positions(expected) or 0 for expected in batches)
        if not positions or not math.isfinite(root):
            return 0.0
        spread = math.sqrt(root * (1 - root) / positions + 1 / (2 * positions) ** 2)
        return max(0.0, (root + 1 / (2 * positions) + spread) / (1 + 1 / positions) - root)

    def check(self, expected: Sequence[Any]) -> None:
        """Refuses outputs that the measure cannot be taken of.

        Raises:
            InputError: it is of classes, and the first floating-point output has none.
        """
        if self.of_classes:
            _logits(expected)


def _relative(pairs: Pairs) -> float:
    """‖y − ŷ‖/‖y‖ over all batches, of the worst floating-point output; infinite where an integer one differs."""
    difference: dict[int, float] = defaultdict(float)
    size: dict[int, float] = defaultdict(float)
    for expected, outputs in pairs:
        for i, (y, got) in enumerate(zip(expected, outputs, strict=True)):
            if not isinstance(y, Tensor):
                continue
            of_batch = squared_difference(y, got)
            difference[i] += of_batch[0]
            size[i] += of_batch[1]
    return max((ratio(squared, size[i]) for i, squared in difference.items()), default=0.0)


def _relative_of_floats(pairs: Pairs) -> float:
    """The same without integer outputs, such as classes; of these alone, the share of their values that differ."""
    floats, differs, count = 0, 0, 0

    def of_floats() -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        nonlocal floats, differs, count
        for expected, outputs in pairs:
            for y, got in zip(expected, outputs, strict=True):
                if isinstance(y, Tensor) and not is_float(y):
                    differs, count = differs + int((y != got).sum()), count + y.numel()
            floating = [(y, got) for y, got in zip(expected, outputs, strict=True) if is_float(y)]
            floats += len(floating)
            yield [y for y, _ in floating], [got for _, got in floating]

    error = _relative(of_floats())
    return error if floats else differs / max(1, count)


def _divergence(pairs: Pairs) -> float:
    """KL(p‖q) in nats, the mean over positions, of softmax over the last axis; p is that of the original."""
    total, count = 0.0, 0
    for y, got in _class_outputs(pairs):
        log_p, log_q = y.double().log_softmax(-1), got.double().log_softmax(-1)
        p = log_p.exp()
        total += float((p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum())
        count += p[..., 0].numel()
    return max(0.0, total) / max(1, count) if math.isfinite(total) else math.inf


def _disagreement(pairs: Pairs) -> float:
    """The share of positions at which the largest entry of the last axis is another one."""
    wrong, count = 0, 0
    for y, got in _class_outputs(pairs):
        if bool(got.isnan().any()):
            return math.inf
        differs = y.argmax(-1) != got.argmax(-1)
        wrong += int(differs.sum())
        count += differs.numel()
    return wrong / max(1, count)


def _class_outputs(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """The first floating-point outputs, expected and got."""
    for expected, outputs in pairs:
        y = _logits(expected)
        yield y, next(got for known, got in zip(expected, outputs, strict=True) if known is y)


def _logits(expected: Sequence[Any]) -> Tensor:
    floating = [y for y in expected if isinstance(y, Tensor) and y.is_floating_point()]
    if not floating or floating[0].dim() == 0 or floating[0].shape[-1] < 2:
        got = f"is of shape {list(floating[0].shape)}" if floating else "does not exist"
        raise InputError(
            f"the measure is of classes on the last axis, but the first floating-point output {got}; expected two "
            "classes or more: use --measure error"
        )
    return floating[0]


RELATIVE = Measure("error", "relative output error", _relative, of_classes=False)
OF_FLOATS = Measure("error of floats", "relative output error", _relative_of_floats, of_classes=False)
_ALL = (
    RELATIVE,
    Measure("kl", "KL divergence of classes, in nats", _divergence, power=2),
    Measure("top1", "share of other classes on top", _disagreement, counts=True),
)
MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in _ALL}


def measure_named(name: str) -> Measure:
    """The measure of a name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in MEASURES:
        raise InputError(f"there is no measure {name!r}; expected one of {', '.join(MEASURES)}")
    return MEASURES[name]
