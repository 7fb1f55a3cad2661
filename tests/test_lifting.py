"""What is lifted to modules: layers called twice, weights in one memory, open sizes, biases for all, packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import lrcompile
from lrcompile import Budget
from lrcompile.frontend.trace import run, trace
from lrcompile.graph.graph import parameter_count, tied_with, weight_bytes
from lrcompile.nn.linear import TransposedLinear

EXACT = Budget(max_error=0.0)


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.fc, self.down = Conv1D(8, 12), Conv1D(12, 12), Conv1D(12, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(self.fc(self.up(x)).relu())
        return self.down(y), self.down(y + 1)


def test_a_layer_of_addmm_that_is_called_twice() -> None:
    model, x = Shared().eval(), torch.randn(3, 8)
    graph = trace(model, (x,)).graph
    sites = {site.path: len(site.nodes) for site in graph.modules_of(TransposedLinear)}
    assert sites == {"up": 1, "fc": 2, "down": 2}
    for got, expected in zip(run(graph.gm, [x]), model(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_parameters_in_one_memory_are_not_tied() -> None:
    """As weight averaging leaves them: each is a piece of one vector."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    count = sum(p.numel() for p in model.parameters())
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert len({p.untyped_storage()._cdata for p in model.parameters()}) == 1
    graph = trace(model, (torch.randn(4, 64),)).graph
    assert parameter_count(graph.gm) == count
    assert weight_bytes(graph.gm) == 4 * count
    assert not any(tied_with(graph, site) for site in graph.sites().values())
    x = (torch.randn(64, 64),)
    result = lrcompile.compile(model, x, target="rpi5", budget=Budget(size=0.5))
    assert result.report.model["weight_bytes_after"] <= 0.5 * 4 * count


class Open(nn.Module):
    """Options of operators that are sizes of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(self.skip(x), x.shape[1:])
        return self.up(functional.max_pool2d(y, 2), output_size=list(x.shape[-2:])) + y


@pytest.mark.parametrize("target", ["rpi5", "v100"])
def test_options_that_are_open_sizes(target: str) -> None:
    sizes = {2: 2 * torch.export.Dim("h", min=2, max=40), 3: 2 * torch.export.Dim("w", min=2, max=40)}
    model, x = Open().eval(), torch.randn(2, 4, 8, 12)
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    result = lrcompile.compile(program, (x,), target=target, budget=EXACT)
    other = torch.randn(2, 4, 16, 6)
    torch.testing.assert_close(result.model(other), model(other), rtol=1e-4, atol=1e-5)


class OneBias(nn.Module):
    """A bias of one number, which torch spreads over all outputs, beside and before layers that could be merged."""

    def __init__(self, *, addmm: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.addmm = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(1)), addmm
        self.other, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.weight) if self.addmm else functional.linear(x, self.weight, self.bias)
        return self.last(y) + self.last(self.other(x))


@pytest.mark.parametrize("addmm", [False, True])
def test_a_bias_of_one_number(addmm: bool) -> None:
    model, x = OneBias(addmm=addmm).eval(), torch.randn(5, 16)
    result = lrcompile.compile(model, (x,), target="rpi5", budget=EXACT)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


class CrossAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(64, 4, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        return self.attend(x, memory, memory, need_weights=False)[0]


@pytest.mark.parametrize(("options", "width"), [({}, 64), ({"kdim": 48, "vdim": 48}, 48)], ids=["packed", "apart"])
def test_projections_of_cross_attention_are_layers(options: dict[str, int], width: int) -> None:
    model = CrossAttention(**options).eval()
    x, memory = torch.randn(2, 5, 64), torch.randn(2, 7, width)
    graph = trace(model, (x, memory)).graph
    layers = [site.module for site in graph.modules_of(nn.Linear)]
    assert sum(layer.out_features for layer in layers) == 4 * 64  # type: ignore[misc]
    torch.testing.assert_close(run(graph.gm, [x, memory])[0], model(x, memory))


def test_a_decoder_layer_is_cut() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(256, 4, 512, batch_first=True).eval()
    x, memory = torch.randn(8, 32, 256), torch.randn(8, 40, 256)
    result = lrcompile.compile(model, (x, memory), target="rpi5", budget=Budget(size=0.7))
    assert any("multihead_attn" in site for rewrite in result.plan.rewrites for site in rewrite.site)
    assert result.report.model["weight_bytes_after"] <= 0.7 * result.report.model["weight_bytes_before"]


def test_a_batch_norm_of_more_axes_than_there_are_modules_for() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm3d(3)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            return functional.batch_norm(n(x).unsqueeze(-1), n.running_mean, n.running_var, n.weight, n.bias)

    model, x = Wide().eval(), torch.randn(2, 3, 2, 2, 2)
    graph = trace(model, (x,)).graph
    assert [site.path for site in graph.modules_of(nn.BatchNorm3d)] == ["norm"]
    torch.testing.assert_close(run(graph.gm, [x])[0], model(x))
