"""lrcompile: rewrites trained PyTorch models where a rewrite makes them faster on a given device.

Public names are imported when they are first used, so that the command line starts without importing torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrcompile.compile import Result, compile, prepare_model, replay, solve
    from lrcompile.devices.cost import Cost, CostModel
    from lrcompile.devices.device import Device
    from lrcompile.devices.profile import available_devices, load_device
    from lrcompile.devices.target import Target, resolve_target
    from lrcompile.errors import LrcompileError
    from lrcompile.front import tradeoff
    from lrcompile.frontend.calibration_data import CalibrationData, calibration_from, load_calibration
    from lrcompile.graph.graph import Graph, Site
    from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
    from lrcompile.passes import Context, Pass, Stage
    from lrcompile.planning.budget import Budget
    from lrcompile.planning.plan import Plan
    from lrcompile.planning.strategies.beam import Beam
    from lrcompile.plugins import discover, select
    from lrcompile.prepared import Prepared
    from lrcompile.progressive import Member, progressive
    from lrcompile.quantization.quantize import Quantization
    from lrcompile.recover import recover
    from lrcompile.recovery.settings import Recovery
    from lrcompile.recovery.stable_rank import StableRank
    from lrcompile.report.report import Report

_HOMES = {
    "compile": "Result compile prepare_model replay solve",
    "devices.cost": "Cost CostModel",
    "devices.device": "Device",
    "devices.profile": "available_devices load_device",
    "devices.target": "Target resolve_target",
    "errors": "LrcompileError",
    "frontend.calibration_data": "CalibrationData calibration_from load_calibration",
    "front": "tradeoff",
    "graph.graph": "Graph Site",
    "graph.rewrite": "Refusal Rewrite Rewriter",
    "passes": "Context Pass Stage",
    "planning.budget": "Budget",
    "planning.plan": "Plan",
    "planning.strategies.beam": "Beam",
    "plugins": "discover select",
    "prepared": "Prepared",
    "progressive": "Member progressive",
    "quantization.quantize": "Quantization",
    "recover": "recover",
    "recovery.settings": "Recovery",
    "recovery.stable_rank": "StableRank",
    "report.report": "Report",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Beam",
    "Budget",
    "CalibrationData",
    "Context",
    "Cost",
    "CostModel",
    "Device",
    "Graph",
    "LrcompileError",
    "Member",
    "Pass",
    "Plan",
    "Prepared",
    "Quantization",
    "Recovery",
    "Refusal",
    "Report",
    "Result",
    "Rewrite",
    "Rewriter",
    "Site",
    "StableRank",
    "Stage",
    "Target",
    "available_devices",
    "calibration_from",
    "compile",
    "discover",
    "load_calibration",
    "load_device",
    "prepare_model",
    "progressive",
    "recover",
    "replay",
    "resolve_target",
    "select",
    "solve",
    "tradeoff",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lrcompile' has no attribute {name!r}")
    return getattr(import_module(f"lrcompile.{_HOME_OF[name]}"), name)


class _Package(ModuleType):
    """Keeps `compile` and others the functions: importing a module of that name would put the module there."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("compile", "progressive", "recover") and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
