"""Three models in which every built-in pass finds something that it can do without an error.

Weights have exactly the ranks, blocks and equal heads that the lossy passes look for, and values around the
activations of bottlenecks are not negative, so that leaving these activations out changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RANK = 4  # of everything of low rank, and the step of ranks of the device that the tests use
WIDTH = 16
BLOCKS = 2  # on the diagonal of a kernel's core
HEADS = 4

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def linear(columns: int = WIDTH, rows: int = WIDTH) -> nn.Linear:
    """A linear layer of low rank."""
    layer = nn.Linear(columns, rows)
    layer.weight.data = torch.randn(rows, RANK) @ torch.randn(RANK, columns) / (RANK * columns) ** 0.5
    return layer


def pointwise(axes: int, *, positive: bool = False, stride: int = 1) -> Any:
    """A 1×1 convolution of low rank; if `positive` it makes nothing negative of what is not negative."""
    layer = CONVS[axes - 1](WIDTH, WIDTH, 1, stride=stride)
    weight = linear().weight.data
    if positive:
        weight = torch.rand(WIDTH, RANK) @ torch.rand(RANK, WIDTH) * 4 / (RANK * WIDTH)
        layer.bias.data.abs_()
    layer.weight.data = weight.reshape(WIDTH, WIDTH, *[1] * axes)
    return layer


def convolution(axes: int, *, positive: bool = False, padding: int = 0) -> Any:
    """Three taps an axis: a core of blocks on its diagonal, each separable between the first axis and the others."""
    layer = CONVS[axes - 1](WIDTH, WIDTH, 3, padding=padding)
    draw: Any = torch.rand if positive else torch.randn
    size, rank, others = WIDTH // BLOCKS, RANK // BLOCKS, 3 ** (axes - 1)
    blocks = [
        torch.einsum(
            "sr,rt,rq,qx,qc->sctx", draw(size, rank), draw(rank, 3), draw(rank, rank), draw(rank, others),
            draw(rank, size),
        )
        for _ in range(BLOCKS)
    ]  # fmt: skip
    kernel = torch.zeros(WIDTH, WIDTH, 3, others)
    for i, block in enumerate(blocks):
        place = slice(i * size, (i + 1) * size)
        kernel[place, place] = block / (block.sum() if positive else block.norm()) * (size if positive else size**0.5)
    layer.weight.data = kernel.reshape(WIDTH, WIDTH, *[3] * axes)
    if positive:
        layer.bias.data.abs_()
    return layer


def batch_norm(axes: int) -> Any:
    """A batch norm whose shift is not negative, nor is its scale."""
    norm = NORMS[axes - 1](WIDTH)
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.running_mean.uniform_(-0.3, 0.0)
    norm.bias.data.uniform_(0.0, 0.3)
    return norm


def layer_norm(*, bias: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, bias=bias)
    norm.weight.data.uniform_(0.5, 1.5)
    if bias:
        norm.bias.data.normal_(0.0, 0.2)
    return norm


def embedding() -> nn.Embedding:
    """A table of low rank."""
    table = nn.Embedding(40, WIDTH)
    table.weight.data = torch.randn(40, RANK) @ torch.randn(RANK, WIDTH) / RANK**0.5
    return table


def heads(order: list[int]) -> nn.Linear:
    """A layer for heads of which those with one number are equal; all of low rank together."""
    layer = linear()
    for tensor in (layer.weight.data, layer.bias.data):
        by_head = tensor.unflatten(0, (HEADS, -1))
        by_head.copy_(by_head[order].clone())
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [batch, length, features] with several heads."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Bottleneck(nn.Module):
    """1×1, 3 taps, 1×1; with activations that change nothing where what comes in is not negative, or with none."""

    def __init__(self, axes: int, *, activated: bool, stride: int = 1) -> None:
        super().__init__()
        self.activated = activated
        self.reduce = pointwise(axes, positive=activated)
        self.conv = convolution(axes, positive=activated, padding=int(activated))
        self.norm = batch_norm(axes)
        self.expand = pointwise(axes, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        act = torch.relu if self.activated else nn.Identity()
        return self.expand(act(self.norm(self.conv(act(self.reduce(x))))))


class Attention(nn.Module):
    """A layer norm, three projections, scaled queries, redundant moves, and a layer scale."""

    def __init__(self, queries: list[int], keys: list[int], *, shift: bool = True) -> None:
        super().__init__()
        self.norm = layer_norm(bias=shift)
        self.q, self.k, self.v, self.out = heads(queries), heads(keys), heads(keys), linear()
        self.gamma, self.drop = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        z = attend(self.q(z) * 0.7, self.k(z), self.v(z).transpose(1, 2).transpose(2, 1))
        return x + self.drop(self.out(z)) * self.gamma


class Head(nn.Module):
    """Three linear layers with nothing between them that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.last = linear(), linear(), batch_norm(1), linear(rows=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(x))))


class Image(nn.Module):
    """A network for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.stem, self.stem_norm = nn.Conv2d(3, WIDTH, 3, bias=False), batch_norm(2)
        self.ahead, self.plain = batch_norm(2), Bottleneck(2, activated=False, stride=2)
        self.drop, self.activated, self.twice = nn.Dropout2d(0.2), *(Bottleneck(2, activated=True) for _ in range(2))
        self.left, self.right = pointwise(2), pointwise(2)
        self.up, self.gamma = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2), nn.Parameter(torch.rand(WIDTH, 1, 1))
        self.up.weight.data = 4 * convolution(2).weight.data[:, :, :2, :2]
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem((x - self.mean) / 0.5)))
        x = torch.relu(self.drop(self.plain(self.ahead(x))))
        x = x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).flatten(2).unflatten(2, (-1, 4))
        for block in (self.activated, self.twice, self.twice):
            x = torch.relu(x + block(x))
        x = self.left(x) * torch.sigmoid(self.right(x))
        return self.head((self.up(x) * self.gamma).relu().mean((2, 3)))


class Text(nn.Module):
    """A transformer with a convolution, for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.widen = embedding(), linear()
        self.place = nn.Parameter(torch.randn(1, 6, WIDTH) / 4)
        self.runs = Attention([0, 0, 2, 2], [0, 0, 2, 2])
        self.grid = Attention([0, 0, 2, 2], [0, 1, 0, 1], shift=False)
        self.conv_norm, self.conv = layer_norm(), Bottleneck(1, activated=True)
        bound = self.conv_norm.weight.detach().norm() * WIDTH**0.5 + self.conv_norm.bias.detach().norm()
        self.conv.reduce.bias.data += bound * self.conv.reduce.weight.detach().flatten(1).norm(dim=1)
        self.mlp_norm, self.up, self.down = layer_norm(), linear(rows=32), linear(columns=32)
        self.head = Head()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.grid(self.runs(self.widen(self.embedding(tokens)) + self.place))
        x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2) / 4
        for _ in range(2):
            x = x + self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return self.head(x.mean(1))


class Video(nn.Module):
    """A network for clips: volumes, then frames as pictures, then frames as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm, self.label = nn.Conv3d(3, WIDTH, 3), batch_norm(3), embedding()
        self.activated, self.plain = Bottleneck(3, activated=True), Bottleneck(3, activated=False)
        self.left, self.right = pointwise(3), pointwise(3)
        self.drop, self.frames = nn.Dropout3d(0.2), Bottleneck(2, activated=True)
        self.place = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.attention, self.head = Attention([0, 0, 2, 2], [0, 0, 2, 2]), Head()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.stem_norm(self.stem((x - 0.4) / 0.5))
        x = torch.relu(x + self.label(label)[:, :, None, None, None])
        x = self.drop(self.plain(x + self.activated(x)))
        x = self.left(x) * torch.sigmoid(self.right(x))
        x = x.relu().transpose(1, 2).flatten(0, 1)
        x = (x + self.frames(x)).mean((2, 3)).unflatten(0, (-1, 2))
        return self.head(self.attention(x + self.place).mean(1))


def _video(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, 6, 8, 8), torch.randint(0, 40, (batch,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "image": (Image, lambda batch: (torch.randn(batch, 3, 12, 12),)),
    "text": (Text, lambda batch: (torch.randint(0, 40, (batch, 6)),)),
    "video": (Video, _video),
}


def make(name: str, dtype: torch.dtype = torch.float64, noise: float = 0.0) -> nn.Module:
    """A model in evaluation; with `noise`, relative to each weight, its ranks are full and its heads differ."""
    with _drawing(0):
        model = MODELS[name][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter += noise * parameter.std() * torch.randn_like(parameter)
    return model.to(dtype)


def inputs(name: str, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    with _drawing(1):
        values = MODELS[name][1](batch)
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in values)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Random numbers of a seed of their own, in double precision: of single ones, low ranks are not exact."""
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(kind)
