"""ONNX files: names, batch axis, weights, bytes that do not tell one machine from another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import panel
import pytest
import torch
from torch import nn

from lrcompile.emit.onnx import OnnxModel, lower, save, to_onnx
from lrcompile.emit.verify import onnx_error
from lrcompile.errors import InputError
from lrcompile.frontend.trace import Traced, trace


class Mixed(nn.Module):
    """Convolution, normalisation, attention without heads, a mask, and outputs of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        y = nn.functional.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q = self.layer_norm(self.linear(y)) * self.scale
        y = nn.functional.scaled_dot_product_attention(q, q, y)
        scores = y.masked_fill(mask[:, None, None] == 0, torch.finfo(y.dtype).min).softmax(-1)
        return {"scores": scores, "x": x, "best": scores.argmax(-1), "again": scores, "scale": self.scale}


def mixed(dtype: torch.dtype = torch.float32, batch: int = 2) -> Traced:
    torch.manual_seed(0)
    model = panel.randomise(Mixed()).to(dtype)
    return trace(model, (torch.randn(batch, 3, 8, 8).to(dtype),), {"mask": torch.ones(batch, dtype=torch.int64)})


def lowered(traced: Traced) -> OnnxModel:
    return lower(
        traced.graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, open_axes=traced.open_axes,
    )  # fmt: skip


def proto(traced: Traced) -> onnx.ModelProto:
    return to_onnx(
        traced.graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, open_axes=traced.open_axes,
    )  # fmt: skip


def error(traced: Traced, model: onnx.ModelProto) -> float:
    data = model.SerializeToString()
    return onnx_error(data, traced.graph.gm, traced.flat, traced.input_names, dynamic_batch=traced.dynamic_batch).error


def initializers(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def test_names_shapes_and_batch_axis() -> None:
    traced = mixed(batch=1)
    model = proto(traced)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["x", "mask"]
    assert [value.name for value in model.graph.output] == ["scores", "x_2", "best", "again", "scale"]  # x is taken
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes[:4] == [["batch", 3, 8, 8], ["batch"], ["batch", 36, 8], ["batch", 3, 8, 8]]
    assert model.opset_import[0].version == 20
    assert {"linear.weight", "layer_norm.weight"} <= set(initializers(model))
    assert error(traced, model) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float16, 2e-3),
        (torch.bfloat16, 1e-3),
        pytest.param(torch.float64, 1e-6, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_floating_point_types(dtype: torch.dtype, limit: float) -> None:
    traced = mixed(dtype)
    model = proto(traced)
    onnx.checker.check_model(model, full_check=True)
    assert error(traced, model) < limit


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, (last, _) = self.lstm(x)
        return self.gru(hidden)[0], last.transpose(0, 1)


def test_recurrent_layers_stay_whole() -> None:
    traced = trace(Recurrent().eval(), (torch.randn(2, 7, 4),))
    exported = proto(traced)
    operators = [node.op_type for node in exported.graph.node]
    assert (operators.count("LSTM"), operators.count("GRU")) == (1, 1)
    assert error(traced, exported) < 1e-6


def test_attention_that_torch_traces_to_two_layouts() -> None:
    model = panel._pretrained_class(
        "T5EncoderModel", "T5Config", vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4
    )
    traced = trace(model, (torch.randint(0, 96, (2, 5)),))
    assert error(traced, proto(traced)) < 1e-5


class Partly(nn.Module):
    def forward(self, x: torch.Tensor, factor: float, extra: Any = None) -> Any:
        return {"y": x * factor, "size": x.shape[0], "none": extra}


def test_what_is_no_tensor_is_noted() -> None:
    traced = trace(Partly(), (torch.randn(2, 3), 2.5))
    model = lowered(traced)
    assert (model.input_names, model.output_names) == (("x",), ("y",))
    assert model.notes == (
        "output size is no tensor: it is left out of the ONNX model",
        "input factor is no tensor: its value 2.5 is fixed in the ONNX model",
    )
    data = ir.to_proto(model.model).SerializeToString()
    assert onnx_error(data, traced.graph.gm, traced.flat, model.input_names, dynamic_batch=True).error == 0.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 48)
        self.inner = nn.Linear(48, 48)
        self.head = nn.Linear(48, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(tokens)))


def test_tied_weights_are_stored_once() -> None:
    traced = trace(Tied().eval(), (torch.randint(0, 96, (2, 5)),))
    exported = proto(traced)
    shapes = [shape for shape in initializers(exported).values() if len(shape) == 2]
    assert sorted(shapes) == [(48, 48), (96, 48)]
    assert error(traced, exported) < 1e-6


def test_a_transposed_weight_has_its_own_name() -> None:
    traced = trace(nn.Sequential(nn.Linear(6, 10)).eval(), (torch.randn(2, 5, 6),))
    exported = proto(traced)
    assert [node.op_type for node in exported.graph.node] == ["MatMul", "Add"]
    assert initializers(exported) == {"0.weight": (6, 10), "0.bias": (10,)}
    assert error(traced, exported) < 1e-6


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x)[1]


def test_what_onnx_cannot_say_is_an_input_error() -> None:
    traced = trace(Scaled(), (torch.randn(2, 4, 4),))
    with pytest.raises(InputError, match=r"torch.onnx cannot express.*svd.*\.pt2"):
        proto(traced)


EXPORT = """
import sys
import panel
from lrcompile.emit.onnx import save
from test_emit_onnx import lowered, mixed
from pathlib import Path
save(lowered(mixed()).model, Path(sys.argv[1]))
"""


def test_bytes_are_the_same_in_every_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    path = ":".join(str(root / name) for name in (".", "passes", "tests"))
    environment = {"PYTHONPATH": path, "PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    there, here = tmp_path / "there.onnx", tmp_path / "here.onnx"
    subprocess.run([sys.executable, "-W", "error", "-c", EXPORT, there], cwd=tmp_path, env=environment, check=True)
    save(lowered(mixed()).model, here)
    assert there.read_bytes() == here.read_bytes()
    for trace_of_machine in (str(root), "site-packages", ".py", str(tmp_path), "stack_trace", "nn.Module", "pkg.torch"):
        assert trace_of_machine.encode() not in here.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    traced = mixed()
    model = lowered(traced).model
    path = tmp_path / "model.onnx"
    assert save(model, path, external_data_bytes=100) == (path, tmp_path / "model.onnx.data")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < len(ir.to_proto(model).SerializeToString())
    assert onnx_error(path, traced.graph.gm, traced.flat, traced.input_names).error < 1e-6
