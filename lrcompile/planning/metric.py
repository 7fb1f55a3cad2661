"""The user's own metric: what it gives for the model as it was and for rewritten ones, and how far it may fall."""

from __future__ import annotations

import copy
import math
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lrcompile.errors import InputError
from lrcompile.frontend.calls import CalledAsGiven, in_place_of
from lrcompile.frontend.imports import import_attribute, working_directory_importable
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import Graph
from lrcompile.planning.budget import Budget
from lrcompile.planning.plan import Plan
from lrcompile.planning.price import Candidate

MOST_EVALUATIONS = 25
ON_ORIGINAL = 2
KEPT_BACK = 8  # evaluations for what measurements of the whole model leave of a choice
AFTERWARDS = 5  # evaluations for what comes after the rewrites, where they leave it something of the budget
CHECK = 1  # the turn of the evaluation that what is emitted has to pass besides the one it was chosen by
FEWEST_SAMPLES = 8  # that a metric may tell of one by one: fewer numbers are more likely several metrics
RESOLUTION = 2.0**-22  # relative: metrics come in single precision, where a drop of exactly the limit may be a bit more

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """A function that gives the value of a model, higher is better, and its name as the user knows it.

    It gives one number, or one for each sample, of which the mean is the value. With `by_site` it is also evaluated
    with each rewrite alone, for the report.
    """

    function: Callable[[nn.Module], Any]
    name: str
    by_name: bool = False
    by_site: bool = False

    @classmethod
    def of(cls, function: Callable[[nn.Module], Any] | Evaluation, by_site: bool = False) -> Evaluation:
        """The evaluation by a Python function.

        Raises:
            InputError: it cannot be called.
        """
        if isinstance(function, Evaluation):
            return replace(function, by_site=by_site or function.by_site)
        if not callable(function):
            raise InputError(f"the metric is a {type(function).__name__}; expected a function of the model")
        kind = type(function)
        name = getattr(function, "__qualname__", kind.__qualname__)
        return cls(function, f"{getattr(function, '__module__', kind.__module__)}:{name}", by_site=by_site)

    @classmethod
    def load(cls, text: str) -> Evaluation:
        """The evaluation named `pkg.mod:fn`, with the working directory importable.

        Raises:
            InputError: there is no such thing, or it cannot be called.
        """
        function = import_attribute(text)
        if not callable(function):
            raise InputError(f"--eval {text} is a {type(function).__name__}; expected a function of the model")
        return cls(function, text, by_name=True)

    def __call__(self, model: nn.Module) -> np.ndarray:
        """What a model is worth, which need not be finite: one number, or one for each sample.

        Raises:
            InputError: the function raised, or gave something else than numbers.
        """
        try:
            with torch.no_grad(), working_directory_importable() if self.by_name else nullcontext():
                value = self.function(model)
        except (Exception, SystemExit) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"the metric {self.name} raised {type(error).__name__}: {first[:300]}; it is called with the model, "
                "which takes what the original takes but has none of its other methods, and must return a number, or "
                "one for each sample"
            ) from error
        numbers = _numbers(value)
        if numbers is None:
            raise InputError(
                f"the metric {self.name} returned {_described(value)}; expected one number, higher is better, such as "
                f"the accuracy as a float, or a list of one number for each sample, at least {FEWEST_SAMPLES}"
            )
        return numbers

    def of_original(self, model: nn.Module) -> np.ndarray:
        """What the model as given is worth.

        Raises:
            InputError: as for a call, or it is not finite.
        """
        numbers = self(model)
        if not np.isfinite(numbers).all():
            first = numbers[~np.isfinite(numbers)][0]
            raise InputError(
                f"the metric {self.name} returned {first}; expected a finite number: check the data it is computed on"
            )
        return numbers


def check_metric(
    metric: Callable[[nn.Module], Any] | Evaluation | None,
    budget: Budget | None,
    plan: Plan | None,
    by_site: bool = False,
) -> Evaluation | None:
    """The evaluation to hold a compile to, where one is asked for.

    Raises:
        InputError: a metric without a limit, a limit or sites without a metric, or a plan to replay as well.
    """
    limited = budget is not None and budget.max_drop is not None
    if plan is not None and (metric is not None or limited):
        raise InputError(
            "--eval and --max-drop steer a search, and --plan replays one; leave them out, or make a new plan"
        )
    if metric is None:
        DropLimit.of(None, budget or Budget())
        if by_site:
            raise InputError(
                "--eval-by-site evaluates a metric for each rewrite, and there is none; give one with "
                "--eval pkg.mod:fn (in Python metric=fn)"
            )
        return None
    evaluation = Evaluation.of(metric, by_site)
    if not limited:
        raise InputError(
            f"the metric {evaluation.name} has no limit; say how far it may fall with --max-drop 0.01 "
            "(in Python budget=Budget(max_drop=0.01))"
        )
    return evaluation


def _numbers(value: Any) -> np.ndarray | None:
    """One real number, or a row of them, one for each sample; None if it is neither."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy() if not value.is_complex() else None
    if isinstance(value, list):
        singles = [one for one in map(_numbers, value) if one is not None and one.size == 1]
        value = np.concatenate(singles) if singles and len(singles) == len(value) else None
    if isinstance(value, np.ndarray):
        is_row = value.size == 1 or (value.ndim == 1 and value.size >= FEWEST_SAMPLES)
        return value.reshape(-1).astype(float) if is_row and value.dtype.kind in "biuf" else None
    if isinstance(value, np.generic):
        value = value.item()
    return np.array([float(value)]) if isinstance(value, Real) else None


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(value, torch.Tensor) else 'an array'} of shape {list(value.shape)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed, and afterwards from where they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@dataclass(frozen=True)
class Value:
    """What a metric gives for a model, and the standard error of its fall, where it tells of single samples.

    On samples that were not seen it falls further than here in one of six cases, were it not chosen for falling little.
    """

    number: float
    error: float = 0.0

    @property
    def sure(self) -> float:
        """What is held to a limit: one standard error less."""
        return self.number - self.error


@dataclass(frozen=True, eq=False)
class Metric:
    """An evaluation on one traced model; `before` is what it gave twice for the model as given.

    A value is computed once for each set of rewrites and `turn`, each with random numbers of its own. One that is not
    finite, as of a perplexity that overflows or of a correlation between constants, is the worst there is, -inf.
    `evaluation_s` is how long the first one took, in seconds.
    """

    evaluation: Evaluation
    traced: Traced
    seed: int
    progress: Progress
    before: tuple[np.ndarray, np.ndarray]
    evaluation_s: float
    known: dict[tuple[str, ...], Value] = field(default_factory=dict)

    @classmethod
    def on(cls, traced: Traced, evaluation: Evaluation, seed: int, progress: Progress) -> Metric:
        """Evaluates the model as given, twice, and says how long one evaluation takes.

        Raises:
            InputError: the evaluation raised, or gave something else than one finite number.
        """
        progress("evaluate", 0, MOST_EVALUATIONS)
        start = time.perf_counter()
        first = _evaluated(evaluation.of_original, traced.graph.gm, traced, seed, ("original", "0"))
        taken_s = time.perf_counter() - start
        progress(f"one evaluation of {evaluation.name} takes {taken_s:.2g} s; at most {MOST_EVALUATIONS} of them", 0, 0)
        again = _evaluated(evaluation.of_original, traced.graph.gm, traced, seed, ("original", "1"))
        _check_count(evaluation, first, again)
        return cls(evaluation, traced, seed, progress, (first, again), taken_s)

    @property
    def samples(self) -> int:
        """How many samples it tells of; 1 where it gives one number for all."""
        return len(self.before[0])

    @property
    def base(self) -> float:
        """The value of the model as given: the mean of two evaluations."""
        return sum(float(numbers.mean()) for numbers in self.before) / 2

    @property
    def noise(self) -> float:
        """How far apart two evaluations of the same model are."""
        return abs(float(self.before[0].mean()) - float(self.before[1].mean()))

    def least(self, max_drop: float) -> float:
        """The least value that has not fallen further than this, by more than noise."""
        return self.base - max_drop - self.noise - RESOLUTION * abs(self.base)

    def value(self, key: tuple[str, ...], graph: Callable[[], Graph]) -> Value:
        """The value of a rewritten graph that the key stands for."""
        if key not in self.known:
            self.known[key] = self._value(graph().gm, key)
        return self.known[key]

    def drops(self, alone: Mapping[str, Candidate], made: Callable[[Candidate], Graph]) -> dict[str, float]:
        """How far the value falls with the candidate of each site alone; infinitely where it is not finite.

        `made` makes the graph with a candidate. What was evaluated before is not evaluated again; how long the rest
        takes is said first.
        """
        keys = {site: ("0", *map(str, candidate.rewrites)) for site, candidate in alone.items()}
        new = {key: alone[site] for site, key in keys.items() if key not in self.known}
        name, takes_s = self.evaluation.name, len(new) * self.evaluation_s
        self.progress(f"{len(new)} more evaluations of {name}, of one rewrite each, take {takes_s:.2g} s", 0, 0)
        for done, (key, candidate) in enumerate(new.items()):
            self.progress("evaluate by site", done, len(new))
            self.value(key, partial(made, candidate))
        return {site: self.base - self.known[key].number for site, key in keys.items()}

    def value_of(self, key: tuple[str, ...], run: Callable[[Sequence[Any]], Sequence[Any]]) -> Value:
        """The value of what takes the flat inputs of the graph and gives its outputs."""
        return self._value(in_place_of(self.traced.graph.gm, run), key)

    def _value(self, gm: fx.GraphModule, key: tuple[str, ...]) -> Value:
        numbers = _evaluated(self.evaluation, gm, self.traced, self.seed, key)
        _check_count(self.evaluation, self.before[0], numbers)
        if not np.isfinite(numbers).all():
            return Value(-math.inf)
        if self.samples == 1:
            return Value(float(numbers[0]))
        fall = (self.before[0] + self.before[1]) / 2 - numbers
        return Value(float(numbers.mean()), float(fall.std(ddof=1)) / math.sqrt(self.samples))


def _check_count(evaluation: Evaluation, before: np.ndarray, after: np.ndarray) -> None:
    if len(before) != len(after):
        raise InputError(
            f"the metric {evaluation.name} returned {len(before)} numbers for the original and {len(after)} later; "
            "expected one number for each sample, of the same samples in every call, or one number for all"
        )


def _evaluated(
    evaluation: Callable[[nn.Module], np.ndarray], gm: fx.GraphModule, traced: Traced, seed: int, key: Sequence[str]
) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torch's own deprecated ways
        own = copy.deepcopy(gm)  # graphs share modules, which a metric may cast or move
    model = CalledAsGiven(own, traced)
    with _seeded(zlib.crc32("\n".join([str(seed), *key]).encode())):
        return evaluation(model)


@dataclass(frozen=True)
class MetricResult:
    """The metric before and after a compile; `evaluations` were needed of at most `most_evaluations`.

    The drop allowed is `max_drop` and, on top of it, the `noise` between two evaluations of the original. Where the
    metric tells of single `samples`, the drop and its `standard_error` are together within that.
    """

    name: str
    before: float
    after: float
    max_drop: float
    noise: float
    standard_error: float
    samples: int
    evaluations: int
    most_evaluations: int = MOST_EVALUATIONS

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class DropLimit:
    """How far a metric may fall in one search, and how many evaluations that may take.

    `asked` are the values that the search has asked for, in order: what an earlier one has computed counts as well,
    so that a search does not depend on what came before it. `most` counts the two on the original. `reserve` is the
    share of the drop that is left to what comes after.
    """

    metric: Metric
    max_drop: float
    most: int = MOST_EVALUATIONS
    reserve: float = 0.0
    asked: dict[tuple[str, ...], Value] = field(default_factory=dict)

    @classmethod
    def of(cls, metric: Metric | None, budget: Budget) -> DropLimit | None:
        """The limit that a budget puts on a metric, None where it puts none.

        Raises:
            InputError: there is no metric to limit.
        """
        if budget.max_drop is None:
            return None
        if metric is None:
            raise InputError(
                f"a drop of at most {budget.max_drop:g} was asked for, but of no metric; give one with "
                "--eval pkg.mod:fn (in Python metric=fn)"
            )
        most = MOST_EVALUATIONS - (AFTERWARDS if budget.reserve else 0)
        return cls(metric, budget.max_drop, most, budget.reserve)

    def kept_back(self) -> DropLimit:
        """The same limit with a part of the evaluations left to those who look at the choice later."""
        return replace(self, most=self.most - KEPT_BACK)

    @property
    def left(self) -> int:
        """How many evaluations are left."""
        return self.most - ON_ORIGINAL - len(self.asked)

    @property
    def least(self) -> float:
        """The least value that holds."""
        return self.metric.least(self.max_drop * (1 - self.reserve))

    def value(self, rewrites: Sequence[object], graph: Callable[[], Graph], turn: int = 0) -> Value | None:
        """The metric with rewrites made; None where no evaluation is left to tell."""
        key = (str(turn), *map(str, rewrites))
        if key not in self.asked:
            if self.left <= 0:
                return None
            self.metric.progress("evaluate", self.most - self.left, self.most)
            self.asked[key] = self.metric.value(key, graph)
        return self.asked[key]

    def values_of(self, rewrites: Sequence[object]) -> list[Value]:
        """What was evaluated with these rewrites made."""
        return [value for (_, *made), value in self.asked.items() if made == list(map(str, rewrites))]

    def result(self, rewrites: Sequence[object] | None) -> MetricResult:
        """The figures for rewrites that were checked; None stands for the model as given."""
        metric = self.metric
        after = Value(metric.base) if rewrites is None else self.asked[(str(CHECK), *map(str, rewrites))]
        return MetricResult(
            metric.evaluation.name, metric.base, after.number, self.max_drop, metric.noise, after.error, metric.samples,
            ON_ORIGINAL + len(self.asked),
        )  # fmt: skip
