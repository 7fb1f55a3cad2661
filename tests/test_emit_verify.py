"""The error metric, and what the check in ONNX Runtime finds."""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from lrcompile.emit.verify import emitted_error, onnx_error, torch_error
from lrcompile.errors import VerificationError
from lrcompile.frontend.trace import at_other_batch, resized, run, trace
from lrcompile.graph.verify import relative_error

INF, NAN = math.inf, math.nan


def tensors(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("expected", "got", "error"),
    [
        (tensors([3.0, 4.0]), tensors([3.0, 4.5]), 0.1),
        (tensors([3.0, 4.0], [1.0]), tensors([3.0, 4.5], [2.0]), 1.0),
        (tensors([0.0]), tensors([0.0]), 0.0),
        (tensors([0.0]), tensors([1e-9]), INF),
        (tensors([NAN]), tensors([NAN]), INF),
        (tensors([1.0]), tensors([NAN]), INF),
        (tensors([-INF, 1.0]), tensors([-INF, 1.0]), 0.0),
        (tensors([-INF, 1.0]), tensors([-1e9, 1.0]), INF),
        (tensors([1, 2]), tensors([1, 2]), 0.0),
        (tensors([1, 2]), tensors([1, 3]), INF),
        (tensors([1.0, 2.0]), tensors([1.0]), INF),
        ([None, 3], [None, 3], 0.0),
        ([3], [4], INF),
        ([torch.tensor([3 + 4j])], [torch.tensor([3 + 4.5j])], 0.1),
        ([torch.empty(0)], [torch.empty(0)], 0.0),
        ([], [], 0.0),
    ],
)
def test_relative_error(expected: list[object], got: list[object], error: float) -> None:
    assert relative_error(expected, got) == pytest.approx(error)


def test_relative_error_wants_equally_many_outputs() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        relative_error([None], [])


def test_torch_error_of_a_changed_graph() -> None:
    x = torch.randn(4, 6)
    model = nn.Linear(6, 3).eval()
    before = trace(model, (x,))
    twice = nn.Linear(6, 3).eval()
    twice.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    after = trace(twice, (x,))
    assert torch_error(before.graph.gm, before.graph.gm, (x,)) == 0.0
    assert torch_error(before.graph.gm, after.graph.gm, (x,)) == pytest.approx(1.0)


def test_resized_rows_differ_and_stay_within_the_values() -> None:
    assert resized(torch.tensor([[1, 2, 3]]), 3).tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]
    assert resized(torch.tensor([[1, 2], [3, 4]]), 3).tolist() == [[1, 2], [3, 4], [2, 1]]
    assert resized(torch.tensor([5]), 3).tolist() == [5, 5, 5]
    assert resized(torch.tensor([[1, 2]]), 2, rolls=False).tolist() == [[1, 2], [1, 2]]
    assert resized(torch.tensor(5), 3).item() == 5
    assert resized(None, 3) is None


class Rating(nn.Module):
    """Looks a user and an item up, each in a table of its own length; one input of both."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(1000, 4), nn.Embedding(50, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids[:, 0]) + self.item(ids[:, 1])


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:].sqrt()


def test_rows_of_another_batch_are_rolled_where_the_model_takes_that() -> None:
    ids = torch.tensor([[900, 3]])
    gm = trace(Rating().eval(), (ids,)).graph.gm
    assert at_other_batch(gm, (ids,), 1)[0].tolist() == [[900, 3]] * 3
    assert emitted_error(lambda flat: run(gm, flat), gm, (ids,), dynamic_batch=True) == 0.0
    x = torch.tensor([[-1.0, 4.0]])
    assert at_other_batch(trace(Root(), (x,)).graph.gm, (x,), 1)[0].tolist() == [[-1.0, 4.0]] * 3
    assert at_other_batch(trace(nn.ReLU(), (x,)).graph.gm, (x,), 1)[0].tolist() == [[-1, 4], [4, -1], [-1, 4]]


def reshaped(shape: list[int], rows: str | int) -> bytes:
    """x [rows, 4] → Reshape(x, shape)."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


class Pairs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], 2, 2)


def test_a_batch_size_baked_into_a_shape_is_found() -> None:
    traced = trace(Pairs(), (torch.randn(2, 4),))
    gm, flat, names = traced.graph.gm, traced.flat, traced.input_names
    assert onnx_error(reshaped([-1, 2, 2], "batch"), gm, flat, names, dynamic_batch=True).error == 0.0
    assert onnx_error(reshaped([2, 2, 2], "batch"), gm, flat, names).error == 0.0
    with pytest.raises(VerificationError, match=r"at batch size 3 .*does not run"):
        onnx_error(reshaped([2, 2, 2], "batch"), gm, flat, names, dynamic_batch=True)
    with pytest.raises(VerificationError, match=r"at batch size 3 .*differs"):
        onnx_error(reshaped([2, -1, 2], "batch"), gm, flat, names, dynamic_batch=True)
    with pytest.raises(VerificationError, match=r"at batch size 3 .*does not run"):
        onnx_error(reshaped([-1, 2, 2], 2), gm, flat, names, dynamic_batch=True)


def test_a_model_that_cannot_be_loaded() -> None:
    traced = trace(Pairs(), (torch.randn(2, 4),))
    model = onnx.load_from_string(reshaped([-1, 2, 2], "batch"))
    model.graph.node[0].op_type = "Reshap"
    with pytest.raises(VerificationError, match=r"cannot load the emitted model: .*Reshap"):
        onnx_error(model.SerializeToString(), traced.graph.gm, traced.flat, traced.input_names)
    with pytest.raises(VerificationError, match="cannot load"):
        onnx_error(b"", traced.graph.gm, traced.flat, traced.input_names)
