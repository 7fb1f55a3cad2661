"""The blocks that need training after the rewrite: a spatial and a temporal convolution side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lrcompile_passes import FactorizeConv3d
from torch import nn

from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import apply
from tests.passes import common
from tests.passes.test_factorize_conv3d import kernel, single

PARALLEL = FactorizeConv3d(parallel=True)


def test_branches_are_the_least_squares_fit() -> None:
    """Nothing is left of the kernel in the cells that the two branches can reach."""
    module = nn.Conv3d(4, 5, 3, padding=1, bias=False)
    graph, _ = single(module, 2, 4, 3, 3, 3)
    for form in ("add", "cat"):
        result = common.applied(graph, PARALLEL, Rewrite(PARALLEL.name, ("0",), {"form": form}))
        left = module.weight.detach() - kernel(result, module)
        assert left[:, :, 1].norm() < 1e-12
        assert left[:, :, :, 1, 1].norm() < 1e-12


@pytest.mark.parametrize("stride", [1, 2, (2, 1, 2)])
@pytest.mark.parametrize("kernel_size", [3, (2, 3, 5)])
def test_branches_of_a_kernel_that_is_a_cross_are_the_layer(stride: Any, kernel_size: Any) -> None:
    module: Any = nn.Conv3d(4, 5, kernel_size, stride=stride, dilation=(2, 1, 2), padding=(1, 1, 2))
    taps, high, wide = module.kernel_size
    module.padding = (1, high // 2, 2 * (wide // 2))
    with torch.no_grad():
        mask = torch.zeros(module.kernel_size)
        mask[taps // 2] = mask[:, high // 2, wide // 2] = 1
        module.weight.mul_(mask)
    graph, x = single(module, 2, 4, 6, 7, 6)
    found = [r for r in common.rewrites(graph, PARALLEL) if r.params["form"] in ("add", "cat")]
    assert [r.error for r in found] == [0.0, 0.0]
    for rewrite in found:
        assert common.difference(common.applied(graph, PARALLEL, rewrite), graph, x) < 1e-12


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(4, 4, (3, 2, 3), padding=1),
        nn.Conv3d(4, 4, 3),
        nn.Conv3d(4, 4, 3, padding=1, groups=2),
        nn.Conv3d(4, 4, (1, 3, 3), padding=1),
        nn.Conv3d(4, 4, (3, 1, 1)),
        nn.ConvTranspose3d(4, 4, 3, padding=1),
    ],
)
def test_no_branches_without_a_center(module: nn.Module) -> None:
    graph, _ = single(module, 2, 4, 5, 5, 5)
    assert all(r.exact or "rank" in r.params for r in common.rewrites(graph, PARALLEL))


def moving_bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy clips [count × 1 × 5 × 10 × 10] of a bar that moves one of four ways, which no single frame shows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    starts = torch.randint(10, (count,), generator=generator)
    clips = 0.5 * torch.randn(count, 1, 5, 10, 10, generator=generator)
    for clip, label, start in zip(clips, labels.tolist(), starts.tolist(), strict=True):
        for t in range(5):
            at = (start + (t if label % 2 else -t)) % 10
            (clip[0, t, at] if label < 2 else clip[0, t, :, at]).add_(1.0)
    return clips, labels


def train(model: nn.Module, steps: int, rate: float) -> float:
    """Accuracy on held-out clips in percent after Adam steps."""
    clips, labels = moving_bars(2000, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        picked = torch.randint(len(clips), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(clips[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, labels = moving_bars(1000, 2)
    with torch.no_grad():
        return 100 * float((model(clips).argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, float]:
    """A net of two 3-D convolutions that tells the four ways apart, and its accuracy in percent."""
    torch.manual_seed(7)
    layers = [nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(16, 4))
    return model, train(model, 250, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["add", "cat"])
def test_branches_recover_by_training(form: str, trained: tuple[nn.Module, float]) -> None:
    model, accuracy = trained
    assert accuracy > 95
    graph = common.drawn(copy.deepcopy(model), moving_bars(2, 3)[0])
    for site in ("0", "2"):
        apply(graph, PARALLEL, Rewrite(PARALLEL.name, (site,), {"form": form}), common.context())
    graph.gm.recompile()
    untrained, recovered = train(graph.gm, 0, 0.0), train(graph.gm, 125, 3e-3)
    print(f"{form}: Conv3d {accuracy:.1f} %, without training {untrained:.1f} %, trained {recovered:.1f} %")
    assert untrained < accuracy - 2
    assert recovered > accuracy - 2
