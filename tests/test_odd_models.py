"""Models with outputs that are infinite, NaN or random, and data types that a target cannot run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import InputError


class Net(nn.Module):
    """Two layers, and something odd at the end."""

    def __init__(self, end: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.end = nn.Linear(64, 64), nn.Linear(64, 8), end
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.second(torch.relu(self.first(x))))


X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def masked(y: torch.Tensor) -> torch.Tensor:
    return y.masked_fill(y > 0, float("-inf"))


def test_masked_outputs_count_as_equal(tmp_path: Path) -> None:
    result = lrcompile.compile(Net(masked), (X,), target="v100")
    assert result.report.error["measured"] <= 1e-5
    assert result.save(tmp_path / "model.onnx").verification["onnx_vs_torch"] <= 1e-5


def test_outputs_without_a_finite_value() -> None:
    result = lrcompile.compile(Net(lambda y: torch.full_like(y, float("inf"))), (X,), target="v100")
    assert result.report.error["measured"] == 0.0


def test_nan_on_the_example_inputs_is_refused() -> None:
    with pytest.raises(InputError, match=r"output 0 of the model holds NaN on the example inputs"):
        lrcompile.compile(Net(lambda y: (y - 1e9).log()), (X,), target="v100")


def test_random_models_are_refused() -> None:
    with pytest.raises(InputError, match="different outputs for the same inputs"):
        lrcompile.compile(Net(lambda y: y + torch.rand_like(y)), (X,), target="v100")


@pytest.mark.parametrize(
    ("use", "operator"),
    [
        (lambda y: y[y > 0].sum()[None], "aten.index.Tensor"),
        (lambda y: y.nonzero().float().sum()[None], "aten.nonzero.default"),
        (lambda y: torch.masked_select(y, y > 0).sum()[None], "aten.masked_select.default"),
        (lambda y: y * (y > 0).sum().item(), "aten.item.default"),
    ],
)
def test_sizes_that_depend_on_values_are_refused(use: Callable[[torch.Tensor], torch.Tensor], operator: str) -> None:
    with pytest.raises(InputError, match=f"^0: {operator} makes sizes or numbers of the values that it gets"):
        lrcompile.compile(nn.Sequential(Net(use)), (X,), target="v100")


def test_constant_outputs() -> None:
    assert lrcompile.compile(Net(torch.zeros_like), (X,), target="v100").report.error["measured"] == 0.0


def test_bfloat16_cannot_be_measured_here() -> None:
    with pytest.raises(InputError, match=r"cannot measure bfloat16.*--dtype fp32"):
        lrcompile.compile(Net(torch.relu), (X,), target="local", dtype="bf16")


def test_a_folder_whose_name_has_a_dot(tmp_path: Path) -> None:
    lrcompile.compile(Net(torch.relu), (X,), target="v100").save(f"{tmp_path}/model.v2/")
    assert (tmp_path / "model.v2" / "model.py").exists()
