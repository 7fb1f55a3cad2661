from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from panel import PANEL
from torch import nn
from torch.export import ExportedProgram

from lrcompile.errors import InputError
from lrcompile.frontend.functionalize import functionalize
from lrcompile.frontend.trace import run, trace

aten = torch.ops.aten
Function = Callable[[torch.Tensor], Any]


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(torch.tanh(x))


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that torch's own functionalisation was run on."""
    seen: list[ExportedProgram] = []
    original = ExportedProgram.run_decompositions

    def record(self: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        seen.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", record)
    return seen


def functional(model: nn.Module, *args: torch.Tensor) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own deprecated ways
        return functionalize(torch.export.export(model.eval(), args))


def written(program: ExportedProgram) -> list[Any]:
    """The in-place operators that are left, in nested graphs too."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    overloads = [n.target for g in graphs for n in g.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return [target for target in overloads if target._schema.is_mutable]


def twice_in_a_row(y: torch.Tensor) -> torch.Tensor:
    return y.add_(1).relu_().mul_(y)


def through_a_view(y: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(y.flatten(1), 0.5, training=False, inplace=True)


def through_two_views(y: torch.Tensor) -> torch.Tensor:
    return y.view(-1, 4).transpose(0, 1).add_(1).sum(1)


def part_of_a_split(y: torch.Tensor) -> torch.Tensor:
    return y.chunk(2, 1)[0].relu_()


def residual(y: torch.Tensor) -> torch.Tensor:
    z = torch.sigmoid(y)
    z += y
    return z * y


def masked(y: torch.Tensor) -> torch.Tensor:
    return torch.sin(y).masked_fill_(y > 0, 3.0)


SIMPLE = [twice_in_a_row, through_a_view, through_two_views, part_of_a_split, residual, masked]


@pytest.mark.parametrize("function", SIMPLE)
def test_renamed_where_nothing_else_sees_the_change(function: Function, decomposed: list[ExportedProgram]) -> None:
    x = torch.randn(2, 4, 4)
    program = functional(Net(function), x)
    assert not decomposed
    assert written(program) == []
    assert torch.equal(program.module()(x), function(torch.tanh(x)))


def base_read_later(y: torch.Tensor) -> Any:
    y[:, :2].add_(1)
    return y


def view_read_later(y: torch.Tensor) -> Any:
    view = y[:, :2]
    return y.add_(1), view


def view_of_a_view_read_later(y: torch.Tensor) -> Any:
    first, second = y.flatten(1)[:, :8], y.transpose(1, 2)
    return first.mul_(2), second


def other_part_of_a_split_read_later(y: torch.Tensor) -> Any:
    first, second = y.split(2, 1)
    return y.mul_(2) + 1, second, first


def input_of_an_inactive_dropout(y: torch.Tensor) -> Any:
    return nn.functional.dropout(y, 0.5, training=False).add_(1), y


def input_of_an_einsum(y: torch.Tensor) -> Any:
    return torch.einsum("bij->bji", y).add_(1), y


def narrow_type(y: torch.Tensor) -> Any:
    return y.half().add_(y)


def comparison(y: torch.Tensor) -> Any:
    return (y + 1).gt_(1)


def in_a_nested_graph(y: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.add_(1)
        z = y @ y
    return y, z.relu_()


DECOMPOSED = [
    base_read_later, view_read_later, view_of_a_view_read_later, other_part_of_a_split_read_later,
    input_of_an_inactive_dropout, input_of_an_einsum, narrow_type, comparison, in_a_nested_graph,
]  # fmt: skip


@pytest.mark.parametrize("function", DECOMPOSED)
def test_left_to_torch_where_another_value_changes(function: Function, decomposed: list[ExportedProgram]) -> None:
    x = torch.randn(2, 4, 4)
    program = functional(Net(function), x)
    assert len(decomposed) == 1
    assert written(program) == []
    torch.testing.assert_close(program.module()(x), function(torch.tanh(x)), rtol=0, atol=0)


def test_local_writes_of_a_nested_graph_are_renamed(decomposed: list[ExportedProgram]) -> None:
    def function(y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (y @ y).relu_()

    x = torch.randn(2, 4, 4)
    program = functional(Net(function), x)
    assert not decomposed
    assert written(program) == []
    assert torch.equal(program.module()(x), function(torch.tanh(x)))


class Writing(nn.Module):
    """Writes to its input, which it reads before and after, and to a buffer."""

    def __init__(self, reads_buffer: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(1))
        self.reads_buffer = reads_buffer

    def forward(self, x: torch.Tensor) -> Any:
        before = x.clone()[:, :2]
        x.mul_(2)
        self.count.add_(1)
        return before, x, x[:, :2] * self.count if self.reads_buffer else x[:, :2]


def test_inputs_and_buffers_are_written_last(decomposed: list[ExportedProgram]) -> None:
    model, x = Writing(reads_buffer=True), torch.randn(2, 4)
    module: Any = functional(copy.deepcopy(model), x).module()
    assert len(decomposed) == 1
    targets = [node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert [target for target in targets if target._schema.is_mutable] == targets[-2:] == [aten.copy_.default] * 2
    for _ in range(2):
        given, expected = x.clone(), x.clone()
        torch.testing.assert_close(module(given), model(expected), rtol=0, atol=0)
        assert torch.equal(given, expected)
        assert torch.equal(module.get_buffer("count"), model.count)


def test_a_traced_graph_writes_to_nothing() -> None:
    model, x = Writing(reads_buffer=False), torch.randn(2, 4)
    before_trace = model.count.clone()
    traced = trace(model, (x.clone(),))
    assert torch.equal(model.count, before_trace)
    assert traced.notes == (
        "the model writes to its buffer count, which it does not read; the compiled one does not",
        "the model writes to its input x; the compiled model leaves it as it is",
    )
    assert torch.equal(traced.flat[0], x)
    before, after, part = run(traced.graph.gm, (traced.flat[0],))
    assert torch.equal(traced.flat[0], x)
    assert torch.equal(before, x[:, :2])
    assert torch.equal(after, 2 * x)
    assert torch.equal(part, 2 * x[:, :2])


def test_state_between_calls_is_refused() -> None:
    with pytest.raises(InputError, match="it reads its buffer count and changes it for the next call"):
        trace(Writing(reads_buffer=True), (torch.randn(2, 4),))


def test_layers_survive_torchs_functionalisation(decomposed: list[ExportedProgram]) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.scale, self.drop, self.head = nn.LayerNorm(4), nn.Dropout(0.1), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.conv(x))
            y[:, :2].add_(1)
            return self.head(self.drop(self.scale(y.mean((2, 3)))))

    model = Layers()
    sites = trace(model, (torch.randn(2, 3, 6, 6),)).graph.sites()
    assert len(decomposed) == 1
    kept = ("conv", "norm", "scale", "head")
    assert {path: type(sites[path].module) for path in kept} == {p: type(model.get_submodule(p)) for p in kept}


def test_mobilenet_needs_no_second_export(decomposed: list[ExportedProgram]) -> None:
    """Its `dropout_` comes after `flatten`."""
    model, args, kwargs = PANEL["mobilenet_v2"]()
    trace(model, args, kwargs)
    assert not decomposed
