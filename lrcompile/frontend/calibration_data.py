"""Calibration data: samples of real inputs, read from a file or a loader, checked, and split into equal batches."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lrcompile.errors import InputError, first_line
from lrcompile.frontend.files import describe, exists, open_input, read_pickle, read_safetensors, recognise
from lrcompile.frontend.imports import call, import_attribute, is_attribute_path, working_directory_importable
from lrcompile.frontend.inputs import check_batch
from lrcompile.graph.verify import is_float
from lrcompile.memory import available_bytes

_EXPECTED = (
    "expected a .npz, .pt or .safetensors file that holds one array per input, samples stacked on the first axis, "
    "or pkg.mod:loader, which returns batches"
)
_PICKLE_ADVICE = "save the inputs as a dict of names to tensors with torch.save, as .npz or as .safetensors"
MOST_BATCHES = 64  # of a loader, which may have no end
SHARE_OF_MEMORY = 0.2  # that data may take: they are put together twice, and the model needs more


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Batches of inputs by name, all of one size.

    `source` is for people. `digest` is the SHA-256 (hex) over the batches' names, shapes, dtypes and bytes, in order.
    `samples` counts the samples in the batches; those that did not fill a last batch are not among them. `places` are
    the numbers of the batches' first samples among all that there were: where shapes differ, some are left out between.
    `cut` says that a loader would have given more than memory lasts for.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    digest: str
    samples: int
    places: tuple[int, ...] = ()
    cut: bool = False

    def in_batches(self, labels: Tensor) -> Tensor:
        """The labels of the samples in the batches, of labels of all samples that there were.

        Raises:
            InputError: there are fewer labels than samples.
        """
        if not self.places:
            return labels
        sizes = [_count(batch) for batch in self.batches]
        spans = [(place, place + size) for place, size in zip(self.places, sizes, strict=True)]
        if len(labels) < spans[-1][1]:
            raise InputError(f"there are {len(labels)} labels for {spans[-1][1]} samples; give one for each sample")
        return torch.cat([labels[start:end] for start, end in spans])

    def check_against(self, example: Mapping[str, Tensor]) -> CalibrationData:
        """The same data in the dtypes of the example inputs (float64 becomes float32, say), after a check.

        Raises:
            InputError: the names, the kind of a dtype (floating, integer, bool) or a shape beyond the batch differ.
        """
        for batch in self.batches:
            _check_names(batch, list(example), self.source)
            for name, tensor in batch.items():
                wanted = example[name]
                if _dtype_kind(tensor.dtype) != _dtype_kind(wanted.dtype):
                    raise InputError(
                        f"{self.source}: {name} is {_short(tensor.dtype)}, but the model takes {_short(wanted.dtype)}; "
                        "convert the calibration data"
                    )
                if tensor.shape[1:] != wanted.shape[1:]:
                    raise InputError(
                        f"{self.source}: a sample of {name} has shape {tuple(tensor.shape[1:])}, but the model takes "
                        f"{tuple(wanted.shape[1:])}; the first axis of the calibration data counts samples"
                    )
        cast = tuple({name: t.to(example[name].dtype) for name, t in batch.items()} for batch in self.batches)
        return replace(self, batches=cast)


def load_calibration(
    text: str | Path,
    input_names: Sequence[str],
    batch: int,
    *,
    max_batches: int | None = MOST_BATCHES,
    optional: Sequence[str] = (),
) -> CalibrationData:
    """Reads calibration data from a file or from a loader named `pkg.mod:loader`; the content decides, not the suffix.

    A file holds a dict of names to arrays, a list of such dicts, or, for a model with one input, an array. A loader is
    called without arguments and returns an iterable of batches: dicts, tuples in the order of `input_names`, or
    tensors; at most `max_batches` of them are taken. Inputs named in `optional` may be there. Files run no code:
    pickled objects are refused.

    Raises:
        InputError: the data cannot be read, do not fit the names, hold no full batch, or hold NaN or infinity.
    """
    text, path = str(text), Path(text)
    if is_attribute_path(text) and not exists(path):
        loader = import_attribute(text)
        content = loader if isinstance(loader, Iterable) and not callable(loader) else call(loader, text)
        return calibration_from(content, input_names, batch, text, max_batches=max_batches, optional=optional)
    with open_input(path, f"calibration data: {_EXPECTED}") as file:
        content = _read(file, path)
    return calibration_from(content, input_names, batch, path.name, max_batches=None, optional=optional)


def calibration_from(
    data: Any,
    input_names: Sequence[str],
    batch: int,
    source: str = "python",
    *,
    max_batches: int | None = MOST_BATCHES,
    optional: Sequence[str] = (),
) -> CalibrationData:
    """Makes calibration data of what Python holds: a dict of arrays, an array, or an iterable of batches.

    Of the inputs named in `optional` those are taken that the first piece holds. No more pieces are taken than memory
    lasts for.

    Raises:
        InputError: as for `load_calibration`.
    """
    check_batch(batch)
    chunks: list[dict[str, Tensor]] = []
    total, cut, names = 0, False, list(input_names)
    is_held = isinstance(data, list | tuple)  # in memory already
    room = math.inf if is_held else SHARE_OF_MEMORY * available_bytes()
    for raw in _chunks(data, {len(names), len(names) + len(optional)}, source, max_batches):
        if cut := room < 0:
            break
        if not chunks:
            names += _present(raw, len(names), optional)
        chunk = _named(raw, names, source)
        _check_samples(chunk, total, source)
        total += _count(chunk)
        room -= sum(tensor.numel() * tensor.element_size() for tensor in chunk.values())
        chunks.append(chunk)
    if total == 0:
        raise InputError(f"{source} holds no samples; {_EXPECTED}")
    runs = _runs(chunks)
    batches = tuple(part for run in runs for part in _split(run, batch))
    counts = [_count(run) for run in runs]
    if not batches:
        most = max(counts)
        held = (
            f"{most} samples" if len(runs) == 1 else f"{total} samples, {most} of them at most with one shape in a row"
        )
        raise InputError(f"{source} holds {held}, fewer than one batch of {batch}; give more, or --batch {most}")
    spans = zip(accumulate(counts, initial=0), counts, strict=False)
    places = tuple(place for start, count in spans for place in range(start, start + count - batch + 1, batch))
    return CalibrationData(batches, source, _digest(batches), batch * len(batches), places, cut)


def _count(arrays: Mapping[str, Sized]) -> int:
    """How many samples arrays by name hold; all hold as many."""
    return len(next(iter(arrays.values())))


def load_labels(text: str, whole: bool = True) -> Tensor:
    """Reads the labels of samples [samples, …] from a file that holds one array: of integers, or any if not `whole`.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    path = Path(text)
    numbers = "whole numbers" if whole else "numbers"
    expected = f"expected a .npy, .npz, .pt or .safetensors file with one array of {numbers}, one or more a sample"
    with open_input(path, f"labels: {expected}") as file:
        content = _read(file, path)
    if isinstance(content, Mapping) and len(content) == 1:
        content = next(iter(content.values()))
    if not _is_array(content):
        items = f" of {len(content)} items" if isinstance(content, Sized) else ""
        raise InputError(f"{path} holds a {type(content).__name__}{items}; {expected}")
    labels = _tensor(content, "labels", str(path))
    no_classes = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if (whole and no_classes) or not labels.dim():
        raise InputError(f"{path} holds {_short(labels.dtype)} of shape {tuple(labels.shape)}; {expected}")
    return labels.long() if whole else labels


# -------------------------------------------------------------------------------------------------------- reading


def _read(file: IO[bytes], path: Path) -> Any:
    head = file.read(64)
    file.seek(0)
    if head.startswith(b"\x93NUMPY") or (head.startswith(b"PK\x03\x04") and _is_npz(file)):
        return _read_numpy(file, path)
    form = recognise(file, path)
    if form == "safetensors":
        return read_safetensors(path)
    if form in ("exported", "torchscript"):
        raise InputError(f"{path} holds a model, not calibration data; {_EXPECTED}")
    if form is None:
        raise InputError(f"{path} is not calibration data: it looks like {describe(head)}; {_EXPECTED}")
    return read_pickle(file, path, form, _PICKLE_ADVICE)


def _is_npz(file: IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # what is wrong with it is said by whoever reads zip archives
    finally:
        file.seek(0)


def _read_numpy(file: IO[bytes], path: Path) -> Any:
    try:
        loaded = np.load(file, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except MemoryError as error:
        raise InputError(f"{path} claims more than memory holds ({first_line(error)}); give fewer samples") from error
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path} holds an array of Python objects, and unpickling runs code from the file; "
                "save arrays of numbers, all samples of one shape"
            ) from None
        raise InputError(f"{path} is a NumPy file that cannot be read ({first_line(error)}); save it again") from error


def _chunks(data: Any, counts: set[int], source: str, limit: int | None) -> Iterator[Any]:
    """The pieces that the data come in, each a dict, a tuple or an array of stacked samples.

    As many arrays as one of the `counts` of inputs are one piece.
    """
    if isinstance(data, (Tensor, np.ndarray, Mapping)):
        yield data
    elif isinstance(data, (list, tuple)) and len(data) in counts - {1} and all(map(_is_array, data)):
        yield tuple(data)
    elif isinstance(data, tuple) and 0 in counts and len(data) < max(counts) and all(map(_is_array, data)):
        yield data  # the first of inputs that are all optional
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        try:
            with working_directory_importable():
                yield from islice(data, limit)
        except Exception as error:  # the user's own loader can raise anything: it is quoted
            if isinstance(error, InputError):
                raise
            raise InputError(f"{source} raised {type(error).__name__} while it gave batches: {error}") from error
    else:
        raise InputError(f"{source} holds a {type(data).__name__}; {_EXPECTED}")


def _present(raw: Any, required: int, optional: Sequence[str]) -> Sequence[str]:
    """Which of the optional inputs a piece holds: by name, or as many as follow those that are required."""
    if isinstance(raw, Mapping):
        return [name for name in optional if name in raw]
    count = len(raw) if isinstance(raw, (tuple, list)) else 1
    return optional[: count - required] if count > required else ()


def _is_array(value: object) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _named(raw: Any, names: Sequence[str], source: str) -> dict[str, Tensor]:
    """One piece as tensors by name, in the order of the model's inputs."""
    if _is_array(raw):
        raw = (raw,)
    if isinstance(raw, (tuple, list)):
        if len(raw) != len(names):
            raise InputError(
                f"{source} gives {len(raw)} unnamed arrays, but the model takes {len(names)} inputs "
                f"({', '.join(names)}); give a dict by name, or as many as there are inputs (no labels)"
            )
        raw = dict(zip(names, raw, strict=True))
    if not isinstance(raw, Mapping):
        raise InputError(f"{source} gives a {type(raw).__name__} as a batch; {_EXPECTED}")
    _check_names(raw, names, source)
    return {name: _tensor(raw[name], name, source) for name in names}


def _tensor(value: Any, name: str, source: str) -> Tensor:
    if isinstance(value, Tensor):
        is_float8 = value.is_floating_point() and value.element_size() == 1
        if value.is_nested or value.is_meta or is_float8:
            kind = "is a nested tensor" if value.is_nested else "has no values" if value.is_meta else "is in float8"
            raise InputError(f"{source}: {name} {kind}; give arrays of numbers or bools, all samples of one shape")
        tensor = value.detach().cpu()
        return tensor if tensor.layout == torch.strided else tensor.to_dense()
    if not isinstance(value, np.ndarray):
        raise InputError(f"{source}: {name} is a {type(value).__name__}; expected a tensor or a NumPy array")
    try:
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise InputError(
            f"{source}: {name} is an array of {value.dtype}, which PyTorch does not have; "
            "give arrays of numbers or bools, all samples of one shape"
        ) from None


# ------------------------------------------------------------------------------------------------ checks, batches


def _check_names(got: Mapping[Any, Any], names: Sequence[str], source: str) -> None:
    for name in got:
        if name not in names:
            near = get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the model takes {', '.join(names)}"
            raise InputError(f"{source} holds {name!r}, which is not an input of the model; {hint}")
    missing = [name for name in names if name not in got]
    if missing:
        raise InputError(
            f"{source} lacks the input {', '.join(missing)}; "
            f"expected {', '.join(names)}, got {', '.join(map(str, got)) or 'none'}"
        )


def _check_samples(chunk: Mapping[str, Tensor], first: int, source: str) -> None:
    """Refuses inputs that differ in their number of samples, and values that are not finite."""
    for name, tensor in chunk.items():
        if tensor.dim() == 0:
            raise InputError(f"{source}: {name} is a single number; expected samples stacked on the first axis")
    counts = {name: len(tensor) for name, tensor in chunk.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(
            f"{source} holds different numbers of samples ({listed}); give the same number for every input"
        )
    for name, tensor in chunk.items():
        if not is_float(tensor) or not tensor.numel():
            continue
        bad = ~torch.isfinite(tensor).flatten(1).all(dim=1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
        if bad.any():
            raise InputError(
                f"{source}: {name} holds NaN or infinity in {int(bad.sum())} of {len(bad)} samples, "
                f"first in sample {first + int(bad.nonzero()[0])}; remove such samples"
            )


def _runs(chunks: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Pieces in a row of one shape and dtype, joined."""
    runs = [list(run) for _, run in groupby(chunks, _layout)]
    return [{name: torch.cat([chunk[name] for chunk in run]) for name in run[0]} for run in runs]


def _split(run: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of exactly `size` samples; a remainder is dropped."""
    for start in range(0, _count(run) - size + 1, size):
        yield {name: tensor[start : start + size] for name, tensor in run.items()}


def _layout(chunk: Mapping[str, Tensor]) -> list[Any]:
    return [(name, tensor.shape[1:], tensor.dtype) for name, tensor in chunk.items()]


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.items():
            digest.update(f"{name} {tuple(tensor.shape)} {_short(tensor.dtype)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dtype_kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
