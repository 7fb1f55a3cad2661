"""Reads a model from a file or a factory: the content decides what it is, and no code in a file runs unless asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lrcompile.errors import InputError, first_line
from lrcompile.frontend.archives import read_torchscript
from lrcompile.frontend.files import describe, exists, open_input, read_pickle, read_safetensors, recognise, some
from lrcompile.frontend.imports import call, import_attribute, is_attribute_path

_PICKLE_ADVICE = (
    "safer: save the model with torch.export.save, or its state dict with torch.save(model.state_dict(), ...) and name "
    "the factory with --arch pkg.mod:factory; or give --trust-pickle if you trust where the file came from"
)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "params", "weights")
_PREFIXES = ("module.", "_orig_mod.")  # written by DataParallel and by torch.compile


@dataclass(frozen=True)
class Source:
    """A model as it was found: `program` is an nn.Module (eval mode), an ExportedProgram or a ScriptModule.

    `name` is for people: the file name or the factory. `args` and `kwargs` are the example inputs that the source
    holds (a `.pt2` archive, or a factory that returns them), else None.
    """

    program: nn.Module | ExportedProgram | torch.jit.ScriptModule
    kind: Literal["module", "exported", "torchscript"]
    name: str
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any] | None


def load(source: str, *, arch: str | None = None, trust_pickle: bool = False) -> Source:
    """Reads a model from a file, or from a factory named `pkg.mod:factory`; tensors land on the CPU.

    A file may be a torch.export archive, a TorchScript archive, a state dict (`torch.save` or safetensors, with
    `arch` naming the factory that builds the module), or, with `trust_pickle`, a pickled module. The suffix is ignored.
    Without `trust_pickle` no code from the file runs; what would need it is refused.

    Raises:
        InputError: the file or factory cannot be used, the state dict does not fit, or a value is not finite.
    """
    path = Path(source)
    if is_attribute_path(source) and not exists(path):
        if arch is not None:
            raise InputError(f"{source} is itself a factory, so --arch {arch} has no meaning; give one of the two")
        found = _build(source)
    else:
        found = _read(path, arch, trust_pickle)
    if not isinstance(found.program, ExportedProgram):
        with suppress(NotImplementedError):  # the modules of exported programs have one mode
            found.program.eval()
    _check_weights(found)
    return found


def check_finite(tensors: Iterable[tuple[str, Tensor]], *, negative_infinity: bool = False) -> None:
    """Refuses NaN and infinite values; `negative_infinity` permits -inf, which attention masks hold by right.

    Raises:
        InputError: names the tensor and counts the values, or the tensor has no values (meta device).
    """
    for name, tensor in tensors:
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise InputError(
                f"{name} has no values (it is on the meta device or not initialised yet); "
                "load the weights, and run a lazy module once, before giving the model"
            )
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            continue
        values = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        bad = ~torch.isfinite(values.float() if values.element_size() == 1 else values)
        if negative_infinity and not tensor.is_complex():
            bad &= values != -torch.inf
        count = int(bad.sum())
        if count:
            raise InputError(
                f"{name} holds {count} of {tensor.numel()} values that are NaN or infinite; "
                "such a model cannot be checked after a rewrite, so give a checkpoint from before it diverged"
            )


def _check_weights(source: Source) -> None:
    program = source.program
    try:
        if isinstance(program, ExportedProgram):
            parameters = set(program.graph_signature.parameters)
            check_finite((k, v) for k, v in program.state_dict.items() if k in parameters)
            others = [*program.state_dict.items(), *program.constants.items()]
            buffers = [(k, v) for k, v in others if k not in parameters and isinstance(v, Tensor)]
        else:
            check_finite(program.named_parameters())
            buffers = list(program.named_buffers())
        check_finite(buffers, negative_infinity=True)
    except InputError as error:
        raise InputError(f"{source.name}: {error}") from None


# ---------------------------------------------------------------------------------------------------- factories


def _build(text: str) -> Source:
    """The model that the factory `pkg.mod:factory` returns, with the example inputs it may return beside it."""
    factory = import_attribute(text)
    if isinstance(factory, (nn.Module, ExportedProgram)):
        result: Any = factory
    else:
        result = call(factory, text)
    args: Any = None
    kwargs: Any = None
    if isinstance(result, tuple) and len(result) in (2, 3):
        result, args, *rest = result
        kwargs = rest[0] if rest else {}
        if isinstance(args, Mapping) and not rest:
            args, kwargs = (), args
        args = args if isinstance(args, (tuple, list)) else (args,)
        if not isinstance(kwargs, Mapping):
            raise InputError(f"{text} returned {_typed(kwargs)} as third value; expected a dict of keyword inputs")
        args, kwargs = tuple(args), dict(kwargs)
    if not isinstance(result, (nn.Module, ExportedProgram)):
        raise InputError(
            f"{text} returned {_typed(result)}; expected an nn.Module, or (module, args), or (module, args, kwargs)"
        )
    return _as_given(result, text) if args is None else Source(result, _kind(result), text, args, kwargs)


def _as_given(program: nn.Module | ExportedProgram, name: str) -> Source:
    """With the example inputs that the program itself holds, if any."""
    args, kwargs = (program.example_inputs if isinstance(program, ExportedProgram) else None) or (None, None)
    return Source(program, _kind(program), name, args, kwargs)


def _kind(program: object) -> Literal["module", "exported", "torchscript"]:
    if isinstance(program, ExportedProgram):
        return "exported"
    return "torchscript" if isinstance(program, torch.jit.ScriptModule) else "module"


def _typed(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


# -------------------------------------------------------------------------------------------------------- files


def _read(path: Path, arch: str | None, trust_pickle: bool) -> Source:
    with open_input(path, "a model file or pkg.mod:factory") as file:
        form = recognise(file, path)
        if form is None:
            file.seek(0)
            raise InputError(
                f"{path} is not a model: it looks like {describe(file.read(64))}; expected a torch.export archive "
                "(.pt2), TorchScript, a state dict (torch.save or safetensors) or pkg.mod:factory"
            )
        if form in ("exported", "torchscript"):
            if arch is not None:
                raise InputError(f"{path} holds a whole model, so --arch {arch} is not needed; leave it out")
            if form == "torchscript":
                return Source(read_torchscript(file, path), "torchscript", path.name, None, None)
            from lrcompile.frontend.exported import read_exported  # importing torch's exporter takes seconds

            program = read_exported(file, path, trust_pickle)
            return _as_given(program, path.name)
        if form == "safetensors":
            content: Any = read_safetensors(path)
        else:
            content = read_pickle(file, path, form, _PICKLE_ADVICE, trust_pickle)
    if isinstance(content, (nn.Module, ExportedProgram)):
        if arch is not None:
            raise InputError(f"{path} holds a whole model, so --arch {arch} is not needed; leave it out")
        return _as_given(content, path.name)
    state = _state_dict(content, path)
    if arch is None:
        raise InputError(
            f"{path} holds a state dict ({len(state)} tensors: {some(state)}) and no architecture; "
            "name the factory that builds the module with --arch pkg.mod:factory"
        )
    built = _build(arch)
    if not isinstance(built.program, nn.Module):
        raise InputError(f"--arch {arch} returned {_typed(built.program)}; expected an nn.Module to load {path} into")
    _fill(built.program, state, path, arch)
    return Source(built.program, built.kind, path.name, built.args, built.kwargs)


# -------------------------------------------------------------------------------------------------- state dicts


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of the usual wrappers."""
    if is_state_dict(content):
        return dict(content)
    if isinstance(content, Mapping):
        for name in _WRAPPERS:
            inner: Any = content.get(name)
            if is_state_dict(inner):
                return dict(inner)
            if isinstance(inner, nn.Module):
                return dict(inner.state_dict())
        raise InputError(
            f"{path} holds a dict without a state dict (its keys: {some(map(str, content))}); expected names to "
            f"tensors, or such a dict under one of {', '.join(_WRAPPERS)}"
        )
    raise InputError(f"{path} holds {_typed(content)}, not a model; expected a state dict of names to tensors")


def is_state_dict(content: object) -> bool:
    """Whether this is a non-empty dict of names to tensors (`_extra_state` entries may be anything)."""
    if not isinstance(content, Mapping) or not content:
        return False
    named = [v for k, v in content.items() if not (isinstance(k, str) and k.endswith("_extra_state"))]
    return bool(named) and all(isinstance(v, Tensor) for v in named) and all(isinstance(k, str) for k in content)


def _without_prefix(state: dict[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by the names that are expected: what wrappers put before all names is taken off until they fit."""
    for prefix in _PREFIXES:
        if not state.keys() >= expected.keys() and all(name.startswith(prefix) for name in state):
            return _without_prefix({name.removeprefix(prefix): v for name, v in state.items()}, expected)
    return state


def _number(tensor: Tensor) -> tuple[bool, bool]:
    """What kind of numbers a tensor holds: torch would take quantised weights for values, and drop imaginary parts."""
    return tensor.is_floating_point(), tensor.is_complex()


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path, arch: str) -> None:
    """Loads the tensors into the module, strictly."""
    expected = module.state_dict()
    state = _without_prefix(state, expected)
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    differing = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and isinstance(v, Tensor) and not nn.parameter.is_lazy(v) and state[k].shape != v.shape
    ]
    stored = [(k, v, state[k]) for k, v in module.named_parameters() if k in state and isinstance(state[k], Tensor)]
    others = [f"{k} {given.dtype} for {v.dtype}" for k, v, given in stored if _number(given) != _number(v)]
    groups = (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", differing), ("of other numbers", others)
    )  # fmt: skip
    if any(names for _, names in groups):
        found = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in groups if names)
        raise InputError(f"{path} does not fit the module of {arch} ({found}); name the factory it was trained with")
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path} does not load into the module of {arch}: {first_line(error)}") from error
