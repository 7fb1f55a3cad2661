"""The processes that train one model together: this one alone, or those that `accelerate launch` started.

Each has the whole model and computes the gradients of its share of a batch; what they find is averaged, so that all
of them take the same step. (Data parallelism through Hugging Face Accelerate, which sets the processes up.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompile.errors import InputError


@dataclass(frozen=True)
class Processes:
    """How many there are, which this one is, and which of those on its machine; the first is the one that writes."""

    count: int = 1
    index: int = 0
    local: int = 0

    @classmethod
    def here(cls) -> Processes:
        """Those that this process was launched with.

        Raises:
            InputError: there are several, and Accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise InputError(
                "several processes were launched, and training on them needs Accelerate: pip install 'lrcompile[many]'"
            ) from None
        state = PartialState(cpu=True)
        return cls(state.num_processes, state.process_index, state.local_process_index)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def device(self, wanted: torch.device) -> torch.device:
        """What this one trains on: with several on one machine each takes one of its GPUs, in turn."""
        if self.count == 1 or wanted.type != "cuda":
            return wanted
        return torch.device("cuda", self.local % torch.cuda.device_count())

    def share(self, numbers: Tensor) -> tuple[Tensor, float]:
        """(this process's part of the numbers of a step's samples, how much of the mean over processes its mean is).

        With fewer samples than processes some get one that is another's, and do not count.
        """
        if self.count == 1:
            return numbers, 1.0
        part = numbers.tensor_split(self.count)[self.index]
        return (part, len(part) * self.count / len(numbers)) if len(part) else (numbers[:1], 0.0)

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over the processes of each value."""
        return list(values) if self.count == 1 else self._reduced(torch.tensor(values, dtype=torch.float64)).tolist()

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Puts the first process's values in the place of this one's: libraries of other machines round otherwise."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().to("cpu", copy=True)))

    def average_gradients(self, parameters: Iterable[nn.Parameter], weight: float) -> None:
        """Puts the mean over the processes, each weighted, in the place of this one's gradients."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        flat = self._reduced((torch.cat([gradient.float().flatten() for gradient in gradients]) * weight).cpu())
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _reduced(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, which speak to each other from the CPU's memory, whatever they train on."""
        from accelerate.utils import reduce

        result: Tensor = reduce(tensor, "mean")
        return result
