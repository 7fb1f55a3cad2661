"""Second moments of a layer's inputs, summed over any number of batches in bounded memory; and what a window sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lrcompile.errors import InputError, is_out_of_memory

MOST_NUMBERS = 2**22  # of a value in one product: 16 MB in single precision, short enough sums for it
MOST_FEATURES = 2304  # of a window's patch: 256 channels of 3×3, whose Gram matrix takes 42 MB
ROUNDING = 1e-12  # of the mean square, below which a variance is what rounding left


@dataclass(frozen=True, eq=False)
class Moments:
    """Of rows x: `gram` = Σ x·xᵀ [features × features] and `total` = Σ x [features], float64; `rows` counts them.

    Where rows have weights, all three are sums of weighted terms.
    """

    gram: Tensor
    total: Tensor
    rows: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.total + other.total, self.rows + other.rows)

    def reordered(self, order: Tensor) -> Moments:
        """Those of the features in another order."""
        return Moments(self.gram[order][:, order], self.total[order], self.rows)

    @property
    def mean(self) -> Tensor:
        """The mean row, [features]."""
        return self.total / (self.rows or 1)

    @cached_property
    def centered(self) -> Tensor:
        """Σ (x − mean)·(x − mean)ᵀ, [features × features]; a variance is never below rounding."""
        left = self.gram - torch.outer(self.total, self.mean)
        left.diagonal().clamp_(min=ROUNDING * float(self.gram.diagonal().mean()))
        return left


@dataclass(frozen=True)
class Window:
    """What a convolution sees at one position: its taps, where they lie, and the zeros around the input."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Window | None:
        """The window of a convolution, or None: of one that is transposed, in groups or padded otherwise, of one whose
        patches have more than `MOST_FEATURES` numbers, and of one that sees each position once, as its channels.
        """
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups > 1:
            return None
        size, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
        spans = [step * (taps - 1) for step, taps in zip(dilation, size, strict=True)]
        if module.padding == "same":
            padding = tuple((span // 2, span - span // 2) for span in spans)
        else:
            padding = tuple(
                (int(p), int(p)) for p in ([0] * len(size) if module.padding == "valid" else module.padding)
            )
        found = cls(size, stride, dilation, padding)
        is_plain = set(size) == set(stride) == {1}
        if is_plain or module.padding_mode != "zeros" or module.in_channels * found.taps > MOST_FEATURES:
            return None
        return found

    @property
    def taps(self) -> int:
        """How many positions it sees."""
        return int(torch.Size(self.size).numel())

    def patches(self, value: Tensor) -> Tensor:
        """A view [batch × positions… × channels × taps…] of what it sees of a value [batch × channels × …]."""
        axes = len(self.size)
        if any(map(any, self.padding)):
            value = pad(value, [p for pair in reversed(self.padding) for p in pair])
        for axis, (taps, stride, dilation) in enumerate(zip(self.size, self.stride, self.dilation, strict=True)):
            value = value.unfold(axis + 2, dilation * (taps - 1) + 1, stride)[..., ::dilation]
        return value.movedim(1, axes + 1)


def moments(rows: Tensor, features: int = 1, weights: Tensor | None = None, most: int = MOST_NUMBERS) -> Moments:
    """Moments of the last `features` axes, flattened, over all others; `weights` has the shape of the others.

    At most about `most` numbers are held at a time besides the result. Products are in single precision (double for
    double values), sums of them in double. Where memory runs out, pieces are halved.

    Raises:
        InputError: there is not even memory for one row.
    """
    leading = rows.dim() - features
    if leading == 0:
        rows, leading, weights = rows.unsqueeze(0), 1, None if weights is None else weights.unsqueeze(0)
    longest = max(range(leading), key=lambda axis: rows.shape[axis])
    if rows.numel() <= most or rows.shape[longest] == 1:
        try:
            return _product(
                rows.flatten(leading).flatten(0, leading - 1), None if weights is None else weights.flatten()
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if rows.shape[longest] == 1:
                size = rows.shape[leading:].numel()
                raise InputError(
                    f"not enough memory for the Gram matrix of {size} input features, {8 * size**2 / 1e6:.0f} MB: "
                    "close other programs, or compile without --calib"
                ) from error
    first, second = rows.tensor_split(2, longest)
    upper, lower = (None, None) if weights is None else weights.tensor_split(2, longest)
    return moments(first, features, upper, most) + moments(second, features, lower, most)


def _product(rows: Tensor, weights: Tensor | None) -> Moments:
    rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    if weights is None:
        return Moments((rows.T @ rows).double(), rows.sum(0, dtype=torch.float64), len(rows))
    weights = weights.to(rows.dtype).unsqueeze(1)
    weighted = rows * weights
    total, count = weighted.sum(0, dtype=torch.float64), float(weights.sum(dtype=torch.float64))
    return Moments((weighted.T @ rows).double(), total, count)
