"""What operations are priced as that have no layer of their own, and those inside of other graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcompile
from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import trace
from lrcompile.graph.op import OpDesc
from tests.optimised import operators

X86 = load_device("x86-ort")


class Of(nn.Module):
    """A function of its input and of a parameter."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def ops_of(model: nn.Module, x: Tensor, lacks: frozenset[str] = frozenset()) -> dict[str, OpDesc]:
    found = describe_all(trace(model.eval(), (x,)).graph.gm, frozenset(), lacks)
    return {name: op for name, op in found.items() if op.kind != "view"}


# ------------------------------------------------------------------------------------------------------------ nested


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.body(x)
        return self.head(y.float())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(64, 8), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        def small(x: Tensor) -> Tensor:
            return self.small(x).repeat(1, 8)

        return torch.cond(x.sum() > 0, small, lambda x: self.large(x), (x,))


def test_what_runs_under_autocast_has_its_price() -> None:
    ops = ops_of(Autocast(), torch.randn(6, 64))
    (inner,) = (op for name, op in ops.items() if op.gemm is not None and "." in name)
    assert inner.gemm is not None
    assert (inner.gemm.m, inner.gemm.n, inner.gemm.k, inner.dtype) == (6, 32, 64, "bf16")
    assert Counter(op.kind for op in ops.values()) == {"gemm": 2, "elementwise": 2}


def test_reports_count_it_too() -> None:
    model, x = Autocast().eval(), torch.randn(6, 64)
    figures = lrcompile.compile(model, (x,), budget=lrcompile.Budget(max_error=0.0)).report.model
    assert figures["flops_before"] >= 2 * 6 * 32 * (64 + 4)
    assert figures["ops_before"] == 4


@pytest.mark.parametrize(
    ("model", "where"), [(Autocast(), "1 layer(s) under torch.autocast"), (Branches(), "2 layer(s) inside of cond")]
)
def test_what_no_pass_is_shown_is_said(model: nn.Module, where: str) -> None:
    report = lrcompile.compile(model.eval(), (torch.randn(6, 64),)).report
    assert [note for note in report.notes if note.startswith(where)]


def test_of_branches_the_dearest_counts() -> None:
    products = [op.gemm for op in ops_of(Branches(), torch.randn(6, 64)).values() if op.gemm is not None]
    assert [(shape.m, shape.n) for shape in products] == [(6, 64)]


# ---------------------------------------------------------------------------------------------------- computed weights


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_transposed_convolution_on_a_computed_weight(groups: int, by_name: bool) -> None:
    """Of C_in × C_out/groups × taps multiplications for each position of the input."""

    def upsampled(x: Tensor, weight: Tensor) -> Tensor:
        weight = weight * x.mean()
        if by_name:
            return functional.conv_transpose2d(x, weight, None, 2, groups=groups)
        return torch.convolution(x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], groups)

    ops = ops_of(Of(upsampled, 8, 12 // groups, 3, 3), torch.randn(2, 8, 5, 5))
    (op,) = (op for op in ops.values() if op.gemm is not None)
    assert op.flops == 2 * (2 * 25) * 8 * (12 // groups) * 9


def test_a_product_with_a_vector_is_a_reduction() -> None:
    kinds = [op.kind for op in ops_of(Of(functional.linear, 16), torch.randn(4, 16)).values()]
    assert kinds == ["reduction"]


def test_a_recurrent_layer_with_a_projection_has_the_gates_of_its_inner_state() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 32, proj_size=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    (op,) = (op for op in ops_of(Projected(), torch.randn(2, 5, 8)).values() if op.recurrent is not None)
    assert op.recurrent is not None
    assert op.recurrent.hidden_size == 32


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_one_step_of_a_recurrent_layer(cell: Callable[..., nn.Module], gates: int) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(8, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.cell(x)
            return y[0] if gates == 4 else y

    ops = ops_of(Step(), torch.randn(5, 8)).values()
    assert sum(op.flops for op in ops if op.recurrent or op.gemm) == 2 * 5 * gates * 32 * (8 + 32)


def test_products_of_several_axes() -> None:
    ops = ops_of(Of(lambda x, w: torch.tensordot(x, w, ([1, 2], [1, 0])), 6, 4, 16), torch.randn(5, 4, 6))
    assert sum(op.flops for op in ops.values()) == pytest.approx(2 * 5 * (4 * 6) * 16, rel=0.01)
    ops = ops_of(Of(lambda x, w: functional.bilinear(x, x, w), 16, 8, 8), torch.randn(5, 8))
    assert sum(op.flops for op in ops.values()) >= 2 * 5 * 8 * 8 * 16


def test_attention_to_values_of_another_width() -> None:
    def attended(x: Tensor, w: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x[..., :16])

    (op,) = (op for op in ops_of(Of(attended, 1), torch.randn(2, 3, 10, 32)).values() if op.attention is not None)
    assert op.flops == 2 * 2 * 3 * 10 * 10 * (32 + 16)


# ----------------------------------------------------------------------------------------------------- broadcasting


@pytest.mark.parametrize(
    ("shape", "run"),
    [
        ((6,), 6), ((5, 6), 30), ((1, 4, 5, 6), 120), ((3, 1, 5, 6), 30), ((3, 4, 1, 1), 30), ((3, 1, 1, 1), 120),
        ((1, 4, 1, 1), 30), ((4, 5, 1), 6), ((3, 4, 1, 6), 6), ((), 360),
    ],
)  # fmt: skip
def test_in_which_runs_values_are_added_to_others(shape: tuple[int, ...], run: int) -> None:
    for add in (torch.add, lambda x, weight: weight + x):
        (op,) = ops_of(Of(add, *shape), torch.randn(3, 4, 5, 6)).values()
        assert (op.function, op.row) == ("bias", run)


# -------------------------------------------------------------------------------------------------------- look-ups


@pytest.mark.parametrize(
    "looked_up",
    [lambda x, table: table[x], lambda x, table: functional.embedding_bag(x, table, mode="sum")],
    ids=["index", "bag"],
)
def test_of_a_table_only_what_is_looked_up_is_read(looked_up: Callable[..., Any]) -> None:
    ids = torch.randint(9, (4, 3))
    small, large = (ops_of(Of(looked_up, rows, 16), ids) for rows in (10, 10_000))
    read = [sum(op.weight_bytes + op.activation_bytes for op in ops.values()) for ops in (small, large)]
    assert read[0] == read[1]
    assert 4 * 12 * 16 <= read[0] <= 2 * 4 * 12 * 16 + 200


# ---------------------------------------------------------------------------------------------------- pieces, copies


def permuted(x: Tensor, weight: Tensor) -> Tensor:
    return (x.permute(0, 2, 1).reshape(2, -1) * weight).sin()


def stored(x: Tensor, weight: Tensor) -> Tensor:
    return (x.permute(0, 2, 1).contiguous() * weight).sin()


def split(x: Tensor, weight: Tensor) -> Tensor:
    a, b, c = (x * weight).split(4, -1)
    return a.sin() + b.cos() * c.sqrt()


def unbound(x: Tensor, weight: Tensor) -> Tensor:
    a, b = (x * weight).unbind(0)
    return a.sin() + b.cos()


def cut(x: Tensor, weight: Tensor) -> Tensor:
    y = x * weight
    return y[:, 1:4].sin() + y[:, :3].cos() + y[:, 2:3].expand(-1, 3, -1).sqrt()


def kept(x: Tensor, weight: Tensor) -> Tensor:
    return ((x * weight)[:, :, :].view(2, -1)).sin()


@pytest.mark.parametrize(
    ("function", "apart", "together"),
    [(permuted, 1, 1), (stored, 1, 1), (split, 1, 0), (unbound, 1, 0), (cut, 4, 0), (kept, 0, 0)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pieces_are_copied_where_a_runtime_has_no_strides(
    function: Callable[..., Any], apart: int, together: int, tmp_path: Path
) -> None:
    """ONNX Runtime has as many nodes that only move; a GPU's kernels read pieces where they lie."""
    traced = trace(Of(function, 1).eval(), (torch.rand(2, 5, 12),))
    described = [describe_all(traced.graph.gm, frozenset(), lacks) for lacks in (X86.lacks, frozenset())]
    assert [sum(op.kind == "movement" for op in ops.values()) for ops in described] == [apart, together]
    assert sum(operators(traced, tmp_path)[kind] for kind in MOVING) == apart


MOVING = ("Transpose", "Split", "Slice", "Gather", "Expand")


def test_what_attention_gives_is_stored_as_its_reader_wants_it() -> None:
    def attended(x: Tensor, weight: Tensor) -> Tensor:
        heads = (x * weight).view(2, 5, 3, 4).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(2, 5, 12)

    assert all(op.kind != "movement" for op in ops_of(Of(attended, 1), torch.rand(2, 5, 12)).values())


def test_pieces_have_a_price() -> None:
    """A product whose output is split costs more than two products of half its width only by what is moved."""
    ops = ops_of(Of(split, 1), torch.rand(2, 5, 12), X86.lacks)
    (op,) = (op for op in ops.values() if op.kind == "movement")
    assert op.activation_bytes == 2 * 4 * 120
    assert AnalyticCostModel(X86).cost(op).latency_s > 0
