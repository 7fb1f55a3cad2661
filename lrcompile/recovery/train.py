"""The training loop of a recovery: it can be stopped and goes on where it was, and never ends worse than it began."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import InputError, is_out_of_memory
from lrcompile.graph.verify import has_nan
from lrcompile.recovery.checkpoint import Checkpoint
from lrcompile.recovery.freeze import factors_of, frozen_in, set_frozen
from lrcompile.recovery.importance import Importance
from lrcompile.recovery.loss import Loss, OwnLoss, check_classes
from lrcompile.recovery.optimise import (
    LARGEST_GRADIENT,
    Masters,
    RunningMean,
    adamw,
    centralise,
    rate_at,
    sharpness_aware,
)  # fmt: skip
from lrcompile.recovery.pair import Pair
from lrcompile.recovery.processes import Processes
from lrcompile.recovery.samples import Batch, Samples
from lrcompile.recovery.settings import RATES, Recovery

JUDGEMENTS = 20  # over the whole training
TRIAL_SHARE = 0.03  # of the time, for each rate that is tried
TRIAL_STEPS = (20, 50)  # at least and at most
MOST_ROLLED_BACK = 6
MARGIN = 1.08  # of the time of a step, for judging and for a machine that slows down
SAVED_EVERY_S = 60.0
SAME = 1e-4  # relative difference up to which a loss of the user's is the one that a checkpoint began with
LOSS_SCALE, SMALLER = 2.0**16, 2.0**4  # of the loss in float16 to begin with, and by how much where it is too large

Progress = Callable[[str, int, int], None]
Weights = list[Tensor]


@dataclass(frozen=True)
class Trained:
    """What a training came to. Losses are those of what it is judged by; the weights of `kept_step` are left.

    `scored` counts the samples that were run to choose a subset of them, each time anew.
    """

    steps: int
    seconds: float
    rate: float
    loss_before: float
    loss_after: float
    kept_step: int
    rolled_back: int
    scored: int
    device: str
    notes: tuple[str, ...] = ()


@dataclass
class _State:
    """Everything that a training needs to go on."""

    steps: int = 0
    step: int = 0
    epoch: int = 0
    place: int = 0  # in the epoch
    rate: float = 0.0
    scale: float = 1.0  # of the loss, for small gradients not to vanish in float16
    seconds: float = 0.0
    began: float = 0.0  # seconds that went before the first step
    rolled_back: int = 0
    scored: int = 0
    done: bool = False
    loss_before: float = math.inf
    best_loss: float = math.inf
    best_step: int = 0
    best: Weights = field(default_factory=list)
    good: Weights = field(default_factory=list)
    weights: Weights = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    mean: dict[str, Any] = field(default_factory=dict)
    kept: Tensor | None = None
    notes: list[str] = field(default_factory=list)


def train(
    pair: Pair,
    samples: Samples,
    recovery: Recovery,
    checkpoint: Checkpoint | None = None,
    progress: Progress = lambda stage, done, total: None,
    processes: Processes | None = None,
    enough: Callable[[], bool] = lambda: False,
    own: OwnLoss | None = None,
) -> Trained:
    """Trains the rewritten model of a pair in place on `recovery.where`, and leaves the best weights that were judged.

    `processes` train together, each with a pair of its own. The training ends early where `enough` says so of weights
    that are the best so far; they are in place, on the CPU, when it is asked. `own` is the user's loss of labels.

    Raises:
        InputError: labels are out of range, the loss is not finite to begin with, or memory runs out on one sample.
    """
    processes = processes or Processes()
    with pair.on(processes.device(recovery.where)) as there:
        return _Training(there, samples, recovery, checkpoint, progress, processes, enough, own).run()


class _Training:
    def __init__(
        self,
        pair: Pair,
        samples: Samples,
        recovery: Recovery,
        checkpoint: Checkpoint | None,
        progress: Progress,
        processes: Processes,
        enough: Callable[[], bool],
        own: OwnLoss | None = None,
    ) -> None:
        self.samples, self.recovery, self.checkpoint, self.progress = samples, recovery, checkpoint, progress
        self.loss, self.processes, self.enough = Loss(pair, recovery, own), processes, enough
        self.parameters = [p for p in pair.trained.gm.parameters() if p.is_floating_point()]
        self.outer, self.inner = factors_of(pair.trained, pair.teacher)
        self.importance = Importance(recovery, samples) if recovery.subset < 1 else None
        processes.take_over(self.parameters)
        self.masters = Masters(self.parameters)
        self.optimizer = adamw(self.masters.weights, RATES[0])
        self.mean = RunningMean(self.masters, recovery.ema)
        self.state = _State(scale=LOSS_SCALE if self.loss.in_float16 else 1.0)
        self.most = sys.maxsize  # samples that memory lasts for at a time
        self.started = self.saved = time.monotonic()

    def run(self) -> Trained:
        state = self.state
        if not self._resumed():
            self._begin()
        order = self._order()
        judged = sum(len(batch) for batch in self.samples.judging)
        every = max(1, state.steps // JUDGEMENTS, judged // self.samples.size)  # judges no more than it trains on
        while state.step < state.steps and not state.done and (done := self._share_done()) < 1:
            self.progress("recover", state.step, state.steps)
            if state.place >= len(order):
                state.epoch, state.place = state.epoch + 1, 0
                self._choose_samples()
                order = self._order()
            finite = self._step(order[state.place], rate_at(done))
            state.step, state.place = state.step + 1, state.place + 1
            if not finite and not self._rolled_back():
                break
            if finite and (state.step % every == 0 or state.step == state.steps):
                self._judge()
            self._save()
        if state.step % every and not state.done:
            self._judge()
        self.progress("recover", state.steps, state.steps)
        if self.recovery.freeze != "none" and not self.outer and not self.inner:
            self._note("freeze was of no use: no layer is split into factors that could be frozen")
        if self.importance and state.kept is None:
            self._note("subset was of no use: the training ended within its first epoch, which sees all samples")
        self.masters.put(state.best)
        state.done, state.seconds, self.started = True, self._seconds(), time.monotonic()
        if self.checkpoint and self.processes.first:
            if self.checkpoint.outlives:
                self._put_down()
            else:
                self.checkpoint.drop()
        return Trained(
            state.step, state.seconds, state.rate, state.loss_before, state.best_loss, state.best_step,
            state.rolled_back, state.scored, self.loss.device.type, tuple(state.notes),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ begin and go on

    def _begin(self) -> None:
        """Judges what is there, tries rates, and says how many steps there will be."""
        state, settings = self.state, self.recovery
        state.loss_before = state.best_loss = self._judged()
        for batch in self.samples.training if self.loss.own is None else ():  # all now, not where a step comes upon one
            if batch.labels is not None and self.loss.scores is not None:
                check_classes(batch.labels, self.loss.scores)
        if not math.isfinite(state.loss_before):
            raise InputError("recovery: the rewritten model's loss is not finite; allow less error, and try again")
        state.best = state.good = self._weights()
        state.done = self._is_enough()
        order = self._order()
        state.steps, state.rate = settings.steps or 0, settings.rate or 0.0
        if settings.steps == 0 or state.done:
            return
        seconds = 0.0 if state.steps else self._timed(order)
        most = state.steps or max(1, int((settings.minutes or 0) * 60 / seconds))
        if not state.rate:
            length = min(max(int(TRIAL_SHARE * most), TRIAL_STEPS[0]), TRIAL_STEPS[1])
            state.rate = self._best_rate(order, length) if most > 4 * len(RATES) * TRIAL_STEPS[0] else RATES[1]
        if settings.minutes is not None:
            state.began = self.processes.mean([self._seconds()])[0]
            state.steps = max(1, int((settings.minutes * 60 - state.began) / (MARGIN * seconds)))

    def _timed(self, order: Sequence[Tensor]) -> float:
        """Seconds that a step takes: the least of two, after one that does not count."""
        taken = []
        for _ in range(3):
            start = time.monotonic()
            self._step(order[0], 0.0)
            taken.append(time.monotonic() - start)
        self._start_again(self.state.best)
        return self.processes.mean([min(taken[1:])])[0]

    def _best_rate(self, order: Sequence[Tensor], length: int) -> float:
        """The rate that leads to the least loss in a short training of its own."""
        losses: dict[float, float] = {}
        for rate in RATES:
            self.state.rate = rate
            finite = True
            for number in range(length):
                self.progress("rates", len(losses) * length + number, len(RATES) * length)
                rate_now = rate_at((number + 1) / (length + 1))
                finite = finite and self._step(order[number % len(order)], rate_now)
            losses[rate] = self._judged() if finite else math.inf
            self._start_again(self.state.best)
        return min(RATES, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)

    def _start_again(self, weights: Weights) -> None:
        self.masters.put(weights)
        self.optimizer = adamw(self.masters.weights, RATES[0])
        self.mean = RunningMean(self.masters, self.recovery.ema)

    def _resumed(self) -> bool:
        """Takes up what a checkpoint holds, if there is one that fits; a loss of the user's may be another by now."""
        stored = self.checkpoint.load() if self.checkpoint else None
        fits = stored is not None and len(stored.get("weights", ())) == len(self.parameters)
        everywhere = self.processes.mean([float(fits)])[0]  # asked by all of them, whatever they found
        if stored is None or everywhere < 1:  # all of them go on, or none
            return False
        if self.loss.own is not None:
            same = math.isclose(stored.get("loss_before", math.nan), self._judged(), rel_tol=SAME)
            if self.processes.mean([float(same)])[0] < 1:
                return False
        for name, value in stored.items():
            setattr(self.state, name, value)
        self.masters.put(self.state.weights)
        self.optimizer.load_state_dict(self.state.optimizer)
        self.mean.load(self.state.mean)
        return True

    def _save(self) -> None:
        if self.checkpoint and self.processes.first and time.monotonic() - self.saved >= SAVED_EVERY_S:
            self._put_down()

    def _put_down(self) -> None:
        assert self.checkpoint is not None
        held = {name: getattr(self.state, name) for name in asdict(_State())}
        held |= {"weights": self._weights(), "optimizer": self.optimizer.state_dict(), "mean": self.mean.state()}
        self.checkpoint.save(held | {"seconds": self._seconds()})
        self.saved = time.monotonic()

    # ------------------------------------------------------------------------------------------------- one step

    def _step(self, numbers: Tensor, rate: float) -> bool:
        """One step on some samples at a share of the highest rate; False if it came to no number: nothing changes."""
        ours, weight = self.processes.share(numbers) if self.samples.mixed else (numbers, 1.0)
        batch = self.samples.batch(ours)

        def gradients() -> Tensor:
            total = torch.zeros((), device=self.loss.device)
            for part in self.loss.parts(batch, self.most):
                loss = part.mean() * (len(part) / len(batch))
                (loss * self.state.scale).backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
            return total

        def backward() -> Tensor:
            value = self._within_memory(batch, gradients)
            self.processes.average_gradients(self.parameters, weight)
            return value

        while True:
            self._forget_gradients()
            value = backward()
            if self.recovery.sam:
                sharpness_aware([p for p in self.parameters if p.grad is not None], self.recovery.sam, backward)
            trained = self.masters.gather(self.state.scale)
            if self.recovery.centralize:
                centralise(trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            finite = float(torch.isfinite(value) & torch.isfinite(norm))
            if self.processes.mean([finite])[0] == 1:
                break
            if self.state.scale == 1:
                self._check_original(batch)
                return False
            self.state.scale = max(1.0, self.state.scale / SMALLER)
        for group in self.optimizer.param_groups:
            group["lr"] = self.state.rate * rate
        self.masters.step(self.optimizer)
        if self.recovery.ema:
            self.mean.update()
        return True

    def _check_original(self, batch: Batch) -> None:
        """Refuses samples of which the original itself makes no numbers; all processes ask, as each has a part.

        Raises:
            InputError: an output of it is NaN.
        """
        parts = batch.to(self.loss.device).pieces(self.most)
        bad = any(has_nan(self.loss.pair.expected(part.inputs)[0]) for part in parts)
        if self.processes.mean([float(bad)])[0] > 0:
            raise InputError(
                "recovery: an output of the original is NaN on some of the samples that are trained on; give data that "
                "the model was made for"
            )

    def _forget_gradients(self) -> None:
        """Of the model's own weights: what the optimiser steps in the place of those in half precision has others."""
        for parameter in self.parameters:
            parameter.grad = None

    def _within_memory(self, batch: Batch, work: Callable[[], Tensor]) -> Tensor:
        """The result of some work on a batch, done on half as many samples at a time for as long as memory runs out.

        Raises:
            InputError: there is not even memory for one sample, or batches cannot be divided.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._forget_gradients()
            size = min(self.most, len(batch))
            if size < 2 or not self.samples.mixed:
                raise InputError(
                    f"recovery: not enough memory to train on {size} samples at a time; give smaller samples, a "
                    "smaller --batch, or close other programs"
                )
            self.most = size // 2

    def _rolled_back(self) -> bool:
        """Goes back to the last weights that were judged, at half the rate; False when that did not help often."""
        state = self.state
        state.rolled_back += 1
        self._start_again(state.good)
        state.rate /= 2
        if state.rolled_back < MOST_ROLLED_BACK:
            return True
        state.notes.append(f"the loss stopped being finite {state.rolled_back} times: training ended there")
        return False

    # ------------------------------------------------------------------------------------------- epochs, judging

    def _order(self) -> list[Tensor]:
        """The steps of the epoch at hand; its weights are frozen and thawed."""
        state = self.state
        set_frozen(self.parameters, frozen_in(state.epoch, self.recovery.freeze, self.outer, self.inner))
        return self.samples.order(state.epoch, self.recovery.seed, state.kept)

    def _choose_samples(self) -> None:
        if self.importance and self.importance.is_due(self.state.epoch):
            self.state.kept, note = self.importance.choose(self.loss, self.state.epoch, self.most)
            self.state.scored += self.samples.count
            self._note(note)

    def _note(self, text: str | None) -> None:
        """Says something to the user once: a training that is taken up, or chooses samples again, comes by again."""
        if text and text not in self.state.notes:
            self.state.notes.append(text)

    def _judge(self) -> None:
        """Keeps the weights if they are the best so far, and as what to go back to if they are finite."""
        state = self.state
        with self.mean.in_place() if self.recovery.ema else nullcontext():
            loss = self._judged()
            weights = self._weights()
            if loss < state.best_loss:
                state.best_loss, state.best_step, state.best = loss, state.step, weights
                state.done = self._is_enough()
        if math.isfinite(loss):
            state.good = self._weights()

    def _is_enough(self) -> bool:
        with self.loss.pair.at_home():
            return self.processes.mean([float(self.enough())])[0] == 1

    def _judged(self) -> float:
        with torch.no_grad():
            parts = [self._losses(batch) for batch in self.samples.judging]
        return self.processes.mean([float(torch.cat(parts).mean())])[0]

    def _losses(self, batch: Batch) -> Tensor:
        """What a batch is judged by, [samples]."""
        return self._within_memory(batch, lambda: torch.cat(list(self.loss.parts(batch, self.most, inside=False))))

    def _weights(self) -> Weights:
        return [weight.detach().clone() for weight in self.masters.weights]

    def _seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.started

    def _share_done(self) -> float:
        """How much of the training is done: of its steps, or of its time where a machine that slowed down runs late."""
        state, limit = self.state, self.recovery.minutes
        done = state.step / state.steps
        if limit is None:
            return done
        seconds = self.processes.mean([self._seconds()])[0]
        return max(done, (seconds - state.began) / max(limit * 60 - state.began, 1e-9))
