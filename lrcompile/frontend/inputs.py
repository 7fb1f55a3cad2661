"""Example inputs: parsed from `--input`, bound to what the model takes, brought to a batch size and a dtype."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError
from lrcompile.frontend.export import check_call

T = TypeVar("T")
Program = nn.Module | ExportedProgram | torch.jit.ScriptModule

_EXAMPLE = "expected a form like x=float32[1,3,224,224], or n=int64[] for a scalar"
_INPUT = re.compile(r"([^\W\d]\w*)\s*=\s*(\w+)\s*\[([^\[\]]*)\]")
_FLOATS = {
    **{"float16": torch.float16, "fp16": torch.float16, "half": torch.float16, "f16": torch.float16},
    **{"bfloat16": torch.bfloat16, "bf16": torch.bfloat16},
    **{"float32": torch.float32, "fp32": torch.float32, "float": torch.float32, "f32": torch.float32},
    **{"float64": torch.float64, "fp64": torch.float64, "double": torch.float64, "f64": torch.float64},
}
_DTYPES = _FLOATS | {
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{"int": torch.int64, "long": torch.int64, "uint8": torch.uint8, "bool": torch.bool},
}
_MAX_BYTES = 1 << 34


@dataclass(frozen=True)
class InputSpec:
    """One example input: its name, dtype and shape (empty for a scalar)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def parse_input(text: str) -> InputSpec:
    """Reads `name=dtype[sizes]`, for example `x=float32[1,3,224,224]`, `ids=int64[8,128]` or `n=int64[]`.

    Raises:
        InputError: the text has another form, the dtype is unknown, a size is not positive, or it exceeds 16 GiB.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--input {text!r} cannot be read; {_EXAMPLE}")
    name, dtype_name, sizes = match.groups()
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise InputError(f"--input {text!r} has the unknown dtype {dtype_name!r}; {_dtype_hint(dtype_name, _DTYPES)}")
    listed = [size.strip() for size in sizes.split(",")] if sizes.strip() else []
    if not all(re.fullmatch(r"[0-9]{1,18}", size) and int(size) > 0 for size in listed):
        raise InputError(f"--input {text!r} has sizes that are not positive whole numbers; {_EXAMPLE}")
    shape = tuple(int(size) for size in listed)
    if math.prod(shape) * dtype.itemsize > _MAX_BYTES:
        raise InputError(f"--input {text!r} takes more than {_MAX_BYTES >> 30} GiB; give smaller sizes")
    return InputSpec(name, dtype, shape)


def parse_inputs(texts: Sequence[str]) -> tuple[InputSpec, ...]:
    """Reads several `--input` options.

    Raises:
        InputError: one of them cannot be read, or a name is given twice.
    """
    specs = tuple(parse_input(text) for text in texts)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--input {name} is given {names.count(name)} times; name each input once, {_EXAMPLE}")
    return specs


def parse_float_dtype(given: str | torch.dtype) -> torch.dtype:
    """The dtype of `--dtype fp32|fp16|bf16` (or its long name), or one of torch's own.

    Raises:
        InputError: there is no such floating-point dtype.
    """
    text = str(given).removeprefix("torch.")
    if text not in _FLOATS:
        raise InputError(f"there is no floating-point dtype {text!r}; {_dtype_hint(text, _FLOATS)}")
    return _FLOATS[text]


def _dtype_hint(text: str, known: Mapping[str, torch.dtype]) -> str:
    near = get_close_matches(text, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def example_inputs(specs: Sequence[InputSpec], seed: int, *, int_high: int = 100) -> dict[str, Tensor]:
    """Random CPU tensors by name, the same for the same seed.

    Floats are standard normal. Integers are uniform in [0, `int_high`), below 2 where the name contains "type", so
    that embedding look-ups stay in range. Booleans, and what is named "mask", are ones: a random mask can blank a whole
    row, and attention over nothing is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for spec in specs:
        name = spec.name.lower()
        if spec.dtype == torch.bool or "mask" in name:
            made[spec.name] = torch.ones(spec.shape, dtype=spec.dtype)
        elif spec.dtype.is_floating_point:
            made[spec.name] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
        else:
            high = 2 if "type" in name else min(int_high, torch.iinfo(spec.dtype).max)
            made[spec.name] = torch.randint(high, spec.shape, generator=generator, dtype=spec.dtype)
    return made


def input_names(program: Program) -> tuple[str, ...]:
    """The names of the inputs that a program takes, in order: required ones first, then those with defaults.

    For an exported program they are the names of its flat tensors, for a module the parameters of `forward`.
    """
    required, optional = parameters(program)
    return (*required, *optional)


def bind_inputs(names: Sequence[str], given: Mapping[str, Tensor], optional: Sequence[str] = ()) -> dict[str, Tensor]:
    """The given inputs in the order of `names` followed by `optional`, which may be absent.

    Raises:
        InputError: an input is missing or has a name that the model does not take.
    """
    expected = [*names, *optional]
    for name in given:
        if name not in expected:
            near = get_close_matches(name, expected, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the model takes {_listed(names, optional)}"
            raise InputError(f"the model has no input named {name!r}; {hint}")
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"no value for the input {', '.join(missing)} (got {', '.join(given) or 'none'}); the model takes "
            f"{_listed(names, optional)}: give each with --input, {_EXAMPLE}"
        )
    return {name: given[name] for name in expected if name in given}


def positional(args: Any) -> tuple[Any, ...]:
    """Positional inputs: a tensor alone is one of them, not a sequence of its rows."""
    return (args,) if isinstance(args, Tensor) else tuple(args)


def call_inputs(program: Program, given: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) to call or export the program with, from inputs by name.

    A module gets keyword arguments in the order of its signature; a module whose `forward` takes `*args`, and a
    ScriptModule, get them by position; an exported program gets the structure it was exported with.

    Raises:
        InputError: an input is missing or has a name that the program does not take.
    """
    required, optional = parameters(program)
    if isinstance(program, ExportedProgram):
        bound = bind_inputs(required, given)
        spec = program.call_spec.in_spec
        assert spec is not None
        leaves = [bound[s] if isinstance(s, str) else s.value for s in _exported_leaves(program)]
        return pytree.tree_unflatten(leaves, spec)
    if isinstance(program, torch.jit.ScriptModule):
        bound = bind_inputs(required, given, optional)
        leading = list(optional[: sum(name in bound for name in optional)])
        if leading != [name for name in optional if name in bound]:
            raise InputError(f"TorchScript takes inputs by position; give {_listed(required, optional)} without gaps")
        return tuple(bound.values()), {}
    taken = inspect.signature(program.forward).parameters.values()
    kinds = {p.kind for p in taken}
    if inspect.Parameter.VAR_POSITIONAL in kinds and not (required or optional):
        return tuple(given.values()), {}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        optional = (*optional, *(name for name in given if name not in (*required, *optional)))
    bound = bind_inputs(required, given, optional)
    by_position = [p.name for p in taken if p.kind is p.POSITIONAL_ONLY and p.name in bound]
    return tuple(bound.pop(name) for name in by_position), bound


def parameters(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of the inputs that must be given, of those that may be)."""
    if isinstance(program, ExportedProgram):
        return tuple(leaf for leaf in _exported_leaves(program) if isinstance(leaf, str)), ()
    if isinstance(program, torch.jit.ScriptModule):
        forward: Any = program.forward
        arguments = forward.schema.arguments[1:]
        optional = tuple(a.name for a in arguments if a.has_default_value())
        return tuple(a.name for a in arguments if a.name not in optional), optional
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = [p for p in inspect.signature(program.forward).parameters.values() if p.kind not in variadic]
    return (
        tuple(p.name for p in taken if p.default is p.empty),
        tuple(p.name for p in taken if p.default is not p.empty),
    )


def _exported_leaves(program: ExportedProgram) -> list[str | ConstantArgument]:
    """The flat inputs of an exported program: names of tensors, and constants fixed at export."""
    arguments = [s.arg for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    return [a if isinstance(a, ConstantArgument) else a.name for a in arguments]


def _listed(names: Sequence[str], optional: Sequence[str]) -> str:
    listed = ", ".join(names) or "no required inputs"
    return listed + (f" (optional: {', '.join(optional)})" if optional else "")


def as_arrays(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors by name as NumPy's arrays; it has no bfloat16, which becomes float32."""
    return {name: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for name, t in inputs.items()}


def check_batch(batch: int) -> None:
    """Refuses what is no positive whole number of samples.

    Raises:
        InputError: `batch` is not one.
    """
    if not isinstance(batch, Integral) or batch < 1:
        raise InputError(f"--batch {batch} is no count of samples; expected a whole number from 1, such as --batch 8")


def with_batch(tree: T, batch: int) -> T:
    """Brings every tensor of the batch to `batch` samples: repeats them in turn, or keeps the first ones.

    `tree` is any nesting of tensors, such as (args, kwargs). The batch is the first dimension of the first tensor that
    has one; tensors with another first dimension (a table of positions, say) stay as they are.

    Raises:
        InputError: `batch` is no positive whole number, or no tensor has a dimension or a sample.
    """
    check_batch(batch)
    sizes = [t.shape[0] for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dim()]
    if not sizes or sizes[0] == 0:
        raise InputError(
            f"--batch {batch} needs an input whose first dimension counts samples; got only scalars or none"
        )

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != sizes[0]:
            return leaf
        return leaf[torch.arange(batch) % sizes[0]]

    return pytree.tree_map(resized, tree)


def cast_floats(tree: T, dtype: torch.dtype) -> T:
    """The same nesting with every floating-point tensor in `dtype`; integers, booleans and non-tensors stay."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, tree)


def as_exported(program: ExportedProgram, tree: T) -> T:
    """The same nesting with floating-point tensors in the types that the program was exported with."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    expected = [values.get(leaf) if isinstance(leaf, str) else None for leaf in _exported_leaves(program)]
    leaves, structure = pytree.tree_flatten(tree)
    if len(leaves) != len(expected):
        return tree  # which is refused later

    def cast(leaf: Any, wanted: Any) -> Any:
        tensors = isinstance(leaf, Tensor) and isinstance(wanted, Tensor)
        return leaf.to(wanted.dtype) if tensors and leaf.is_floating_point() and wanted.is_floating_point() else leaf

    return pytree.tree_unflatten([cast(*pair) for pair in zip(leaves, expected, strict=True)], structure)


def flat_names(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that a traced module's inputs get which are tensors: inside a container `outer_0` or `outer_key`.

    Raises:
        InputError: `forward` does not take these.
    """
    check_call(module, args, kwargs)
    signature = inspect.signature(module.forward)
    declared = {name: kwargs[name] for name in signature.parameters if name in kwargs}
    given = {**signature.bind_partial(*args).arguments, **declared, **kwargs}
    if all(isinstance(value, Tensor) for value in given.values()):
        return tuple(given)
    leaves = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(given)[0] if isinstance(leaf, Tensor)]
    return tuple("_".join(re.sub(r"\W", "_", _word(key)) for key in path).lower() for path, _ in leaves)


def _word(key: Any) -> str:
    """A step into a container: a key, a place or a name."""
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))
