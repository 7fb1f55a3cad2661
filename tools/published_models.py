"""Architectures that published whole-model latencies are of, with random weights, at the sizes they were measured at.

What an existing library has comes from there; the others are written down as in their papers, because no library that
has them installs beside the torch that lrcompile is tested with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Act = Callable[[], nn.Module]
Relu: Act = partial(nn.ReLU, inplace=False)


def conv(into: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: Act | None = Relu) -> nn.Module:
    """Convolution, batch norm, activation."""
    layer = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out), *([act()] if act else []))


class Residual(nn.Module):
    """x + f(x), with a way for x to change its shape, and an activation after it."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.shortcut, self.act = inner, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x) + self.shortcut(x))


class Branches(nn.Module):
    """The outputs of several modules, side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, hidden: int, gate: Act = nn.Sigmoid) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def classifier(width: int, classes: int = 1000) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


# --------------------------------------------------------------------------------------------------------- ResNets


class Scales(nn.Module):
    """The 3×3 convolution of a Res2Net block: slices of the channels, each added to the next."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.convs = nn.ModuleList(conv(width, width, 3, stride) for _ in range(3))
        self.pool = nn.AvgPool2d(3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts, made = x.chunk(4, 1), list[Tensor]()
        for layer, part in zip(self.convs, parts, strict=False):
            made.append(layer(part if self.stride > 1 or not made else part + made[-1]))
        return torch.cat([*made, self.pool(parts[3]) if self.stride > 1 else parts[3]], 1)


def resnet(
    depths: Sequence[int],
    *,
    bottleneck: bool = True,
    base: int = 64,
    groups: int = 1,
    squeeze: bool = False,
    variant: str = "",
    classes: int = 1000,
) -> nn.Module:
    """ResNets, wide ones (`base`), ResNeXts (`groups`), SE-ResNets, ResNet-D ("vd") and Res2Net ("scales")."""
    deep = variant in ("vd", "scales")
    stem = [conv(3, 32, 3, 2), conv(32, 32, 3), conv(32, 64, 3)] if deep else [conv(3, 64, 7, 2)]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    into = 64
    for i, depth in enumerate(depths):
        inner = base * groups << i if groups > 1 else base << i
        out = (64 << i) * 4 if bottleneck else 64 << i
        for j in range(depth):
            stride = 2 if i and not j else 1
            middle = Scales(inner, stride) if variant == "scales" else conv(inner, inner, 3, stride, groups)
            wide = inner * 4 if variant == "scales" else inner
            parts = (
                [conv(into, wide), middle, conv(wide, out, act=None)]
                if bottleneck
                else [conv(into, out, 3, stride), conv(out, out, 3, act=None)]
            )
            if squeeze:
                parts.append(SqueezeExcite(out, out // 16))
            shortcut: nn.Module | None = None
            if into != out or stride > 1:
                pooled = deep and stride > 1
                shortcut = conv(into, out, 1, 1 if pooled else stride, act=None)
                shortcut = nn.Sequential(nn.AvgPool2d(2), shortcut) if pooled else shortcut
            layers.append(Residual(nn.Sequential(*parts), shortcut, nn.ReLU()))
            into = out
    return nn.Sequential(*layers, classifier(into, classes))


def r2plus1d() -> nn.Module:
    """R(2+1)D-18."""

    def split(into: int, out: int, stride: int = 1) -> nn.Module:
        middle = into * out * 27 // (into * 9 + 3 * out)
        space = nn.Conv3d(into, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        time = nn.Conv3d(middle, out, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        return nn.Sequential(space, nn.BatchNorm3d(middle), nn.ReLU(), time, nn.BatchNorm3d(out))

    stem = nn.Conv3d(3, 45, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm3d(45), nn.ReLU()]
    layers += [nn.Conv3d(45, 64, (3, 1, 1), 1, (1, 0, 0), bias=False), nn.BatchNorm3d(64), nn.ReLU()]
    into = 64
    for i in range(4):
        for j in range(2):
            out, stride = 64 << i, 2 if i and not j else 1
            inner = nn.Sequential(split(into, out, stride), nn.ReLU(), split(out, out))
            way = (
                nn.Sequential(nn.Conv3d(into, out, 1, stride, bias=False), nn.BatchNorm3d(out)) if into != out else None
            )
            layers.append(Residual(inner, way, nn.ReLU()))
            into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(into, 400))


# ---------------------------------------------------------------------------------------------------- small networks


def inverted(into: int, out: int, kernel: int, stride: int, hidden: int, squeeze: bool, act: Act) -> nn.Module:
    """Widen, depthwise, narrow."""
    parts = [conv(into, hidden, act=act)] if hidden != into else []
    parts.append(conv(hidden, hidden, kernel, stride, hidden, act))
    if squeeze:
        parts.append(SqueezeExcite(hidden, hidden // 4, nn.Hardsigmoid))
    inner = nn.Sequential(*parts, conv(hidden, out, act=None))
    return Residual(inner) if stride == 1 and into == out else inner


def mobilenet_v1() -> nn.Module:
    widths = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    widths += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
    pairs = [nn.Sequential(conv(a, a, 3, stride, a), conv(a, b)) for a, b, stride in widths]
    return nn.Sequential(conv(3, 32, 3, 2), *pairs, classifier(1024))


def of_stages(first: int, stages: Sequence[tuple[int, int, int, int, int]], last: int) -> nn.Module:
    """MobileNetV2 and MNASNet: stages of (widening, channels, depth, stride, kernel)."""
    layers, into = [conv(3, first, 3, 2)], first
    for widening, out, depth, stride, kernel in stages:
        for j in range(depth):
            layers.append(inverted(into, out, kernel, stride if j == 0 else 1, into * widening, False, Relu))
            into = out
    return nn.Sequential(*layers, conv(into, last), classifier(last))


V2 = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3)]
MNAS = [(1, 16, 1, 1, 3), (3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5)]


def mobilenet_v3() -> nn.Module:
    """The large one: (kernel, hidden, channels, squeeze, hard swish, stride)."""
    rows = [
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
        (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2),
        (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
    ]  # fmt: skip
    layers, into = [conv(3, 16, 3, 2, act=nn.Hardswish)], 16
    for kernel, hidden, out, squeeze, hard, stride in rows:
        layers.append(inverted(into, out, kernel, stride, hidden, bool(squeeze), nn.Hardswish if hard else Relu))
        into = out
    head = (nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000))
    return nn.Sequential(*layers, conv(160, 960, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1."""

    def fire(into: int, narrow: int, wide: int) -> nn.Module:
        sides = [nn.Sequential(nn.Conv2d(narrow, wide, k, padding=k // 2), nn.ReLU()) for k in (1, 3)]
        return nn.Sequential(nn.Conv2d(into, narrow, 1), nn.ReLU(), Branches(*sides))

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    layers = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), fire(64, 16, 64), fire(128, 16, 64), pool()]
    layers += [fire(128, 32, 128), fire(256, 32, 128), pool(), fire(256, 48, 192), fire(384, 48, 192)]
    layers += [fire(384, 64, 256), fire(512, 64, 256), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten())


class Shuffle(nn.Module):
    """A unit of ShuffleNetV2."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        half = out // 2
        self.stride, mine = stride, into if stride > 1 else half
        self.right = nn.Sequential(conv(mine, half), conv(half, half, 3, stride, half, None), conv(half, half))
        self.left = nn.Sequential(conv(into, into, 3, 2, into, None), conv(into, half)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride > 1 else x.chunk(2, 1)
        y = torch.cat((self.left(left), self.right(right)), 1)
        return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def shufflenet_v2() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    into = 24
    for out, depth in ((116, 4), (232, 8), (464, 4)):
        layers += [Shuffle(into if j == 0 else out, out, 2 if j == 0 else 1) for j in range(depth)]
        into = out
    return nn.Sequential(*layers, conv(464, 1024), classifier(1024))


# ---------------------------------------------------------------------------------------------------------- others


def vgg(depths: Sequence[int]) -> nn.Module:
    layers, into = list[nn.Module](), 3
    for depth, out in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU()]
            into = out
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def googlenet() -> nn.Module:
    def inception(into: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int) -> nn.Module:
        pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(into, d))
        sides = [nn.Sequential(conv(into, narrow), conv(narrow, wide, 3)) for narrow, wide in (b, c)]
        return Branches(conv(into, a), *sides, pool)

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    return nn.Sequential(
        conv(3, 64, 7, 2), pool(), conv(64, 64), conv(64, 192, 3), pool(),
        inception(192, 64, (96, 128), (16, 32), 32), inception(256, 128, (128, 192), (32, 96), 64), pool(),
        inception(480, 192, (96, 208), (16, 48), 64), inception(512, 160, (112, 224), (24, 64), 64),
        inception(512, 128, (128, 256), (24, 64), 64), inception(512, 112, (144, 288), (32, 64), 64),
        inception(528, 256, (160, 320), (32, 128), 128), pool(),
        inception(832, 256, (160, 320), (32, 128), 128), inception(832, 384, (192, 384), (48, 128), 128),
        classifier(1024),
    )  # fmt: skip


def xception() -> nn.Module:
    def separable(into: int, out: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(into, into, 3, 1, 1, groups=into, bias=False)
        return [nn.ReLU(), depthwise, nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out)]

    layers = [conv(3, 32, 3, 2), conv(32, 64, 3)]
    for into, out in ((64, 128), (128, 256), (256, 728)):
        inner = nn.Sequential(*separable(into, out), *separable(out, out), nn.MaxPool2d(3, 2, 1))
        layers.append(Residual(inner, conv(into, out, 1, 2, act=None)))
    layers += [Residual(nn.Sequential(*(part for _ in range(3) for part in separable(728, 728)))) for _ in range(8)]
    inner = nn.Sequential(*separable(728, 728), *separable(728, 1024), nn.MaxPool2d(3, 2, 1))
    layers += [Residual(inner, conv(728, 1024, 1, 2, act=None)), *separable(1024, 1536), *separable(1536, 2048)]
    return nn.Sequential(*layers, nn.ReLU(), classifier(2048))


def convmixer() -> nn.Module:
    width, layers = 1536, [nn.Conv2d(3, 1536, 7, 7), nn.GELU(), nn.BatchNorm2d(1536)]
    for _ in range(20):
        mix = nn.Sequential(nn.Conv2d(width, width, 9, 1, 4, groups=width), nn.GELU(), nn.BatchNorm2d(width))
        layers += [Residual(mix), nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, classifier(width))


def repvgg() -> nn.Module:
    """RepVGG-A0 as it is deployed: plain 3×3 convolutions."""
    layers, into = list[nn.Module](), 3
    for out, depth in ((48, 1), (48, 2), (96, 4), (192, 14), (1280, 1)):
        for j in range(depth):
            layers += [nn.Conv2d(into, out, 3, 2 if j == 0 else 1, 1), nn.ReLU()]
            into = out
    return nn.Sequential(*layers, classifier(1280))


def dcgan() -> nn.Module:
    layers, into = list[nn.Module](), 100
    for i, out in enumerate((512, 256, 128, 64)):
        layers += [
            nn.ConvTranspose2d(into, out, 4, 2 if i else 1, 1 if i else 0, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        into = out
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())


def of_transformers(name: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**options))


def vit_small() -> nn.Module:
    return of_transformers(
        "ViTForImageClassification", "ViTConfig", hidden_size=384, num_attention_heads=6, intermediate_size=1536,
        num_labels=1000, attn_implementation="sdpa",
    )  # fmt: skip


def bert(width: int = 768, layers: int = 12) -> nn.Module:
    return of_transformers(
        "BertForSequenceClassification", "BertConfig", hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width, attn_implementation="sdpa",
    )  # fmt: skip


def efficientnet(width: float, depth: float, size: int, last: int) -> nn.Module:
    return of_transformers(
        "EfficientNetForImageClassification", "EfficientNetConfig", width_coefficient=width, depth_coefficient=depth,
        image_size=size, hidden_dim=last, num_labels=1000,
    )  # fmt: skip


def of_monai(name: str, **options: Any) -> nn.Module:
    import monai.networks.nets

    return getattr(monai.networks.nets, name)(**options)


def image(size: int = 224, channels: int = 3) -> Tensor:
    return torch.zeros(1, channels, size, size)


def tokens(length: int) -> Tensor:
    return torch.ones(1, length, dtype=torch.int64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Resnet18_for_PyTorch": (partial(resnet, (2, 2, 2, 2), bottleneck=False), image()),
    "ResNet34": (partial(resnet, (3, 4, 6, 3), bottleneck=False), image()),
    "Resnet50_Pytorch_Infer": (partial(resnet, (3, 4, 6, 3)), image()),
    "ResNet152": (partial(resnet, (3, 8, 36, 3)), image()),
    "Wide_ResNet50_2_for_Pytorch": (partial(resnet, (3, 4, 6, 3), base=128), image()),
    "Wide_ResNet101_2": (partial(resnet, (3, 4, 23, 3), base=128), image()),
    "ResNext101_32x8d": (partial(resnet, (3, 4, 23, 3), base=8, groups=32), image()),
    "SE_ResNet50_Pytorch_Infer": (partial(resnet, (3, 4, 6, 3), squeeze=True), image()),
    "Resnetvd": (partial(resnet, (3, 4, 6, 3), variant="vd"), image()),
    "Res2Net_v1b_101_for_PyTorch": (partial(resnet, (3, 4, 23, 3), base=26, variant="scales"), image()),
    "SimCLR_inference": (partial(resnet, (2, 2, 2, 2), bottleneck=False, classes=128), image(32)),
    "R(2+1)D": (r2plus1d, torch.zeros(1, 3, 16, 112, 112)),
    "VGG16": (partial(vgg, (2, 2, 3, 3, 3)), image()),
    "VGG19": (partial(vgg, (2, 2, 4, 4, 4)), image()),
    "MobileNet-v1": (mobilenet_v1, image()),
    "MobileNetV2_for_Pytorch": (partial(of_stages, 32, [*V2, (6, 320, 1, 1, 3)], 1280), image()),
    "MobileNetV3_for_Pytorch": (mobilenet_v3, image()),
    "Mnasnet1_0": (partial(of_stages, 32, [*MNAS, (6, 320, 1, 1, 3)], 1280), image()),
    "EfficientNet_for_Pytorch": (partial(efficientnet, 1.0, 1.0, 224, 1280), image()),
    "EfficientNet-B3": (partial(efficientnet, 1.2, 1.4, 300, 1536), image(300)),
    "Squeezenet1_1": (squeezenet, image()),
    "shufflenetv2": (shufflenet_v2, image()),
    "Densenet121_Pytorch_Infer": (
        partial(of_monai, "DenseNet121", spatial_dims=2, in_channels=3, out_channels=1000), image()),
    "GoogleNet_for_Pytorch": (googlenet, image()),
    "xception": (xception, image(299)),
    "convmixer_1536_20": (convmixer, image()),
    "RepVGG": (repvgg, image()),
    "DCGAN": (dcgan, image(1, 100)),
    "vit-small": (vit_small, image()),
    "Beit": (partial(of_transformers, "BeitForImageClassification", "BeitConfig", num_labels=1000), image()),
    "Bert_Base_Cased_SST2": (bert, tokens(128)),
    "bert_large_NER": (partial(bert, 1024, 24), tokens(512)),
    "resnet50v1.5": (partial(resnet, (3, 4, 6, 3)), image()),
    "resnext101-32x4d": (partial(resnet, (3, 4, 23, 3), base=4, groups=32), image()),
    "se-resnext101-32x4d": (partial(resnet, (3, 4, 23, 3), base=4, groups=32, squeeze=True), image()),
}  # fmt: skip

RESNET50_IMAGES_S = {
    ("v100", "fp32"): {1: 96, 2: 196, 4: 386, 8: 709, 16: 1023, 32: 1127, 64: 1200, 128: 1229, 256: 1261},
    ("v100", "fp16"): {1: 78, 2: 154, 4: 300, 8: 595, 16: 1178, 32: 2146, 64: 2984, 128: 3249, 256: 3382},
    ("t4", "fp32"): {1: 98, 2: 186, 4: 325, 8: 363, 16: 409, 32: 420, 64: 428, 128: 426, 256: 415},
    ("t4", "fp16"): {1: 79, 2: 156, 4: 317, 8: 652, 16: 1050, 32: 1128, 64: 1165, 128: 1190, 256: 1198},
}
"""Images a second of ResNet-50 v1.5 in eager PyTorch 21.03, by batch: NVIDIA/DeepLearningExamples at 291f0d0,
PyTorch/Classification/ConvNets/resnet50v1.5/README.md."""
