"""Brings a model and its example inputs to the precision and batch size asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError
from lrcompile.frontend.export import open_axes
from lrcompile.frontend.inputs import Program, as_exported, cast_floats, parse_float_dtype, positional, with_batch
from lrcompile.frontend.lift import remove_guards
from lrcompile.frontend.trace import copied, in_eval_mode
from lrcompile.graph.describe import DTYPE_NAMES


def prepare(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dtype: str | torch.dtype | None,
    batch: int | None,
) -> tuple[Program, tuple[Any, ...], dict[str, Any], str]:
    """(program, args, kwargs, precision) with floating parameters and inputs in `dtype` and `batch` samples.

    The program's own precision is kept where `dtype` is None. In that an exported program gets inputs of the types that
    it was exported with, and another one those that are given, unless it does not run on them. Only what is of real
    numbers is cast. The given module is not changed.

    Raises:
        InputError: the precision is unknown or is not computed with, or the batch size cannot be changed.
    """
    args, kwargs = positional(args), dict(kwargs or {})
    own = _precision(program)
    if own not in DTYPE_NAMES:
        raise InputError(f"most weights of the model are {own}, which nothing here computes with; give it in float32")
    wanted = own if dtype is None else parse_float_dtype(dtype)
    if wanted != own:
        args, kwargs = cast_floats((args, kwargs), wanted)
    elif isinstance(program, ExportedProgram):
        args, kwargs = as_exported(program, (args, kwargs))
    elif not _takes(program, args, kwargs, own):
        args, kwargs = cast_floats((args, kwargs), own)
    if wanted != own:
        module = _unguarded(program) if isinstance(program, ExportedProgram) else program
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own deprecated ways
            program = copy.deepcopy(module, _computed(module))
            program._apply(lambda t: t.to(wanted) if t.is_floating_point() else t)  # `to` would cast complex ones too
    if batch is not None:
        args, kwargs = with_batch((args, kwargs), batch)
    return program, args, kwargs, DTYPE_NAMES[wanted]


def _takes(program: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: torch.dtype) -> bool:
    """Whether a program of a precision runs on the inputs as they are; it is run if any are of another one."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()} <= {own}:
        return True
    args, kwargs = pytree.tree_unflatten([copied(leaf) for leaf in leaves], spec)
    with in_eval_mode(program), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own, which come again when it is traced
        try:
            program(*args, **kwargs)
        except Exception:  # whatever an operation raises for types that it does not take
            return False
    return True


def _unguarded(program: ExportedProgram) -> fx.GraphModule:
    """A module of a program that may take other types: without what export asserts of them.

    Its `meta` has the axes that the program leaves open.
    """
    module: Any = program.module(check_guards=False)
    remove_guards(module)
    result = fx.GraphModule(module, module.graph)  # export's own refuses eval()
    result.meta["open_axes"] = open_axes(program)
    return result


def _computed(module: nn.Module) -> dict[int, Tensor]:
    """What `deepcopy` takes for weights that hooks compute anew in each call, which torch refuses to copy."""
    held = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in held if not value.is_leaf}


def _precision(program: Program) -> torch.dtype:
    """The precision of most of the program's parameters; float32 where it has none."""
    tensors = program.state_dict.values() if isinstance(program, ExportedProgram) else program.state_dict().values()
    count: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():  # a module's extra state may be anything
            count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
    return max(count, key=lambda d: count[d], default=torch.float32)
