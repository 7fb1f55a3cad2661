from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrcompile_passes import FoldLayerNorm, LowRankLinear
from torch import nn

import lrcompile
from lrcompile.nn.linear import TransposedLinear
from tests.panel import randomise
from tests.passes import common

PASS = FoldLayerNorm()


class Net(nn.Module):
    """A layer norm, and what reads it; `use` gets the module and the normalized value."""

    def __init__(self, norm: nn.Module, use: Callable[[Any, Any], Any], *layers: nn.Module) -> None:
        super().__init__()
        self.norm, self.layers, self.use = norm, nn.ModuleList(layers), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self, self.norm(x))


def every(m: Any, y: Any) -> Any:
    return sum(layer(y) for layer in m.layers)


def test_golden() -> None:
    model = randomise(Net(nn.LayerNorm(6), every, nn.Linear(6, 4), nn.Linear(6, 4))).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert str(rewrite) == "fold-layer-norm(norm, layers.0, layers.1)"
    assert rewrite.exact
    result = common.applied(graph, PASS, rewrite)
    assert common.text(result) == common.text(graph)
    assert common.layers(result)["norm"] == "LayerNorm((6,), eps=1e-05, elementwise_affine=False, bias=False)"
    assert not any(key.startswith("norm") for key in result.gm.state_dict())
    assert common.rewrites(result, PASS) == []
    other = torch.randn(5, 3, 6, dtype=torch.float64)
    assert common.on_other_batch(result, model, (x,), (other,)) < 1e-10


@given(st.data())
def test_exact_for_all_options_or_refused(data: Any) -> None:
    width = data.draw(st.integers(2, 6))  # a norm over one feature is zero
    norm = nn.LayerNorm(
        width, eps=data.draw(st.sampled_from([1e-5, 0.1])), elementwise_affine=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )  # fmt: skip
    kinds = data.draw(st.lists(st.sampled_from([nn.Linear, TransposedLinear]), min_size=1, max_size=3))
    biases = [data.draw(st.booleans()) for _ in kinds]
    layers = [kind(width, 3, bias) for kind, bias in zip(kinds, biases, strict=True)]
    x = torch.randn(2, *data.draw(st.lists(st.integers(1, 3), max_size=2)), width, dtype=torch.float64)
    graph = common.drawn(randomise(Net(norm, every, *layers)).double(), x)
    found, refused = common.rewrites(graph, PASS), common.refusals(graph, PASS)
    missing = [i for i, bias in enumerate(biases) if not bias and norm.bias is not None]
    if norm.weight is None:
        assert (found, refused) == ([], {})
    elif missing:
        assert refused == {"norm": f"layers.{missing[0]} has no bias to take the shift"}
    else:
        (rewrite,) = found
        result = common.applied(graph, PASS, rewrite)
        assert common.difference(result, graph, x) < 1e-10
        for i, bias in enumerate(biases):
            assert (result.gm.get_submodule(f"layers.{i}").bias is not None) == bias


def test_called_twice() -> None:
    def use(m: Any, y: Any) -> Any:
        return m.layers[1](m.norm(torch.relu(m.layers[0](y))))

    x = torch.randn(3, 4, dtype=torch.float64)
    graph = common.exported(randomise(Net(nn.LayerNorm(4), use, nn.Linear(4, 4), nn.Linear(4, 4))).double(), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert rewrite.site == ("norm", "layers.0", "layers.1")
    assert common.difference(common.applied(graph, PASS, rewrite), graph, x) < 1e-10

    def shared(m: Any, y: Any) -> Any:
        return m.layers[0](torch.relu(m.layers[0](y)))

    graph = common.exported(Net(nn.LayerNorm(4), shared, nn.Linear(4, 4)), x.float())
    assert common.refusals(graph, PASS) == {"norm": "module layers.0 called at 2 sites, on different values"}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(nn.LayerNorm(4), lambda m, y: m.layers[0](y) + y, nn.Linear(4, 4)), "its result is read by add too"),
        (Net(nn.LayerNorm(4), every, nn.Linear(4, 4, bias=False)), "layers.0 has no bias to take the shift"),
        (Net(nn.LayerNorm((4, 4)), every, nn.Linear(4, 4)), "it normalizes several axes"),
        (Net(nn.LayerNorm(4), every, nn.Conv1d(4, 4, 1)), "layers.0 does not read features of the last axis"),
        (Net(nn.LayerNorm(4), every, nn.Linear(4, 4)).half(), "layers.0: weight is of type float16"),
        (Net(nn.LayerNorm(4), every, nn.Linear(4, 4)).bfloat16(), "layers.0: weight is of type bfloat16"),
    ],
)
def test_refusals(model: nn.Module, reason: str) -> None:
    graph = common.exported(model, torch.randn(2, 4, 4, dtype=next(model.parameters()).dtype))
    assert common.refusals(graph, PASS) == {"norm": reason}
    assert common.rewrites(graph, PASS) == []


def test_tied_weights() -> None:
    layer = Net(nn.LayerNorm(4), lambda m, y: m.layers[1](torch.relu(m.layers[0](y))), *[nn.Linear(4, 4)] * 2)
    layer.layers[1] = nn.Linear(4, 4)
    layer.layers[1].weight = layer.layers[0].weight
    x = torch.randn(2, 4)
    assert common.refusals(common.drawn(layer, x), PASS) == {"norm": "layers.0: weight tied with layers.1"}
    norm = Net(nn.LayerNorm(4), lambda m, y: m.layers[1](torch.relu(m.layers[0](y))), nn.Linear(4, 4), nn.LayerNorm(4))
    norm.layers[1].weight = norm.norm.weight
    assert common.refusals(common.drawn(norm, x), PASS) == {"norm": "weight tied with layers.1"}


def test_the_scale_shows_in_the_spectrum() -> None:
    """Without calibration data a split of the folded layer is better than one of the layer as it was."""
    torch.manual_seed(0)
    model: Any = Net(nn.LayerNorm(32), every, nn.Linear(32, 32)).double()
    model.norm.weight.data = torch.logspace(-2, 1, 32).double()
    x = torch.randn(64, 32, dtype=torch.float64)
    errors = []
    for passes in ([LowRankLinear()], [PASS, LowRankLinear()]):
        graph = common.exported(model, x)
        for transform in passes:
            rewrite = common.rewrites(graph, transform)[0]
            graph = common.applied(graph, transform, rewrite)
        errors.append(common.difference(graph, common.exported(model, x), x))
    assert errors[1] < 0.7 * errors[0]


def test_emitted(tmp_path: Path) -> None:
    model, x = randomise(Net(nn.LayerNorm(6), every, nn.Linear(6, 4), nn.Linear(6, 4))), torch.randn(2, 3, 6)
    result = lrcompile.compile(model, (x,), passes=[PASS])
    assert [r.pass_name for r in result.report.rewrites] == ["fold-layer-norm"]
    report = result.save(tmp_path / "model.onnx")
    assert report.verification["onnx_vs_torch"] is not None
    assert report.error["measured"] <= 1e-5
