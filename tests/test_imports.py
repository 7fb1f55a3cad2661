"""Imports point downward only: the table says what each part may know, and every module is held to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest
from lrcompile_passes import PASSES

ROOT = Path(__file__).parents[1]
SOURCES = (*sorted((ROOT / "lrcompile").rglob("*.py")), *sorted((ROOT / "passes").rglob("*.py")))
MOST_LINES = 500

# Each part of the compiler, lowest first, and the lower parts that it may import. A part is a module or a package.
MAY_IMPORT = {
    "errors": "",
    "memory": "",
    "cache": "",
    "writing": "errors",
    "nn": "",
    "graph": "errors",
    "devices": "errors cache writing graph",
    "frontend": "errors memory nn graph",
    "lower": "errors nn graph frontend",
    "emit": "errors writing nn graph frontend",
    "planning.moments": "errors",
    "planning.decompose": "planning.moments",
    "planning.windows": "planning.moments planning.decompose",
    "planning.store": "cache planning.moments planning.decompose planning.windows",
    "passes": "errors graph devices planning.moments planning.decompose planning.windows planning.store",
    "plugins": "errors passes",
    "planning": "errors memory graph devices frontend planning.moments planning.decompose passes",
    "report": "errors graph devices frontend planning",
    "confirm": "errors graph devices frontend emit planning",
    "remarks": "devices frontend graph planning planning.moments",
    "quantization": "errors graph devices frontend emit planning report confirm",
    "prepared": "devices frontend graph passes planning report confirm",
    "compile": "errors cache graph devices frontend lower emit passes plugins planning.store planning report confirm "
    "prepared remarks quantization",
    "front": "errors graph planning prepared compile",
    "recovery": "errors memory cache graph",
    "recover": "errors memory graph frontend lower planning report recovery compile",
    "progressive": "errors frontend graph planning report recovery prepared compile recover",
    "request": "errors writing emit frontend planning plugins quantization recovery",
    "session": "errors writing devices frontend emit plugins planning report quantization compile front recovery "
    "recover progressive request",
    "cli": "errors devices frontend plugins planning report session",
    "__main__": "cli",
    "lrcompile": "errors graph devices frontend passes plugins planning report quantization prepared compile front "
    "recovery recover progressive",
    "lrcompile_passes": "errors graph planning.decompose passes",  # what a plugin may know
}

# A cycle that import time does not see: the rewriter infers shapes, which a graph knows, inside a function.
KNOWN_CYCLES = [{"lrcompile.graph.graph", "lrcompile.graph.rewrite"}]


def name_of(path: Path) -> str:
    root = ROOT / "passes" if path.is_relative_to(ROOT / "passes") else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


def part_of(module: str) -> str:
    """The longest entry of the table that the module is or lies in."""
    short = module.removeprefix("lrcompile.")
    parts = [part for part in MAY_IMPORT if short == part or short.startswith(f"{part}.")]
    assert parts, f"{module} is in no part: say in MAY_IMPORT what it may import"
    return max(parts, key=len)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this repository that a module imports, at the top or in a function; not those for types only."""
    return frozenset(_imported(ast.parse(MODULES[module].read_text())))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names if _ours(name))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _ours(alias.name))
        else:
            yield from _imported(node)


def _ours(name: str) -> bool:
    return name.split(".")[0] in ("lrcompile", "lrcompile_passes")


def test_table_points_downward() -> None:
    order = list(MAY_IMPORT)
    for part, below in MAY_IMPORT.items():
        assert set(below.split()) <= set(order[: order.index(part)]), part


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_lies_below(module: str) -> None:
    part = part_of(module)
    wrong = {other for other in imports(module) if part_of(other) not in (part, *MAY_IMPORT[part].split())}
    assert not wrong, f"{module} ({part}) may not import {', '.join(sorted(wrong))}"


def test_no_cycles() -> None:
    graph = nx.DiGraph([(module, other) for module in MODULES for other in imports(module)])
    cycles = [component for component in nx.strongly_connected_components(graph) if len(component) > 1]
    assert [c for c in cycles if c not in KNOWN_CYCLES] == []


def test_the_compiler_names_no_pass() -> None:
    names = ["lrcompile_passes", *(transform.name for transform in PASSES)]
    for module, path in MODULES.items():
        if not module.startswith("lrcompile_passes"):
            text = path.read_text()
            assert [name for name in names if name in text] == [], module


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_private(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and _ours(str(node.module)):
            assert [a.name for a in node.names if a.name.startswith("_")] == [], f"line {node.lineno}"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tools").rglob("*.py"))])
def test_files_stay_readable(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MOST_LINES, f"{path.name} has {lines} lines: divide it by what its parts are for"
