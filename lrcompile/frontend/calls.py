"""Calls a graph as its model is called: export fixes the order and the names of inputs, and what was left out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from lrcompile.frontend.trace import Traced


def signature_of(
    program: nn.Module | ExportedProgram | torch.jit.ScriptModule, gm: fx.GraphModule
) -> inspect.Signature:
    """How a program may be called, of which `gm` is the graph.

    An archive knows no defaults, and takes every input by position or by name.
    """
    if isinstance(program, nn.Module) and not isinstance(program, torch.jit.ScriptModule):
        return inspect.signature(program.forward)
    names: list[str] = gm.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    if isinstance(program, torch.jit.ScriptModule):
        forward: Any = program.forward
        names = [argument.name for argument in forward.schema.arguments][1 : len(names) + 1]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


class CalledAsGiven(nn.Module):
    """A graph that takes what the original model takes, by position or by name, and returns what that returns.

    Inputs may have another floating-point precision than the graph, and more axes where `--io-rank` folds them; the
    outputs then have the axes of the original again. What the graph was not traced with cannot be given.
    """

    def __init__(self, gm: fx.GraphModule, traced: Traced) -> None:
        super().__init__()
        self.gm = gm
        self._call = (traced.signature, len(traced.args), tuple(traced.kwargs))
        self._example, self._shapes = traced.flat, traced.output_shapes
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in the structure of the original's.

        Raises:
            TypeError: the graph was traced with other inputs than those given.
        """
        pairs = zip(self._flat(args, kwargs), self._example, strict=True)
        flat = [_fitted(value, example, bool(self._shapes)) for value, example in pairs]
        spec = self.gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
        given, named = pytree.tree_unflatten(flat, spec)
        outputs = self.gm(*given, **named)
        if not self._shapes:
            return outputs
        leaves, structure = pytree.tree_flatten(outputs)
        return pytree.tree_unflatten(list(map(_unfolded, leaves, self._shapes)), structure)

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs in the order in which the graph takes them."""
        signature, count, names = self._call
        slots = {name: name for name in names}
        traced = signature.bind(*range(count), **slots).arguments
        given = signature.bind(*args, **kwargs)
        for name in given.arguments.keys() - traced.keys():
            if given.arguments[name] is not None and given.arguments[name] is not signature.parameters[name].default:
                raise TypeError(f"{name} was given, but the model was traced without it: give it as an example input")
        given.apply_defaults()
        order, spec = pytree.tree_flatten(dict(traced))
        try:
            values = spec.flatten_up_to({name: given.arguments[name] for name in traced})
        except ValueError as error:
            raise TypeError(f"the model was traced with another number of inputs: {error}") from error
        slot = dict(zip(order, values, strict=True))
        flat = pytree.tree_leaves(([slot[i] for i in range(count)], {name: slot[name] for name in names}))
        if len(flat) != len(self._example):
            raise TypeError(f"{len(flat)} inputs were given, but the model was traced with {len(self._example)}")
        return flat


def _fitted(value: Any, example: Any, fold: bool) -> Any:
    """An input in the precision that the graph takes, with `fold` also with the number of axes that it takes."""
    if not isinstance(example, Tensor):
        if isinstance(value, Tensor) or value != example:
            raise TypeError(f"{value!r} was given where the model was traced with {example!r}, which is fixed")
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} was given where the model was traced with a tensor")
    if value.is_floating_point() and example.is_floating_point():
        value = value.to(example.dtype)
    extra = value.dim() - example.dim()
    return value.flatten(1, 1 + extra) if fold and extra > 0 else value


def _unfolded(value: Any, shape: Sequence[int] | None) -> Any:
    """An output with the axes of the original."""
    return value if shape is None else value.unflatten(1, tuple(shape[1:-2]))
