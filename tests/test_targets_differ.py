"""One model, two devices, two answers: what Hajimolahoseini et al. report for ResNet-50 (arXiv 2309.12412)."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import lrcompile
from lrcompile.devices.cost import total
from lrcompile.devices.fusion import describe_all
from lrcompile.planning.sensitivity import rewritten
from lrcompile.report.terminal import print_site

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # a whole ResNet-50, for two devices
DEVICES = ("v100", "ascend310")


@pytest.fixture(scope="module")
def prepared() -> dict[str, lrcompile.Prepared]:
    """ResNet-50 at 224², one image, for both devices. Its weights are random: a large error is allowed."""
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig()).eval()
    x = torch.randn(1, 3, 224, 224)
    return {name: lrcompile.prepare_model(model, (x,), target=name) for name in DEVICES}


@pytest.fixture(scope="module")
def results(prepared: dict[str, lrcompile.Prepared]) -> dict[str, lrcompile.Result]:
    return {name: lrcompile.solve(p, lrcompile.Budget(max_error=0.99)) for name, p in prepared.items()}


def chosen(result: lrcompile.Result) -> dict[str, str]:
    """Lossy rewrites by site."""
    return {rewrite.site[0]: str(dict(rewrite.params)) for rewrite in result.plan.rewrites if not rewrite.exact}


def test_layers_or_ranks_differ(results: dict[str, lrcompile.Result]) -> None:
    v100, ascend = (chosen(results[name]) for name in DEVICES)
    assert v100
    assert ascend
    assert v100 != ascend


def test_predicted_latency_is_never_above_the_original(results: dict[str, lrcompile.Result]) -> None:
    for result in results.values():
        assert result.report.latency_ms["after"] <= result.report.latency_ms["before"]


def test_explain_says_why_one_device_leaves_what_the_other_cuts(results: dict[str, lrcompile.Result]) -> None:
    v100, ascend = (chosen(results[name]) for name in DEVICES)
    differing = [(site, "ascend310") for site in v100.keys() - ascend.keys()]
    differing += [(site, "v100") for site in ascend.keys() - v100.keys()]
    assert differing
    for path, device in differing:
        decision = next(d for d in results[device].report.sites if d.site == path)
        screen = io.StringIO()
        print_site(Console(file=screen, width=120), decision)
        assert any(words in screen.getvalue() for words in ("not sure enough", "nothing is faster", "up to")), path
        assert "P(faster)" in screen.getvalue()


def test_cutting_every_layer_is_slower_than_choosing_on_a_launch_heavy_device(
    prepared: dict[str, lrcompile.Prepared], results: dict[str, lrcompile.Result]
) -> None:
    p = prepared["v100"]
    largest = {c.sites[0]: c for c in p.pricing.candidates if len(c.rewrites) == 1 and not c.exact}
    graph = rewritten(p.graph, [c.rewrites[0] for c in largest.values()], p.passes, p.context)
    everywhere = total(
        [
            p.target.model.cost(op)
            for op in describe_all(graph.gm, p.target.device.fuses, p.target.device.lacks).values()
        ]
    )
    assert everywhere.latency_s * 1e3 > results["v100"].report.latency_ms["after"]
