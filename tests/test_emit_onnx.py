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
        input_names=traced.input_names, output_names=traced.output_names, dynamic_batch=traced.dynamic_batch,
    )  # fmt: skip


def proto(traced: Traced) -> onnx.ModelProto:
    return to_onnx(
        traced.graph.gm, traced.args, traced.kwargs,
        input_names=traced.input_names, output_names=traced.output_names, dynamic_batch=traced.dynamic_batch,
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
    ("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-3), (torch.float64, 1e-6)], ids=str
)
def test_other_floating_point_types(dtype: torch.dtype, limit: float) -> None:
    traced = mixed(dtype)
    model = proto(traced)
    onnx.checker.check_model(model, full_check=True)
    assert error(traced, model) < limit


@pytest.mark.parametrize(("name", "operator"), [("lstm_tagger", "LSTM"), ("gru_tagger", "GRU")])
def test_recurrent_layers_stay_whole(name: str, operator: str) -> None:
    model, args, kwargs = panel.PANEL[name]()
    traced = trace(model, args, kwargs)
    exported = proto(traced)
    assert [node.op_type for node in exported.graph.node].count(operator) == 2
    assert error(traced, exported) < 1e-6


def test_attention_that_torch_traces_to_two_layouts() -> None:
    model, args, kwargs = panel.t5_encoder()
    traced = trace(model, args, kwargs)
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


def test_weights_keep_their_names_and_tied_ones_are_stored_once() -> None:
    model, args, kwargs = panel.gpt2()
    traced = trace(model, args, kwargs)
    exported = proto(traced)
    shapes = initializers(exported)
    assert shapes["transformer.h.0.attn.c_attn.weight"] in ((48, 144), (144, 48))
    assert sum(shape in ((96, 48), (48, 96)) for shape in shapes.values()) == 1  # wte and lm_head
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
    files = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        path = ":".join(str(root / name) for name in (".", "passes", "tests"))
        environment = {"PYTHONPATH": path, "PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(folder)}
        file = folder / "model.onnx"
        subprocess.run([sys.executable, "-W", "error", "-c", EXPORT, file], cwd=folder, env=environment, check=True)
        files.append(file.read_bytes())
    assert files[0] == files[1]
    for trace_of_machine in (str(root), "site-packages", ".py", str(tmp_path), "stack_trace", "nn.Module", "pkg.torch"):
        assert trace_of_machine.encode() not in files[0]
    assert capfd.readouterr() == ("", "")


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    traced = mixed()
    model = lowered(traced).model
    path = tmp_path / "model.onnx"
    assert save(model, path, external_data_bytes=100) == (path, tmp_path / "model.onnx.data")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < len(ir.to_proto(model).SerializeToString())
    assert onnx_error(path, traced.graph.gm, traced.flat, traced.input_names).error < 1e-6
