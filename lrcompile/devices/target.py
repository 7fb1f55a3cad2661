"""What `--target` names: a device with the cost model that prices it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost, CostModel, total
from lrcompile.devices.device import Device
from lrcompile.devices.layouts import operations_on
from lrcompile.devices.measure import LocalCostModel, local_device
from lrcompile.devices.onnx_graph import OPSET
from lrcompile.devices.profile import load_device

DEFAULT_TARGET = "v100"


@dataclass(frozen=True)
class Target:
    """A device and its cost model; `is_local` means that whole models can be measured here too."""

    name: str
    device: Device
    model: CostModel
    is_local: bool = False

    @property
    def max_rank(self) -> int | None:
        """The highest rank of tensors that the device holds, or None where there is no limit."""
        return 4 if "rank5" in self.device.lacks else None

    def for_model(self, dynamic_batch: bool, opset: int | None) -> Target:
        """The target for a model with an open or fixed batch and an ONNX opset: the runtime fuses differently."""
        if not isinstance(self.model, LocalCostModel):
            return self
        return replace(self, model=replace(self.model, dynamic_batch=dynamic_batch, opset=opset or OPSET))

    def costs(self, gm: fx.GraphModule) -> dict[str, Cost]:
        """What each operation of a graph takes, by the names of nodes."""
        return {name: self.model.cost(op) for name, op in operations_on(self.device, gm).items()}

    def whole(self, costs: Mapping[str, Cost]) -> Cost:
        """What a model takes: its operations, and the start of a run where that was measured."""
        return total([Cost(self.device.network.get("run_s", 0.0)), *costs.values()])

    @property
    def recalls(self) -> bool:
        """Whether any price was measured in another process, maybe long ago."""
        return isinstance(self.model, LocalCostModel) and self.model.counters.recalled > 0

    def of_now(self) -> Target:
        """The target with prices that are measured now, or were in the last minutes."""
        return replace(self, model=self.model.of_now()) if isinstance(self.model, LocalCostModel) else self

    def saving_sigma_s(self, before: fx.GraphModule, after: fx.GraphModule) -> float:
        """Standard deviation in s of what is predicted to be saved."""
        return math.hypot(*(cost.sigma_s for cost in self.model.compare(before, after)))

    def remarks(self) -> list[str]:
        """What of a measured price list was predicted after all, and why."""
        if not isinstance(self.model, LocalCostModel):
            return []
        remarks = [f"predicted instead of measured, {n} times: {why}" for why, n in self.model.fallbacks.items()]
        if self.model.counters.skipped:
            remarks.append(f"{self.model.counters.skipped} clear losers were predicted and not measured")
        return remarks


def resolve_target(name: str) -> Target:
    """The target of a name: "local", a shipped profile, or the path of a profile.

    Raises:
        DeviceError: there is no such profile, or it is faulty.
    """
    if name == "local":
        return Target("local", local_device(), LocalCostModel(), is_local=True)
    device = load_device(name)
    return Target(name, device, AnalyticCostModel(device))
