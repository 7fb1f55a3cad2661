"""What is known of a device; profile.py reads it from a file, profile_text.py writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lrcompile.devices.residual import Residuals
from lrcompile.errors import DeviceError
from lrcompile.graph.op import DTYPE_BYTES

LAUNCH_CLASSES = ("gemm", "conv", "other")
SIGMA_CLASSES = ("gemm", "conv", "recurrent", "other")
FUSIONS = (
    "conv_normalization", "conv_activation", "conv_addition", "image_addition", "gemm_activation", "gemm_addition",
    "conv_padding", "skip_layer_norm", "bias_gelu",
)  # fmt: skip
FEATURES = ("flash_attention", "grouped_conv", "rank5", "strided_views", "product_bias", "plain_images", "free_views")
PROVENANCE = ("datasheet", "published measurement", "fitted", "assumed", "measured here")

# Types that no profile lists: their arithmetic runs on the units of another type.
_COMPUTED_LIKE = {"uint8": "int8", "bool": "int8", "int16": "fp32", "int32": "fp32", "int64": "fp32"}
UNITS: dict[str, dict[str, float]] = {
    "rate": {"TFLOP/s": 1e12, "TOP/s": 1e12, "GFLOP/s": 1e9, "GOP/s": 1e9},
    "bandwidth": {"GB/s": 1e9, "TB/s": 1e12},
    "frequency": {"MHz": 1e6, "GHz": 1e9},
    "time": {"ns": 1e-9, "us": 1e-6, "ms": 1e-3},
    "size": {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "count": {"units": 1, "elements": 1},
    "fraction": {"of peak": 1, "of latency": 1},
    "number": {"factor": 1, "exponent": 1},
}
KERNEL_FIGURES: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "efficiency": ("efficiency", "fraction", "of peak", {"most": 1}),
    "tile_exponent": ("tile_exponent", "number", "exponent", {"zero": True}),
    "prologue": ("prologue", "count", "elements", {"zero": True}),
    "overlap": ("overlap", "number", "factor", {"zero": True, "most": 1}),
    "setup": ("setup_s", "time", "us", {"zero": True}),
    "bandwidth": ("bandwidth", "number", "factor", {}),
    "skinny_bandwidth": ("skinny_bandwidth_bytes_s", "bandwidth", "GB/s", {}),
    "few_channels": ("few_channels", "number", "factor", {}),
    "misaligned": ("misaligned", "number", "factor", {}),
    "split_setup": ("split_setup_s", "time", "us", {"zero": True}),
}
"""Of kernels in a profile: the field that holds a figure, its dimension, the unit it is written in, and its bounds."""
OPTIONAL_KERNELS = ("conv_data", "conv_weight", "attention", "batched")
"""Of an engine: kernels that are priced as others where a profile has none of their own."""
WINOGRAD_RATES = ("transformed", "five", "fused", "filter_bandwidth")


@dataclass(frozen=True)
class Kernels:
    """How an engine's kernels for one kind of operation run.

    The largest tile reaches `efficiency` of a unit's peak rate, others less: by their share of its area to the power
    of `tile_exponent`. A product may be cut along K in as many ways as `split_k` lists. Each wave of tiles takes
    `prologue` steps of K longer than what it computes. `overlap` is the share of an incomplete wave that costs
    nothing: 0 for whole waves, 1 for none at all. `setup_s` comes on top of the launch, and `bandwidth` is the share
    of the sustained bandwidth that is reached. `skinny_bandwidth_bytes_s` limits products with a short side whose
    operands are both stored along K; `few_channels` is the rate of convolutions of less than 8 channels over that of
    others, `misaligned` that of operations with an extent that is no multiple of the alignment. Partial sums of a
    product cut along K take `split_setup_s` to start adding. `tiles` is a menu of their own, in place of the engine's.
    """

    efficiency: float
    tile_exponent: float
    split_k: tuple[int, ...]
    prologue: float = 0.0
    overlap: float = 0.0
    setup_s: float = 0.0
    bandwidth: float = 1.0
    skinny_bandwidth_bytes_s: float = math.inf
    few_channels: float = 1.0
    misaligned: float = 1.0
    split_setup_s: float = 0.0
    tiles: tuple[tuple[int, int], ...] | None = None

    @property
    def slower(self) -> Kernels:
        """Those for operations that are not aligned."""
        return self if self.misaligned == 1.0 else replace(self, efficiency=self.efficiency * self.misaligned)


@dataclass(frozen=True)
class Winograd:
    """Rates of Winograd's algorithms over that of an implicit GEMM.

    `transformed` is for the products of F(4×4, 3×3) with transforms as separate kernels, `five` for those of
    F(4×4, 5×5), `fused` for F(2×2, 3×3) in one kernel. The transform of the filter reaches `filter_bandwidth` of the
    sustained bandwidth; the transforms start with `setup_s`.
    """

    transformed: float
    five: float
    fused: float
    filter_bandwidth: float
    setup_s: float


UNFOLD_FIGURES = ("each", "strided", "row")


@dataclass(frozen=True)
class Unfold:
    """What one thread takes to unfold the windows of a convolution that runs as a product, in s.

    That is for each value, for each where a stride leaves some out, and for each row of them.
    """

    each_s: float
    strided_s: float
    row_s: float


@dataclass(frozen=True)
class Engine:
    """One kind of arithmetic unit with the menu of kernels that libraries have for it.

    A kernel computes m×n outputs at a time, for (m, n) of `tiles`. `conv_data` and `conv_weight` are the gradients of
    a convolution's input and weight. `depthwise_efficiency` is the part of the device's fp32 peak that a depthwise
    kernel reaches, `l2_share` the part of the L2 cache's bandwidth that its kernels do. `batched` is that of batched
    products, which else are priced as single ones; `attention` that of fused attention, which else costs what its
    products do. `unfold` is for a runtime that unfolds the windows of convolutions that it has no kernel for.
    """

    tiles: tuple[tuple[int, int], ...]
    gemm: Kernels
    conv: Kernels
    conv_data: Kernels
    conv_weight: Kernels
    depthwise_efficiency: float
    l2_share: float = 1.0
    winograd: Winograd | None = None
    attention: Kernels | None = None
    batched: Kernels | None = None
    unfold: Unfold | None = None

    def products(self, batch: int) -> Kernels:
        """The kernels of so many products at once."""
        return self.gemm if batch <= 1 or self.batched is None else self.batched


@dataclass(frozen=True)
class Pace:
    """What a fixed product takes at a pace, in s, and the power of it that latencies follow: 1 is in proportion.

    `handed` is what small operations take that threads share, over the product: how fast work is handed over.
    """

    product_s: float
    follows: float
    handed: float


@dataclass(frozen=True)
class Device:
    """A device profile; rates in operations a second, a multiply-add counting as two.

    Mappings over data types hold only types that the hardware computes with; `computed_as` names the substitute
    for the others. `fuses` names what its runtime runs as one with the operation before, of `FUSIONS`;
    "image_addition" is that of two maps of 2-D convolutions, where "conv_addition" takes any value.
    `residuals` are what the formula left of measurements, by family of operations, where there are any.
    `network` says what networks take besides, as measured: a run takes `run_s`, and operations are `slower` by a factor
    than when they are measured again and again. `pace` is that of the machine which measured latencies are given for.
    `host_s` is what the host takes for each operation of an eager framework, 0 where nobody measured it.
    `provenance` holds the source of each figure under its dotted key in the profile.
    """

    name: str
    description: str
    kind: Literal["gpu", "npu", "cpu"]
    default_dtype: str
    units: int
    clock_hz: float
    bandwidth_peak_bytes_s: float
    bandwidth_bytes_s: float
    l2_bytes: float
    l2_bandwidth_bytes_s: float
    norm_exponent: float
    peak_flops: Mapping[str, float]
    computed_as: Mapping[str, str]
    engine: Mapping[str, str]
    alignment: Mapping[str, int]
    alignment_conv: Mapping[str, int]
    rank_step: Mapping[str, int]
    rank_step_preferred: Mapping[str, int]
    engines: Mapping[str, Engine]
    launch_s: Mapping[str, float]
    recurrent_step_s: float
    host_s: float
    sigma_relative: Mapping[str, float]
    lacks: frozenset[str] = frozenset()
    fuses: frozenset[str] = frozenset()
    residuals: Mapping[str, Residuals] = field(default_factory=dict, repr=False)
    network: Mapping[str, float] = field(default_factory=dict)
    pace: Pace | None = None
    provenance: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.units, self.clock_hz, self.bandwidth_bytes_s))

    def compute_dtype(self, dtype: str) -> str:
        """The type whose units do the arithmetic of `dtype`; DeviceError for a type that nothing here knows."""
        if dtype in self.peak_flops:
            return dtype
        like = _COMPUTED_LIKE.get(dtype, dtype)
        found = like if like in self.peak_flops else self.computed_as.get(like)
        if found is None:
            raise DeviceError(f"device {self.name}: unknown data type {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
        return found

    def engine_for(self, dtype: str) -> Engine:
        """The units that do the arithmetic of `dtype`; DeviceError for a type that nothing here knows."""
        return self.engines[self.engine[self.compute_dtype(dtype)]]

    def ranks(self, below: int, dtype: str | None = None, count: int = 10) -> tuple[int, ...]:
        """At most `count` ranks worth proposing, ascending, each strictly below `below`.

        They are multiples of the device's rank step, its preferred step where that leaves enough, half of them
        spread evenly and half by equal factors so that small ranks and ranks near the bound are both there. Below
        the first step only CPUs, whose step is soft, get ranks: single integers.
        """
        kind = self.compute_dtype(dtype or self.default_dtype)
        step, preferred = self.rank_step[kind], self.rank_step_preferred[kind]
        if count < 1 or below <= 1:
            return ()
        if below <= step:
            return _spread(range(1, below), range(1, below), count) if self.kind == "cpu" else ()
        return _spread(range(step, below, step), range(preferred, below, preferred), count)


def _spread(every: range, preferred: range, count: int) -> tuple[int, ...]:
    if len(every) <= count:
        return tuple(every)
    first, last = every[0], preferred[-1] if preferred else every[-1]
    if count == 1:
        return (last,)
    doublings = [first << i for i in range(last.bit_length()) if first << i < (preferred.start if preferred else last)]
    geometric = [first * (last / first) ** (i / (count - 1)) for i in range(0, count, 2)]
    linear = [first + (last - first) * i / (count - 1) for i in range(1, count, 2)]
    chosen = {first, last}
    for target in geometric + linear:
        grid = preferred if preferred and target >= preferred[0] else doublings or every
        if len(chosen) < count:
            chosen.add(min(grid, key=lambda rank: abs(rank - target)))
    for grid in (doublings, preferred, every):
        while len(chosen) < count and (spare := [rank for rank in grid if rank not in chosen]):
            chosen.add(max(spare, key=lambda rank: min(abs(math.log(rank / other)) for other in chosen)))
    return tuple(sorted(chosen))
