"""What one node of a graph asks of a device: the only thing that a cost model sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "gemm",  # matrix product; `gemm` holds its dimensions
    "conv",  # convolution or transposed convolution; `conv` holds its dimensions
    "attention",  # scaled dot-product attention; `attention` holds its dimensions
    "recurrent",  # LSTM, GRU or RNN over a sequence
    "normalization",  # batch, layer, group, instance norm and softmax
    "reduction",  # sums, means and pooling over a window or an axis
    "fused",  # the last step of the operation before it: no kernel of its own
    "elementwise",  # maps each element: activations, additions, casts
    "gather",  # embedding and index look-ups
    "movement",  # copies with another layout: concatenate, pad, transpose that is materialised
    "view",  # no kernel at all: reshape, slice, constants, shape arithmetic
]

DTYPE_BYTES: dict[str, float] = {
    "fp64": 8,
    "fp32": 4,
    "tf32": 4,
    "fp16": 2,
    "bf16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


Layout = Literal["TN", "NN", "NT"]


@dataclass(frozen=True)
class GemmShape:
    """`batch` independent products [m×k]·[k×n].

    `layout` says along which axis the operands are stored: "TN" both along k, as inputs and weights of a linear layer
    are; "NN" the second one along n; "NT" the first along m too (the names are those of the BLAS interface).
    """

    m: int
    n: int
    k: int
    batch: int = 1
    layout: Layout = "TN"

    @property
    def elements(self) -> int:
        """How many elements the operands and results have."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class ConvShape:
    """A convolution over 1, 2 or 3 spatial axes.

    `padding` holds (before, after) for each axis. For a transposed convolution `size_in` is still the
    input's and `size_out` the output's spatial size.
    """

    batch: int
    channels_in: int
    channels_out: int
    size_in: tuple[int, ...]
    size_out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class AttentionShape:
    """softmax(QKᵀ)V with `heads` query heads and `heads_kv` key/value heads.

    `mask` says what kind of mask is given besides a causal one: a boolean one has to be turned into numbers.
    """

    batch: int
    heads: int
    heads_kv: int
    queries: int
    keys: int
    head_dim: int
    causal: bool = False
    mask: Literal["none", "number", "boolean"] = "none"


@dataclass(frozen=True)
class RecurrentShape:
    """One stacked recurrent call: `gates` is 4 for LSTM, 3 for GRU, 1 for a plain RNN."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    gates: int


Function = Literal[
    "copy",  # anything that reads and writes each value once and computes little: relu, concatenate, gather
    "binary",  # of two values of the same shape
    "bias",  # adds or multiplies, in runs of `row` elements, as many values to each run, or one for all of it
    "gelu",
    "bias_gelu",  # of rows of `row` elements and a vector
    "silu",
    "sigmoid",  # and others with an exponential: tanh, exp, erf
    "layer_norm",  # over `row` elements; also softmax
    "skip_layer_norm",  # of the sum of two values
    "group_norm",  # over `row` elements, for each channel its own scale; also instance norm
    "transpose",  # in runs of `row` elements that stay together
    "reduce",  # of `row` elements to one; also pooling
]
FUNCTIONS: tuple[Function, ...] = get_args(Function)


@dataclass(frozen=True)
class OpDesc:
    """One operation: its kind, sizes and traffic.

    `flops` counts a multiply-add as two. `weight_bytes` are constant operands, `activation_bytes` what is
    read and written besides them. Of what only moves data or maps elements, `function` says what it computes, and
    over how many elements, `row`. `label` names the operation for people and decides nothing.
    """

    kind: Kind
    dtype: str
    flops: float
    weight_bytes: float
    activation_bytes: float
    gemm: GemmShape | None = None
    conv: ConvShape | None = None
    attention: AttentionShape | None = None
    recurrent: RecurrentShape | None = None
    function: Function = "copy"
    row: int = 1
    label: str = ""


def gemm_op(
    m: int,
    n: int,
    k: int,
    dtype: str,
    *,
    batch: int = 1,
    weight: bool = True,
    label: str = "gemm",
    layout: Layout = "TN",
) -> OpDesc:
    """The description of `batch` products [m×k]·[k×n]; the second operand is a weight unless `weight` is False."""
    size = DTYPE_BYTES[dtype]
    second = batch * k * n * size
    return OpDesc(
        kind="gemm",
        dtype=dtype,
        flops=2.0 * batch * m * n * k,
        weight_bytes=second if weight else 0,
        activation_bytes=batch * (m * k + m * n) * size + (0 if weight else second),
        gemm=GemmShape(m, n, k, batch, layout),
        label=label,
    )


def conv_op(shape: ConvShape, dtype: str, *, label: str = "conv") -> OpDesc:
    """The description of a convolution of the given shape, without its bias."""
    size = DTYPE_BYTES[dtype]
    taps = shape.channels_in // shape.groups * _product(shape.kernel)
    positions = _product(shape.size_in if shape.transposed else shape.size_out)
    per_position = shape.channels_out // shape.groups * _product(shape.kernel) * shape.channels_in
    macs = shape.batch * positions * (per_position if shape.transposed else taps * shape.channels_out)
    return OpDesc(
        kind="conv",
        dtype=dtype,
        flops=2.0 * macs,
        weight_bytes=taps * shape.channels_out * size,
        activation_bytes=shape.batch
        * (shape.channels_in * _product(shape.size_in) + shape.channels_out * _product(shape.size_out))
        * size,
        conv=shape,
        label=label,
    )


def attention_op(shape: AttentionShape, dtype: str) -> OpDesc:
    """The description of attention of the given shape."""
    size = DTYPE_BYTES[dtype] * shape.batch * shape.head_dim
    moved = 2 * size * (shape.queries * shape.heads + shape.keys * shape.heads_kv)
    flops = 4.0 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim
    return OpDesc("attention", dtype, flops, 0.0, moved, attention=shape, label="attention")


def recurrent_op(shape: RecurrentShape, dtype: str) -> OpDesc:
    """The description of a recurrent call of the given shape, with biases."""
    size, gates = DTYPE_BYTES[dtype], shape.gates * shape.hidden_size
    wide = shape.hidden_size * shape.directions
    inputs = [shape.input_size] + [wide] * (shape.layers - 1)
    products = shape.directions * gates * sum(width + shape.hidden_size for width in inputs)
    weights = products + 2 * shape.directions * gates * shape.layers
    values = shape.batch * (shape.steps * (shape.input_size + wide) + 2 * wide * shape.layers)
    flops = 2.0 * products * shape.batch * shape.steps
    return OpDesc("recurrent", dtype, flops, weights * size, values * size, recurrent=shape, label="recurrent")


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
