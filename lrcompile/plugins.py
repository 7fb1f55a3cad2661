"""Finds passes through the entry-point group `lrcompile.passes`; the built-in ones come the same way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lrcompile.errors import InputError, PluginError
from lrcompile.passes import Pass, Stage

GROUP = "lrcompile.passes"


@dataclass(frozen=True)
class Discovered:
    """The passes that were found, in pipeline order, where each comes from, and what could not be loaded."""

    passes: tuple[Pass, ...]
    origins: dict[str, str]
    problems: tuple[str, ...]


def discover(points: Iterable[EntryPoint] | None = None) -> Discovered:
    """Loads every registered pass: the built-in package first, then plugins by name.

    An entry point names a Pass class, a Pass instance or a sequence of them. One that fails to load is reported in
    `problems` and the others go on.

    Raises:
        PluginError: two passes have one name.
    """
    found: dict[str, Pass] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    registered = entry_points(group=GROUP) if points is None else points
    for point in sorted(registered, key=lambda p: (p.name != "builtin", p.name, p.value)):
        origin = f"{point.dist.name if point.dist else 'unknown package'} ({point.value})"
        try:
            passes = _instances(point.load())
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the compiler goes on without it
            problems.append(f"plugin {point.name!r} of {origin} is left out: {type(error).__name__}: {error}")
            continue
        for transform in passes:
            if transform.name in found:
                raise PluginError(
                    f"two passes are named {transform.name!r}: one of {origins[transform.name]} and one of {origin}; "
                    "uninstall one, or rename its pass"
                )
            found[transform.name] = transform
            origins[transform.name] = origin
    return Discovered(tuple(found.values()), origins, tuple(problems))


def select(passes: Sequence[Pass], names: Sequence[str]) -> tuple[Pass, ...]:
    """The passes of these names, in pipeline order. A name may also be `-name`: all but that one.

    Raises:
        InputError: a name is unknown; the nearest is suggested.
    """
    names = [name.strip() for name in names]
    known = {transform.name for transform in passes}
    for name in names:
        plain = name.removeprefix("-")
        if plain not in known:
            near = difflib.get_close_matches(plain, known, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"unknown pass {plain!r}; {hint}available: {', '.join(sorted(known))}")
    wanted = {name for name in names if not name.startswith("-")} or known
    unwanted = {name.removeprefix("-") for name in names if name.startswith("-")}
    return tuple(transform for transform in passes if transform.name in wanted - unwanted)


def _instances(loaded: Any) -> list[Pass]:
    items = list(loaded) if isinstance(loaded, list | tuple) else [loaded]
    passes = [item() if isinstance(item, type) and issubclass(item, Pass) else item for item in items]
    for item in passes:
        if not isinstance(item, Pass):
            raise TypeError(f"expected a Pass or a sequence of passes, got {type(item).__name__}")
        if not isinstance(getattr(item, "stage", None), Stage):
            raise TypeError(f"{type(item).__name__} has no stage; expected one of {', '.join(map(str, Stage))}")
    return passes
