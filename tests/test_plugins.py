"""Passes of other packages: found through entry points, used like the built-in ones, and what faulty ones lead to."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Optional

import pytest
import torch
from lrcompile_passes import PASSES, LowRankLinear
from torch import nn

import lrcompile
from lrcompile.errors import InputError, PassError, PluginError
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Pass, Stage
from lrcompile.plugins import GROUP, configure, discover, given, select

FIXTURE = Path(__file__).parent / "plugin"
BUILTIN = EntryPoint("builtin", "lrcompile_passes:PASSES", GROUP)

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a package with one entry point findable, as an installer would: its metadata on the import path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, point: str, target: str) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{point} = {target}\n")

    return write


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes an importable module for one test."""

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setitem(sys.modules, name, None)  # restored, that is dropped, after the test
        monkeypatch.delitem(sys.modules, name)

    return write


@pytest.fixture
def example(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture package as its own pyproject.toml declares it."""
    project = tomllib.loads((FIXTURE / "pyproject.toml").read_text())["project"]
    ((point, target),) = project["entry-points"][GROUP].items()
    monkeypatch.syspath_prepend(FIXTURE)
    install(project["name"], point, target)


@pytest.mark.usefixtures("example")
def test_found_and_listed() -> None:
    found = discover()
    assert [p.name for p in found.passes][: len(PASSES)] == [p.name for p in PASSES]
    assert found.passes[-1].name == "fold-scale"
    assert found.origins["fold-scale"] == "lrcompile-plugin-example (lrcompile_plugin_example:FoldScale)"
    assert found.problems == ()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.query(x) / 4))


@pytest.mark.usefixtures("example")
def test_used_in_a_compile_and_replayed() -> None:
    model, x = Scaled().eval(), torch.randn(3, 16)
    others = select(discover().passes, ["-fold-affine"])  # which comes first, and folds scales too
    result = lrcompile.compile(model, (x,), budget=lrcompile.Budget(max_error=0), passes=others)
    assert "fold-scale(query; scale=0.25)" in [str(rewrite) for rewrite in result.report.rewrites]
    assert not any("div" in node.name for node in result.model.graph.nodes)
    torch.testing.assert_close(result.model(x), model(x))
    assert result.plan.options["fold-scale"] == {"limit": 4096.0}
    plan = lrcompile.Plan.loads(result.plan.dumps())
    again = lrcompile.compile(model, (x,), plan=plan)
    assert torch.equal(again.model(x), result.model(x))


def test_plan_of_a_plugin_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURE)
    transform = import_module("lrcompile_plugin_example").FoldScale(limit=8.0)
    model, x = Scaled().eval(), torch.randn(3, 16)
    plan = lrcompile.compile(model, (x,), passes=[transform]).plan
    with pytest.raises(lrcompile.LrcompileError, match=r"uses pass 'fold-scale', which is not installed.*install"):
        lrcompile.compile(model, (x,), plan=plan)
    replayed = lrcompile.compile(model, (x,), plan=plan, passes=[type(transform)()])
    assert replayed.plan.options == {"fold-scale": {"limit": 8.0}}


BROKEN = {
    "raise RuntimeError('no licence')": "RuntimeError: no licence",
    "import module_that_does_not_exist": "No module named 'module_that_does_not_exist'",
    "raise SystemExit('bye')": "SystemExit: bye",
    "def (": "SyntaxError",
    "raise ImportError('no such library\\n\\nand a page of advice')": "ImportError: no such library",
    "from lrcompile_plugin_example import FoldScale\nFoldScale = type('Mine', (FoldScale,), {'name': 'my,pass'})": (
        "Mine is named 'my,pass'; expected letters and hyphens"
    ),
    "": "has no attribute 'FoldScale'",
    "FoldScale = 3": "expected a Pass or a sequence of passes, got int",
    "FoldScale = [dict]": "expected a Pass or a sequence of passes, got type",
    "from lrcompile import Pass\nclass FoldScale(Pass): pass": "abstract",
    "from lrcompile import Pass\nclass FoldScale(Pass):\n def propose(*a): pass\n def apply(*a): pass": "has no stage",
}


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.usefixtures("example")
def test_broken_plugin_is_one_diagnostic(install: Install, module: Callable[[str, str], None], text: str) -> None:
    module("broken_plugin", text)
    install("broken-plugin", "aaa", "broken_plugin:FoldScale")
    found = discover()
    assert [p.name for p in found.passes] == [*(p.name for p in PASSES), "fold-scale"]
    (problem,) = found.problems
    assert problem.startswith("plugin 'aaa' of broken-plugin (broken_plugin:FoldScale) is left out: ")
    assert BROKEN[text] in problem
    assert "\n" not in problem


@pytest.mark.usefixtures("example")
def test_name_clash(install: Install, module: Callable[[str, str], None]) -> None:
    module("other_plugin", (FIXTURE / "lrcompile_plugin_example.py").read_text())
    install("other-plugin", "zzz", "other_plugin:FoldScale")
    with pytest.raises(PluginError) as raised:
        discover()
    assert str(raised.value) == (
        "two passes are named 'fold-scale': one of lrcompile-plugin-example (lrcompile_plugin_example:FoldScale) "
        "and one of other-plugin (other_plugin:FoldScale); uninstall one, or rename its pass"
    )


def test_name_clash_with_a_builtin() -> None:
    with pytest.raises(PluginError, match="two passes are named 'remove-identity'"):
        discover([BUILTIN, EntryPoint("mine", "lrcompile_passes.remove_identity:RemoveIdentity", GROUP)])


def test_select() -> None:
    everything = [p.name for p in PASSES]
    some = ["fold-batch-norm", "merge-siblings"]
    assert [p.name for p in select(PASSES, ["merge-siblings", " fold-batch-norm"])] == some
    assert [p.name for p in select(PASSES, ["-merge-siblings"])] == [n for n in everything if n != "merge-siblings"]
    assert select(PASSES, ["merge-siblings", "-merge-siblings"]) == ()
    assert select(PASSES, "merge-siblings") == select(PASSES, ["merge-siblings"])


@pytest.mark.parametrize("name", ["merge-sibling", "-merge-sibling"])
def test_select_suggests_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown pass 'merge-sibling'; did you mean 'merge-siblings'\? available: "):
        select(PASSES, [name])


def test_options_are_set_by_words() -> None:
    words = ["merge-pointwise.through=drop", "branch-tucker.groups = 2, 8", "factorize-conv3d.parallel=TRUE"]
    words += ["low-rank-embedding.smoothing=0.5", "low-rank-conv.pairs=3", "group-heads.inits=first"]
    passes = {p.name: p for p in configure(PASSES, words)}
    assert list(passes) == [p.name for p in PASSES]
    assert passes["merge-pointwise"].through == "drop"
    assert passes["branch-tucker"].groups == (2, 8)
    assert passes["factorize-conv3d"].parallel is True
    assert passes["low-rank-embedding"].smoothing == 0.5
    assert passes["low-rank-conv"].pairs == 3
    assert passes["group-heads"].inits == ("first",)
    assert configure(PASSES, []) == tuple(PASSES)


def test_options_that_may_be_none_are_set_by_words() -> None:
    @dataclass(frozen=True)
    class Mine(LowRankLinear):
        most: Optional[int] = None  # noqa: UP045 - as older packages write it
        least: int | None = None

    assert configure([Mine()], ["mine.most=3", "mine.least=2"]) == (Mine(most=3, least=2),)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("merge-pointwise", "expected PASS.OPTION=VALUE"),
        ("merge-pointwise=drop", "expected PASS.OPTION=VALUE"),
        ("merge-pointwize.through=drop", "did you mean 'merge-pointwise'"),
        ("merge-pointwise.trough=drop", "did you mean 'through'"),
        ("remove-identity.pairs=1", "available: none"),
        ("merge-pointwise.through=dorp", "expected one of '', 'drop', 'move', got 'dorp'"),
        ("low-rank-conv.pairs=many", "expected a whole number, got 'many'"),
        ("low-rank-conv.pairs=0", "low-rank-conv.pairs is 0; expected 1 or more: give --option low-rank-conv.pairs=1"),
        ("merge-pointwise.pairs=-1", "merge-pointwise.pairs is -1; expected 1 or more"),
        ("branch-tucker.pairs=0", "branch-tucker.pairs is 0; expected 1 or more"),
        ("branch-tucker.groups=2,0", "branch-tucker.groups is 0; expected 1 or more"),
        ("low-rank-embedding.smoothing=-5", "low-rank-embedding.smoothing is -5.0; expected 0 or more"),
        ("low-rank-embedding.smoothing=nan", "low-rank-embedding.smoothing is nan; expected 0 or more"),
        ("factorize-conv3d.parallel=maybe", "expected one of 'true', 'false', got 'maybe'"),
    ],
)
def test_options_that_cannot_be_set(setting: str, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        configure(PASSES, [setting])


def test_options_that_a_plugin_checks_itself() -> None:
    @dataclass(frozen=True)
    class Mine(LowRankLinear):
        most: int = 1

        def __post_init__(self) -> None:
            if self.most < 0:
                raise ValueError("most has to be 0 or more")

    with pytest.raises(InputError, match=r"--option mine\.most=-1: most has to be 0 or more"):
        configure([Mine()], ["mine.most=-1"])


@pytest.mark.parametrize(
    ("passes", "problem"),
    [
        (["low-rank-linear"], r"expected a Pass or a sequence of passes, got str; names are for select\("),
        ("low-rank-linear", "got str"),
        ([None], "got NoneType"),
        ([LowRankLinear(), LowRankLinear(center=True)], "two are named 'low-rank-linear'"),
    ],
)
def test_passes_given_from_python_that_are_none(passes: object, problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        lrcompile.compile(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), passes=passes)  # type: ignore[arg-type]


@pytest.mark.parametrize("passes", [LowRankLinear, LowRankLinear(), [LowRankLinear], iter([LowRankLinear()])])
def test_passes_given_from_python(passes: object) -> None:
    assert given(passes) == (LowRankLinear(),)


def _raises(*_: object) -> float:
    raise SystemExit("no idea")


def _fails(*_: object) -> None:
    raise RuntimeError("no licence\n\nand a page of advice")


FAULTY: list[tuple[dict[str, object], str]] = [
    ({"propose": lambda *_: iter(["a"])}, r"at the graph: failed to propose: TypeError: .*got a str"),
    ({"propose": _raises}, "at the graph: failed to propose: SystemExit: no idea"),
    ({"propose": lambda *_: iter([Rewrite("", "a")])}, "the site of a rewrite is 'a'; expected a tuple"),
    ({"propose": lambda *_: iter([Rewrite("", ("0",), {"w": torch.ones(1)})])}, "Tensor is not JSON serializable"),
    (
        {"propose": lambda *_: iter([Rewrite("", ("0",), {}, lambda: 1 / 0)])},
        r"at 0: cannot tell the error of mine\(0\)",
    ),
    ({"apply": lambda *_: None}, r"at 0: mine\(0\) edits nothing"),
    ({"apply": _fails}, r"RuntimeError: no licence; leave it out with --passes=-mine and report it$"),
    ({"apply": _raises}, r"at 0: cannot apply mine\(0\): SystemExit: no idea"),
    ({"remark": lambda *_: 1 / 0}, r"at 0: failed to remark on mine\(0\): ZeroDivisionError"),
]


@pytest.mark.parametrize(("parts", "problem"), FAULTY)
def test_a_pass_that_breaks_its_contract_is_named(parts: dict[str, object], problem: str) -> None:
    def split(self: Pass, rewriter: lrcompile.Rewriter, rewrite: Rewrite) -> None:
        site, new = rewriter.site(), rewriter.context.constant(torch.ones(8, 2048)).new_zeros
        inner, outer = nn.Linear(2048, 8, bias=False), nn.Linear(8, 2048, bias=False)
        inner.weight, outer.weight = nn.Parameter(new(8, 2048)), nn.Parameter(new(2048, 8))
        rewriter.replace_module(site, [inner, outer])

    whole = {"propose": lambda *_: iter([Rewrite("", ("0",), {}, 0.1)]), "apply": split, "stage": Stage.FACTORIZE}
    transform = dataclass(frozen=True)(type("Mine", (Pass,), whole | parts))()
    model = nn.Sequential(nn.Linear(2048, 2048)).eval()
    budget = lrcompile.Budget(size=0.5)
    with pytest.raises(PassError, match=f"^pass mine {problem}" if problem.startswith("at") else problem):
        lrcompile.compile(model, (torch.randn(64, 2048),), passes=[transform], budget=budget)


@pytest.mark.usefixtures("example")
def test_order_of_discovery_does_not_matter() -> None:
    points = list(entry_points(group=GROUP))
    assert len(points) > 1
    assert discover(points) == discover(reversed(points))


@pytest.mark.slow
def test_installs_with_pip(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling: pip builds the plugin without a network")
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(FIXTURE)], check=True)
    code = "from lrcompile.plugins import discover; print([p.name for p in discover().passes][-1])"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert shown.stdout.strip() == "fold-scale"
