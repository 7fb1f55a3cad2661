"""Data that a model was not made for, and data that say too little of a layer: both are told, good data are not."""

from __future__ import annotations

import pytest
import torch
from test_real_data import needs_efficientnet, needs_minilm
from torch import Tensor, nn

import lrcompile
from lrcompile.frontend.trace import trace
from lrcompile.planning.distribution import Distance, entering, known_to_batch_norms
from tools import models

MEAN, STD = 110.0, 50.0  # of the scenes' pixels, 0 to 255


def scenes(samples: int, seed: int) -> Tensor:
    """Smooth images, 0 to 255 before they are scaled; [samples × 3 × 16 × 16]."""
    chance = torch.Generator().manual_seed(seed)
    coarse = torch.randn(samples, 3, 4, 4, generator=chance)
    return nn.functional.interpolate(coarse, size=16, mode="bilinear") * 80 + MEAN


def normalised(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    """A net whose batch norms have seen scenes."""
    net = Net().train()
    with torch.no_grad():
        for seed in range(60):
            net(normalised(scenes(16, 100 + seed)))
    return net.eval()


CHANCE = torch.Generator().manual_seed(5)
DATA = {
    "scenes": normalised(scenes(32, 1)),
    "one scene": normalised(scenes(8, 2))[:1].expand(8, -1, -1, -1),
    "not normalised": scenes(32, 1),
    "loud noise": torch.randn(32, 3, 16, 16, generator=CHANCE) * 3,
    "nothing": torch.zeros(8, 3, 16, 16),
}
STRANGE = ("not normalised", "loud noise", "nothing")


@pytest.mark.parametrize("name", DATA)
def test_a_note_on_data_that_batch_norms_do_not_know(net: Net, name: str) -> None:
    data = lrcompile.calibration_from({"x": DATA[name]}, ["x"], batch=8)
    example = (normalised(scenes(8, 3)),)
    result = lrcompile.compile(net, example, calibration=data)
    for notes in (result.report.notes, lrcompile.replay(net, example, plan=result.plan, calibration=data).report.notes):
        found = [note for note in notes if note.startswith("the calibration data are unlike")]
        assert len(found) == (name in STRANGE), found


def test_batch_norms_that_were_never_trained_say_nothing() -> None:
    graph = trace(Net().eval(), (scenes(2, 0),)).graph
    assert known_to_batch_norms(graph) == {}
    assert Distance.between({}, entering(graph, [(scenes(2, 0),)])) is None


def test_the_distance_is_that_of_normal_distributions() -> None:
    expected = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    got = torch.full((3,), 3.0, dtype=torch.float64), torch.full((3,), 25.0, dtype=torch.float64)
    found = Distance.between({"a": expected, "b": expected}, {"a": got, "b": expected})
    assert found is not None
    assert (found.largest, found.at, found.layers) == (pytest.approx(5, rel=1e-2), "a", 2)
    assert not found.is_usual


def test_what_enters_layers_is_summed_over_batches() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(12, 5, 8) + 2
    graph = trace(net, (x[:4],)).graph
    mean, variance = entering(graph, [(x[:4],), (x[4:12],)])["0"]
    torch.testing.assert_close(mean, x.double().flatten(0, 1).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, x.double().flatten(0, 1).var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_what_enters_a_layer_that_is_called_on_a_vector() -> None:
    data = lrcompile.calibration_from({"input": torch.randn(32)}, ["input"], batch=8)
    result = lrcompile.compile(nn.Sequential(nn.Linear(8, 8)).eval(), (torch.randn(8),), calibration=data)
    mean, variance = result.seen["0"]
    assert (mean.shape, variance.shape) == ((8,), (8,))


def test_what_enters_a_convolution_of_one_image_are_its_channels() -> None:
    x = torch.randn(3, 10, 12)
    mean, _ = entering(trace(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), (x,)).graph, [(x,)])["0"]
    torch.testing.assert_close(mean, x.double().mean((1, 2)), rtol=1e-5, atol=1e-6)


def low_rank() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256), nn.Linear(256, 256)]
    for layer in layers:
        layer.weight.data = torch.randn(256, 16) @ torch.randn(16, 256) / 64 + 0.01 * layer.weight.data
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (8.0, True)])
def test_a_note_on_recovery_data_unlike_the_calibration_data(scale: float, told: bool) -> None:
    x = torch.randn(2, 256, 256)
    data, more = (lrcompile.calibration_from({"input": part}, ["input"], batch=32) for part in (x[0], x[1] * scale))
    small = lrcompile.compile(low_rank(), (x[0][:32],), calibration=data, budget=lrcompile.Budget(size=0.5))
    notes = lrcompile.recover(small, more, steps=0).report.notes
    assert any(note.startswith("the recovery data are unlike the calibration data") for note in notes) == told
    assert not any("unlike" in note for note in lrcompile.recover(small, data, steps=0).report.notes)


@pytest.mark.parametrize(("samples", "told"), [(96, True), (512, False)])
def test_a_note_on_fewer_rows_than_features(samples: int, told: bool) -> None:
    data = lrcompile.calibration_from({"input": torch.randn(samples, 256)}, ["input"], batch=16)
    result = lrcompile.compile(low_rank(), (torch.randn(16, 256),), calibration=data, budget=lrcompile.Budget(size=0.5))
    found = [note for note in result.report.notes if "fewer rows of calibration data" in note]
    assert bool(found) == told
    if told:  # one batch of six is held out
        assert found[0].startswith("2 of the 2 layers")
        assert "80 rows, 256 features" in found[0]


# -------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
def test_images() -> None:
    needs_efficientnet()
    net, (images,) = models.efficientnet_lite0(batch=2)
    graph = trace(net, (images,)).graph
    known = known_to_batch_norms(graph)
    good = models.calibration_images(16)
    raw = good * models._SCALE + models._ZERO

    def usual(x: Tensor) -> bool:
        found = Distance.between(known, entering(graph, [(batch,) for batch in x.split(8)]))
        assert found is not None
        return found.is_usual

    for x in (good, good[:1], models.unseen_images(8), models.imagenet_images()[0][:16]):
        assert usual(x)
    chance = torch.Generator().manual_seed(0)
    for x in (raw[:8], torch.randn(8, 3, 224, 224, generator=chance), torch.zeros(2, 3, 224, 224)):
        assert not usual(x)


@pytest.mark.slow
def test_sentences() -> None:
    needs_minilm()
    net, example = models.minilm(seq=64)
    graph = trace(net, example).graph
    texts = models.movie_sentences()[0]

    def seen(ids: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return entering(graph, list(zip(ids.split(8), mask.split(8), strict=True)))

    expected = seen(*models.tokenise(texts[:32], 64))
    ids, mask = models.tokenise(texts[32:64], 64)
    ones, chance = torch.ones_like(mask), torch.Generator().manual_seed(0)
    cases = {
        True: [(ids, mask), (ids[:8], mask[:8])],
        False: [(torch.randint(1000, 30000, ids.shape, generator=chance), ones), (ids % 100, ones)],
    }
    for usual, inputs in cases.items():
        for given in inputs:
            found = Distance.between(expected, seen(*given))
            assert found is not None
            assert found.is_usual == usual
