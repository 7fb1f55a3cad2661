"""From a module to a `torch.export` program, with the sizes left open that are to be."""

from __future__ import annotations

import inspect
import keyword
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.graph import _custom_builtins
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError, first_line

OpenAxes: TypeAlias = tuple[tuple[int, ...], ...]
"""For each flat input the axes of which the size is open."""


def export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: OpenAxes
) -> tuple[ExportedProgram, OpenAxes, str | None]:
    """(program, the axes that it leaves open, why these are fewer than wanted).

    What the module does not leave open of all that is wanted is tried with the batch (axis 0) alone, then with nothing.

    Raises:
        InputError: the module cannot be exported.
    """
    reason, batch = "", batch_size(pytree.tree_leaves((args, kwargs)))
    for axes in dict.fromkeys((wanted, tuple(tuple(a for a in axes if a == 0) for axes in wanted))):
        if not any(axes):
            continue
        try:
            program = _exported(module, _without_ones(args, kwargs, axes), axes)
        except InputError as error:
            reason = str(error)
            continue
        if batch and any(guard.endswith(" == 1") for guard in program._guards_code):  # one multiple of a number
            with suppress(InputError):
                program = _exported(module, _without_ones(args, kwargs, axes, batch), axes)
        kept = open_axes(program)
        if kept == axes:
            return program, kept, reason or None
        reason = "the model fixes its batch size"
        if any(max(axes, default=0) for axes in axes):
            reason = "the model fixes sizes that were open"
    return _exported(module, (args, kwargs), None), tuple(() for _ in wanted), reason or None


def check_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Inputs by the parameters of `forward`.

    Raises:
        InputError: `forward` does not take these.
    """
    signature = inspect.signature(module.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the model does not take these inputs: {error}; forward takes {signature}, got {len(args)} by position"
            + (f" and {', '.join(kwargs)} by name" if kwargs else "")
        ) from error


def check_names(kwargs: Mapping[str, Any]) -> None:
    """Refuses names of inputs that torch cannot write code with, as `**inputs` may have.

    Raises:
        InputError: one is no Python identifier, or is a word of Python.
    """
    for name in kwargs:
        if name in _custom_builtins:
            raise InputError(
                f"the model takes an input named {name!r}, which torch.fx uses in the code that it writes; give it by "
                "position, or another name"
            )
        if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
            raise InputError(
                f"the model takes an input named {name!r}, which torch.export cannot write as a name in Python; give "
                "it another name, or let forward take a dictionary in place of **"
            )


def batch_size(flat: Sequence[Any]) -> int | None:
    """The common first dimension of the inputs, or None where there is none."""
    sizes = {t.shape[0] for t in flat if isinstance(t, Tensor) and t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def batch_axes(flat: Sequence[Any]) -> OpenAxes:
    """The first axis of every input."""
    return tuple((0,) if isinstance(value, Tensor) and value.dim() else () for value in flat)


def open_axes(program: ExportedProgram) -> OpenAxes:
    """The axes that a program leaves open; a size that export fixed on the way stays a symbol, of a constant."""
    return tuple(
        tuple(i for i, size in enumerate(value.shape) if _is_open(size)) if isinstance(value, Tensor) else ()
        for value in input_values(program)
    )


def at_other_sizes(program: ExportedProgram, flat: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The inputs at other sizes of the axes that are open besides the batch, which the program may refuse."""
    shapes: list[Sequence[Any]] = [value.shape if isinstance(value, Tensor) else () for value in input_values(program)]
    batch = {size.node.expr for shape in shapes for size in shape[:1] if _is_open(size)}
    pairs = [
        (size.node.expr, actual)
        for shape, value in zip(shapes, flat, strict=True)
        for size, actual in zip(shape, getattr(value, "shape", ()), strict=True)
        if _is_open(size)
    ]
    known = {expression: actual for expression, actual in pairs if expression.is_Symbol}
    free = known.keys() - batch
    if not free or any(expression.free_symbols - known.keys() for expression, _ in pairs):
        return
    for change in (lambda n: n + 1, lambda n: 2 * n, lambda n: n - 1, lambda n: n // 2):
        there = {symbol: change(size) if symbol in free else size for symbol, size in known.items()}
        if min(there.values()) > 0:
            yield tuple(
                _resized(value, [int(s.node.expr.subs(there)) if _is_open(s) else int(s) for s in shape])
                for shape, value in zip(shapes, flat, strict=True)
            )


def input_values(program: ExportedProgram) -> list[Any]:
    """The flat inputs as export knows them: tensors with symbols for open sizes, and values that it fixed."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    return [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _is_open(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _resized(value: Any, sizes: Sequence[int]) -> Any:
    """The input with other sizes: cut off, or repeated from the start."""
    for axis, size in enumerate(sizes):
        value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
    return value


def _without_ones(args: tuple[Any, ...], kwargs: dict[str, Any], axes: OpenAxes, batch: int = 1) -> Any:
    """(args, kwargs) with two where an axis to leave open has one: export takes sizes 0 and 1 for constants.

    Twice the samples where there are `batch`.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    for i, open_here in enumerate(axes):
        for axis in open_here:
            if flat[i].shape[axis] == (1 if axis else batch):
                flat[i] = torch.cat([flat[i], flat[i]], axis)
    return pytree.tree_unflatten(flat, spec)


def _shapes(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """A structure as torch wants it of sizes: what is of a class of its own is a list of its parts."""
    if spec.is_leaf():
        return next(leaves)
    parts = [_shapes(child, leaves) for child in spec.children()]
    is_known = spec.type in pytree.BUILTIN_TYPES
    return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(parts, spec.context) if is_known else parts


def _exported(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], axes: OpenAxes | None
) -> ExportedProgram:
    args, kwargs = inputs
    shapes = None
    if axes is not None:
        flat, spec = pytree.tree_flatten(inputs)
        given = [
            dict.fromkeys(open_here, Dim.AUTO) if isinstance(value, Tensor) and value.dim() else None
            for value, open_here in zip(flat, axes, strict=True)
        ]
        arg_shapes, kwarg_shapes = _shapes(spec, iter(given))
        # by parameter name, with `*args` as one tuple
        shapes = check_call(module, arg_shapes, kwarg_shapes).arguments
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # export raises many types; each means that this model cannot be traced
            raise InputError(
                f"torch.export could not trace the model: {type(error).__name__}: {first_line(error)}; "
                "check the inputs (--input), or export it yourself with torch.export.save and give the archive"
            ) from error
