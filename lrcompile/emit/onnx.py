"""From a rewritten graph to ONNX: exported by torch, then stripped of all that would tell one run from another."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _core as exporter
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils import _pytree as pytree

from lrcompile.emit.express import expressible, is_tensor
from lrcompile.emit.shapes import fold_shapes
from lrcompile.errors import InputError, first_line
from lrcompile.frontend.export import OpenAxes, batch_size, export, input_values
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import ALL_CONVS, submodule

OPSET = 20
BFLOAT16_OPSET = 22
"""The first opset in which convolution and pooling take bfloat16; a model with such values is written in it."""
EXTERNAL_DATA_BYTES = 2_000_000_000
"""Weights above this many bytes go to a file of their own: a protobuf message ends at 2 GiB."""

BATCH = "batch"
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """An ONNX graph with the names of its inputs and outputs, and what the user should know about it."""

    model: ir.Model
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    open_axes: OpenAxes
    notes: tuple[str, ...] = ()


def save(model: ir.Model, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> tuple[Path, ...]:
    """Writes the file, and `<name>.data` beside it if the weights are larger than that; returns what was written.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    if weight_bytes(model) <= external_data_bytes:
        ir.save(model, path)
        return (path,)
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return path, data


def check_ranks(model: ir.Model, traced: Traced) -> None:
    """Holds an ONNX graph to the ranks that the traced model promises: torch.onnx has its own forms of operators.

    Raises:
        InputError: a value has a higher rank.
    """
    if traced.max_rank is None:
        return
    ends = set() if traced.io_rank is not None else {*model.graph.inputs, *model.graph.outputs}
    for value in _values(model.graph):
        if value in ends or value.shape is None or len(value.shape) <= traced.max_rank:
            continue
        node = value.producer()
        where = f"{node.op_type} ({node.name})" if node is not None else f"the weight {value.name}"
        raise InputError(
            f"{where} has rank {len(value.shape)} in ONNX, but at most {traced.max_rank} was asked for: torch.onnx "
            "writes an operation of the model in this way; change it there, or compile without --max-rank"
        )


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def to_onnx(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    open_axes: OpenAxes,
    opset: int | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a lifted graph; see `lower`.

    Raises:
        InputError: torch cannot express the graph in ONNX.
    """
    lowered = lower(
        gm, args, kwargs,
        input_names=input_names, output_names=output_names, open_axes=open_axes, opset=opset,
    )  # fmt: skip
    return ir.to_proto(lowered.model)


def lower(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    open_axes: OpenAxes,
    opset: int | None = None,
) -> OnnxModel:
    """Exports a lifted graph to ONNX; equal graphs give equal bytes, on any machine with the same libraries.

    `input_names` and `output_names` are those of the flat inputs and outputs; a name that is taken gets a number.
    Of the `open_axes` of the flat inputs the first is called "batch", and others after an input, such as "image_2".
    `opset` is 20 unless given, or 22 where a value is bfloat16; from 23 on attention is one operator.

    Sizes are fixed, with a note, where torch cannot express the graph with open ones.

    Raises:
        InputError: torch cannot express the graph in ONNX, or the opset its operators in their type.
    """
    opset = opset_of(gm, opset)
    notes: list[str] = []
    outputs = _tensors(output_names, pytree.tree_leaves(list(gm.graph.output_node().args)), "output", notes)
    inputs = _tensors(input_names, pytree.tree_leaves((args, dict(kwargs))), "input", notes)
    program, kept, _ = export(expressible(gm, opset), args, dict(kwargs), open_axes)
    notes += fixed_sizes(input_names, open_axes, kept)
    with quiet():
        try:
            converted = exporter.export(
                program, registry=_operators(opset), verbose=False, opset_version=opset, optimize=False
            )
            _transpose_weights(converted.model.graph)
            onnxscript.optimizer.optimize_ir(converted.model, should_fold=_should_fold)
            fold_shapes(converted.model.graph)
            RemoveUnusedNodesPass()(converted.model)
            _round_folded(converted.model.graph)
        except (torch.onnx.errors.OnnxExporterError, ir.passes.PassError) as error:
            if any(kept):  # an open size where an operator takes a number: the groups of a convolution, say
                with suppress(InputError):
                    fixed = tuple(() for _ in kept)
                    closed = lower(
                        gm, args, kwargs,
                        input_names=input_names, output_names=output_names, open_axes=fixed, opset=opset,
                    )  # fmt: skip
                    return replace(closed, notes=(*closed.notes, *fixed_sizes(input_names, open_axes, fixed)))
            raise InputError(
                f"torch.onnx cannot express the model in ONNX: {_reason(error)}; "
                "write a folder or a .pt2 archive instead"
            ) from error
    model = converted.model
    _strip(model)
    is_shared = batch_size(pytree.tree_leaves((args, dict(kwargs)))) is not None
    _name_open(model, _names_of_symbols(program, input_names, is_shared))
    ins, outs = _rename(model.graph, inputs, outputs)
    return OnnxModel(model, ins, outs, kept, tuple(notes))


def opset_of(gm: fx.GraphModule, asked: int | None) -> int:
    """The opset that a graph is written in.

    Raises:
        InputError: the one asked for has no operators in the graph's type.
    """
    graphs = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]  # those under torch.autocast too
    nodes = [(part, node) for part in graphs for node in part.graph.nodes]
    values = pytree.tree_leaves([node.meta.get("val") for _, node in nodes])
    bfloat16 = any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)
    opset = asked or (BFLOAT16_OPSET if bfloat16 else OPSET)
    if bfloat16 and opset < BFLOAT16_OPSET and any(_slides(part, node) for part, node in nodes):
        raise InputError(
            f"opset {opset} has no convolutions and pooling of bfloat16; give --opset {BFLOAT16_OPSET} or a later one"
        )
    return opset


@cache
def _operators(opset: int) -> ONNXRegistry:
    """How torch writes each operator; `torch.onnx.export` takes this from source code anew for every model, which is
    most of its time for a small one."""
    return ONNXRegistry.from_torchlib(opset_version=opset)


def fixed_sizes(names: Sequence[str], wanted: OpenAxes, kept: OpenAxes) -> list[str]:
    """What the user should know of sizes that are no longer open."""
    lost = [(name, axis) for name, a, b in zip(names, wanted, kept, strict=True) for axis in a if axis not in b]
    if not lost:
        return []
    if all(axis == 0 for _, axis in lost):
        return ["the rewritten model fixes its batch size"]
    return [f"the rewritten model fixes sizes that were open: {', '.join(f'axis {i} of {name}' for name, i in lost)}"]


def _tensors(names: Sequence[str], values: Sequence[Any], kind: str, notes: list[str]) -> list[str]:
    """The names of what ONNX can take or return; notes the rest.

    Raises:
        InputError: one is complex.
    """
    chosen = []
    for name, value in zip(names, values, strict=True):
        if isinstance(value, torch.Tensor) or (isinstance(value, fx.Node) and is_tensor(value)):
            tensor = value.meta["val"] if isinstance(value, fx.Node) else value
            if tensor.is_complex():
                raise InputError(
                    f"{kind} {name} is {str(tensor.dtype).removeprefix('torch.')}, which no runtime of ONNX takes; use "
                    "torch.view_as_real in the model, or write a folder or a .pt2 archive instead"
                )
            chosen.append(name)
        elif kind == "input" and value is not None:
            notes.append(f"input {name} is no tensor: its value {value!r} is fixed in the ONNX model")
        elif value is not None:
            notes.append(f"output {name} is no tensor: it is left out of the ONNX model")
    return chosen


_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings and log lines of torch's exporters: what matters of them is raised as an error."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What was being translated, and the first cause."""
    what, cause = error.__cause__ or error, error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    operator = re.search(r"target=(?:torch\.ops\.)?([\w.]+)", first_line(what))
    return f"{operator[1]}: {first_line(cause)}" if operator else first_line(cause)


def _transpose_weights(graph: ir.Graph) -> None:
    """Stores a weight transposed, under its own name, where a Transpose is all that uses it.

    The optimizer would do so for small weights alone, and give them a number for a name.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1 or weight.is_graph_output():
            continue
        tensor = getattr(weight.const_value, "raw", None)
        if node.outputs[0].is_graph_output() or not isinstance(tensor, torch.Tensor):
            continue
        axes = node.attributes["perm"].as_ints()
        weight.const_value = TorchTensor(tensor.permute(*axes), weight.name)
        weight.shape = weight.const_value.shape
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def _should_fold(node: ir.Node) -> bool | None:
    """Whether to compute a node of constants now: not a tied weight's transpose, which would store it twice."""
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    return False if weight is not None and weight.is_initializer() and len(weight.uses()) > 1 else None


def _round_folded(graph: ir.Graph) -> None:
    """Rounds weights that the optimizer folded bfloat16 batch normalisation into: it leaves them in float32."""
    for node in graph:
        x, *parameters = node.inputs or (None,)
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or x is None or x.dtype != ir.DataType.BFLOAT16:
            continue
        for value in parameters:
            if value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                rounded = torch.from_numpy(value.const_value.numpy()).bfloat16()
                value.const_value = TorchTensor(rounded, value.name)
                value.dtype = ir.DataType.BFLOAT16


def _strip(model: ir.Model) -> None:
    """Drops stack traces, Python names and machine paths."""
    ClearMetadataAndDocStringPass()(model)
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    model.producer_name, model.producer_version = "lrcompile", None
    model.graph.name = "main"


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _names_of_symbols(program: ExportedProgram, input_names: Sequence[str], is_shared: bool) -> dict[str, str]:
    """What to call the open sizes: "batch" for the first axis, where inputs share it, else after the input and axis."""
    names: dict[str, str] = {}
    for name, value in zip(input_names, input_values(program), strict=True):
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                names.setdefault(str(size), BATCH if is_shared and axis == 0 else f"{name}_{axis}")
    return names


def _name_open(model: ir.Model, names: Mapping[str, str]) -> None:
    """Gives the open sizes their names wherever they occur, in expressions such as 12*batch too."""
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(sorted(map(re.escape, names))) + r")\b")
    for value in _values(model.graph):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            pattern.sub(lambda found: names[found[0]], size.value)
            if isinstance(size, ir.SymbolicDim) and size.value is not None
            else size
            for size in value.shape
        )


def _rename(
    graph: ir.Graph, input_names: Sequence[str], output_names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names inputs and outputs as asked, and whatever else had such a name otherwise; returns the names given."""
    taken: set[str] = set()
    names = [_fresh(name, taken) for name in (*input_names, *output_names)]
    ends = [*graph.inputs, *graph.outputs]
    if len(ends) != len(names):
        raise InputError(
            f"the ONNX graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs where the model has "
            f"{len(input_names)} and {len(output_names)}: constant inputs or outputs cannot be written as ONNX"
        )
    others = [value for value in _values(graph) if value not in set(ends)]
    used = {value.name for value in others if value.name} | taken
    for value in others:
        if value.name in taken:
            value.name = _fresh(value.name, used)
    for i, value in enumerate(ends):
        value.name = f"\0{i}"  # so that no two share a name on the way
    for value, name in zip(ends, names, strict=True):
        value.name = name
    return tuple(names[: len(input_names)]), tuple(names[len(input_names) :])


def _fresh(name: str, taken: set[str]) -> str:
    """The name, with the first free number after it if it is taken; takes it."""
    result, count = name, 1
    while result in taken:
        count += 1
        result = f"{name}_{count}"
    taken.add(result)
    return result


def _slides(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a convolution or a pooling."""
    if node.op == "call_module":
        return isinstance(submodule(gm, node.target), ALL_CONVS)
    name = str(getattr(node.target, "overloadpacket", ""))
    return "conv" in name or "pool" in name
