"""A budget on the user's own metric from the command line: the report, the plan, a replay, and errors in a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from lrcompile.cli import run
from tests.test_metric import TARGET, WIDTH, accuracy, mlp


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return mlp()


MODULE = """
import torch
from tests.test_metric import accuracy, mlp

def build():
    return mlp()

def broken(model):
    raise RuntimeError("the data are gone")

def names(model):
    return ["a", "b"]
"""


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "user_metric.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("user_metric", None)


WORDS = ("user_metric:build", "--input", f"input=float32[256,{WIDTH}]", "--target", TARGET)


def test_command_line(cwd: Path, capsys: pytest.CaptureFixture[str], net: nn.Module) -> None:
    limits = ("--eval", "user_metric:accuracy", "--max-drop", "0.02")
    code = run([*WORDS, *limits, "--out", "out", "--plan-out", "plan.json", "--report-json", "report.json"])
    out, err = capsys.readouterr()
    assert code == 0
    assert "one evaluation of user_metric:accuracy takes" in err
    assert "at most 25 of them" in err
    report, plan = (json.loads(Path(name).read_text()) for name in ("report.json", "plan.json"))
    figures = report["metric"]
    assert figures == plan["metric"]
    assert plan["budget"]["max_drop"] == figures["max_drop"] == 0.02
    assert figures["name"] == "user_metric:accuracy"
    assert figures["before"] == pytest.approx(accuracy(net), abs=1e-6)
    assert figures["after"] >= figures["before"] - 0.02 - 1e-6
    line = next(line for line in out.splitlines() if line.startswith("metric"))
    assert f"allowed 0.02; {figures['evaluations']} evaluations of at most 25" in line

    (cwd / "user_metric.py").write_text(MODULE.replace("accuracy, ", ""))
    del sys.modules["user_metric"]
    assert run([*WORDS, "--plan", "plan.json", "--out", "again"]) == 0
    out, err = capsys.readouterr()
    assert line in out.splitlines()
    assert "the metric is as it was then" in out
    assert "one evaluation" not in err
    assert Path("again/weights.safetensors").read_bytes() == Path("out/weights.safetensors").read_bytes()


def test_what_a_metric_prints_is_not_between_the_json(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "user_metric.py").write_text(MODULE + "\ndef loud(model):\n    print('evaluated')\n    return 1.0\n")
    assert run([*WORDS, "--eval", "user_metric:loud", "--max-drop", "0.02", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["metric"]["before"] == 1.0
    assert "evaluated" in err


def test_by_site(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--eval", "user_metric:accuracy", "--max-drop", "0.02")
    assert run([*WORDS, *limits, "--eval-by-site", "--plan-out", "plan.json", "--report-json", "report.json"]) == 0
    out, err = capsys.readouterr()
    assert "more evaluations of user_metric:accuracy, of one rewrite each, take" in err
    assert "metric falls" in out
    sites = json.loads(Path("report.json").read_text())["sites"]
    assert any(isinstance(site["drop"], float) for site in sites if site["decision"] == "rewritten")
    assert run(["explain", "plan.json"]) == 0
    assert "metric falls" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected", "says"),
    [
        (("--eval", "user_metric:broken", "--max-drop", "0.1"), 2, "raised RuntimeError: the data are gone"),
        (("--eval", "user_metric:names", "--max-drop", "0.1"), 2, "returned a list of 2; expected one number"),
        (("--eval-by-site",), 2, "evaluates a metric for each rewrite, and there is none"),
        (("--eval", "user_metric:MODULE", "--max-drop", "0.1"), 2, "no attribute 'MODULE'"),
        (("--eval", "user_metric:torch", "--max-drop", "0.1"), 2, "is a module; expected a function"),
        (("--eval", "user_metric.py", "--max-drop", "0.1"), 2, "not of the form pkg.mod:attribute"),
        (("--eval", "user_metric:accuracy"), 2, "has no limit"),
        (("--max-drop", "0.1"), 2, "give one with --eval"),
        (("--eval", "user_metric:accuracy", "--max-drop", "-1"), 2, "budget max_drop is -1.0"),
        (("--eval", "user_metric:accuracy", "--max-drop", "0", "--size", "0.08"), 1, "the metric falls from"),
    ],
)
@pytest.mark.usefixtures("cwd")
def test_command_line_errors(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: int, says: str
) -> None:
    assert run([*WORDS, *words, "--out", "out.onnx"]) == expected
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrcompile: ")]
    assert len(said) == 1
    assert says in said[0]
    assert not Path("out.onnx").exists()
