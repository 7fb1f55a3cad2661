"""What the user asks of a recovery."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from lrcompile.errors import InputError

Outputs = Literal["mse", "kl"]
Freeze = Literal["none", "regular", "sequential"]
Precision = Literal["auto", "fp32", "bf16"]
Where = Literal["cpu", "cuda"]

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
DEFAULT_BATCH = 32
WHOLE = ("steps", "batch", "seed")


@dataclass(frozen=True)
class Recovery:
    """How a rewritten model is trained; one of `steps`, from 0, and `minutes` says for how long.

    With `until` it ends as soon as the error, in the measure of the compile's budget, is at most that. With `refit`,
    layers are fitted anew in closed form before, which takes as long as a few dozen steps.

    Without labels the model learns from the original: its outputs, compared by `outputs` ("mse": relative squared
    difference; "kl": divergence of the softmax over the last axis), and, weighted by `hidden`, the values inside that
    both compute, and by `attention`, the weights of attention that both compute. With labels it learns those by
    cross-entropy with `smoothing`, and the original besides, weighted by `teacher`.

    `batch` is the number of samples in a step, where the model takes any; `rate` the highest rate of AdamW, which is
    otherwise chosen among `RATES` by trying. `freeze`: "regular" trains the inner factor of each split only,
    "sequential" inner and outer factors in turn, an epoch each (arXiv 2309.03824). `sam` is the radius of
    sharpness-aware minimisation, `centralize` takes the mean out of gradients of matrices, `ema` is the decay of a
    running mean of the weights, 0 each for none. `subset` is the share of samples that is trained on, those of
    highest loss (SwiftLearn). `device` is what trains: "cuda" is the first GPU, or one for each process. `precision` is
    that of products while training: "auto" is bfloat16 where the device has units for it (most GPUs, and processors
    with AMX, on which it is three to four times faster); weights stay as they are. `seed` orders the samples.
    """

    steps: int | None = None
    minutes: float | None = None
    until: float | None = None
    batch: int | None = None
    rate: float | None = None
    outputs: Outputs = "mse"
    hidden: float = 1.0
    attention: float = 0.0
    teacher: float = 1.0
    smoothing: float = 0.0
    refit: bool = True
    freeze: Freeze = "none"
    subset: float = 1.0
    sam: float = 0.0
    centralize: bool = False
    ema: float = 0.0
    device: Where = "cpu"
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise InputError("recovery needs a length: give either --recover STEPS or --recover-minutes MINUTES")
        for name, low, high in (
            ("steps", 0, math.inf), ("minutes", 1e-3, math.inf), ("until", 0, math.inf), ("batch", 1, math.inf),
            ("rate", 1e-12, 10), ("hidden", 0, math.inf), ("attention", 0, math.inf), ("teacher", 0, math.inf),
            ("smoothing", 0, 0.99), ("subset", 1e-3, 1), ("sam", 0, 10), ("ema", 0, 0.99999),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high):
                limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
                raise InputError(f"recovery: {name} is {value!r}; expected a number {limits}")
            if name not in WHOLE:
                object.__setattr__(self, name, float(value))  # of numpy too, which no checkpoint could hold
        for name in WHOLE:
            value = getattr(self, name)
            if isinstance(value, Integral):
                object.__setattr__(self, name, int(value))
            elif value is not None or name == "seed":
                raise InputError(f"recovery: {name} is {value!r}; expected a whole number")
        choices = (("outputs", Outputs), ("freeze", Freeze), ("device", Where), ("precision", Precision))
        for name, kind in choices:
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise InputError(f"recovery: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError('recovery: device is "cuda", but torch sees no CUDA GPU here; leave it out to use the CPU')

    @property
    def where(self) -> torch.device:
        """What trains."""
        return torch.device(self.device)

    @property
    def in_bfloat16(self) -> bool:
        """Whether products are computed in bfloat16 while training."""
        if self.precision != "auto":
            return self.precision == "bf16"
        if self.where.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_amx_tile_supported()

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)
