"""From a rewritten graph to a torch.export archive, with bytes that do not tell one run from another."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from lrcompile.emit.onnx import quiet
from lrcompile.emit.structure import set_plain_outputs
from lrcompile.errors import InputError, first_line
from lrcompile.frontend.export import OpenAxes, export
from lrcompile.graph.graph import Graph


def to_pt2(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], open_axes: OpenAxes
) -> tuple[ExportedProgram, OpenAxes]:
    """The lifted graph as a torch.export program that holds the example inputs, and which axes of them are open.

    Its outputs are plain dictionaries, tuples and lists: a library's own output class would need that library.

    Raises:
        InputError: torch cannot export the graph.
    """
    plain = Graph(gm, FakeTensorMode()).copy().gm
    set_plain_outputs(plain.graph)
    plain.recompile()
    program, kept, _ = export(plain, args, dict(kwargs), open_axes)
    program.example_inputs = (args, dict(kwargs))
    # how often a number goes into the batch is once as good as several times, which export assumes
    program._guards_code = [guard for guard in program._guards_code if not guard.endswith(" != 1")]
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:  # where on this machine, and in which process, a node came from
                node.meta.pop("stack_trace", None)
                node.meta.pop("from_node", None)
    return program, kept


def save_pt2(program: ExportedProgram, path: Path) -> None:
    """Writes a program; equal programs give equal bytes, whatever the file's name.

    Raises:
        InputError: torch cannot put its inputs or outputs into words.
        OSError: the disk is full or the place cannot be written.
    """
    with _Archive(path, "wb") as file, quiet():
        try:
            torch.export.save(program, file)  # given a path instead, torch writes its stem into the archive
        except Exception as error:  # the writer raises what it happens to meet: an input of a class of its own, say
            raise _unwritten(error) from error
    if file.error is not None:
        raise file.error


def _unwritten(error: Exception) -> InputError:
    return InputError(
        f"torch.export cannot keep the model in an archive: {type(error).__name__}: {first_line(error)}; give inputs "
        "and outputs in plain tuples, lists and dictionaries, or write ONNX or a folder instead"
    )


class _Archive(io.FileIO):
    """A file that takes everything and keeps its first error: torch's writer ends the process when a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                self.error = error
        return len(data)


def load_pt2(path: Path) -> torch.nn.Module:
    """The module that an archive written by `save_pt2` holds.

    Raises:
        InputError: torch cannot read what it wrote.
    """
    with quiet():
        try:
            return torch.export.load(path).module()
        except Exception as error:  # the reader too
            raise _unwritten(error) from error
