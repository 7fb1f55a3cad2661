"""Decompositions remembered on disk by what they are of: the next compile of the same model and data makes none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrcompile.cache import put_whole
from lrcompile.planning.decompose import Spectrum, Tucker
from lrcompile.planning.moments import Moments
from lrcompile.planning.windows import Fit, WindowSpectrum, WindowTucker

VERSION = 1  # raise it when a decomposition of the same inputs becomes another
LEAST_SIDE = 256  # of what is decomposed: smaller ones take no longer than reading a file
MOST_BYTES = 2**30

D = TypeVar("D", Spectrum, Tucker)

_KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (Spectrum, Tucker, WindowSpectrum, WindowTucker)}
_GIVEN = ("matrix", "kernel")  # the layer's own weight, which is not written
_TRIANGULAR = "fit.lower"  # the largest by far, of which half is written


@dataclass(frozen=True)
class Store:
    """A folder of decompositions, at most `most_bytes` of them; those that were not read for longest go first.

    A file is written whole or not at all, and one that is damaged counts as none. A full or read-only disk, or what is
    larger than all of that, costs time in the next compile and nothing else.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    def of(self, decompose: Callable[..., D], weight: Tensor, *inputs: Moments | Tensor | bool | None) -> D:
        """What `decompose` makes of a weight and statistics of its inputs; read where it was made before.

        Results are the same, to the last bit, whether they are read or made.
        """
        if max(weight.shape[0], weight.shape[1]) < LEAST_SIDE:
            return decompose(weight, *inputs)
        path = self.folder / f"{_key(decompose.__name__, weight, *inputs)}.safetensors"
        found = _read(path, weight)
        if found is None:
            tensors, plain = _packed(decompose(weight, *inputs))
            self._write(path, tensors, plain)
            found = _unpacked(tensors, plain, weight)
        return found  # type: ignore[return-value]

    def _write(self, path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.most_bytes:
            return
        with contextlib.suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with put_whole(path) as file:
                save_file(dict(tensors), file, {"plain": json.dumps(plain)})

    def _make_room(self, wanted: int) -> None:
        files = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self.folder)]
        total = wanted + sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _key(name: str, *parts: Moments | Tensor | bool | None) -> str:
    """Names what is decomposed, and how: rounding depends on torch and on the processor and threads that it uses."""
    here = (VERSION, name, torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    digest = hashlib.sha256(repr(here).encode())
    for part in parts:
        if isinstance(part, Moments):
            digest.update(f"moments {part.rows}".encode())
        for tensor in (part.gram, part.total) if isinstance(part, Moments) else (part,):
            if isinstance(tensor, Tensor):
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
            else:
                digest.update(repr(tensor).encode())
    return digest.hexdigest()


def _packed(found: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fields of a decomposition: tensors, and what is none."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"kind": type(found).__name__} if not prefix else {}
    for entry in fields(found):
        value, name = getattr(found, entry.name), prefix + entry.name
        if isinstance(value, Fit):
            parts = _packed(value, f"{name}.")
            tensors, plain = {**tensors, **parts[0]}, {**plain, **parts[1]}
        elif isinstance(value, Tensor):
            if entry.name not in _GIVEN:
                whole = value.detach().clone(memory_format=torch.contiguous_format)
                tensors[name] = whole[*_triangle(len(whole))] if name == _TRIANGULAR else whole
        else:
            plain[name] = value
    return tensors, plain


def _unpacked(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], weight: Tensor) -> Spectrum | Tucker:
    kind = _KINDS[plain["kind"]]
    given = {**plain, **tensors, **dict.fromkeys(_GIVEN, weight.detach())}
    if _TRIANGULAR in given:
        packed = given[_TRIANGULAR]
        side = (math.isqrt(8 * len(packed) + 1) - 1) // 2
        given[_TRIANGULAR] = packed.new_zeros(side, side).index_put_(_triangle(side), packed)
    fit = {name.removeprefix("fit."): value for name, value in given.items() if name.startswith("fit.")}
    if fit:
        given["fit"] = Fit(**fit)
    return kind(**{entry.name: given[entry.name] for entry in fields(kind)})  # type: ignore[no-any-return]


def _triangle(side: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(side, side)
    return rows, columns


def _read(path: Path, weight: Tensor) -> Spectrum | Tucker | None:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            plain = json.loads(file.metadata()["plain"])
        found = _unpacked(tensors, plain, weight)
        os.utime(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return found
