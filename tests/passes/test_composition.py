"""All built-in passes on one model in one search: what they do together, and that their order changes nothing."""

from __future__ import annotations

import pytest
import torch
from lrcompile_passes import PASSES
from torch import Tensor, nn

import lrcompile
from lrcompile.passes import Stage
from tests.panel import randomise
from tests.passes import common


class Net(nn.Module):
    """Something for every exact pass, and wide layers for the others."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.first = nn.BatchNorm2d(width)
        self.a, self.d = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.gamma = nn.LayerNorm(width), nn.Parameter(torch.ones(width))
        self.q, self.v, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.k(self.a(self.first(self.stem((x - self.mean) / 0.5)))))
        y = torch.relu(y).permute(0, 2, 3, 1).permute(0, 3, 1, 2).flatten(2).transpose(1, 2)
        z = self.norm(y)
        return y + self.out(torch.relu(self.q(z) / 8) * self.v(z)) * self.gamma


def compiled(passes: list[lrcompile.Pass], max_error: float) -> lrcompile.Result:
    torch.manual_seed(0)
    model, x = randomise(Net()), torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(1))
    return lrcompile.compile(model, (x,), target="v100", passes=passes, budget=lrcompile.Budget(max_error=max_error))


def test_exact_passes_together() -> None:
    result = compiled(list(PASSES), 0.0)
    names = {rewrite.pass_name for rewrite in result.report.rewrites}
    assert names >= {"fold-batch-norm", "fold-affine", "fold-layer-norm", "fold-layout"}
    assert result.report.error["measured"] < 1e-5
    assert result.report.model["ops_after"] <= result.report.model["ops_before"] - 7
    left = {type(module).__name__ for module in result.model.modules()}
    assert not any(name.startswith("BatchNorm") for name in left)


@pytest.mark.parametrize("max_error", [0.0, 0.5])
def test_the_order_of_the_passes_does_not_matter(max_error: float) -> None:
    first, second = (compiled(list(order), max_error) for order in (PASSES, PASSES[::-1]))
    x = torch.randn(2, 3, 18, 18)
    limit = 1e-5 if max_error == 0 else 1e-4
    assert common.relative(second.model(x), first.model(x)) < limit
    assert second.report.latency_ms["after"] == pytest.approx(first.report.latency_ms["after"], rel=1e-9)
    assert second.report.model["ops_after"] == first.report.model["ops_after"]
    always = {transform.name for transform in PASSES if transform.stage is Stage.CANONICALIZE}
    assert any(not rewrite.exact for rewrite in first.report.rewrites) == (max_error > 0)
    priced = [{str(r) for r in run.report.rewrites if r.pass_name not in always} for run in (first, second)]
    assert priced[0] == priced[1]
