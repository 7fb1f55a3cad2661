"""From a rewritten graph to a torch.export archive, with bytes that do not tell one run from another."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lrcompile.emit.onnx import quiet
from lrcompile.frontend.trace import export

ARCHIVE = "model.pt2"
"""The archive's bytes hold the stem of the file name that torch writes it under, so that is always this one."""


def to_pt2(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_batch: bool
) -> tuple[ExportedProgram, bool]:
    """The lifted graph as a torch.export program that holds the example inputs, and whether its batch is dynamic.

    Raises:
        InputError: torch cannot export the graph.
    """
    program, dynamic = export(gm, args, dict(kwargs), dynamic_batch)
    program.example_inputs = (args, dict(kwargs))
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:  # where on this machine, and in which process, a node came from
                node.meta.pop("stack_trace", None)
                node.meta.pop("from_node", None)
    return program, dynamic


def save_pt2(program: ExportedProgram, folder: Path) -> Path:
    """Writes `model.pt2` into a folder; equal programs give equal bytes.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    path = folder / ARCHIVE
    with quiet(), path.open("wb") as file:
        torch.export.save(program, file)
    return path


def load_pt2(path: Path) -> torch.nn.Module:
    """The module that an archive written by `save_pt2` holds."""
    with quiet():
        return torch.export.load(path).module()
