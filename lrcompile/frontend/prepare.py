"""Brings a model and its example inputs to the precision and batch size asked for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from lrcompile.frontend.inputs import cast_floats, parse_float_dtype, with_batch
from lrcompile.graph.describe import DTYPE_NAMES

Program = nn.Module | ExportedProgram | torch.jit.ScriptModule


def prepare(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: str | None, batch: int | None
) -> tuple[Program, tuple[Any, ...], dict[str, Any], str]:
    """(program, args, kwargs, precision) with floating parameters and inputs in `dtype` and `batch` samples.

    The program's own precision is kept where `dtype` is None. The given module is not changed.

    Raises:
        InputError: the precision is unknown, or the batch size cannot be changed.
    """
    own = _precision(program)
    wanted = own if dtype is None else parse_float_dtype(dtype)
    if wanted != own:
        module = program.module() if isinstance(program, ExportedProgram) else copy.deepcopy(program)
        program = module.to(wanted)
    args, kwargs = cast_floats((args, kwargs), wanted)
    if batch is not None:
        args, kwargs = with_batch((args, kwargs), batch)
    return program, args, kwargs, DTYPE_NAMES[wanted]


def _precision(program: Program) -> torch.dtype:
    """The precision of most of the program's parameters; float32 where it has none."""
    tensors = program.state_dict.values() if isinstance(program, ExportedProgram) else program.state_dict().values()
    count: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
    return max(count, key=lambda d: count[d], default=torch.float32)
