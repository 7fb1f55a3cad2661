"""From the modules of a lifted graph to the constructors that make them again, weights aside."""

from __future__ import annotations

import inspect
import keyword
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lrcompile.graph.graph import is_container, storage_id
from lrcompile.nn.linear import TransposedLinear

_SINGLE = frozenset(("kernel_size", "stride", "padding", "dilation", "output_padding"))
_PAGE = 100


class UnknownModuleError(Exception):
    """A module of a class whose constructor cannot be written down."""


@dataclass(eq=False)
class ModuleSource:
    """What makes a module tree: the base class of its root, the statements of `__init__`, and the tensors to store."""

    base: str
    lines: list[str] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    _ties: list[str] = field(default_factory=list)
    _modules: dict[int, str] = field(default_factory=dict)
    _tensors: dict[Any, str] = field(default_factory=dict)


def module_source(root: nn.Module) -> ModuleSource:
    """Writes down every module, parameter, buffer and constant of a lifted graph.

    What is shared stays shared: it is made once, stored once, and assigned to its other names.

    Raises:
        UnknownModuleError: a module is not one of torch.nn that its attributes describe.
    """
    source = ModuleSource("nn.Module" if _style(root, is_root=True) == "tree" else "nn.ModuleDict")
    for name, made in _tensor_entries(source, root, "", "self"):
        source.lines.append(_assignment("self", name, made))
    for name, child in _children(root).items():
        place = _step("self", root, name, is_root=True)
        source.lines.append(f"{place} = {_module(source, child, name, place, 8)}")
    source.lines += source._ties
    return source


def access(root: nn.Module, path: str) -> str:
    """The expression for a module or tensor at a dotted path, such as `self.layer[0].query.weight`."""
    expression, module = "self", root
    for name in path.split("."):
        if name not in module._modules:
            return _attribute(expression, name)
        expression = _step(expression, module, name, is_root=module is root)
        module = module._modules[name]  # type: ignore[assignment]
    return expression


def _attribute(holder: str, name: str) -> str:
    return f"{holder}.{name}" if _is_name(name) else f"getattr({holder}, {_quoted(name)})"


def _assignment(holder: str, name: str, value: str) -> str:
    return f"{holder}.{name} = {value}" if _is_name(name) else f"setattr({holder}, {_quoted(name)}, {value})"


def _step(expression: str, module: nn.Module, name: str, is_root: bool = False) -> str:
    style = _style(module, is_root)
    if style in ("nn.ModuleList", "nn.Sequential"):
        return f"{expression}[{name}]"
    if style == "nn.ModuleDict":
        return f"{expression}[{_quoted(name)}]"
    return f"{expression}.{name}" if _is_name(name) else f"{expression}.get_submodule({_quoted(name)})"


def _style(module: nn.Module, is_root: bool = False) -> str:
    """What holds a module's children: attributes, or for names that are none, a list or a dictionary."""
    names = list(_children(module))
    if all(map(_is_name, names)) or not (is_root or is_container(module)):
        return "tree"
    if not is_root and names == [str(i) for i in range(len(names))]:
        return "nn.Sequential" if type(module) is nn.Sequential else "nn.ModuleList"
    return "nn.ModuleDict"


def _module(source: ModuleSource, module: nn.Module, path: str, place: str, indent: int) -> str:
    """The constructor of a module and of all that it holds."""
    first = source._modules.setdefault(id(module), place)
    if first != place:
        source._ties.append(f"{place} = {first}")
        return "nn.Module()"
    if is_container(module):
        return _container(source, module, path, place, indent)
    constructor = _constructor(module)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of layers that hold nothing
        made = {name: tensor for name, _, tensor in _own_tensors(eval(constructor, {"nn": nn, "torch": torch}))}
    for name, kind, tensor in _own_tensors(module):
        if name not in made or made[name].shape != tensor.shape:
            raise UnknownModuleError(f"{path}: {constructor} makes no {name} of shape {tuple(tensor.shape)}")
        is_new = _store(source, kind, tensor, f"{path}.{name}", place, name)
        if is_new and kind == "parameter" and not tensor.requires_grad:
            source._ties.append(f"{_attribute(place, name)}.requires_grad_(False)")
        del made[name]
    source._ties += [f"{place}.{name} = None" for name in made]
    for name, child in _children(module).items():
        text = _module(source, child, f"{path}.{name}", _step(place, module, name), 8)
        source._ties.append(f"{place}.add_module({_quoted(name)}, {text})")
    return constructor


def _container(source: ModuleSource, module: nn.Module, path: str, place: str, indent: int) -> str:
    style = _style(module)
    tensors = dict(_tensor_entries(source, module, path, place))
    if style != "tree":  # before what children of it are tied to
        source._ties += [_assignment(place, name, made) for name, made in tensors.items()]
    children = {
        name: _module(source, child, f"{path}.{name}", _step(place, module, name), indent + 4)
        for name, child in _children(module).items()
    }
    items = list(children.values())
    if style == "nn.ModuleDict":
        return _call("nn.ModuleDict({", [f"{_quoted(name)}: {text}" for name, text in children.items()], "})", indent)
    if style == "nn.Sequential":
        return _call("nn.Sequential(", items, ")", indent)
    if style == "nn.ModuleList" and len(items) > 1 and set(items) == {items[0]} != {"nn.Module()"}:
        return _call("nn.ModuleList([", [f"{items[0]} for _ in range({len(items)})"], "])", indent, comma="")
    if style == "nn.ModuleList":
        return _call("nn.ModuleList([", items, "])", indent)
    held = {**tensors, **children}
    entries = [f"{name}={text}" for name, text in held.items() if _is_name(name)]
    entries += [f"**{{{_quoted(name)}: {text}}}" for name, text in held.items() if not _is_name(name)]
    return _call("tree(", entries, ")", indent) if entries else "nn.Module()"


def _call(left: str, arguments: list[str], right: str, indent: int, comma: str = ",") -> str:
    line = f"{left}{', '.join(arguments)}{right}"
    if len(line) + indent <= _PAGE and "\n" not in line:
        return line
    space = " " * indent
    rows = "\n".join(f"{space}    {argument}{comma}" for argument in arguments)
    return f"{left}\n{rows}\n{space}{right}"


def _tensor_entries(source: ModuleSource, module: nn.Module, path: str, place: str) -> Iterator[tuple[str, str]]:
    """(name, constructor) of a container's own tensors, but for those that are tied to one made before."""
    for name, kind, tensor in _own_tensors(module):
        if not _store(source, kind, tensor, f"{path}.{name}" if path else name, place, name):
            continue
        sizes = ", ".join(map(str, tensor.shape)) if tensor.dim() else "()"
        dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
        empty = f"torch.empty({sizes}{dtype})"
        if kind == "parameter":
            yield name, f"nn.Parameter({empty}{'' if tensor.requires_grad else ', requires_grad=False'})"
        else:
            yield name, f"nn.Buffer({empty}{'' if kind == 'buffer' else ', persistent=False'})"


def _store(source: ModuleSource, kind: str, tensor: torch.Tensor, key: str, holder: str, name: str) -> bool:
    """Notes a tensor to store; False where it is tied to one noted before, which its place will hold too."""
    identity = (kind == "parameter", storage_id(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    place = _attribute(holder, name)
    first = source._tensors.setdefault(identity, place)
    if first == place:
        source.weights[key] = tensor
        return True
    if kind == "parameter":
        source._ties.append(_assignment(holder, name, first))
    else:
        persistent = "" if kind == "buffer" else ", persistent=False"
        source._ties.append(f"{holder}.register_buffer({_quoted(name)}, {first}{persistent})")
    return False


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name, "parameter", "buffer" or "constant", tensor) of what belongs to the module itself."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, "parameter", parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, "constant" if name in module._non_persistent_buffers_set else "buffer", buffer
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield name, "constant", value


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _constructor(module: nn.Module) -> str:
    """Such as `nn.Linear(384, 96, bias=False)`: what differs from the defaults, as the attributes tell."""
    if isinstance(module, fx.GraphModule):
        raise UnknownModuleError("it has a nested graph, as of torch.autocast or control flow")
    kind = nn.Linear if type(module) is TransposedLinear else type(module)
    if not kind.__module__.startswith("torch.nn.modules.") or getattr(nn, kind.__name__, None) is not kind:
        raise UnknownModuleError(f"{kind.__module__}.{kind.__qualname__} is not a module of torch.nn")
    arguments = []
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if name.startswith("_") or name in ("device", "dtype"):
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) or not hasattr(module, name):
            raise UnknownModuleError(f"nn.{kind.__name__} does not keep its argument {name}")
        value = _plain(name, getattr(module, name))
        if parameter.default is parameter.empty:
            arguments.append(repr(value))
        elif value != _plain(name, parameter.default):
            arguments.append(f"{name}={value!r}")
    types = {tensor.dtype for _, _, tensor in _own_tensors(module) if tensor.is_floating_point()}
    if len(types) == 1 and types != {torch.float32}:
        arguments.append(f"dtype={types.pop()}")
    return f"nn.{kind.__name__}({', '.join(arguments)})"


def _plain(name: str, value: Any) -> Any:
    if name == "bias":
        return bool(value) if isinstance(value, bool) else value is not None
    if name == "normalized_shape":
        return value[0] if len(value) == 1 else value
    if name in _SINGLE and isinstance(value, tuple) and value and value == value[:1] * len(value):
        return value[0]
    if value is not None and not isinstance(value, bool | int | float | str | tuple):
        raise UnknownModuleError(f"the argument {name}={value!r} cannot be written down")
    return value


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
