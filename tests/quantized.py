"""Small networks in 8-bit integers, and what is read off their files."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, CalibrationData, Result, calibration_from
from lrcompile.devices.bench import BenchResult
from lrcompile.quantization import quantize as decisions


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
            nn.Conv2d(16, 8, 1),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """A block with its sum, the largest of windows, and sums of which integers make but one side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        hidden = (hidden + self.outer(self.inner(hidden).relu())).relu()
        return (hidden + hidden.sigmoid()) * (hidden + 1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Louder(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.data *= 1.5


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Sensitive(nn.Module):
    """One layer of three has an outlier that leaves 8 bits nothing for the rest, and the outlier is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.middle.weight.data[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.middle(torch.cat([hidden[:, :1] + 1e4, hidden[:, 1:]], 1)).relu())


class Reciprocal(nn.Module):
    """What is small beside the other values becomes zero in 8 bits, and its reciprocal infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        self.conv.weight.data = torch.eye(2).reshape(2, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 1 / self.conv(x)


class Words(nn.Module):
    """Tables of embeddings, one of which the head reads too where it is tied."""

    def __init__(self, kind: str = "free") -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(400, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 400, bias=kind.endswith("bias"))
        self.read_besides = kind.endswith("besides")
        if kind != "free":
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.layer(self.words(x)).relu())
        return scores + self.words.weight.sum(1) if self.read_besides else scores


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).softmax(-1)


INPUTS: dict[type[nn.Module], tuple[int, ...]] = {
    ConvNet: (3, 8, 8), Residual: (3, 8, 8), Mlp: (32,), Louder: (32,), Transformer: (6, 32),
    Sensitive: (32,), Plain: (4,), Reciprocal: (2, 2, 2),
}  # fmt: skip
LAYERS = {
    ConvNet: {"body.0", "body.2", "body.4", "head"},
    Mlp: {"up", "down"},
    Transformer: {"layer.self_attn.in_proj", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2"},
}


def data(kind: type[nn.Module]) -> CalibrationData:
    x = torch.randn(32, *INPUTS[kind], generator=torch.Generator().manual_seed(1))
    return calibration_from({"x": x.abs() + 0.1 if kind is Reciprocal else x}, ["x"], 4)


@cache
def compiled(kind: type[nn.Module], max_error: float | None = None, **options: Any) -> tuple[Result, CalibrationData]:
    torch.manual_seed(0)
    given = data(kind)
    budget = Budget(max_error=max_error, reserve=decisions.RESERVE)
    model = kind().eval()
    return lrcompile.compile(
        model, (given.batches[0]["x"],), calibration=given, budget=budget, **{"target": "rpi5"} | options
    ), given


def outputs(path: Path, given: CalibrationData) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": batch["x"].numpy()})[0] for batch in given.batches[-2:]])


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def benched(ratio: float, spread: float = 0.0) -> BenchResult:
    """A measurement that is made up; `spread` is half of its interval."""
    interval = (ratio - spread, ratio + spread)
    return BenchResult(1e-3, 1e-3, 1e-3, ratio * 1e-3, ratio * 1e-3, ratio, *interval, 6, 12, False, 0.0, 0.0, "", 4, 1)
