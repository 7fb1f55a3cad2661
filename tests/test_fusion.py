"""What is priced as fused, and that ONNX Runtime fuses what the profile says."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost, total
from lrcompile.devices.device import FUSIONS
from lrcompile.devices.fusion import describe_all
from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import Traced, trace
from tests.optimised import operators

ALL = frozenset(FUSIONS)
X86, X86_LACKS = load_device("x86-ort").fuses, load_device("x86-ort").lacks


class Block(nn.Module):
    """A residual block; what follows the second convolution is said by name."""

    def __init__(self, end: str, axes: int = 2) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if axes == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first, self.second, self.norm = conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1), norm(8)
        self.end = end

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.second(self.first(x).relu())
        match self.end:
            case "norm, add, relu":
                return functional.relu(self.norm(y) + x)
            case "relu":
                return y.relu()
            case "add":
                return y + x
            case "relu, add":
                return y.relu() + x
            case "relu, relu":
                return torch.sigmoid(y.relu())
            case "read twice":
                return y.relu(), y
            case "broadcast":
                return y + x.mean((2, 3), keepdim=True)
            case "gelu":
                return functional.gelu(y)
        raise ValueError(self.end)


class Mlp(nn.Module):
    def __init__(self, act: Any = functional.gelu) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 32), nn.Linear(32, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


IMAGE = torch.randn(2, 8, 6, 6)


def fused(traced: Traced, fuses: frozenset[str] = ALL) -> list[str]:
    """The operations that are priced as fused, in order."""
    return [op.label for op in describe_all(traced.graph.gm, fuses).values() if op.kind == "fused"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("norm, add, relu", ["BatchNorm2d", "add", "relu"]),
        ("relu", ["relu"]),
        ("add", ["add"]),
        ("relu, add", ["relu"]),
        ("relu, relu", ["relu"]),
        ("read twice", []),
        ("broadcast", []),
        ("gelu", []),
    ],
)
def test_what_follows_a_convolution(end: str, expected: list[str]) -> None:
    assert fused(trace(Block(end).eval(), (IMAGE,))) == ["relu", *expected]


def test_what_follows_a_product() -> None:
    x = torch.randn(2, 5, 8)
    assert fused(trace(Mlp().eval(), (x,))) == ["gelu", "add"]
    assert fused(trace(Mlp().eval(), (x,)), frozenset({"gemm_activation"})) == ["gelu"]
    assert fused(trace(Mlp(torch.sigmoid).eval(), (x,)), frozenset({"gemm_activation"})) == []
    assert fused(trace(Mlp().eval(), (x,)), frozenset()) == []


def test_a_fused_addition_reads_its_other_operand() -> None:
    ops = describe_all(trace(Block("norm, add, relu").eval(), (IMAGE,)).graph.gm, ALL)
    kept = {op.label: op.activation_bytes for op in ops.values() if op.kind == "fused"}
    assert kept == {"relu": 0.0, "BatchNorm2d": 0.0, "add": IMAGE.numel() * 4}
    device = load_device("v100")
    price = AnalyticCostModel(device).cost
    (add,) = (op for op in ops.values() if op.label == "add")
    assert price(add).latency_s == pytest.approx(IMAGE.numel() * 4 / device.bandwidth_bytes_s)


def test_of_two_convolutions_that_are_added_the_later_takes_the_addition() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.short = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.main(x) + self.short(x)).relu()

    assert fused(trace(Two().eval(), (IMAGE,))) == ["add", "relu"]


def test_folding_what_is_fused_anyway_is_no_gain() -> None:
    """Profiles whose runtime folds batch norms see none in doing so before; others do."""
    traced = trace(Block("norm, add, relu").eval(), (IMAGE,))
    device = load_device("v100")

    def latency(fuses: frozenset[str]) -> Cost:
        return total([AnalyticCostModel(device).cost(op) for op in describe_all(traced.graph.gm, fuses).values()])

    assert "conv_normalization" in device.fuses
    norm_s = device.launch_s["other"]
    assert latency(device.fuses - {"conv_normalization"}).latency_s > latency(device.fuses).latency_s + norm_s


def test_training_fuses_nothing() -> None:
    gm = trace(Block("relu").eval(), (IMAGE,)).graph.gm
    other = trace(Block("add").eval(), (IMAGE,)).graph.gm
    device = load_device("v100")
    launch_s = 3 * device.launch_s["other"]  # forward, and twice the traffic backward
    before, after = AnalyticCostModel(device, training=True).compare(gm, other)
    assert min(before.latency_s, after.latency_s) > launch_s / 2
    before, after = AnalyticCostModel(device).compare(gm, other)
    assert max(before.latency_s, after.latency_s) < device.launch_s["other"]


class Residual(nn.Module):
    """Residual blocks over some axes, and two branches that are added."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](16)
        self.stem, self.a = conv(8, 16, 3, padding=1), conv(16, 16, 3, padding=1)
        self.b, self.c = conv(16, 16, 3, padding=1), conv(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.norm(self.a(x)) + x).relu()
        return torch.sigmoid(self.b(x) + self.c(x)) + x.mean()


class Decoder(nn.Module):
    """Transposed convolutions, before a norm, activations and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.last = nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x)).relu()
        return (self.last(x) + x).tanh()


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x + self.first(x)))


class TwoActivations(nn.Module):
    """A linear layer with a bias that two GELUs read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(functional.gelu(y)) + self.down(functional.gelu(y, approximate="tanh"))


class Gated(nn.Module):
    """A linear layer with a bias before an activation."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize(
    "traced",
    [
        trace(Decoder().eval(), (IMAGE,)),
        *(trace(PostNorm().eval(), (torch.randn(*[3] * axes, 8),)) for axes in (1, 2, 3)),
        *(
            trace(Gated(act).eval(), (torch.randn(*sizes, 8),))
            for act, sizes in (
                (functional.gelu, (5,)),
                (functional.gelu, (2, 5)),
                (functional.gelu, (2, 3, 5)),
                (torch.sigmoid, (2, 5)),
                (partial(functional.gelu, approximate="tanh"), (2, 5)),
            )
        ),
        trace(TwoActivations().eval(), (torch.randn(2, 5, 8),)),
        *(trace(Residual(axes).eval(), (torch.randn(2, 8, *[6] * axes),)) for axes in (1, 2, 3)),
        *(trace(Block(end).eval(), (IMAGE,)) for end in ("norm, add, relu", "relu", "add", "gelu", "relu, relu")),
    ],
    ids=[
        "decoder",
        "norm of 2 axes",
        "norm of 3 axes",
        "norm of 4 axes",
        "GELU of 2 axes",
        "GELU of 3 axes",
        "GELU of 4 axes",
        "sigmoid of 3 axes",
        "tanh GELU",
        "two GELUs",
        "1-D",
        "2-D",
        "3-D",
        "norm, add, relu",
        "relu",
        "add",
        "gelu",
        "relu, relu",
    ],
)
def test_onnx_runtime_fuses_what_the_profile_of_x86_says(traced: Traced, tmp_path: Path) -> None:
    ops = describe_all(traced.graph.gm, X86, X86_LACKS).values()
    left = sum(op.kind not in ("fused", "view") for op in ops)
    kinds = operators(traced, tmp_path)
    copies = sum(kinds[kind] for kind in ("ReorderInput", "ReorderOutput", "Squeeze"))
    assert sum(kinds.values()) - copies == left, kinds
    assert kinds["BiasGelu"] == sum(op.function == "bias_gelu" for op in ops), kinds
    assert kinds["SkipLayerNormalization"] == sum(op.function == "skip_layer_norm" for op in ops), kinds


class Padded(nn.Module):
    """Zeros around an image, which may be read by something else too, or be no zeros."""

    def __init__(self, value: float = 0.0, *, shown: bool = False) -> None:
        super().__init__()
        self.conv, self.value, self.shown = nn.Conv2d(8, 8, 3), value, shown

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = functional.pad(x, (1, 1, 0, 1), value=self.value)
        return (self.conv(x), x) if self.shown else self.conv(x)


class Heads(nn.Module):
    """Linear layers around something with its axes changed, and around attention."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.attention = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8), attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).view(-1, 5, 2, 8).transpose(1, 2)
        if self.attention:
            y = functional.scaled_dot_product_attention(y, y, y)
        else:
            y = y.reshape(-1, 2, 40).sin().view(-1, 2, 5, 8)
        return self.norm(x + self.down(y.transpose(1, 2).reshape(-1, 5, 16)))


class Mask(nn.Module):
    """Adds what depends on sizes alone."""

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1:], device=x.device)
        return x + torch.tril(ones).cumsum(0).sin()


TOKENS = torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    ("traced", "views", "movements"),
    [
        (trace(Padded().eval(), (IMAGE,)), 1, 0),
        (trace(Padded(1.0).eval(), (IMAGE,)), 0, 1),
        (trace(Padded(shown=True).eval(), (IMAGE,)), 0, 1),
        (trace(Heads(attention=False).eval(), (TOKENS,)), 2, 2),
        (trace(Mask().eval(), (TOKENS,)), 3, 0),
    ],
    ids=["padding", "padding with ones", "padding that is read", "transposes", "constants"],
)
def test_onnx_runtime_has_what_the_profile_of_x86_lacks(
    traced: Traced, views: int, movements: int, tmp_path: Path
) -> None:
    """A bias after a product of three axes, transposes, and padding that convolutions cannot take in are nodes."""
    ops = describe_all(traced.graph.gm, X86, X86_LACKS).values()
    kinds = Counter(op.kind for op in ops if op.label != "getattr")
    assert kinds["movement"] == movements
    assert kinds["view"] >= views
    found = operators(traced, tmp_path)
    copies = sum(found[kind] for kind in ("ReorderInput", "ReorderOutput", "Reshape"))
    assert sum(found.values()) - copies == sum(op.kind not in ("fused", "view") for op in ops), found


def test_attention_has_its_transposes_in_its_price() -> None:
    gm = trace(Heads(attention=True).eval(), (TOKENS,)).graph.gm
    kinds = Counter(op.kind for op in describe_all(gm, X86, X86_LACKS).values())
    assert (kinds["attention"], kinds["movement"]) == (1, 0)
    assert all(op.kind == "view" for op in describe_all(gm).values() if op.function == "transpose")


@pytest.mark.parametrize(
    ("axes", "run"),
    [((0, 1, 2, 3), 5040), ((0, 2, 1, 3), 9), ((1, 0, 2, 3), 504), ((0, 1, 3, 2), 1), ((3, 0, 1, 2), 1)],
)
def test_what_stays_together_in_a_transpose(axes: tuple[int, ...], run: int) -> None:
    class Permuted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(axes) + 1

    gm = trace(Permuted().eval(), (torch.randn(2, 5, 56, 9),)).graph.gm
    (op,) = (op for op in describe_all(gm).values() if op.function == "transpose")
    assert op.row == run
    assert op.activation_bytes == (0 if run == 5040 else 8 * 5040)
