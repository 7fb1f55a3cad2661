"""A small network that lost much to low ranks, and what recoveries of it learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, CalibrationData, Result, calibration_from

WIDTH = 96


class Net(nn.Module):
    """Three layers of which the first two can be split, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def data(samples: int = 960, seed: int = 1) -> CalibrationData:
    x = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(seed))
    return calibration_from({"x": x}, ["x"], 8)


def written() -> list[str]:
    """Words of a command that splits the network, with what they name written into the working directory."""
    dynamic = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(net(), (torch.randn(8, WIDTH),), dynamic_shapes=dynamic), "net.pt2")
    np.savez("calib.npz", x=torch.cat([batch["x"] for batch in data().batches]).numpy())
    return ["net.pt2", "--target", "rpi5", "--size", "0.6", "--calib", "calib.npz"]


def labels() -> Tensor:
    """What the original says of `data`."""
    with torch.no_grad():
        return torch.cat([net()(batch["x"]).argmax(-1) for batch in data().batches])


def split_net() -> Result:
    """The network, split without calibration data, so that much is lost."""
    result = lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=0.6))
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)
    return result


def weights(result: Result) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in result.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def recovered(compiled: Result, tmp_path: Path, **settings: Any) -> Result:
    settings = {"steps": 60, "rate": 1e-3, "refit": False} | settings
    return lrcompile.recover(compiled, data(), checkpoints=tmp_path, **settings)
