"""Reads torch.export archives, and refuses those that would run code when they are opened.

torch.export's reader is not made for hostile files (torch 2.13): it unpickles custom objects, tensor subclasses and
sample inputs, loads compiled libraries, evaluates shape expressions (`sympify`), resolves any dotted name below
`torch`, imports modules named in tree specs, and executes guards and names as source text. So each of these is
checked first, through the reader that torch itself uses; an archive with more than plain tensors and known operators is
refused.

Importing this module imports torch's exporter, which takes seconds.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import operator
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SYM_OPS, _bytes_to_dataclass
from torch._export.serde.union import _Union
from torch.export import ExportedProgram
from torch.export.pt2_archive import constants
from torch.export.pt2_archive._package import load_pt2

from lrcompile.errors import InputError, first_line
from lrcompile.frontend.archives import FILE_OPERATORS, open_archive

_MODEL = constants.MODELS_FILENAME_FORMAT.format("model")
_NAME = re.compile(r"[\w .\-/+@]*")  # nothing that could call or end a statement in generated source text
_SYMBOL = re.compile(r"[^\W\d]\w*|[-+]?[\d.]+([eE][-+]?\d+)?")
_SYMPY = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan"
    "|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|Xor|Piecewise|ExprCondPair|Tuple|floor|ceiling|sign|sqrt|exp"
    "|log|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural"
    "|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt"
    "|RoundDecimal|ToFloat|Identity"
)
_EXPRESSION_NODES = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.Tuple, ast.UnaryOp, ast.BinOp),
    *(ast.unaryop, ast.operator, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop),
)
_CONTROL_FLOW = re.compile(
    "cond|while_loop|map_impl|scan|associative_scan|wrap|wrap_with_set_grad_enabled|wrap_with_autocast"
    "|tag_activation_checkpoint|auto_functionalized|auto_functionalized_v2|invoke_subgraph|flex_attention"
)


class _UnsafeError(Exception):
    """Why opening an archive would run code."""


def read_exported(file: IO[bytes], path: Path, trusted: bool) -> ExportedProgram:
    """Reads a torch.export archive. Guards stored as source text are dropped; the ranges of dynamic sizes stay.

    Raises:
        InputError: the archive is damaged, or holds what would run code on opening and is not `trusted`.
    """
    reader = open_archive(file, path)
    models = [name for name in reader.get_all_records() if name.startswith(constants.MODELS_DIR)]
    if models != [_MODEL]:
        held = ", ".join(models) or "no model"
        raise InputError(f"{path} holds {held}; expected an archive with one model, written by torch.export.save")
    try:
        if not trusted:
            _check_exported(reader)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own deprecated ways of reading
            program = load_pt2(file).exported_programs["model"]
    except _UnsafeError as error:
        raise InputError(
            f"{path} {error}, so opening it could run code from the file; save it again with torch.export.save "
            "without custom objects, or give --trust-pickle if you trust where the file came from"
        ) from None
    except Exception as error:  # the reader raises what it happens to meet: KeyError, AssertionError, SerializeError, …
        raise InputError(
            f"{path} is a torch.export archive that cannot be read ({type(error).__name__}: {first_line(error)}); "
            f"save it again with torch.export.save of torch {torch.__version__}, on the CPU"
        ) from error
    program._guards_code = []
    return program


def _check_exported(reader: Any) -> None:
    """Raises _UnsafeError where opening the archive would do more than build tensors and known operators."""
    records = reader.get_all_records()
    for name in records:
        if name.startswith((constants.AOTINDUCTOR_DIR, constants.EXECUTORCH_DIR)):
            raise _UnsafeError(f"holds compiled code ({name})")
    for folder, config_format in (
        (constants.WEIGHTS_DIR, constants.WEIGHTS_CONFIG_FILENAME_FORMAT),
        (constants.CONSTANTS_DIR, constants.CONSTANTS_CONFIG_FILENAME_FORMAT),
    ):
        if f"{folder}model.pt" in records:
            _check_plain(reader, f"{folder}model.pt")
        elif config_format.format("model") in records:
            for name, payload in json.loads(reader.get_record(config_format.format("model")))["config"].items():
                file_name = payload["path_name"]
                if payload["use_pickle"] or not file_name.startswith(
                    (constants.WEIGHT_FILENAME_PREFIX, constants.TENSOR_CONSTANT_FILENAME_PREFIX)
                ):
                    raise _UnsafeError(f"stores {name} as a pickled object ({file_name})")
    samples = constants.SAMPLE_INPUTS_FILENAME_FORMAT.format("model")
    if reader.has_record(samples):
        _check_plain(reader, samples)
    _check_value(_bytes_to_dataclass(schema.ExportedProgram, reader.get_record(_MODEL)))


def _check_plain(reader: Any, record: str) -> None:
    content = reader.get_record(record)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # whatever the restricted unpickler objects to, the unrestricted one must not try
        raise _UnsafeError(f"holds pickled Python objects ({record})") from None


def _check_value(value: Any, free_text: bool = False) -> None:
    """Checks a part of the serialised program: every operator, expression, tree and name in it."""
    match value:
        case schema.Node():
            _check_operator(value.target)
            _check_value([value.name, value.outputs])
            for given in value.inputs:
                _check_value(given.name)
                _check_value(given.arg, free_text=True)
        case schema.SymExpr():
            _check_expression(value.expr_str)
        case schema.ModuleCallSignature():
            _check_tree(value.in_spec)
            _check_tree(value.out_spec)
            _check_value([value.inputs, value.outputs, value.forward_arg_names])
        case schema.GraphModule():
            _check_value([value.graph, value.signature, value.module_call_graph, value.treespec_namedtuple_fields])
        case schema.ExportedProgram():  # guards_code is dropped, and the range constraints' keys are only looked up
            _check_value([value.graph_module, value.verifiers])
        case schema.CustomObjArgument():
            raise _UnsafeError(f"uses a custom object ({value.class_fqn})")
        case _Union():
            tag = str(value.type)
            if tag == "as_operator":
                _check_operator(value.value)
            elif not (free_text and tag in ("as_string", "as_strings")):  # FX prints these quoted
                _check_value(value.value, free_text)
        case str():
            if not _NAME.fullmatch(value):
                raise _UnsafeError(f"uses {value[:60]!r} as a name")
        case list() | tuple():
            for item in value:
                _check_value(item, free_text)
        case dict():
            for key, item in value.items():
                _check_value(key)
                _check_value(item, free_text)
        case _ if dataclasses.is_dataclass(value):
            for part in dataclasses.fields(value):
                _check_value(getattr(value, part.name))


def _check_operator(text: str) -> None:
    parts = text.split(".")
    if len(parts) == 2:
        module = {"_operator": operator, "math": math, "torch": torch}.get(parts[0])
        if getattr(module, parts[1], None) in _SYM_OPS:
            return
    elif parts[:3] == ["torch", "ops", "higher_order"]:
        if len(parts) == 4 and _CONTROL_FLOW.fullmatch(parts[3]):
            return
    elif parts[:2] == ["torch", "ops"] and len(parts) == 5:
        found: Any = torch.ops
        for name in parts[2:]:
            found = getattr(found, name, None)
        if found is None:
            raise ValueError(f"operator {text} is not registered; import the package that defines it first")
        if isinstance(found, torch._ops.OpOverload) and parts[3] not in FILE_OPERATORS:
            return
    raise _UnsafeError(f"calls {text[:80]!r}, which is not a known operator")


def _check_expression(text: str) -> None:
    """A sympy expression in `srepr` form: calls of known constructors on numbers and symbols, nothing else."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        nodes = []
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    safe = (
        bool(nodes)
        and all(isinstance(node, _EXPRESSION_NODES) for node in nodes)
        and all(isinstance(name, ast.Name) and _SYMPY.fullmatch(name.id) for name in called)
        and all(_SYMBOL.fullmatch(n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    )
    if not safe:
        raise _UnsafeError(f"has {text[:80]!r} as a size")


def _check_tree(text: str) -> None:
    """A pytree spec: `enum` contexts and default factories would import modules by name."""
    _, tree = json.loads(text)
    for kind, context in _tree_nodes(tree):
        decoded = json.loads(context) if isinstance(context, str) and context[:1] in '[{"n' else context
        strings = list(_strings([kind, decoded]))
        _register_output_type(kind)
        if kind == "collections.defaultdict" or "__enum__" in strings:
            raise _UnsafeError(f"has inputs or outputs of type {kind} that name Python objects")
        _check_value(strings)


def _register_output_type(kind: str | None) -> None:
    """Imports the module of a Hugging Face output class, which registers the class; no other package is imported."""
    if kind and re.fullmatch(r"transformers(\.\w+)+", kind) and importlib.util.find_spec("transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(kind.rpartition(".")[0])


def _tree_nodes(tree: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield tree["type"], tree["context"]
    for child in tree["children_spec"]:
        yield from _tree_nodes(child)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
