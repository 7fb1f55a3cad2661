r"""An image classifier with its trained weights, for the command line:

    lrcompile examples.efficientnet_lite:model --calib examples.efficientnet_lite:calibration --target jetson-orin \
        --out efficientnet_lr.onnx

Run it from the repository's root, after `make data`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools import models


def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """EfficientNet-Lite0 and a batch of eight images."""
    return models.efficientnet_lite0()


def calibration() -> Tensor:
    """64 random crops of ten images that the agreement below is not judged on."""
    return models.calibration_images(64)


def agreement(rewritten: nn.Module) -> float:
    """Share of the ten unseen images that the original and the rewritten model call the same."""
    original, _ = models.efficientnet_lite0()
    images = models.imagenet_images()[0][:10]
    with torch.no_grad():
        return float((original(images).argmax(1) == rewritten(images).argmax(1)).float().mean())
