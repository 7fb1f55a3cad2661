"""Shows how far a long stage has come: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 2.0

WORDS = {
    "trace": "tracing the model",
    "canonicalize": "exact clean-up",
    "calibrate": "running calibration data",
    "price": "pricing rewrites",
    "sensitivity": "measuring sensitivity",
    "choose": "choosing within the budget",
    "tradeoff": "points of the front",
    "evaluate": "evaluating the metric",
    "confirm": "measuring the whole model",
    "apply": "applying the plan",
    "rates": "trying learning rates",
    "recover": "training what was rewritten",
    "emit": "writing and verifying",
    "bench": "measuring",
    "fit": "fitting the profile",
    "measure": "measuring",
    "quantize": "quantising layers",
}


class ProgressDisplay:
    """A progress callback (stage, done, total); `total` 0 announces a stage of unknown length.

    A stage of several words is a remark, which stays on the screen.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.first = 0  # how much was done when the stage began: a training that goes on begins in the middle
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done; a total of 0 is unknown."""
        words = WORDS.get(stage, stage)
        if " " in stage:
            self.console.print(stage, highlight=False, markup=False)
            return
        if self.bar:
            if stage != self.stage or self.task is None:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(words, total=total or None)
            self.bar.update(self.task, completed=done, total=total or None)
        elif stage != self.stage or done < self.first:
            self.first, self.started = done, time.monotonic()
            self.shown = self.started
        elif total and done > self.first and time.monotonic() - self.shown >= PLAIN_EVERY_S:
            self.shown = time.monotonic()
            left = (self.shown - self.started) / (done - self.first) * (total - done)
            self.console.print(f"{words}: {done} of {total}, about {left:.0f} s left", highlight=False)
        self.stage = stage
