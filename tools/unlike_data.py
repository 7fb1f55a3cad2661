"""How far good and strange data are from what trained models know: the figures in docs/planning.md.

python -m tools.unlike_data
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lrcompile.frontend.trace import trace
from lrcompile.planning.distribution import Distance, Spread, entering, known_to_batch_norms
from tools import models


def images() -> None:
    """EfficientNet-Lite0, against the running statistics of its batch norms."""
    net, (example,) = models.efficientnet_lite0(batch=2)
    graph = trace(net, (example,)).graph
    good = models.calibration_images(32)
    pixels = good * models._SCALE + models._ZERO
    means, deviations = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )  # ImageNet's
    chance = torch.Generator().manual_seed(0)
    cases = {
        "32 images": good,
        "one image": good[:1],
        "colours in another order": good.flip(1),
        "ImageNet's mean and deviation": (pixels / 255 - means) / deviations,
        "pixels 0 to 255": pixels,
        "noise": torch.randn(8, 3, 224, 224, generator=chance),
        "zeros": torch.zeros(2, 3, 224, 224),
    }
    known = known_to_batch_norms(graph)
    for name, x in cases.items():
        report(f"EfficientNet-Lite0, {name}", known, entering(graph, [(batch,) for batch in x.split(8)]))


def sentences() -> None:
    """MiniLM, which has no batch norms, against 32 other sentences."""
    net, example = models.minilm(seq=64)
    graph = trace(net, example).graph

    def seen(ids: Tensor, mask: Tensor) -> dict[str, Spread]:
        return entering(graph, list(zip(ids.split(8), mask.split(8), strict=True)))

    texts = models.movie_sentences()[0]
    expected = seen(*models.tokenise(texts[:32], 64))
    ids, mask = models.tokenise(texts[32:64], 64)
    chance = torch.Generator().manual_seed(0)
    shuffled = ids.clone()
    for row, count in zip(shuffled, mask.sum(1).tolist(), strict=True):
        row[1 : count - 1] = row[torch.randperm(count - 2, generator=chance) + 1]
    ones = torch.ones_like(mask)
    cases = {
        "32 sentences": (ids, mask),
        "8 sentences": (ids[:8], mask[:8]),
        "their words shuffled": (shuffled, mask),
        "random tokens": (torch.randint(1000, 30000, ids.shape, generator=chance), ones),
        "tokens below 100": (ids % 100, ones),
    }
    for name, given in cases.items():
        report(f"MiniLM, {name}", expected, seen(*given))


def report(name: str, expected: dict[str, Spread], got: dict[str, Spread]) -> None:
    found = Distance.between(expected, got)
    assert found is not None
    print(f"{name:40} {found.typical:8.2f} {found.largest:8.2f} {'' if found.is_usual else 'note'}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    images()
    sentences()
