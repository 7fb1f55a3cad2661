"""Weights that are computed of others: weight norm, spectral norm, standardised kernels."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

import lrcompile
from lrcompile import Budget
from lrcompile.frontend.trace import Traced, run, trace
from lrcompile.graph.graph import weight_bytes

X = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(0))


def layers(model: nn.Module) -> Traced:
    """The traced model, which computes what it did."""
    torch.manual_seed(0)
    traced = trace(model.eval(), (X,))
    with torch.no_grad():
        assert torch.allclose(run(traced.graph.gm, (X,))[0], model(X), atol=1e-5)
    return traced


def called(traced: Traced) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


class Standardised(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2), keepdim=True)) / self.weight.std((1, 2), keepdim=True)
        return functional.conv1d(x, weight, self.bias, padding=1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the hook, which models have all the same
    HOOKED = weight_norm(nn.Conv1d(16, 24, 3, bias=False))


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(nn.Conv1d(16, 24, 3)),
        parametrizations.weight_norm(nn.Conv1d(16, 24, 3), dim=2),
        HOOKED,
        parametrizations.weight_norm(nn.ConvTranspose1d(16, 8, 3, stride=2)),
        parametrizations.spectral_norm(nn.Linear(12, 20)),
        parametrizations.orthogonal(nn.Linear(12, 12)),
        Standardised(16, 24, 3),
    ],
    ids=["norm", "norm over taps", "hook", "transposed", "spectral", "orthogonal", "standardised"],
)
def test_a_layer_with_a_computed_weight_is_a_layer(layer: nn.Module) -> None:
    traced = layers(nn.Sequential(layer, nn.ReLU()))
    assert called(traced) == ["0"]
    module = traced.graph.gm.get_submodule("0")
    assert type(module) in (nn.Conv1d, nn.ConvTranspose1d, nn.Linear)
    assert set(traced.graph.gm.state_dict()) <= {"0.weight", "0.bias"}
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_it_is_split_and_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(16, 256, 5)), nn.ReLU(), nn.Conv1d(256, 4, 1)).eval()
    result = lrcompile.compile(model, (X,), target="rpi5", budget=Budget(size=0.8))
    assert any(rewrite.site == ("0",) for rewrite in result.report.rewrites)
    again = lrcompile.compile(model, (X,), plan=result.plan)
    with torch.no_grad():
        assert torch.equal(again.model(X), result.model(X))
    assert result.save(tmp_path / "small.onnx").verification["onnx_vs_torch"] < 1e-4


def test_a_layer_that_is_called_twice_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = parametrizations.weight_norm(nn.Linear(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    traced = layers(Twice())
    assert called(traced) == ["layer", "layer"]
    assert weight_bytes(traced.graph.gm) == 4 * (12 * 12 + 12)


def test_a_tied_weight_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 20, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.layer(x), self.layer.weight.t())

    traced = layers(Tied())
    assert called(traced) == ["layer"]
    assert weight_bytes(traced.graph.gm) == 4 * 12 * 20


def test_a_long_computation_takes_each_step_once() -> None:
    """Each value is used twice by the next: over 40 steps that would be a million million computations."""

    class Iterated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            for _ in range(40):
                weight = (weight + weight.tanh()) / 2
            return functional.linear(x, weight, self.bias)

    assert called(layers(nn.Sequential(Iterated(12, 12)))) == ["0"]


def test_what_is_random_is_not_computed_once() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight + 0 * torch.randn_like(self.weight))

    assert "aten.linear.default" in {str(node.target) for node in layers(Noisy()).graph.nodes}


class TiedAutoencoder(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(20, 12)))

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.normalize(getattr(self, self.name), dim=1)
        return functional.linear(functional.linear(x, weight).relu(), weight.t())


@pytest.mark.parametrize("name", ["weight", "D"])
def test_a_weight_that_is_computed_of_a_computed_one(name: str) -> None:
    traced = layers(TiedAutoencoder(name))
    assert len(called(traced)) == 2
