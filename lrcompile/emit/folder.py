"""From a rewritten graph to a folder that needs torch alone: readable `model.py` and `weights.safetensors`."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lrcompile.emit.expressions import expression, is_free, uses_device, wrap
from lrcompile.emit.modules import ModuleSource, UnknownModuleError, access, module_source
from lrcompile.emit.structure import plain_outputs
from lrcompile.errors import InputError
from lrcompile.frontend.trace import Traced, trace
from lrcompile.graph.graph import attribute

WEIGHTS = "weights.safetensors"

_HEAD = '''"""Written by lrcompile. Needs torch alone.

    from model import load

    model = load()
    outputs = model({call})

{about}
"""

import json{imports}
from pathlib import Path

import torch
from torch import nn


class Model({base}):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, {parameters}):
{forward}


{tree}def load(folder=Path(__file__).parent):
    """The model with its weights, ready for inference; `model.train()` and an optimizer fine-tune it."""
    with torch.device("meta"), Uninitialized():
        model = Model()
    stored = read_weights(Path(folder) / "weights.safetensors")
    loaded = {{}}
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in loaded:  # else it is tied to one that was loaded before
                    value = stored[f"{{path}}.{{name}}" if path else name]
                    is_parameter = isinstance(tensor, nn.Parameter)
                    loaded[tensor] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
                tensors[name] = loaded[tensor]
    return model.eval()


class Uninitialized(torch.overrides.TorchFunctionMode):
    """Leaves out the random numbers that constructors make, since the weights are loaded anyway."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {{}}))


def read_weights(path):
    """The tensors of a safetensors file: a length of 8 bytes, a JSON header of that length, the tensors' bytes."""
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {{}}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).reshape(shape)
    return tensors


DTYPES = {{
{dtypes}
}}
'''

_TREE = '''def tree(**children):
    """A module that only holds others, and parameters and buffers."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


'''

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64",
}  # fmt: skip


def write_folder(folder: Path, gm: fx.GraphModule, traced: Traced) -> None:
    """Makes the folder with `model.py` and `weights.safetensors`; equal graphs give equal bytes.

    Raises:
        InputError: the graph calls something that cannot be written as plain PyTorch.
        OSError: the disk is full or the place cannot be written.
    """
    try:
        source = module_source(gm)
    except UnknownModuleError:  # of a plug-in's pass: take it apart into operations
        gm = trace(gm, traced.args, traced.kwargs).graph.gm
        try:
            source = module_source(gm)
        except UnknownModuleError as error:
            raise InputError(
                f"cannot write the model as plain PyTorch: {error}; write a .pt2 archive instead"
            ) from error
    for name, tensor in source.weights.items():
        if tensor.dtype not in _DTYPES:
            raise InputError(f"cannot store {name} of {tensor.dtype} as safetensors; write a .pt2 archive instead")
    folder.mkdir()
    (folder / "model.py").write_text(model_text(gm, source, traced), encoding="utf-8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in source.weights.items()}
    try:
        safetensors.torch.save_file(_unaliased(tensors), folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error
    (folder / WEIGHTS).chmod((folder / "model.py").stat().st_mode)  # safetensors lets nobody else read it


def load_folder(folder: Path) -> nn.Module:
    """The model of a folder as its own `load` makes it, without leaving compiled files in the folder."""
    path = folder / "model.py"
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "model"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return namespace["load"](folder)


def model_text(gm: fx.GraphModule, source: ModuleSource, traced: Traced) -> str:
    """The text of `model.py`.

    Raises:
        InputError: the graph calls something that cannot be written as plain PyTorch.
    """
    parameters, unpacking, names = _signature(gm, traced)
    lines = [*unpacking, *_forward(gm, names)]
    init = [line if "\n" in line else wrap(line, 8).lstrip() for line in source.lines] or ["pass"]
    dtypes = {name: dtype for dtype, name in _DTYPES.items() if dtype in {t.dtype for t in source.weights.values()}}
    return _HEAD.format(
        call=", ".join(_call(parameters)),
        about=_about(traced),
        imports="\nimport math" if any("math." in line for line in lines) else "",
        base=source.base,
        init="\n".join(" " * 8 + line for line in init),
        parameters=", ".join(parameters),
        forward="\n".join(wrap(line, 8) for line in lines),
        tree=_TREE if any("tree(" in line for line in source.lines) else "",
        dtypes="\n".join(f'    "{name}": {dtype},' for name, dtype in dtypes.items()),
    )


def _in_a_docstring(value: Any) -> str:
    """A value as it may stand between three quotes: an archive's own text must not end them."""
    return repr(value).replace("\\", "\\\\").replace('"', '\\"')


def _about(traced: Traced) -> str:
    shapes = [
        f"{name}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"{name}: {_in_a_docstring(value)}"
        for name, value in zip(traced.input_names, traced.flat, strict=True)
    ]
    further = [
        f"axis {axis} of {name}"
        for name, axes in zip(traced.input_names, traced.open_axes, strict=True)
        for axis in axes
        if axis or not traced.dynamic_batch
    ]
    free = ["the batch size (axis 0)"] * traced.dynamic_batch + further
    sizes = f"{', '.join(free)} {'is' if len(free) == 1 else 'are'} free" if free else "sizes are fixed"
    return f"Inputs: {', '.join(shapes)}; {sizes}."


def _signature(gm: fx.GraphModule, traced: Traced) -> tuple[list[str], list[str], dict[fx.Node, str]]:
    """(parameters of `forward`, lines that take nested inputs apart, the name of each placeholder)."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    args, kwargs = pytree.tree_unflatten(placeholders, pytree.tree_structure((traced.args, traced.kwargs)))
    signature = inspect.signature(gm.forward)
    bound = signature.bind(*args, **kwargs).arguments
    parameters, lines, names, taken = [], [], {}, set(signature.parameters)
    for given, parameter in signature.parameters.items():
        if given not in bound:
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and "*" not in parameters:
                parameters.append("*")  # what follows one that was left out is no longer in its place
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not any(p.startswith("*") for p in parameters):
            parameters.append("*")
        is_named = parameter.kind is inspect.Parameter.VAR_KEYWORD
        for word, value in bound[given].items() if is_named else [(given, bound[given])]:
            name = word if is_free(word) else f"{word}_"
            if is_named and not any(p.startswith("*") for p in parameters):
                parameters.append("*")
            parameters.append(f"*{name}" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else name)
            for path, node in pytree.tree_flatten_with_path(value)[0]:
                names[node] = name
                if path:
                    names[node] = next(free for n in itertools.count() if (free := node.name + "_" * n) not in taken)
                    lines.append(f"{names[node]} = {name}{pytree.keystr(path)}")
    return [*parameters[:-1], *(p for p in parameters[-1:] if p != "*")], lines, names


def _call(parameters: Sequence[str]) -> list[str]:
    """The arguments of a call with variables of the parameters' names."""
    by_name = next((i + 1 for i, p in enumerate(parameters) if p.startswith("*")), len(parameters))
    return [*(p for p in parameters[:by_name] if p != "*"), *(f"{p}={p}" for p in parameters[by_name:])]


def _forward(gm: fx.GraphModule, names: dict[fx.Node, str]) -> list[str]:
    """One line a node; a variable's name is used again when its value is not needed any more."""
    lines: list[str] = []
    nodes = list(gm.graph.nodes)
    last_use = {argument: i for i, node in enumerate(nodes) for argument in node.all_input_nodes}
    live = set(names.values())
    if any(uses_device(node) for node in nodes):
        tensors = [n for n in names if isinstance(n.meta.get("val"), torch.Tensor)]
        owner = names[tensors[0]] if tensors else "next(self.parameters())"
        lines.append(f"device = {owner}.device")
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            if isinstance(attribute(gm, node.target), nn.Module):
                raise InputError(
                    f"cannot write the nested graph {node.target} as plain PyTorch; write a .pt2 archive instead"
                )
            names[node] = access(gm, node.target)
        if node.op in ("placeholder", "get_attr") or (node.op != "output" and not node.users):
            continue
        if node.op == "output":
            outputs = plain_outputs(gm.graph, iter(pytree.tree_leaves(node.args[0])))
            lines.append(f"return {_structure(outputs, names)}")
            break
        text = _line(gm, node, names)
        for argument in node.all_input_nodes:
            if last_use[argument] == i and re.fullmatch(r"[xn]\d*", names[argument]):
                live.discard(names[argument])
        kind = "x" if isinstance(node.meta.get("val"), torch.Tensor | tuple | list) else "n"
        names[node] = next(name for number in itertools.count() if (name := f"{kind}{number or ''}") not in live)
        live.add(names[node])
        lines.append(f"{names[node]} = {text}")
    return lines


def _line(gm: fx.GraphModule, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.op == "call_module":
        arguments = [names[value] if isinstance(value, fx.Node) else repr(value) for value in node.args]
        return f"{access(gm, node.target)}({', '.join(arguments)})"  # type: ignore[arg-type]
    return expression(node, names)


def _structure(outputs: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(outputs, fx.Node):
        return names[outputs]
    if isinstance(outputs, dict):
        return "{" + ", ".join(f"{_key(key)}: {_structure(value, names)}" for key, value in outputs.items()) + "}"
    if isinstance(outputs, list):
        return "[" + ", ".join(_structure(value, names) for value in outputs) + "]"
    if isinstance(outputs, tuple):
        items = [_structure(value, names) for value in outputs]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    return repr(outputs)


def _key(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) and '"' not in key and "\\" not in key else repr(key)


def _unaliased(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of one storage as tensors of their own, as safetensors wants them."""
    counts: dict[int, int] = {}
    for tensor in tensors.values():
        counts[tensor.untyped_storage().data_ptr()] = counts.get(tensor.untyped_storage().data_ptr(), 0) + 1
    return {
        name: tensor.clone()
        if counts[tensor.untyped_storage().data_ptr()] > 1
        or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        else tensor
        for name, tensor in tensors.items()
    }
