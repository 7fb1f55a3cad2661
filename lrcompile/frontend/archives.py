"""Zip archives that torch writes, and TorchScript ones in particular, read without running Python code in them."""

from __future__ import annotations

import io
import re
import tokenize
import warnings
import zipfile
from pathlib import Path
from typing import IO

import torch

from lrcompile.errors import InputError, first_line

MOST_UNPACKED = 1 << 28  # bytes of an archive that unpacks to more than a hundred times its size: torch packs nothing
FILE_OPERATORS = frozenset(("save", "load", "from_file", "read_file", "write_file"))  # they reach the file system


def open_archive(file: IO[bytes], path: Path) -> torch._C.PyTorchFileReader:
    """The reader that torch itself uses, so that what is checked is what is loaded.

    Raises:
        InputError: the archive is damaged, or is not one that torch wrote.
    """
    file.seek(0)
    try:
        reader = torch._C.PyTorchFileReader(file)
        names = reader.get_all_records()
    except (RuntimeError, OSError) as error:
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError):
            members = []
        names = [member.filename for member in members]
        if not members or min(member.header_offset for member in members) > 0:  # a lost end, or an archive within
            raise InputError(f"{path} is a truncated or damaged zip archive; copy or save it again") from None
        if "serialized_exported_program.json" in names:
            raise InputError(
                f"{path} was saved by torch.export of torch 2.7 or older; load it there, and save it with a newer torch"
            ) from error
        listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise InputError(
            f"{path} is a zip archive without a model (it holds {listed}); expected a model file"
        ) from None
    unpacked = sum(map(reader.get_record_size, names))
    if unpacked > max(MOST_UNPACKED, 100 * file.seek(0, 2)):
        raise InputError(f"{path} unpacks to {unpacked >> 20} MB, far more than it holds: torch did not write it so")
    if len({name.lower() for name in names}) < len(names):  # the reader finds names without regard to case
        raise InputError(f"{path} holds records whose names differ in case alone, which torch cannot tell apart")
    return reader


def read_torchscript(file: IO[bytes], path: Path) -> torch.jit.ScriptModule:
    """Reads a TorchScript archive on the CPU.

    Its unpickler builds only tensors and TorchScript classes, and its code is TorchScript, not Python; but that code
    (`__setstate__` runs on loading) can write files through `torch.save`, so operators that reach files are refused,
    as are attributes with names that would end up in Python source text.

    Raises:
        InputError: the archive is damaged, its code reads or writes files, or it has attributes with such names.
    """
    reader = open_archive(file, path)
    for record in reader.get_all_records():
        if record.lower().startswith("code/") and record.lower().endswith(".py"):
            found = _unsafe(reader.get_record(record))
            if found:
                raise InputError(
                    f"{path} contains TorchScript code that {found} in {record}; "
                    "give a model without it, for example one saved with torch.export.save"
                )
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
            return torch.jit.load(file, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is a TorchScript archive that cannot be read: {first_line(error)}") from error


def _unsafe(source: bytes) -> str | None:
    """What code does that is refused, if anything.

    It uses an operator that reaches files, or `torch` or `ops` in a way that could hide one, or it names an attribute
    with more than letters, digits and underscores.
    """
    try:
        tokens = [
            token.string
            for token in tokenize.tokenize(io.BytesIO(source).readline)
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
        ]
    except (tokenize.TokenError, SyntaxError) as error:
        return f"cannot be read ({first_line(error)})"
    tokens += [""] * 6
    for i, token in enumerate(tokens):
        if token == "__annotations__" and not re.fullmatch(r"""["']\w+["']""", tokens[i + 2]):
            return f"declares an attribute {tokens[i + 2][:60]}"
        if token not in ("torch", "ops") or (i and tokens[i - 1] == ".") or tokens[i + 1] in (":", "="):
            continue
        length = 3 if token == "torch" else 5
        use = tokens[i : i + length]
        plain = use[1::2] == ["."] * (length // 2) and tokens[i + length] != "."
        if not plain or use[-1] in FILE_OPERATORS:
            return f"can reach files ({''.join([*use, *tokens[i + length : i + length + 2]])})"
    return None
