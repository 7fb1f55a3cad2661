"""Networks that are trained here, so that accuracy can be measured: `python tools/recipes.py resnet vit`.

A residual network and a vision transformer learn Fashion-MNIST: 55,000 of its training images; 5,000 are held out, and
the 10,000 test images judge. What was trained is kept in the user's cache and found again as long as the recipe is
the same.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tools.fetch_data import DataMissing, cache_directory
from tools.models import fashion_mnist

BATCH = 128
HELD_OUT = 5000
SMOOTHING = 0.1
SHIFT = 2  # pixels, at most, that an image is moved by


class FashionResNet(nn.Module):
    """5.4 M parameters: a stem, and residual blocks of 64, 160, 400 and 400 channels at 14², 7², 4² and 4² pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        widths = ((32, 64, 2), (64, 160, 2), (160, 400, 2), (400, 400, 1))
        self.blocks = nn.Sequential(*(Residual(*width) for width in widths))
        self.head = nn.Linear(400, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch × 1 × 28 × 28] to scores [batch × 10]."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Residual(nn.Module):
    """Two 3 × 3 convolutions around which the input is led, by a 1 × 1 convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        same = into == out and stride == 1
        self.around = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
        return (y + self.around(x)).relu()


class FashionViT(nn.Module):
    """2.9 M parameters: six blocks of width 192 over 16 tokens, which three convolutions make of an image.

    The convolutions are a tenth of the work, and with them few epochs suffice (arXiv 2106.14881).
    """

    def __init__(self, width: int = 192, blocks: int = 6, heads: int = 3) -> None:
        super().__init__()
        widths = ((1, 32), (32, 96), (96, width))
        stem = [nn.Sequential(nn.Conv2d(*pair, 3, 2, 1, bias=False), nn.BatchNorm2d(pair[1])) for pair in widths]
        self.patches = nn.Sequential(stem[0], nn.ReLU(), stem[1], nn.ReLU(), stem[2])
        self.positions = nn.Parameter(torch.randn(16, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch × 1 × 28 × 28] to scores [batch × 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Block(nn.Module):
    """Attention, then two layers, each on top of its normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.layers(self.between(x))


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    make: Callable[[], nn.Module]
    epochs: int
    rate: float
    optimizer: str
    decay: float


RECIPES = {
    "resnet": Recipe(FashionResNet, 6, 0.1, "sgd", 5e-4),
    "vit": Recipe(FashionViT, 6, 1e-3, "adamw", 0.05),
}


def fashion(held_out: bool = False) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, classes) to train on, those to judge by: the test images or the training images held out)."""
    images, classes = fashion_mnist("train")
    rest = (images[-HELD_OUT:], classes[-HELD_OUT:])
    return (images[:-HELD_OUT], classes[:-HELD_OUT]), rest if held_out else fashion_mnist("t10k")


def varied(images: Tensor, chance: torch.Generator) -> Tensor:
    """Images mirrored and moved by up to two pixels at random."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=chance) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    down, right = torch.randint(2 * SHIFT + 1, (2,), generator=chance).tolist()
    padded = nn.functional.pad(images, (SHIFT,) * 4, value=float(images.min()))
    return padded[..., down : down + images.shape[-2], right : right + images.shape[-1]]


def fit(
    model: nn.Module, data: tuple[Tensor, Tensor], recipe: Recipe, seed: int, say: Callable[[str], None]
) -> nn.Module:
    """Trains a model; in bfloat16 where the processor multiplies that faster."""
    images, classes = data
    chance = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * (len(images) // BATCH)
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, recipe.rate, 0.9, weight_decay=recipe.decay, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, recipe.rate, weight_decay=recipe.decay),
    }
    optimizer = kinds[recipe.optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps, pct_start=0.2)
    model.train()
    low = torch.cpu._is_amx_tile_supported()
    start = time.monotonic()
    for epoch in range(recipe.epochs):
        losses = []
        for batch in torch.randperm(len(images), generator=chance).split(BATCH)[: len(images) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                scores = model(varied(images[batch], chance))
            loss = nn.functional.cross_entropy(scores.float(), classes[batch], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        say(f"epoch {epoch + 1} of {recipe.epochs}: loss {mean:.3f}, {time.monotonic() - start:.0f} s")
    return model.eval()


@torch.no_grad()
def correct(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the class of each image is right [images]."""
    parts = zip(*(tensor.split(500) for tensor in data), strict=True)
    return torch.cat([model(images).argmax(1) == classes for images, classes in parts])


def accuracy(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> float:
    """In percent."""
    return 100 * int(correct(model, data).sum()) / len(data[1])


def kept(name: str, facts: Sequence[object], model: nn.Module, fit: Callable[[], object]) -> nn.Module:
    """A model with weights that were trained by the same facts before, or are now and stay in the user's cache."""
    key = hashlib.sha256(repr([getattr(fact, "__name__", fact) for fact in facts]).encode()).hexdigest()[:12]
    path = cache_directory().parent / "models" / f"{name.replace('*', key)}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    fit()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model


def trained_on_fashion(name: str, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """The trained network of a recipe, from the user's cache or made now and kept there.

    Raises:
        DataMissing: the images cannot be fetched.
    """
    recipe = RECIPES[name]
    sources = [inspect.getsource(part) for part in (FashionResNet, Residual, FashionViT, Block, fit, varied)]
    facts = [BATCH, HELD_OUT, SMOOTHING, SHIFT, *vars(recipe).values(), *sources]
    torch.manual_seed(seed)
    model = recipe.make()
    return kept(f"fashion-{name}-*-{seed}", facts, model, lambda: fit(model, fashion()[0], recipe, seed, say))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            model = trained_on_fashion(name, options.seed, lambda line: print(line, flush=True))
            count = sum(parameter.numel() for parameter in model.parameters())
            print(f"{name}: {count:,} parameters, {accuracy(model, fashion()[1]):.2f} % of the test images")
    except DataMissing as problem:
        print(f"recipes: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
