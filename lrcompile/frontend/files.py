"""What a file that a user named holds, by its content, read without running any code that is in it."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import warnings
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lrcompile.errors import InputError, first_line
from lrcompile.frontend.archives import open_archive
from lrcompile.frontend.imports import working_directory_importable

Form = Literal["exported", "torchscript", "safetensors", "checkpoint", "legacy checkpoint", "pickle"]

_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization.MAGIC_NUMBER as a pickled integer
_SIGNATURES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "an ELF program or library"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`"),
)


def open_input(path: Path, expected: str) -> IO[bytes]:
    """Opens a regular, non-empty file for reading.

    Raises:
        InputError: it is missing (similar names are suggested), a directory, a device, empty or not readable.
    """
    if not exists(path):
        folder, names = path.parent, list[str]()
        try:
            path.stat()
        except PermissionError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        except (OSError, ValueError):  # not there, too long, or no name at all
            with contextlib.suppress(OSError):
                names = sorted(p.name for p in folder.iterdir() if p.name != path.name)  # a link to nothing
        near = get_close_matches(path.name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(str(folder / n) for n in near)}?" if near else f"expected {expected}"
        raise InputError(f"there is no file {path}; {hint}")
    if path.is_dir():
        raise InputError(f"{path} is a directory; expected {expected}")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; expected {expected}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; expected {expected}, so copy or save it again")
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def recognise(file: IO[bytes], path: Path) -> Form | None:
    """The form of a file that PyTorch or safetensors wrote, or None for anything else.

    Raises:
        InputError: the file is a damaged zip archive or a zip archive of another kind.
    """
    file.seek(0)
    head = file.read(64)
    size = file.seek(0, 2)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        records = open_archive(file, path).get_all_records()
        if "archive_format" in records:
            return "exported"
        if "constants.pkl" in records:
            return "torchscript"
        if "data.pkl" in records:
            return "checkpoint"
        raise InputError(f"{path} is a zip archive without a model (it holds {some(records)}); expected a model file")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= size:
        return "safetensors"
    if _LEGACY_MAGIC in head[:32]:
        return "legacy checkpoint"
    if _is_pickle(file, head):
        return "pickle"
    return None


def _is_pickle(file: IO[bytes], head: bytes) -> bool:
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return True
    file.seek(0)
    try:
        return sum(1 for _ in pickletools.genops(file.read(1 << 20))) > 2
    except (ValueError, OverflowError, IndexError):
        return False
    finally:
        file.seek(0)


def describe(head: bytes) -> str:
    """The first bytes of a file in words."""
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head.lower()):
        return "an ONNX model, which cannot be read yet; give the PyTorch model it came from"
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return f"bytes of an unknown kind (first: {head[:12].hex(' ')})"
    if text.isprintable() or any(c in text for c in "\n\r\t"):
        return f"text ({text.splitlines()[0][:40]!r})"
    return f"bytes of an unknown kind (first: {head[:12].hex(' ')})"


def exists(path: Path) -> bool:
    """Whether there is such a file or directory."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or holds a null byte: no such file either way
        return False


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} is a safetensors file that cannot be read: {first_line(error)}") from error


def read_pickle(file: IO[bytes], path: Path, form: Form, advice: str, trust_pickle: bool = False) -> Any:
    """The content of a `torch.save` file or a pickle; without `trust_pickle` only tensors and plain containers.

    Raises:
        InputError: the file is damaged, or only running its code could read it; `advice` is the next step then.
    """
    file.seek(0)
    try:
        if form == "pickle" and trust_pickle:
            with working_directory_importable():
                return pickle.load(file)
        if form == "pickle":
            raise pickle.UnpicklingError("a plain pickle, not written by torch.save")
        with working_directory_importable(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(file, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # a pickle can raise anything; each is quoted below
        if trust_pickle:
            raise InputError(f"{path} cannot be unpickled: {type(error).__name__}: {first_line(error)}") from error
        names = _foreign_globals(file, path, form)
        if not names and form != "pickle":
            text = str(error).rpartition("WeightsUnpickler error: ")[2]  # behind advice to run what is in the file
            reason = first_line(text or type(error).__name__)
            raise InputError(f"{path} is damaged or truncated ({reason}); copy or save it again") from error
        what = f"pickled Python objects ({some(names)})" if names else "a plain Python pickle, not made by torch.save"
        raise InputError(f"{path} holds {what}, and unpickling runs code from the file; {advice}") from None


def _foreign_globals(file: IO[bytes], path: Path, form: Form) -> list[str]:
    """Names that the pickle would import beyond torch's own and plain containers; read by disassembly only."""
    file.seek(0)
    stream = open_archive(file, path).get_record("data.pkl") if form == "checkpoint" else file.read(1 << 24)
    names = dict.fromkeys(_globals(stream, pickles=5 if form == "legacy checkpoint" else 1))
    allowed = ("torch._utils.", "torch._tensor.", "torch.storage.", "collections.OrderedDict")
    return [n for n in names if not n.startswith(allowed) and not re.fullmatch(r"torch\.\w+(Storage|Tensor)", n)]


def _globals(stream: bytes, pickles: int) -> Iterator[str]:
    """The dotted names that up to `pickles` concatenated pickles import, in order."""
    position = 0
    for _ in range(pickles):
        pushed: list[Any] = [None]
        memo: dict[Any, Any] = {}
        last = 0
        try:
            for opcode, argument, where in pickletools.genops(stream[position:]):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".", 1)
                elif opcode.name == "STACK_GLOBAL" and all(isinstance(name, str) for name in pushed[-2:]):
                    yield ".".join(pushed[-2:])
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1]
                    continue
                pushed.append(memo.get(argument) if "BINGET" in opcode.name else argument)
                last = where or 0
        except (ValueError, OverflowError, IndexError):
            return
        position += last + 1


def some(names: Iterable[str], count: int = 3) -> str:
    """The first names of a list, and how many there are beyond."""
    listed = list(names)
    return ", ".join(listed[:count]) + (f", … {len(listed) - count} more" if len(listed) > count else "")
