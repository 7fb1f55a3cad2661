"""Shape arithmetic in ONNX graphs: made constant where it is known, left alone where it is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import parser
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from torch.export import Dim

from lrcompile.emit.onnx import to_onnx
from lrcompile.emit.shapes import fold_shapes
from lrcompile.frontend.trace import trace


def folded(text: str, shapes: dict[str, list[int | str]]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(the model as written, the model with its shapes folded); `shapes` says what is known of inner values."""
    before = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]>\nmain {text}')
    onnx.checker.check_model(before)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(before))
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
    fold_constants(model)
    fold_shapes(model.graph)
    RemoveUnusedNodesPass()(model)
    return before, ir.to_proto(model)


def fold_constants(model: ir.Model) -> None:
    """Constant nodes as initializers, which is what the exporter hands over."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def same(before: onnx.ModelProto, after: onnx.ModelProto, *inputs: np.ndarray) -> None:
    results = []
    for model in (before, after):
        session = onnxruntime.InferenceSession(model.SerializeToString())
        names = [port.name for port in session.get_inputs()]
        results.append(session.run(None, dict(zip(names, inputs, strict=True))))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def images(batch: int) -> np.ndarray:
    return np.arange(batch * 24, dtype=np.float32).reshape(batch, 4, 6)


def test_reshape_to_a_shape_of_which_only_the_batch_is_open() -> None:
    before, after = folded(
        """(float[batch, 4, 6] x) => (float[batch, 2, 2, 6] y) {
            all = Shape(x)
            zero = Constant<value_ints = [0]>()
            one = Constant<value_ints = [1]>()
            first = Slice(all, zero, one)
            rest = Constant<value_ints = [2, 2, 6]>()
            shape = Concat<axis = 0>(first, rest)
            y = Reshape(x, shape)
        }""",
        {},
    )
    assert kinds(after) == Counter({"Reshape": 1})
    for batch in (1, 2, 5):
        same(before, after, images(batch))


def test_reshape_with_two_open_sizes_is_left() -> None:
    before, after = folded(
        """(float[batch, length, 6] x) => (float[a, b, 2, 3] y) {
            all = Shape(x)
            zero = Constant<value_ints = [0]>()
            two = Constant<value_ints = [2]>()
            first = Slice(all, zero, two)
            rest = Constant<value_ints = [2, 3]>()
            shape = Concat<axis = 0>(first, rest)
            y = Reshape(x, shape)
        }""",
        {},
    )
    assert kinds(after)["Shape"] == 1
    same(before, after, images(3))


def test_a_size_computed_from_the_batch_is_open_too() -> None:
    before, after = folded(
        """(float[batch, 4, 6] x) => (float[n, 6] y) {
            count = Shape<start = 0, end = 1>(x)
            four = Constant<value_ints = [4]>()
            rows = Mul(count, four)
            six = Constant<value_ints = [6]>()
            shape = Concat<axis = 0>(rows, six)
            y = Reshape(x, shape)
        }""",
        {},
    )
    same(before, after, images(3))  # whatever was folded


def test_expand_to_its_own_shape_is_removed() -> None:
    before, after = folded(
        """(float[batch, 4, 6] x) => (float[batch, 4, 6] z) {
            all = Shape(x)
            y = Expand(x, all)
            z = Neg(y)
        }""",
        {},
    )
    assert kinds(after) == Counter({"Neg": 1})
    same(before, after, images(2))


def test_expand_of_a_shared_row_keeps_its_batch() -> None:
    before, after = folded(
        """(float[batch, 4, 6] x, float[1, 4, 6] row) => (float[batch, 4, 6] z) {
            all = Shape(x)
            z = Expand(row, all)
        }""",
        {},
    )
    assert kinds(after)["Expand"] == 1
    same(before, after, images(3), images(1))


def test_expand_that_is_an_output_stays() -> None:
    before, after = folded(
        """(float[batch, 4, 6] x) => (float[batch, 4, 6] y) {
            all = Shape(x)
            y = Expand(x, all)
        }""",
        {},
    )
    same(before, after, images(2))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_with_an_open_batch_has_no_shape_arithmetic(heads: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, heads, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: Dim.AUTO},))
    traced = trace(program, (x,))
    model = to_onnx(
        traced.graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, open_axes=((0,),),
    )  # fmt: skip
    assert not {"Shape", "Slice", "Concat"} & set(kinds(model))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (1, 2, 7):
        sample = torch.randn(batch, 5, 16)
        with torch.no_grad():
            expected = layer(sample)
        got = session.run(None, {traced.input_names[0]: sample.numpy()})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


class Recurrent(nn.Module):
    """A recurrent layer between an embedding and a head, from zeros or a state that it is given or keeps."""

    def __init__(self, kind: type[nn.RNNBase], state: str = "none", **options: Any) -> None:
        super().__init__()
        self.embedding, self.state = nn.Embedding(11, 8), state
        self.layers = kind(8, 6, **options)
        self.head = nn.Linear(6 * (1 + self.layers.bidirectional), 3)
        self.register_buffer("kept", torch.zeros(1, 1, 6))

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        given = {"none": None, "given": first, "zeros": self.kept.expand(1, x.shape[0], 6)}[self.state]
        y, _ = self.layers(self.embedding(x), given)
        return self.head(y)


def recurrent(model: nn.Module, *args: Tensor) -> onnx.ModelProto:
    """As ONNX with an open batch, which gives what the model does, also for another batch."""
    model.eval()
    traced = trace(model, args)
    proto = to_onnx(
        traced.graph.gm, traced.args, traced.kwargs, input_names=traced.input_names, output_names=traced.output_names,
        open_axes=tuple((1,) if arg.dim() == 3 else (0,) for arg in args),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [port.name for port in session.get_inputs()]
    for batch in (1, 2, 3):
        some = [arg[:, :1].repeat(1, batch, 1) if arg.dim() == 3 else arg[:1].repeat(batch, 1) for arg in args]
        (given,) = session.run(None, {name: value.numpy() for name, value in zip(names, some, strict=True)})
        with torch.no_grad():
            np.testing.assert_allclose(given, model(*some).numpy(), atol=1e-6)
    return proto


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "batch_first": True}])
def test_recurrent_layers_with_an_open_batch_have_no_shape_arithmetic(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    model = Recurrent(kind, **{"batch_first": True, **options})
    found = kinds(recurrent(model, torch.randint(0, 11, (2, 5))))
    assert not found.keys() & {"Shape", "Slice", "Concat", "Expand", "Mul", "ConstantOfShape"}, found
    assert found[kind.__name__] == options.get("num_layers", 1)


def test_a_first_state_of_zeros_is_left_out_and_another_is_not() -> None:
    for state, extra, count in (("zeros", (), 4), ("given", (torch.randn(1, 2, 6),), 6)):
        model = Recurrent(nn.GRU, state, batch_first=True)
        (node,) = (n for n in recurrent(model, torch.randint(0, 11, (2, 5)), *extra).graph.node if n.op_type == "GRU")
        assert len(node.input) == count or not any(node.input[count:])
        assert (len(node.input) > 5 and bool(node.input[5])) == (state == "given")
