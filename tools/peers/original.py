"""What a peer is given and what it gives back; read on both sides, so it needs PyTorch alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

NARROW = 16  # channels on a side up to which a layer is left alone: a stem on pixels, a head of ten classes


class NothingToDo(Exception):  # noqa: N818 - an answer, not a fault
    """A peer has nothing to act on in a model; the message says what it would need."""


@dataclass(frozen=True, eq=False)
class Original:
    """A trained model and calibration batches of its inputs; `classes`: the last axis of its output counts classes."""

    model: nn.Module
    batches: tuple[tuple[Tensor, ...], ...]
    classes: bool

    def save(self, path: Path) -> None:
        """Pickles it: the classes have to be importable where it is read."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Original:
        """Reads what `save` wrote."""
        return cls(**torch.load(path, weights_only=False))

    def copy(self) -> nn.Module:
        """The model, to be changed."""
        return copy.deepcopy(self.model)

    def outputs(self, count: int) -> list[Tensor]:
        """What the model makes of the first batches."""
        with torch.no_grad():
            return [self.model(*batch) for batch in self.batches[:count]]


@dataclass(frozen=True, eq=False)
class Compressed:
    """A smaller model that takes what the original takes, and what a reader should know of how it came about."""

    model: nn.Module
    notes: tuple[str, ...] = ()


Compress = Callable[[float], Compressed]


def wide_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Linear layers and ungrouped convolutions with more than `NARROW` channels on both sides, by name."""
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if plain and min(module.weight.shape[:2]) > NARROW:
            yield name, module


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
