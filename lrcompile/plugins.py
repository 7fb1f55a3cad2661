"""Finds passes through the entry-point group `lrcompile.passes`; the built-in ones come the same way."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lrcompile.errors import InputError, PlanError, PluginError, first_line
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
            why = f"{type(error).__name__}: {first_line(error)}"  # some libraries write pages
            problems.append(f"plugin {point.name!r} of {origin} is left out: {why}")
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


def given(passes: Any) -> tuple[Pass, ...]:
    """Passes as Python code gives them: instances, or classes whose options all have defaults.

    Raises:
        PluginError: one is no pass, or two have one name.
    """
    try:
        found = _instances(list(passes) if isinstance(passes, Iterable) and not isinstance(passes, str) else passes)
    except TypeError as error:
        raise PluginError(f"passes: {error}; names are for select(discover().passes, names)") from error
    names = [transform.name for transform in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PluginError(f"passes: two are named {twice!r}; give one of them, or rename the other")
    return tuple(found)


def select(passes: Sequence[Pass], names: Sequence[str]) -> tuple[Pass, ...]:
    """The passes of these names, in pipeline order. A name may also be `-name`: all but that one.

    Raises:
        InputError: a name is unknown; the nearest is suggested.
    """
    names = [name.strip() for name in ([names] if isinstance(names, str) else names)]
    known = {transform.name for transform in passes}
    for name in names:
        plain = name.removeprefix("-")
        if plain not in known:
            raise InputError(_unknown("pass", plain, known))
    wanted = {name for name in names if not name.startswith("-")} or known
    unwanted = {name.removeprefix("-") for name in names if name.startswith("-")}
    return tuple(transform for transform in passes if transform.name in wanted - unwanted)


def configure(passes: Sequence[Pass], settings: Sequence[str]) -> tuple[Pass, ...]:
    """The passes with options set by words of the form PASS.OPTION=VALUE; lists are comma-separated.

    Raises:
        InputError: the pass or the option is unknown, or the value is none that the option takes.
    """
    by_name = {transform.name: transform for transform in passes}
    for setting in settings:
        place, equals, text = setting.partition("=")
        name, _, option = place.strip().partition(".")
        if not equals or not option:
            raise InputError(f"--option got {setting!r}; expected PASS.OPTION=VALUE; `lrcompile passes` lists them")
        if name not in by_name:
            raise InputError(f"--option {setting}: {_unknown('pass', name, by_name)}")
        try:
            by_name[name] = replace(by_name[name], **parsed_option(type(by_name[name]), name, option, text))
        except (TypeError, ValueError) as error:  # of the pass itself, which may check its options
            raise InputError(f"--option {setting}: {error}") from error
    return tuple(by_name.values())


def as_planned(
    passes: Sequence[Pass], used: Iterable[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Pass]:
    """The passes by name, with the options that a plan was made with.

    Raises:
        PlanError: one that the plan uses is not installed, or has no such options.
    """
    result = {transform.name: transform for transform in passes}
    for name in used:
        if name not in result:
            raise PlanError(
                f"the plan uses pass {name!r}, which is not installed; "
                f"known: {', '.join(sorted(result))}; install its plugin or make a new plan"
            )
    for name, made_with in options.items():
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in made_with.items()}
        try:
            result[name] = replace(result[name], **values)
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(f"the plan sets options of pass {name!r} that it does not have: {error}") from error
    return result


def parsed_option(kind: type, name: str, option: str, text: str) -> dict[str, Any]:
    """A field of a dataclass and its value, from words; `name` is what messages call the dataclass.

    Raises:
        InputError: there is no such field, or the text is no value of it.
    """
    setting = f"--option {name}.{option}={text}"
    known = [f.name for f in fields(kind)]
    if option not in known:
        raise InputError(f"{setting}: {_unknown(f'option of {name}', option, known)}")
    try:
        return {option: _parsed(text.strip(), get_type_hints(kind)[option])}
    except (NameError, ValueError) as error:  # types that a plugin imports for its type checker alone have no names
        raise InputError(f"{setting}: {error}") from error


def _parsed(text: str, kind: Any) -> Any:
    """A word as a value of an option's type; raises ValueError with what was expected."""
    if get_origin(kind) is tuple:
        return tuple(_parsed(part.strip(), get_args(kind)[0]) for part in text.split(",") if part.strip())
    if get_origin(kind) is Literal:
        choices = {str(value): value for value in get_args(kind)}
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(map(repr, choices))}, got {text!r}")
        return choices[text]
    if get_origin(kind) in (UnionType, Union) and type(None) in get_args(kind):
        return _parsed(text, next(part for part in get_args(kind) if part is not type(None)))
    if kind is bool:
        return _parsed(text.lower(), Literal["true", "false"]) == "true"
    if kind not in (int, float, str):
        raise ValueError("an option of this type can be set from Python only")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}, got {text!r}") from None


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}available: {', '.join(sorted(known)) or 'none'}"


def _instances(loaded: Any) -> list[Pass]:
    items = list(loaded) if isinstance(loaded, list | tuple) else [loaded]
    passes = [item() if isinstance(item, type) and issubclass(item, Pass) else item for item in items]
    for item in passes:
        if not isinstance(item, Pass):
            raise TypeError(f"expected a Pass or a sequence of passes, got {type(item).__name__}")
        if not isinstance(getattr(item, "stage", None), Stage):
            raise TypeError(f"{type(item).__name__} has no stage; expected one of {', '.join(map(str, Stage))}")
        if not isinstance(item.name, str) or not re.fullmatch(r"[^-\s,.=][^\s,.=]*", item.name):
            raise TypeError(f"{type(item).__name__} is named {item.name!r}; expected letters and hyphens, as my-pass")
    return passes
