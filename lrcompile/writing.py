"""Puts files where the user wants them: what cannot be written is known before the work, and they appear whole."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lrcompile.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_file(path: str | Path) -> None:
    """Checks before the work that a file of any suffix can be written: a new one, one to replace, or a device.

    Raises:
        InputError: it cannot be; the message says what to do.
    """
    with cannot_write(path):
        if is_device(path):
            if not os.access(path, os.W_OK):
                raise InputError(f"cannot write {path}: no permission; give another path")
        elif check_place(path).is_dir():
            raise InputError(f"cannot write {path}: it is a folder; give the name of a file")


def check_place(path: str | Path) -> Path:
    """Checks that something can be put at a path, whatever may be there; the path with links followed.

    Raises:
        InputError: there is no folder to put it in, or none that can be written to.
    """
    real = followed(path)
    if not real.parent.exists():
        raise InputError(f"cannot write {path}: there is no folder {real.parent}; make it with mkdir -p")
    if not real.parent.is_dir():
        raise InputError(f"cannot write {path}: {real.parent} is a file, not a folder; give another path")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write in {real.parent}; give another path")
    return real


def check_plans_folder(path: Path) -> None:
    """Checks before the work that a folder of numbered plans can be written: a new one, or one that holds only such.

    Raises:
        InputError: it cannot be; the message says what to do.
    """
    real = followed(path)
    if not real.is_dir():
        check_file(path)
        if real.exists():
            raise InputError(f"cannot write {path}: it is a file where a folder is expected; give another path")
        return
    with cannot_write(path):
        strangers = sorted(file.name for file in real.iterdir() if not re.fullmatch(r"\d+\.json", file.name))
    if strangers:
        raise InputError(
            f"cannot write {path}: the folder holds {strangers[0]}, which is no numbered plan; give a new folder"
        )
    check_place(path)


def is_device(path: str | Path) -> bool:
    """Whether a path is neither a file nor a folder, but something else that can be written to, as /dev/stdout."""
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all; a device or a pipe is written to directly.

    Raises:
        InputError: the path cannot be written or the disk is full.
    """
    check_file(path)
    if is_device(path):
        Path(path).write_text(text, encoding="utf-8")
        return
    path = followed(path)
    data = text.encode()
    with staging(path, len(data)) as folder:
        staged = folder / path.name
        staged.write_bytes(data)
        install([(staged, path)], folder)


@contextmanager
def placed_whole(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of `path` when the block ends without an error.

    Raises:
        InputError: the path cannot be written or the disk is full.
    """
    path = followed(path)
    with staging(path, 0) as folder:
        yield folder / path.name
        install([(folder / path.name, path)], folder)


@contextmanager
def staging(path: Path, size_bytes: int) -> Iterator[Path]:
    """A folder beside the path, on the same file system, that is gone afterwards whatever happens.

    Raises:
        InputError: the folder cannot be made, or the disk is full; `size_bytes` is what is to be written, about.
    """
    with cannot_write(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", dir=path.parent))
        try:
            yield folder
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise InputError(
                f"no space left on the file system of {path.parent}: {path.name} needs about "
                f"{math.ceil(size_bytes / 1e6)} MB; make room or write elsewhere"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def install(moves: Sequence[tuple[Path, Path]], folder: Path) -> None:
    """Moves what is complete to where it goes: all of it, or on any failure none, with what was there put back."""
    if len(moves) == 1 and not moves[0][1].is_dir():
        os.replace(*moves[0])  # atomic
        return
    old = Path(tempfile.mkdtemp(dir=folder))  # of a name that none of the new ones has
    begun: list[tuple[Path, Path]] = []
    try:
        for new, final in moves:
            begun.append((new, final))
            if final.exists():
                os.replace(final, old / final.name)
            os.replace(new, final)
    except BaseException:
        for new, final in reversed(begun):
            if not new.exists() and final.exists():
                os.replace(final, new)
            if (old / final.name).exists():
                os.replace(old / final.name, final)
        raise


def followed(path: str | Path) -> Path:
    """The path with links followed, so that what a link points to is replaced and not the link."""
    return Path(os.path.realpath(path))


@contextmanager
def cannot_write(path: str | Path) -> Iterator[None]:
    """Says an error of the operating system as a sentence about the path.

    Raises:
        InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another path") from error
