"""From a model and example inputs to the lifted graph, with a dynamic batch where the model allows one."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lrcompile.errors import InputError, VerificationError, first_line
from lrcompile.frontend.calls import Call, CodeOfCall, script_signature, signature_of
from lrcompile.frontend.export import (
    OpenAxes,
    at_other_sizes,
    batch_axes,
    batch_size,
    check_call,
    check_names,
    export,
    input_values,
    open_axes,
)
from lrcompile.frontend.functionalize import drop_last_writes, functionalize
from lrcompile.frontend.inputs import positional
from lrcompile.frontend.lift import calling_module, lift
from lrcompile.frontend.weights import compute_weights
from lrcompile.graph.graph import Graph, propagate
from lrcompile.graph.nested import out_of_reach
from lrcompile.graph.verify import has_nan, relative_error


@dataclass(frozen=True, eq=False)
class Traced:
    """A lifted graph with the inputs it was traced on.

    `args` and `kwargs` are what the model's `forward` takes; `flat` are the same tensors in the order of
    `input_names`, the graph's placeholders. `output_names` name the flat outputs. `open_axes` are the axes of the flat
    inputs that may have other sizes than on the example, and `others` are flat inputs with other sizes of those
    besides the batch, to check with. `max_rank` is the highest rank that values inside the graph may have, and
    `io_rank` that of its inputs and outputs, where there is a limit. `opset` is the version of ONNX operators that it
    is to be written in, where one was asked for. `signature` is how the model as given is called; `output_shapes` are
    those that outputs had before `io_rank` folded them, None for those that it left alone.
    """

    graph: Graph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flat: tuple[Any, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    open_axes: OpenAxes
    others: tuple[tuple[Any, ...], ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    max_rank: int | None = None
    io_rank: int | None = None
    opset: int | None = None
    signature: inspect.Signature = field(default_factory=inspect.Signature)
    output_shapes: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def dynamic_batch(self) -> bool:
        """Whether the first axis of every input is open."""
        return any(self.open_axes) and self.open_axes == tuple(
            tuple(dict.fromkeys((0, *axes))) if isinstance(value, torch.Tensor) and value.dim() else ()
            for value, axes in zip(self.flat, self.open_axes, strict=True)
        )

    def takes_any_batch(self) -> bool:
        """Whether its batch is open, and not for multiples of a number alone."""
        size, gm = batch_size(self.flat), self.graph.gm
        if not self.dynamic_batch or size is None:
            return False
        return not _divides(gm) or _takes(gm, [resized(value, size + 1) for value in self.flat])


def trace(
    program: nn.Module | ExportedProgram | torch.jit.ScriptModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Traced:
    """Exports a model with `torch.export`, lifts it, and checks that the lifted graph computes the same.

    A module is traced in eval mode, and is afterwards in the mode that it was in.

    Raises:
        InputError: the model cannot be exported or does not run on the inputs.
        VerificationError: the lifted graph differs from the model (a fault of lrcompile).
    """
    with in_eval_mode(program):
        return _traced(program, args, kwargs)


@contextmanager
def in_eval_mode(program: nn.Module | ExportedProgram | torch.jit.ScriptModule) -> Iterator[None]:
    """Puts a module in eval mode for a while; archives stay in the one that they were saved in.

    Buffers that a run writes, such as counters, have their values back afterwards.
    """
    buffers = [(b, b.detach().clone()) for b in program.buffers() if not b.is_meta and not is_lazy(b)]
    training: list[nn.Module] = []
    if not isinstance(program, ExportedProgram | torch.jit.ScriptModule):
        training = [module for module in program.modules() if module.training]
        with suppress(NotImplementedError):  # the modules of exported programs have one mode
            program.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _traced(
    program: nn.Module | ExportedProgram | torch.jit.ScriptModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Traced:
    args, kwargs = positional(args), dict(kwargs or {})
    notes: list[str] = []
    source = program
    if isinstance(program, torch.jit.ScriptModule):
        args, kwargs = _by_position(program, args, kwargs), {}
        program = _convert_torchscript(program, args)
    if batch_size(pytree.tree_leaves((args, kwargs))) == 0:
        raise InputError("the example inputs hold no sample, so no rewrite can be checked; give one or more samples")
    check_names(kwargs)
    if isinstance(program, ExportedProgram):
        exported, kept = program, open_axes(program)
        reference: Any = program.module(check_guards=False)  # guards are source text, of what the inputs hold
    else:
        check_call(program, args, kwargs)
        kwargs = _as_declared(program, kwargs)
        reference = program
        exported, kept, note = _exported(program, args, kwargs)
        if note:
            notes.append(note)
    expected = _run_reference(reference, *pytree.tree_map(copied, (args, kwargs)))
    _check_numbers(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own deprecated ways
        gm = functionalize(exported).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    notes += drop_last_writes(gm)
    compute_weights(gm)
    gm = lift(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    args, kwargs = _ordered(args, kwargs, exported)
    flat = tuple(pytree.tree_leaves((args, kwargs)))
    if len(flat) != len(placeholders):
        raise InputError(
            f"the model takes {len(placeholders)} inputs ({', '.join(n.name for n in placeholders)}), "
            f"got {len(flat)}; give one --input for each"
        )
    notes += [
        f"input {node.name} is a number that the archive leaves open, and is fixed at {value}"
        for node, known, value in zip(placeholders, input_values(exported), flat, strict=True)
        if isinstance(known, torch.SymInt | torch.SymFloat | torch.SymBool)
    ]
    signature = signature_of(source, gm)
    codegen: Any = gm.graph._codegen
    gm.graph.set_codegen(CodeOfCall(codegen.pytree_info, Call.of(signature, args, kwargs)))
    gm.recompile()
    gm.eval()
    others = tuple(_accepted(reference, at_other_sizes(exported, flat), (args, kwargs)))
    graph = _shaped(gm, flat)
    notes += out_of_reach(graph.gm)
    try:
        _check_same(expected, run(gm, flat), "the lifted graph")
        for other, result in others:
            _check_same(result, run(gm, other), "the lifted graph at other sizes")
    except VerificationError as error:
        again = pytree.tree_leaves(_run_reference(reference, *pytree.tree_map(copied, (args, kwargs))))
        if not relative_error(pytree.tree_leaves(expected), again) <= 1e-3:
            raise InputError(
                "the model gives different outputs for the same inputs, so no rewrite can be checked; "
                "take out what is random, such as dropout that ignores eval()"
            ) from error
        raise
    return Traced(
        graph=graph,
        args=args,
        kwargs=kwargs,
        flat=flat,
        input_names=_input_names(program, source, args, kwargs, placeholders),
        output_names=_output_names(expected),
        open_axes=kept,
        others=tuple(other for other, _ in others),
        notes=tuple(notes),
        signature=signature,
    )


def _shaped(gm: fx.GraphModule, flat: tuple[Any, ...]) -> Graph:
    """The graph with shapes, as `propagate` makes it; raises InputError where a shape depends on values."""
    try:
        return propagate(gm, flat)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        node = next((node for node in gm.graph.nodes if node.meta.get("unbacked_bindings")), None)
        layer = calling_module(node)[0] if node else ""
        raise InputError(
            f"{layer or 'the model'}: {node.target if node else error.func} makes sizes or numbers of the values that "
            "it gets, so that nothing after it has a latency; mask values in its place, or move it out of the model"
        ) from error


def run(gm: fx.GraphModule, flat: Sequence[Any]) -> tuple[Any, ...]:
    """The flat outputs of a lifted graph for flat inputs."""
    with torch.no_grad():
        result = fx.Interpreter(gm).run(*flat, enable_io_processing=False)
    return tuple(pytree.tree_leaves(result))


def at_other_batch(gm: fx.GraphModule, flat: Sequence[Any], size: int) -> list[Any]:
    """Inputs of `size` samples with three or two, or first with twice as many where sizes are divided: export may then
    have left open no other than multiples of a number, even if the graph itself runs on others.

    Repeated rows are rolled, so that they differ, unless the graph does not run on those, as where columns are indices
    of different tables, or makes NaN of them.
    """
    few = 3 if size != 3 else 2
    sizes = (2 * size, few) if _divides(gm) else (few,)  # where nothing is divided, export knew the sizes
    inputs: list[Any] = []
    for count, rolls in itertools.product(sizes, (True, False)):
        inputs = [resized(value, count, rolls) for value in flat]
        if _takes(gm, inputs):
            break
    return inputs


def _divides(gm: fx.GraphModule) -> bool:
    """Whether sizes are divided in a graph, or those of its inputs are multiples of a number."""
    inputs_are = [node.meta.get("sizes", ()) for node in gm.graph.find_nodes(op="placeholder")]
    return any("//" in text for node in gm.graph.nodes for text in node.meta.get("sizes", ())) or any(
        "*" in size for sizes in inputs_are for size in sizes[:1]
    )


def _takes(gm: fx.GraphModule, flat: Sequence[Any]) -> bool:
    """Whether a graph runs on inputs, and makes no NaN of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outputs = run(gm, flat)
        except Exception:  # whatever an operation raises for values or sizes that it does not take
            return False
    return not has_nan(outputs)


def resized(value: Any, size: int, rolls: bool = True) -> Any:
    """The input with `size` rows along axis 0: its own, repeated, and if it `rolls` also rolled along the last axis."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    rows = [(value[i % len(value)], i // len(value)) for i in range(size)]
    return torch.stack([row.roll(shift, -1) if rolls and row.dim() else row for row, shift in rows])


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram, OpenAxes, str | None]:
    """(program, its open axes, why its batch is not open)."""
    flat = pytree.tree_leaves((args, kwargs))
    size = batch_size(flat)
    known = module.meta.get("open_axes") if isinstance(module, fx.GraphModule) else None  # of what it was made of
    if known is not None:
        program, kept, reason = export(module, args, kwargs, known)
        return program, kept, f"sizes that the archive leaves open are fixed: {reason}" if reason else None
    if size is None:
        closed = tuple(() for _ in flat)
        return *export(module, args, kwargs, closed)[:2], "inputs share no first dimension: batch stays fixed"
    program, kept, reason = export(module, args, kwargs, batch_axes(flat))
    return program, kept, f"batch stays fixed at {size}: {reason}" if reason else None


def _accepted(
    reference: Any, candidates: Iterable[tuple[Any, ...]], inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The first inputs at other sizes that the model takes, with its outputs; nothing if it takes none."""
    spec = pytree.tree_structure(inputs)
    for flat in candidates:
        args, kwargs = pytree.tree_unflatten(list(map(copied, flat)), spec)
        with suppress(InputError):
            yield flat, _run_reference(reference, args, kwargs)
            return


def copied(value: Any) -> Any:
    """A copy of an input: the model may write to it, and it is still needed."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _by_position(program: torch.jit.ScriptModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs in the order of the script's own parameters, with defaults: the converter wants all of them.

    Raises:
        InputError: a name is not one of its parameters, is given twice, a parameter without default is left out, or
            one is no tensor.
    """
    signature = script_signature(program)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the TorchScript model does not take these inputs: {error}; it takes "
            f"{', '.join(signature.parameters) or 'none'}: give one --input for each"
        ) from error
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        other = next((leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, torch.Tensor)), value)
        if not isinstance(other, torch.Tensor | list | tuple | dict):
            raise InputError(
                f"the TorchScript model's parameter {name} is {other!r}, and TorchScript can be converted with tensors "
                "alone; script it with that value inside, or give the model as a torch.export archive"
            )
    return tuple(bound.arguments.values())


def _convert_torchscript(program: torch.jit.ScriptModule, args: tuple[Any, ...]) -> nn.Module | ExportedProgram:
    from torch._export.converter import TS2EPConverter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return TS2EPConverter(program, args).convert()
        except Exception as error:
            raise InputError(
                f"the TorchScript archive could not be converted: {type(error).__name__}: {first_line(error)}; "
                "give the model as a torch.export archive, or as a state dict with --arch"
            ) from error


def _run_reference(reference: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return reference(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"the model does not run on the given inputs: {type(error).__name__}: {first_line(error)}"
            ) from error


def _as_declared(program: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of the parameters: torch exports a graph by position, whatever the names say."""
    declared = [name for name in inspect.signature(program.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in declared} | kwargs


def _ordered(
    args: tuple[Any, ...], kwargs: dict[str, Any], exported: ExportedProgram
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with names, also those inside dictionaries, in the order in which the exported program takes them."""
    spec = exported.call_spec.in_spec
    if spec is None:
        return args, kwargs
    try:
        return pytree.tree_unflatten(spec.flatten_up_to((args, kwargs)), spec)  # type: ignore[no-any-return]
    except ValueError:
        return args, kwargs  # their number is checked next


def _input_names(
    program: nn.Module | ExportedProgram,
    source: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    placeholders: list[fx.Node],
) -> tuple[str, ...]:
    """The user's names of the flat inputs: export renames what is a Python word, and converting what is a script's."""
    names = tuple(node.name for node in placeholders)
    if isinstance(source, torch.jit.ScriptModule):
        scripted = tuple(script_signature(source).parameters)
        return scripted if len(scripted) == len(names) == len(args) else names
    if isinstance(program, ExportedProgram):
        own = tuple(s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT)
        return own if len(own) == len(names) else names
    if not all(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        return names
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [name for name, p in inspect.signature(program.forward).parameters.items() if p.kind in kinds]
    given = (*taken[: len(args)], *kwargs)
    return given if len(given) == len(names) else names


def _check_numbers(outputs: Any) -> None:
    leaves = pytree.tree_leaves(outputs)
    if leaves and not any(not isinstance(value, torch.Tensor) or value.numel() for value in leaves):
        raise InputError(
            "the outputs of the model hold nothing on the example inputs, so no rewrite can be checked; give inputs "
            "that the model is made for, with --calib or --input"
        )
    for i, value in enumerate(leaves):
        if has_nan([value]):
            raise InputError(
                f"output {i} of the model holds NaN on the example inputs, so no rewrite can be checked; "
                "give inputs that the model is made for, with --calib or --input"
            )


def _check_same(expected: Any, got: tuple[Any, ...], what: str) -> None:
    leaves = [t for t in pytree.tree_leaves(expected) if isinstance(t, torch.Tensor)]
    results = [t for t in got if isinstance(t, torch.Tensor)]
    for i, (a, b) in enumerate(zip(leaves, results, strict=True)):
        error = relative_error([a], [b])
        limit = 2e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-5
        if not error <= limit:
            raise VerificationError(f"{what} differs from the model at output {i}: relative error {error:.2e}")


def _output_names(outputs: Any) -> tuple[str, ...]:
    """Names from the output's structure: dictionary keys where there are any, else output_0, output_1, …"""
    names = []
    for i, (path, _) in enumerate(pytree.tree_flatten_with_path(outputs)[0]):
        keys = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        words = [str(getattr(entry, "idx", i) if key is None else key) for key, entry in zip(keys, path, strict=True)]
        names.append("_".join(words) if any(key is not None for key in keys) else f"output_{i}")
    return tuple(names)
