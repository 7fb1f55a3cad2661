"""How far a long stage has come: the time left where there is no terminal."""

from __future__ import annotations

import io

import pytest

from lrcompile.report import progress as module
from lrcompile.report.console import Screen
from lrcompile.report.progress import ProgressDisplay


def shown(monkeypatch: pytest.MonkeyPatch, *calls: tuple[float, int, int]) -> list[str]:
    """What is printed of (time in s, done, total) of a training."""
    now = {"s": 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["s"])
    printed = io.StringIO()
    with ProgressDisplay(Screen(file=printed, width=100)) as display:
        for time_s, done, total in calls:
            now["s"] = time_s
            display("recover", done, total)
    return printed.getvalue().splitlines()


@pytest.mark.parametrize("start", [0, 400])
def test_the_time_left_is_that_of_the_steps_of_this_run(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    """A training that goes on where it was has done in this run what it does in this run."""
    lines = shown(monkeypatch, (0, start, 500), (1, start + 1, 500), (10, start + 10, 500))
    left = 500 - start - 10
    assert lines == [f"training what was rewritten: {start + 10} of 500, about {left} s left"]


def test_a_stage_that_begins_again_is_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, (0, 90, 100), (100, 0, 100), (110, 50, 100))
    assert lines == ["training what was rewritten: 50 of 100, about 10 s left"]
