"""Models and data that users have less often: inputs in containers, open sizes, defaults, complex numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, calibration_from
from lrcompile.cli import run
from lrcompile.errors import InputError
from lrcompile.frontend.trace import trace


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, *pieces: Tensor, table: dict[str, Tensor] | None = None) -> Tensor:
        y = self.layer(pieces[0]) + pieces[1]
        return y if table is None else y + table["row"]


def in_pieces() -> Any:
    return Pieces().eval(), (torch.randn(4, 16), torch.randn(4, 16))


def in_a_table() -> Any:
    return Pieces().eval(), (torch.randn(4, 16), torch.randn(4, 16)), {"table": {"row": torch.randn(4, 16)}}


@pytest.mark.parametrize("factory", ["in_pieces", "in_a_table"])
def test_data_for_inputs_in_containers(factory: str) -> None:
    names = ["pieces_0", "pieces_1", "table_row"][: 2 if factory == "in_pieces" else 3]
    np.savez("calib.npz", **{name: torch.randn(16, 16).numpy() for name in names})
    assert run([f"test_given_odd:{factory}", "--target", "rpi5", "--calib", "calib.npz", "--out", "out.onnx"]) == 0
    assert [port.name for port in onnx.load("out.onnx").graph.input] == names


def test_an_archive_in_another_precision_keeps_its_open_sizes() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(2, 7, 16)
    auto = torch.export.Dim.AUTO
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(({0: auto, 1: auto}),)), "net.pt2")
    for options in ([], ["--dtype", "fp16", "--batch", "3"]):
        assert run(["net.pt2", "--target", "rpi5", "--out", "out.onnx", *options]) == 0
        shape = onnx.load("out.onnx").graph.input[0].type.tensor_type.shape
        assert [size.dim_param for size in shape.dim] == ["batch", "input_1", ""]


TWO = torch.tensor(2.0)


class Scaled(Pieces):
    def forward(self, x: Tensor, scale: Tensor = TWO) -> Tensor:  # type: ignore[override]
        return self.layer(x) * scale


def test_a_metric_of_a_model_with_a_tensor_for_a_default() -> None:
    x = torch.randn(4, 16)
    budget = Budget(max_drop=0.1)
    options: dict[str, Any] = {"metric": lambda model: model(x).mean(), "budget": budget}
    result = lrcompile.compile(Scaled().eval(), (x,), target="rpi5", **options)
    assert result.report.metric is not None


class Waves(Pieces):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.fft.rfft(self.layer(x)) / x.norm()


class Turned(nn.Module):
    """A layer of complex numbers, with a bias, on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.turn = nn.Linear(32, 32), nn.Linear(16, 16, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.turn(torch.view_as_complex(self.real(x).reshape(4, 8, 16, 2))))


@pytest.mark.parametrize("target", ["v100", "x86-ort"])
def test_layers_of_complex_numbers_have_a_price(target: str) -> None:
    result = lrcompile.compile(Turned().eval(), (torch.randn(4, 8, 32),), target=target)
    assert result.report.latency_ms["before"] > 0


def test_examples_that_gradients_are_wanted_of() -> None:
    x = torch.randn(8, 64, requires_grad=True)
    result = lrcompile.compile(nn.Linear(64, 64).eval(), (x,), target="local")
    assert result.report.latency_ms["kind"] == "measured"


def test_complex_numbers_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="output 0 of the model holds NaN"):
        trace(Waves().eval(), (torch.zeros(4, 16),))
    with pytest.raises(InputError, match="x holds NaN or infinity in 4 of 4 samples"):
        calibration_from({"x": torch.full((4, 2), torch.nan, dtype=torch.complex64)}, ["x"], 2)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (torch.ones(4, 2, device="meta"), "has no values"),
        (torch.ones(4, 2, dtype=torch.float8_e4m3fn), "is in float8"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "is a nested tensor"),
    ],
)
def test_tensors_that_are_no_samples(value: Tensor, part: str) -> None:
    with pytest.raises(InputError, match=f"x {part}; give arrays of numbers"):
        calibration_from({"x": value}, ["x"], 2)


class Repeated(Pieces):
    def forward(self, x: Tensor, n: int) -> Tensor:  # type: ignore[override]
        return self.layer(x) * n


def test_a_number_that_an_archive_leaves_open_is_said_to_be_fixed() -> None:
    x, dim = torch.randn(4, 16), torch.export.Dim
    program = torch.export.export(Repeated().eval(), (x, 3), dynamic_shapes=({0: dim.AUTO}, dim.DYNAMIC))
    assert trace(program, (x, 3)).notes == ("input n is a number that the archive leaves open, and is fixed at 3",)
    assert not trace(Repeated().eval(), (x, 3)).notes
