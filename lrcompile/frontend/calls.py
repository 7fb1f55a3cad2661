"""Calls a graph as its model is called: export fixes the order and the names of inputs, and what was left out."""

from __future__ import annotations

import ast
import copy
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _custom_builtins, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from lrcompile.frontend.trace import Traced

_FLAT_INPUTS = "_lrcompile_flat_inputs"  # what the code of a graph calls `flat_inputs`, lest an input be called so
_VARIADIC: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def signature_of(
    program: nn.Module | ExportedProgram | torch.jit.ScriptModule, gm: fx.GraphModule
) -> inspect.Signature:
    """How a program may be called, of which `gm` is the graph.

    An archive knows no defaults, nor where an input that was given by name stands among those that were left out: it
    takes that by name alone.
    """
    if isinstance(program, torch.jit.ScriptModule):
        return script_signature(program)
    if isinstance(program, nn.Module):
        return inspect.signature(program.forward)
    info: _PyTreeInfo = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    assert info.in_spec is not None
    by_position, by_name = info.in_spec.children()
    names = [*info.orig_args[: by_position.num_children], *by_name.context]
    kinds: list[Any] = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * by_position.num_children
    kinds += [inspect.Parameter.KEYWORD_ONLY] * by_name.num_children
    return inspect.Signature(list(map(inspect.Parameter, names, kinds)))


def script_signature(program: torch.jit.ScriptModule) -> inspect.Signature:
    """The signature that a script's schema says."""
    forward: Any = program.forward
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
            for a in forward.schema.arguments[1:]
        ]
    )


@dataclass(frozen=True)
class Call:
    """How a model was called when it was traced, and so what its graph takes.

    Of the signature's parameters, `positional` and `named` are those that were given so; the others were left out.
    `fixed` are the flat inputs that are no tensors, of which export keeps the value, as text.
    """

    signature: inspect.Signature
    positional: tuple[str, ...]
    named: tuple[str, ...]
    fixed: Mapping[int, str]

    @classmethod
    def of(cls, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call with these inputs."""
        by_position = signature.bind_partial(*args).arguments
        own = [name for name in kwargs if name in signature.parameters]
        variadic = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        fixed = {i: repr(value) for i, value in enumerate(leaves) if not isinstance(value, Tensor)}
        return cls(signature, tuple(by_position), (*own, *(variadic if len(own) < len(kwargs) else ())), fixed)

    @property
    def left_out(self) -> dict[str, str]:
        """The parameters that were left out, with their defaults as text."""
        given = {*self.positional, *self.named}
        return {name: repr(p.default) for name, p in self.signature.parameters.items() if name not in given}

    def flat(self, spec: pytree.TreeSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Inputs, given as the model takes them, in the order in which the graph does.

        Raises:
            TypeError: the graph was traced with other inputs than those given.
        """
        bound = self.signature.bind(*args, **kwargs)
        told = dict(bound.arguments)
        left_out = {name: (told[name], text) for name, text in self.left_out.items() if name in told}
        bound.apply_defaults()
        values, parameters = bound.arguments, self.signature.parameters
        given: list[Any] = []
        for name in self.positional:
            given += values[name] if parameters[name].kind in _VARIADIC else [values[name]]
        named: dict[str, Any] = {}
        for name in self.named:
            named |= values[name] if parameters[name].kind in _VARIADIC else {name: values[name]}
        return flat_inputs((tuple(given), named), spec, self.fixed, left_out)


def flat_inputs(
    given: Any, spec: pytree.TreeSpec, fixed: Mapping[int, str], left_out: Mapping[str, tuple[Any, str]]
) -> list[Any]:
    """The flat inputs of a graph of (args, kwargs) in any order of names; the code of a graph calls this.

    `fixed` and `left_out` are as in `Call`, the latter with the values given now.

    Raises:
        TypeError: the graph was traced with other inputs than those given.
    """
    if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((given, dict(left_out)))):
        return fx_pytree.tree_flatten_spec(given, spec)  # fx traces the code, when it reads a pickled graph, say
    for name, (value, default) in left_out.items():
        if not (value is None or (not isinstance(value, Tensor) and repr(value) == default)) and value not in ((), {}):
            raise TypeError(f"{name} was given, but the model was traced without it: give it as an example input")
    try:
        flat = spec.flatten_up_to(given)
    except ValueError as error:
        raise TypeError(f"the model was traced with another number of inputs, or other keys: {error}") from error
    for i, value in enumerate(flat):
        if i in fixed and (isinstance(value, Tensor) or repr(value) != fixed[i]):
            raise TypeError(f"{value!r} was given where the model was traced with {fixed[i]}, which is fixed")
        if i not in fixed and not isinstance(value, Tensor):
            raise TypeError(f"a {type(value).__name__} was given where the model was traced with a tensor")
    return flat


class CodeOfCall(_PyTreeCodeGen):
    """Writes the code of a graph whose `forward` has the signature of the model's.

    Annotations are left out, and so are defaults that are no literals: None then stands for them. A name that means
    something else in the code of graphs (`device`, say) gets an underscore.
    """

    def __init__(self, pytree_info: _PyTreeInfo, call: Call) -> None:
        super().__init__(pytree_info)
        self.call = call

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """The first lines of the function."""
        call = self.call
        parameters = [
            p.replace(name=_name(p.name), annotation=p.empty, default=_default(p))
            for p in call.signature.parameters.values()
        ]
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        positional_only = any(p.kind is p.POSITIONAL_ONLY for p in parameters)
        own = own if positional_only else own.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        head = f"def {self._func_name}{inspect.Signature([own, *parameters])}{maybe_return_annotation}:"
        if not free_vars:
            return head
        stars = {p.name: _VARIADIC.get(p.kind, "") for p in call.signature.parameters.values()}
        args = "".join(f"{stars[name]}{_name(name)}, " for name in call.positional)
        kwargs = ", ".join(f"**{_name(name)}" if stars[name] else f"{name!r}: {_name(name)}" for name in call.named)
        left = ", ".join(f"{name!r}: ({_name(name)}, {text!r})" for name, text in call.left_out.items())
        names = "".join(f"{name.split(':')[0].split('#')[0]}, " for name in free_vars)
        given = f"(({args}), {{{kwargs}}})"
        return f"{head}\n    {names}= {_FLAT_INPUTS}({given}, self._in_spec, {dict(call.fixed)!r}, {{{left}}})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the code needs besides torch."""
        return [*super().additional_globals(), (_FLAT_INPUTS, flat_inputs)]


def _name(name: str) -> str:
    return f"{name}_" if name in _custom_builtins or name in ("self", _FLAT_INPUTS) else name


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is parameter.empty:
        return parameter.empty
    try:
        ast.literal_eval(repr(parameter.default))
    except (ValueError, SyntaxError):
        return None
    return parameter.default


class CalledAsGiven(nn.Module):
    """A graph that takes what the original model takes, by position or by name, and returns what that returns.

    Inputs may have another floating-point precision than the graph, narrower whole numbers, and more axes where
    `--io-rank` folds them; the outputs then have the axes of the original again. What the graph was not traced with
    cannot be given.
    """

    def __init__(self, gm: fx.GraphModule, traced: Traced) -> None:
        super().__init__()
        self.gm = gm
        self._call = Call.of(traced.signature, traced.args, traced.kwargs)
        self._example, self._shapes = traced.flat, traced.output_shapes
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in the structure of the original's.

        Raises:
            TypeError: the graph was traced with other inputs than those given.
        """
        spec = self.gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
        pairs = zip(self._call.flat(spec, args, kwargs), self._example, strict=True)
        flat = [_fitted(value, example, bool(self._shapes)) for value, example in pairs]
        given, named = pytree.tree_unflatten(flat, spec)
        outputs = self.gm(*given, **named)
        if not self._shapes:
            return outputs
        leaves, structure = pytree.tree_flatten(outputs)
        return pytree.tree_unflatten(list(map(_unfolded, leaves, self._shapes)), structure)


class _Elsewhere(nn.Module):
    """What a graph computes, computed by something else; copies run the same.

    It has the graph's weights, by which users find out about its type and device; they are not used.
    """

    def __init__(self, run: Callable[[Sequence[Any]], Sequence[Any]], graph: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.graph = graph

    def forward(self, *flat: Any) -> Sequence[Any]:
        return self.run(flat)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Elsewhere:
        return _Elsewhere(self.run, copy.deepcopy(self.graph, memo))


def in_place_of(gm: fx.GraphModule, run: Callable[[Sequence[Any]], Sequence[Any]]) -> fx.GraphModule:
    """A graph that is called as `gm` is, and takes the tensors that it returns from what runs on its flat inputs."""
    graph = fx.Graph()
    inputs = [graph.placeholder(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    outputs = graph.call_module("elsewhere", tuple(inputs))
    (end,) = gm.graph.find_nodes(op="output")
    count = iter(range(len(end.args[0])))
    graph.output(
        [
            graph.call_function(operator.getitem, (outputs, next(count))) if isinstance(y, fx.Node) else y
            for y in end.args[0]
        ]
    )
    graph.set_codegen(gm.graph._codegen)
    return fx.GraphModule({"elsewhere": _Elsewhere(run, gm)}, graph)


def _fitted(value: Any, example: Any, fold: bool) -> Any:
    """An input in the precision that the graph takes, with `fold` also with the number of axes that it takes."""
    if not isinstance(example, Tensor):
        return value
    if _fits(value.dtype, example.dtype):
        value = value.to(example.dtype)
    extra = value.dim() - example.dim()
    return value.flatten(1, 1 + extra) if fold and extra > 0 else value


def _fits(given: torch.dtype, taken: torch.dtype) -> bool:
    """Whether numbers of one type may be put into another: real ones are rounded, whole ones must not be cut."""
    if given.is_floating_point or taken.is_floating_point:
        return given.is_floating_point and taken.is_floating_point
    if given.is_complex or taken.is_complex or torch.bool in (given, taken):
        return False
    one, other = torch.iinfo(given), torch.iinfo(taken)
    return other.min <= one.min and one.max <= other.max


def _unfolded(value: Any, shape: Sequence[int] | None) -> Any:
    """An output with the axes of the original."""
    return value if shape is None else value.unflatten(1, tuple(shape[1:-2]))
