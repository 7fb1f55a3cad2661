"""Finds what a user names as `pkg.mod:attribute`: a model factory, a data loader, an evaluation."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from lrcompile.errors import InputError

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_attribute_path(text: str) -> bool:
    """Whether the text has the form `pkg.mod:attribute`."""
    return _PATH.fullmatch(text) is not None


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Puts the working directory first on the import path, for as long as the block lasts."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def import_attribute(text: str) -> Any:
    """The attribute named `pkg.mod:attribute`, with the working directory importable.

    Raises:
        InputError: the text has another form, the module or attribute does not exist, or importing it fails.
    """
    if not is_attribute_path(text):
        raise InputError(f"{text!r} is not of the form pkg.mod:attribute, for example models.resnet:build")
    module_name, _, attribute = text.partition(":")
    with working_directory_importable():
        found: Any = _import_module(module_name, text)
    reached = module_name
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = get_close_matches(name, [n for n in dir(found) if not n.startswith("__")], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "check the spelling"
            raise InputError(f"{text}: {reached} has no attribute {name!r}; {hint}")
        found, reached = getattr(found, name), f"{reached}.{name}"
    return found


def call(function: Callable[[], Any], text: str) -> Any:
    """Calls what the user named as `text`, without arguments and with the working directory importable.

    Raises:
        InputError: it is not callable, or it raised: the exception is quoted.
    """
    if not callable(function):
        raise InputError(f"{text} is a {type(function).__name__}; expected something callable without arguments")
    try:
        with working_directory_importable():
            return function()
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{text} raised {type(error).__name__}: {error}; it is called without arguments and must return its result"
        ) from error


def _import_module(name: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise InputError(
                f"{text}: importing {name} needs the module {missing!r}, which is not installed"
            ) from error
        parent = missing.rpartition(".")[0]
        near = get_close_matches(missing.rpartition(".")[2], _siblings(parent), n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join(filter(None, (parent, near[0])))!r}?" if near else "check the name"
        raise InputError(
            f"{text}: there is no module {missing!r} in {os.getcwd()} or among the installed packages; {hint}"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{text}: importing {name} raised {type(error).__name__}: {error}") from error


def _siblings(parent: str) -> list[str]:
    """The modules beside the one that was not found: in the parent package, else in the working directory."""
    module = sys.modules.get(parent)
    paths = list(getattr(module, "__path__", [])) if module else [os.getcwd()]
    return [found.name for found in pkgutil.iter_modules(paths)]
