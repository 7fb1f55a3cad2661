"""What `--target` names: a device with the cost model that prices it."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import CostModel
from lrcompile.devices.device import Device, load_device


@dataclass(frozen=True)
class Target:
    """A device and its cost model; `is_local` means that whole models can be measured here too."""

    name: str
    device: Device
    model: CostModel
    is_local: bool = False


def resolve_target(name: str) -> Target:
    """The target of a name: "local", a shipped profile, or the path of a profile.

    Raises:
        DeviceError: there is no such profile, or it is faulty.
    """
    if name == "local":
        from lrcompile.devices.measure import LocalCostModel, local_device

        return Target("local", local_device(), LocalCostModel(), is_local=True)
    device = load_device(name)
    return Target(name, device, AnalyticCostModel(device))
