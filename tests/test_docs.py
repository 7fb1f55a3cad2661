"""What the documents show works: their code is run, their links lead somewhere, their options exist.

Blocks marked `python` run in order, in one namespace a document; one whose first line is a file name is saved under
that name too. Lines of `bash` blocks that start with `lrcompile` run in order, with the exit code that a comment
behind them states. Lines marked `text`, and indented ones, are not run, but their options are checked. Calibrations are
of a machine that is made up, and trainings take a few steps.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from lrcompile import cli
from tests.test_calibrate import use_made_up_machine

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugin"
PAGES = ("README.md", "docs/python-api.md", "docs/write-a-pass.md", "docs/architecture.md")
LINKING = tuple(str(page.relative_to(ROOT)) for page in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))))


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    language, start, lines = None, 0, []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if line.startswith("```") and language is None:
            language, start, lines = line[3:].strip(), number, []
        elif line.startswith("```"):
            assert language, f"{page}:{start}: a block without a language"
            yield Block(language, start, "\n".join(lines) + "\n")
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}:{start}: a block without an end"


def commands(text: str) -> list[str]:
    """The lines that call lrcompile, those continued with a backslash joined."""
    lines = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("lrcompile ")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_made_up_machine(monkeypatch)  # a calibration takes the minutes that it is given
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    namespace: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        text = re.sub(r"(--recover |\bsteps=)\d+", r"\g<1>5", block.text)
        if block.language == "python":
            named = re.match(r"# (\w+\.py)\n", text)
            if named:
                (tmp_path / named[1]).write_text(text)
            exec(compile("\n" * block.line + text, page, "exec"), namespace)
        elif block.language == "bash":
            for command in commands(text):
                run(command, f"{page}:{block.line}")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(sys.modules[name].__file__).startswith(str(tmp_path)):
            del sys.modules[name]


def run(command: str, where: str) -> None:
    words = shlex.split(command, comments=True)
    stated = re.search(r"# exits with (\d+)$", command)
    assert cli.run(words[1:]) == (int(stated[1]) if stated else 0), f"{where}: {command}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_options_exist(page: str) -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for command in commands((ROOT / page).read_text()):
        words = shlex.split(command, comments=True)
        chosen = known[words[1]] if words[1] in known else known["compile"]
        options = {name for parameter in chosen.params for name in parameter.opts} | {"--help"}
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= options, f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_options_in_prose_exist(page: str) -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = {name for command in known.values() for parameter in command.params for name in parameter.opts}
    foreign = {"--no-index"}
    assert set(re.findall(r"`(--[a-z-]+)", (ROOT / page).read_text())) - foreign <= options


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What links may call the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_plugin_page_is_the_plugin() -> None:
    shown = [block.text for block in blocks("docs/write-a-pass.md")]
    for name in ("pyproject.toml", "lrcompile_plugin_example.py", "test_fold_scale.py"):
        assert (PLUGIN / name).read_text() in shown, name


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page: str) -> None:
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        assert len(line) <= 120 or line.startswith("|"), f"{page}:{number}"
