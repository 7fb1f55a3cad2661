"""What torch.onnx writes in a roundabout way is written directly, and computes the same at two batch sizes."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime as ort
import pytest
import torch
from onnx.shape_inference import infer_shapes
from torch import Tensor, nn

from lrcompile.emit.onnx import to_onnx
from lrcompile.frontend.trace import trace


class Reads(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)


ROWS, COLUMNS = torch.tensor([0, 1, 1]), torch.tensor([4, -1, 2])
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": lambda x: x[torch.arange(x.shape[0]).reshape(-1, 1, 1, 1), torch.arange(5).reshape(1, 1, 1, -1)],
    "pairs": lambda x: x[ROWS, COLUMNS],
    "from the end": lambda x: x[-ROWS - 1, COLUMNS],
    "three axes": lambda x: x[ROWS, COLUMNS, torch.tensor([[-1], [0]])],
    "all of a row": lambda x: x[ROWS.unsqueeze(1), COLUMNS].sum(-1),
    "booleans": lambda x: (x > 0)[ROWS, COLUMNS],
    "int32": lambda x: x[ROWS.int(), COLUMNS.int()],
}


@pytest.mark.parametrize("name", READS)
def test_reads_by_several_positions(name: str) -> None:
    model, x = Reads(READS[name]), torch.randn(3, 5, 4)
    traced = trace(model, (x,))
    written = to_onnx(traced.graph.gm, (x,), {}, input_names=["x"], output_names=["y"], open_axes=((0,),))
    assert "GatherND" not in {node.op_type for node in written.graph.node}
    inferred = infer_shapes(written, strict_mode=True).graph.value_info
    assert all(len(value.type.tensor_type.shape.dim) <= 5 for value in inferred)
    session = ort.InferenceSession(written.SerializeToString())
    for batch in (x, torch.randn(4, 5, 4)):
        (got,) = session.run(None, {"x": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(batch))


@pytest.mark.parametrize("read", [lambda x: x[:, ROWS, COLUMNS], lambda x: x[ROWS, :, COLUMNS], lambda x: x[ROWS]])
def test_other_reads_are_left_to_torch(read: Callable[[Tensor], Tensor]) -> None:
    model, x = Reads(read), torch.randn(3, 5, 5)
    traced = trace(model, (x,))
    written = to_onnx(traced.graph.gm, (x,), {}, input_names=["x"], output_names=["y"], open_axes=((0,),))
    session = ort.InferenceSession(written.SerializeToString())
    for batch in (x, torch.randn(4, 5, 5)):
        (got,) = session.run(None, {"x": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(batch))
