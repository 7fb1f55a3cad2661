"""lrcompile: rewrites trained PyTorch models where a rewrite makes them faster on a given device."""

from lrcompile.compile import Prepared, Result, compile, prepare_model, replay, solve
from lrcompile.devices.cost import Cost, CostModel
from lrcompile.devices.device import Device, available_devices, load_device
from lrcompile.devices.target import Target, resolve_target
from lrcompile.errors import LrcompileError
from lrcompile.frontend.calibration_data import CalibrationData, calibration_from, load_calibration
from lrcompile.graph.graph import Graph, Site
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile.planning.budget import Budget
from lrcompile.planning.plan import Plan
from lrcompile.plugins import discover, select
from lrcompile.report.report import Report

__all__ = [
    "Budget",
    "CalibrationData",
    "Context",
    "Cost",
    "CostModel",
    "Device",
    "Graph",
    "LrcompileError",
    "Pass",
    "Plan",
    "Prepared",
    "Refusal",
    "Report",
    "Result",
    "Rewrite",
    "Rewriter",
    "Site",
    "Stage",
    "Target",
    "available_devices",
    "calibration_from",
    "compile",
    "discover",
    "load_calibration",
    "load_device",
    "prepare_model",
    "replay",
    "resolve_target",
    "select",
    "solve",
]
