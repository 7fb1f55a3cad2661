from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lrcompile_passes import RemoveIdentity
from torch import nn
from torch.nn import functional

import lrcompile
from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import Graph
from tests.passes import common

PASS = RemoveIdentity()


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.function(torch.tanh(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.keep = nn.Linear(6, 8), nn.Dropout(0.3), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.keep(self.drop(self.fc(self.drop(x))))
        y = functional.dropout(y.clone(), 0.2, training=False).to(torch.float64).view(x.size(0), 8)
        return torch.relu(y.reshape(-1, 2, 4).permute(0, 1, 2) * 1)


def simplified(graph: Graph) -> Graph:
    """The graph after the pass was applied until it proposes nothing."""
    while found := common.rewrites(graph, PASS):
        assert found[0].exact
        graph = common.applied(graph, PASS, found[0])
    return graph


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    result = simplified(graph)
    assert common.text(result) == (
        "x = placeholder x()\n"
        "fc = call_module fc(x)\n"
        "reshape = call_function reshape.default(fc, [-1, 2, 4])\n"
        "relu = call_function relu.default(reshape)\n"
        "output = output output((relu,))"
    )
    assert common.difference(result, graph, x) == 0
    assert common.on_other_batch(result, model, (x,), (torch.randn(7, 6, dtype=torch.float64),)) < 1e-12


REMOVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "view": lambda x: x.view(x.size(0), 4, 4),
    "reshape -1": lambda x: x.reshape(-1, 4, 4),
    "expand": lambda x: x.expand(-1, 4, 4),
    "transpose": lambda x: x.transpose(1, 1),
    "slice": lambda x: x[:, 0:4],
    "squeeze": lambda x: x.squeeze(1),
    "flatten": lambda x: x.flatten(2),
    "divide": lambda x: x / 1,
    "pad": lambda x: functional.pad(x, (0, 0)),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "dropout2d": lambda x: functional.dropout2d(x, 0.5, training=False),
}
KEPT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other type": lambda x: x.to(torch.float64),
    "by two": lambda x: x * 2,
    "transposed": lambda x: x.transpose(1, 2),
    "first rows": lambda x: x[:4],
    "shifted": lambda x: functional.pad(x, (1, -1)),
    "active dropout": lambda x: functional.dropout(x, 0.0, training=True),
    "contiguous after transposition": lambda x: x.transpose(1, 2).contiguous(),
}


@pytest.mark.parametrize("name", REMOVED)
def test_removed(name: str) -> None:
    x = torch.randn(4, 4, 4)
    graph = common.exported(Function(REMOVED[name]), x)
    result = simplified(graph)
    kinds = [node.target for node in result.nodes if node.op == "call_function"]
    assert kinds == [torch.ops.aten.tanh.default, torch.ops.aten.relu.default]
    assert common.difference(result, graph, x) == 0


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    """The traced batch is as long as the other axes, so that shapes agree by chance."""
    x = torch.randn(4, 4, 4)
    assert common.rewrites(common.exported(Function(KEPT[name]), x), PASS) == []


def test_a_reshape_that_export_fixes_the_batch_for() -> None:
    class Swap(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.transpose(0, 1).reshape(x.size(0), 4))

    assert not trace(Swap(), (torch.randn(4, 4),)).dynamic_batch  # only so may the reshape go


def test_the_output_is_not_an_input() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x)

    assert common.rewrites(common.exported(Nothing(), torch.randn(4, 4)), PASS) == []


def test_training_mode_is_refused() -> None:
    graph = common.exported(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.randn(3, 4))
    graph.gm.get_submodule("1").train()
    assert common.refusals(graph, PASS) == {"1": "in training mode"}
    assert common.rewrites(graph, PASS) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, 4).to(dtype)
    graph = common.exported(Function(lambda x: x.to(dtype).to(torch.float32)), x)
    targets = [node.target for node in simplified(graph).nodes if node.op == "call_function"]
    assert targets.count(torch.ops.aten.to.dtype) == 1


class Outputs(nn.Module):
    """Identities in a row at the output, and two of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Dropout(0.1), nn.Dropout(0.2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.relu()
        return self.two(self.one(x)), self.fc(x), y.clone(), y.detach()


def test_several_at_once_leave_no_input_as_output() -> None:
    """Each may go alone; both together would hand out the input, or one value twice."""
    model, x = Outputs().eval(), torch.randn(2, 4)
    result = lrcompile.compile(model, (x,), target="rpi5", budget=lrcompile.Budget(max_error=0.0))
    (output,) = (node for node in result.model.graph.nodes if node.op == "output")
    values = output.args[0]
    assert len(set(values)) == len(values)
    assert all(node.op != "placeholder" for node in values)
    for got, expected in zip(result.model(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)
