"""The front of latency against error: its points, its files, and what a user is told when there can be none."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.__main__ import main
from lrcompile.cli import run
from lrcompile.errors import InputError
from lrcompile.front import front_figures
from lrcompile.planning.budget import EXACT_ERROR
from lrcompile.report.plots import plot_front
from lrcompile.report.progress import ProgressDisplay
from tests.test_search import X, stack

NET = """
import torch
from tests.test_search import X, stack

def build():
    return stack(), (X,)
"""


@pytest.fixture(scope="module")
def prepared() -> lrcompile.Prepared:
    return lrcompile.prepare_model(stack(), (X,), target="v100")


@pytest.fixture(scope="module")
def front(prepared: lrcompile.Prepared) -> list[lrcompile.Result]:
    return lrcompile.tradeoff(prepared, points=6)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "front_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"front_net.py", "__pycache__"}


def share(result: lrcompile.Result) -> float:
    return float(result.report.latency_ms["after"] / result.report.latency_ms["before"])


def test_each_point_buys_latency_with_error(front: list[lrcompile.Result]) -> None:
    assert len(front) == 6
    for slower, faster in pairwise(front):
        assert share(faster) < share(slower)
        assert faster.report.error["measured"] > slower.report.error["measured"]


def test_it_reaches_from_exact_rewrites_to_the_fastest(
    prepared: lrcompile.Prepared, front: list[lrcompile.Result]
) -> None:
    assert front[0].report.error["measured"] <= EXACT_ERROR
    fastest = lrcompile.solve(prepared, lrcompile.Budget(max_error=1e6))
    assert share(front[-1]) == pytest.approx(share(fastest), rel=1e-4)
    steps = [share(slower) - share(faster) for slower, faster in pairwise(front)]
    assert max(steps) < 2 * (share(front[0]) - share(front[-1])) / 5


@pytest.mark.parametrize("strategy", ["milp", "energy"])
def test_it_ends_at_the_error_allowed(prepared: lrcompile.Prepared, strategy: str) -> None:
    front = lrcompile.tradeoff(prepared, points=5, max_error=0.1, strategy=strategy)
    fastest = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.1, strategy=strategy))
    assert front[-1].plan.dumps() == fastest.plan.dumps()
    assert len(front) == 5
    assert all(result.report.error["measured"] <= 0.1 for result in front)


def test_an_error_of_zero_is_one_point(prepared: lrcompile.Prepared) -> None:
    (only,) = lrcompile.tradeoff(prepared, max_error=0.0)
    assert only.report.error["measured"] <= EXACT_ERROR


class Twice(nn.Module):
    """Two layers that merge exactly, up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("max_error", [1e-6, 1e-5, 2e-5])
def test_a_limit_below_the_rounding_of_half_precision_holds(max_error: float) -> None:
    budget = lrcompile.Budget(max_error=max_error)
    result = lrcompile.compile(Twice().eval(), (X[:64, :64],), target="v100", dtype="fp16", budget=budget)
    assert not result.plan.rewrites
    assert result.report.error["measured"] == 0
    assert any("exact rewrites alone round" in note for note in result.report.notes)


def test_rounding_of_half_precision_is_no_error() -> None:
    (only,) = lrcompile.tradeoff(Twice().eval(), (X[:64, :64],), target="v100", dtype="fp16", max_error=0.0)
    assert only.plan.rewrites
    assert only.report.error["measured"] > EXACT_ERROR


def test_a_point_is_what_its_budget_gives(prepared: lrcompile.Prepared, front: list[lrcompile.Result]) -> None:
    for result in front:
        assert lrcompile.solve(prepared, result.plan.budget).plan.dumps() == result.plan.dumps()


def test_it_is_the_same_from_the_model_itself(front: list[lrcompile.Result]) -> None:
    again = lrcompile.tradeoff(stack(), (X,), points=6, target="v100")
    assert [result.plan.dumps() for result in again] == [result.plan.dumps() for result in front]


def test_each_result_has_its_own_times(prepared: lrcompile.Prepared) -> None:
    before = dict(prepared.clock.seconds)
    one, other = (lrcompile.solve(prepared, lrcompile.Budget(max_error=0)) for _ in range(2))
    assert prepared.clock.seconds == before
    assert one.report.timings_s.keys() == other.report.timings_s.keys() == before.keys() | {"choose"}


def test_dominated_points_are_dropped(prepared: lrcompile.Prepared) -> None:
    """Steps of latency so small that several points want the same rewrites."""
    many = lrcompile.tradeoff(prepared, points=40, strategy="uniform")
    assert 2 < len(many) < 40
    figures = [(share(result), result.report.error["measured"]) for result in many]
    assert not [(a, b) for a in figures for b in figures if a != b and a[0] <= b[0] and a[1] <= b[1]]


def test_a_model_with_nothing_to_gain_is_one_point() -> None:
    (only,) = lrcompile.tradeoff(nn.Linear(8, 8).eval(), (torch.randn(1, 8),), target="v100")
    assert only.plan.rewrites == ()


@pytest.mark.parametrize("points", [1, 0, -3, 1001, True])
def test_points_that_make_no_front(prepared: lrcompile.Prepared, points: int) -> None:
    with pytest.raises(InputError, match=r"--points .* makes no front; expected 2 to 1000"):
        lrcompile.tradeoff(prepared, points=points)


def test_a_prepared_model_takes_no_options(prepared: lrcompile.Prepared) -> None:
    with pytest.raises(InputError, match="prepared already; give its inputs and options to prepare_model"):
        lrcompile.tradeoff(prepared, target="rpi5")


def test_a_front_limits_no_metric() -> None:
    for options in ({"metric": lambda model: 1.0}, {"metric_by_site": True}):
        with pytest.raises(InputError, match="limits no metric; leave the metric out"):
            lrcompile.tradeoff(stack(256, 2), (X[:, :256],), target="rpi5", **options)


def test_files_and_replay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tradeoff", "front_net:build", "--points", "4", "--out", "front.json", "--plans", "plans"]
    assert run(command) == 0
    table = capsys.readouterr().out
    figures = json.loads(Path("front.json").read_text())
    assert [point["plan"] for point in figures["points"]] == [f"plans/{i}.json" for i in range(1, 5)]
    for point in figures["points"]:
        assert point["latency_ms"].keys() == {"before", "after", "sigma", "kind"}
        assert point["latency_ms"]["kind"] == "analytic"
        assert point["speedup"] == pytest.approx(point["latency_ms"]["before"] / point["latency_ms"]["after"])
        assert f"{point['speedup']:.2f}×" in table
        assert run(["front_net:build", "--plan", point["plan"], "--json"]) == 0
        replayed = json.loads(capsys.readouterr().out)
        assert replayed["error"]["measured"] == pytest.approx(point["error"], rel=1e-6, abs=1e-9)
        assert replayed["latency_ms"]["after"] == pytest.approx(point["latency_ms"]["after"], rel=1e-6)
        assert len(replayed["rewrites"]) == point["rewrites"]
    assert [point["size"] for point in figures["points"]] == sorted(
        (point["size"] for point in figures["points"]), reverse=True
    )
    assert made(folder) == {"front.json", "plans"}


def test_a_shorter_front_replaces_all_plans(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for points, strategy in ((4, "milp"), (2, "energy")):
        command = ["tradeoff", "front_net:build", "--points", str(points), "--strategy", strategy, "--plans", "plans"]
        assert run(command) == 0
        plans = sorted(Path("plans").iterdir())
        assert [path.name for path in plans] == [f"{i}.json" for i in range(1, points + 1)]
        assert {lrcompile.Plan.load(path).budget.strategy for path in plans} == {strategy}
    assert made(folder) == {"plans"}


def test_json_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tradeoff", "front_net:build", "--points", "2", "--target", "rpi5", "--skip", "6", "--json"]
    assert run(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["target"] == "rpi5"
    assert figures["settings"]["strategy"] == "milp"
    assert [point["plan"] for point in figures["points"]] == [None, None]


def test_plot(tmp_path: Path, front: list[lrcompile.Result]) -> None:
    pytest.importorskip("matplotlib")
    figures = front_figures(front, [None] * len(front))
    for name in ("a.svg", "b.svg"):
        plot_front(figures, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "latency on v100, share of the original (predicted, analytic)" in text
    assert text.count('id="text_') >= len(front) + 2


def test_a_plot_without_matplotlib(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run(["tradeoff", "front_net:build", "--plot", "front.svg"]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plans", "taken"], "the folder holds mine.txt, which is no numbered plan; give a new folder"),
        (["--plans", "taken/mine.txt"], "it is a file where a folder is expected"),
        (["--plans", "no/such"], "there is no folder"),
        (["--out", "no/front.json"], "there is no folder"),
        (["--plot", "front.gif"], "a plot's name ends in .svg, .png, .pdf; got '.gif'"),
        (["--points", "1"], "--points 1 makes no front; expected 2 to 1000, such as 8"),
        (["--max-error", "-1"], "max_error is -1.0; expected a finite number of at least 0"),
        (["--strategy", "luck"], "--strategy 'luck' is unknown"),
        (["--confidence", "2"], "--confidence 2.0 can never be reached"),
        (["--target", "v1000"], "v1000"),
        (["--skip", "nothing*"], "--skip 'nothing*' matches no site"),
        (["--speedup", "2"], "No such option"),
    ],
)
def test_bad_usage_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("mine")
    assert run(["tradeoff", "front_net:build", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lrcompile: ")
    assert message in err
    assert "Traceback" not in err
    assert made(folder) == {"taken"}


@pytest.mark.parametrize("stage", ["price", "tradeoff", "choose"])
def test_an_interrupt_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    (folder / "plans").mkdir()
    (folder / "plans" / "1.json").write_text("precious")

    def interrupted(self: ProgressDisplay, at: str, done: int, total: int) -> None:
        if at == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressDisplay, "__call__", interrupted)
    command = ["lrcompile", "tradeoff", "front_net:build", "--plans", "plans", "--out", "front.json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "lrcompile: interrupted; what was not finished was not written"
    assert made(folder) == {"plans"}
    assert [path.read_text() for path in (folder / "plans").iterdir()] == ["precious"]


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "lrcompile tradeoff MODEL" in capsys.readouterr().out
    assert run(["tradeoff", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--points", "--plans", "--plot", "--calib", "--strategy", "--input"):
        assert option in text


@pytest.mark.slow
def test_on_this_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regions and whole models are measured; every point is measured against the original."""
    assert run(["tradeoff", "front_net:build", "--target", "local", "--points", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 1 <= len(figures["points"]) <= 3
    assert {point["latency_ms"]["kind"] for point in figures["points"]} == {"measured"}
    assert figures["points"][0]["error"] <= EXACT_ERROR


def test_whole_numbers_stay_as_they_are_within_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = stack(256, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores = self.scores(x)
            return scores, scores.argmax(-1)

    net, x = Classes().eval(), X[:, :256]
    prepared = lrcompile.prepare_model(net, (x,), target="rpi5")
    asked = [lrcompile.Budget(max_error=0.0), lrcompile.Budget(speedup=1.3)]
    monkeypatch.setattr("lrcompile.front.budgets", lambda *given: asked)
    _, free = lrcompile.tradeoff(prepared, points=2)
    assert free.report.error["measured"] < 0.5
    assert not torch.equal(free.model(x)[1], net(x)[1])
    (only,) = lrcompile.tradeoff(prepared, points=2, max_error=0.5)
    assert torch.equal(only.model(x)[1], net(x)[1])
