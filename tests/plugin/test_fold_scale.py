from __future__ import annotations

import pytest
import torch
from lrcompile_plugin_example import FoldScale
from torch import nn

import lrcompile
from lrcompile.frontend.trace import trace
from lrcompile.passes import apply, proposals

DEVICE = lrcompile.load_device("v100")


class Scaled(nn.Module):
    """A layer, and what is done with its output."""

    def __init__(self, layer: nn.Module, use: object) -> None:
        super().__init__()
        self.layer, self.use = layer, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.layer, x)


LAYERS = [
    (nn.Linear(6, 5), (2, 6)),
    (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    (nn.Conv1d(6, 4, 3, groups=2, stride=2, padding=1, padding_mode="circular"), (2, 6, 9)),
    (nn.Conv2d(6, 4, 3, dilation=2, padding="same", bias=False), (2, 6, 7, 7)),
    (nn.Conv3d(6, 4, 1), (2, 6, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("scale", [0.125, -3, 1 / 3])
def test_numerics(layer: nn.Module, shape: tuple[int, ...], scale: float) -> None:
    model, x = Scaled(layer, lambda f, x: f(x) * scale).double(), torch.randn(shape, dtype=torch.float64)
    result = lrcompile.compile(model, (x,), passes=[FoldScale()])
    assert [str(rewrite) for rewrite in result.report.rewrites] == [f"fold-scale(layer; scale={float(scale)})"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)


def test_structure() -> None:
    graph = trace(Scaled(nn.Linear(4, 4), lambda f, x: torch.relu(2 * f(x) / 8)), (torch.randn(2, 4),)).graph
    context = lrcompile.Context(DEVICE)
    for scale in (2.0, 0.125):  # two in a row: each round finds one
        (rewrite,) = proposals(graph, FoldScale(), context)
        assert isinstance(rewrite, lrcompile.Rewrite)
        assert rewrite == lrcompile.Rewrite.from_json(rewrite.to_json())
        assert rewrite.params == {"scale": scale}
        apply(graph, FoldScale(), rewrite, context)
    assert [node.name for node in graph.nodes] == ["x", "layer", "relu", "output"]


def test_layer_called_twice() -> None:
    model, x = Scaled(nn.Linear(4, 4), lambda f, x: f(f(x) * 0.5) * 0.5).double(), torch.randn(2, 4).double()
    result = lrcompile.compile(model, (x,), passes=[FoldScale()])
    assert len(result.report.rewrites) == 1
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.layer(x) * 0.5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Scaled(nn.Linear(4, 4), lambda f, x: f(x) * 0.5 + f(x)), "its output is used without the scale too"),
        (Scaled(nn.Linear(4, 4), lambda f, x: f(f(x) * 2) * 3), "module called at 2 sites with different scales"),
        (Scaled(nn.Linear(4, 4), lambda f, x: f(x) * 5000), "scale 5000 is beyond the limit of 4096"),
        (Scaled(nn.Linear(4, 4), lambda f, x: f(x) * 0.5).half(), "weight is of type float16"),
        (Tied(), "weight tied with other"),
    ],
)
def test_refusals(model: nn.Module, reason: str) -> None:
    x = torch.randn(2, 4, dtype=next(model.parameters()).dtype)
    assert list(proposals(trace(model, (x,)).graph, FoldScale(), lrcompile.Context(DEVICE))) == [
        lrcompile.Refusal("fold-scale", "layer", reason)
    ]
