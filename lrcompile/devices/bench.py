"""The paired benchmark: two ONNX models on the same inputs, in alternating blocks, compared block by block.

Latencies on a shared machine drift by tens of percent within seconds; the ratio of neighbouring blocks does not.
Blocks run A B B A, so that a steady drift cancels within a group. Both models are opened anew several times, in turn
the one and the other first: where a session's memory lies makes it up to 2 % faster or slower for as long as it lives
(a model against itself, measured), so the verdict is on the ratios of the openings.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from lrcompile.errors import InputError, first_line

Clock = Callable[[], float]
Run = Callable[[], object]
Progress = Callable[[str, int, int], None]

ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(value for value in vars(ort_state).values() if isinstance(value, type) and issubclass(value, Exception)),
)  # those of ONNX Runtime share no base class
BLOCK_S = 0.005
MIN_BLOCKS = 2  # in an opening
OPENINGS = 6  # fewer give no 95 % interval of a median
NOISY = 0.05
_DTYPES: dict[str, Any] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    **{
        name: np.dtype(name)
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
    },
}


@dataclass(frozen=True)
class BenchResult:
    """Model B against model A: latencies in seconds a run, and `ratio` = B/A with its 95 % interval.

    `low_a_s` is the mean of the fastest quarter of A's runs.

    `openings` counts the pairs of sessions that the ratio is the median of, each itself the median of A B B A groups,
    of which there are `blocks` in all. `noisy` says that the interval is wider than ±5 %. `contention` is the part of
    the time that threads of this process waited for a core that another program held (0 where the system does not
    tell); much of it slows models most that run on several cores. `output_difference` is the largest relative
    difference ‖b − a‖/‖a‖ of an output, None where the outputs cannot be compared; `outputs` says why.
    """

    median_a_s: float
    min_a_s: float
    low_a_s: float
    median_b_s: float
    min_b_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    openings: int
    blocks: int
    noisy: bool
    contention: float
    output_difference: float | None
    outputs: str
    batch: int
    threads: int | None

    @property
    def verdict(self) -> str:
        """One word or two: which is faster, or why that is not known."""
        if self.noisy:
            return "too noisy: repeat"
        if self.ratio_low <= 1 <= self.ratio_high:
            return "no difference"
        return "second faster" if self.ratio < 1 else "first faster"

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {"kind": "measured", **asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Blocks:
    """Latencies in seconds of each run, and B/A of each A B B A group."""

    runs_a_s: list[float]
    runs_b_s: list[float]
    ratios: list[float]


def paired(
    model_a: str | Path | bytes,
    model_b: str | Path | bytes,
    *,
    inputs: Mapping[str, Any] | None = None,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    threads: int | None = None,
    openings: int = OPENINGS,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> BenchResult:
    """Measures two ONNX models against each other in ONNX Runtime on this machine's CPU, for about `seconds`.

    Inputs that `inputs` (name → array) does not hold are random; open leading axes get size `batch`. `threads` is
    ONNX Runtime's intra-op count, its own default when None. `openings` is how often both models are opened; with
    fewer than six the interval is that of the extremes. `progress` gets ("bench", done, total).

    Raises:
        InputError: a file is missing or not ONNX, the models' inputs differ, or an input is wrong or cannot be made.
        InputError: `batch`, `seconds` or `seed` is out of range.
    """
    if batch < 1 or not 0 <= seconds < math.inf or seed < 0:
        raise InputError(
            f"expected a batch of at least 1, seconds and a seed of at least 0; got {batch}, {seconds} and {seed}"
        )
    session_a, name_a = _open(model_a, threads, "the first model")
    session_b, name_b = _open(model_b, threads, "the second model")
    _check_same_inputs(session_a.get_inputs(), session_b.get_inputs())
    ports = [_tighter(a, b) for a, b in _matched(session_a.get_inputs(), session_b.get_inputs())]
    feeds = make_feeds(ports, dict(inputs or {}), batch, seed)
    outputs_a, outputs_b = _run(session_a, feeds, name_a), _run(session_b, feeds, name_b)
    difference, outputs = compare_outputs(outputs_a, outputs_b)
    waiting = running = 0.0  # threads end with their session
    done: list[Blocks] = []
    for i in range(openings):
        if i:
            del session_a, session_b  # before others are opened: models may be large
            if i % 2:
                session_b, _ = _open(model_b, threads, name_b)
                session_a, _ = _open(model_a, threads, name_a)
            else:
                session_a, _ = _open(model_a, threads, name_a)
                session_b, _ = _open(model_b, threads, name_b)
        run_a, run_b = partial(session_a.run, None, feeds), partial(session_b.run, None, feeds)
        waited, start = waited_s(), clock()
        done.append(interleave(run_a, run_b, seconds / openings, clock, _part(progress or _silent, i, openings)))
        waiting, running = waiting + waited_s() - waited, running + clock() - start
        del run_a, run_b
    contention = min(1.0, waiting / max(running, 1e-9))
    ratio, low, high = median_interval([statistics.median(blocks.ratios) for blocks in done])
    runs_a_s, runs_b_s = (
        [t for blocks in done for t in blocks.runs_a_s],
        [t for blocks in done for t in blocks.runs_b_s],
    )
    return BenchResult(
        median_a_s=statistics.median(runs_a_s),
        min_a_s=min(runs_a_s),
        low_a_s=fastest_quarter(runs_a_s),
        median_b_s=statistics.median(runs_b_s),
        min_b_s=min(runs_b_s),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        openings=openings,
        blocks=sum(len(blocks.ratios) for blocks in done),
        noisy=(high - low) / 2 > NOISY * ratio,
        contention=contention,
        output_difference=difference,
        outputs=outputs,
        batch=batch,
        threads=threads,
    )


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """The options of every measurement: all graph optimisations, ONNX Runtime's default threads unless given.

    Threads stop when a run ends: by default those of one session go on spinning for the next run, and with two
    sessions in turn they take the cores from the other (measured on two cores: a thread waited 90 % of the time).
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def waited_s() -> float:
    """Seconds that this process's threads have waited for a core since they started; 0 where that is not known."""
    waited_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
            waited_ns += int(path.read_text().split()[1])
    return waited_ns / 1e9


def interleave(run_a: Run, run_b: Run, seconds: float, clock: Clock, progress: Progress) -> Blocks:
    """Runs A B B A groups of blocks of at least 5 ms until `seconds` have passed, and two groups at least."""
    runs = (run_a, run_b)
    counts = [_warm_up(run, seconds, clock) for run in runs]
    times: tuple[list[float], list[float]] = ([], [])
    ratios: list[float] = []
    start = clock()
    while len(ratios) < MIN_BLOCKS or clock() - start < seconds:
        medians: tuple[list[float], list[float]] = ([], [])
        for side in (0, 1, 1, 0):
            block = [_timed(runs[side], clock) for _ in range(counts[side])]
            times[side].extend(block)
            medians[side].append(statistics.median(block))
        ratios.append(math.sqrt(math.prod(medians[1]) / math.prod(medians[0])))
        progress("bench", min(99, int(100 * (clock() - start) / max(seconds, 1e-9))), 100)
    progress("bench", 100, 100)
    return Blocks(*times, ratios)


def fastest_quarter(samples: Sequence[float]) -> float:
    """Mean of the fastest quarter: interference only ever adds time."""
    fastest = sorted(samples)[: max(1, len(samples) // 4)]
    return sum(fastest) / len(fastest)


def median_interval(ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(median, low, high): the sign-test interval of the median, which assumes no distribution.

    Below six values no such interval reaches 95 %, and the extremes are returned.
    """
    ordered, n = sorted(ratios), len(ratios)
    tail, rank = 0.0, 0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if tail > (1 - confidence) / 2:
            break
        rank += 1
    outside = max(rank - 1, 0)
    return statistics.median(ordered), ordered[outside], ordered[n - 1 - outside]


def make_feeds(ports: Sequence[ort.NodeArg], given: Mapping[str, Any], batch: int, seed: int) -> dict[str, np.ndarray]:
    """Arrays for every input: those given, checked, and random ones for the rest.

    Floats are normal, integers 0 or 1 (safe as indices; 1 where the name says mask), booleans true.

    Raises:
        InputError: a given array fits no input, or the size of an axis is not known.
    """
    known = [port.name for port in ports]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"the models have no input {unknown[0]!r}; their inputs are {', '.join(known)}")
    rng = np.random.default_rng(seed)
    leading = {port.shape[0] for port in ports if port.shape}
    if batch != 1 and leading and all(isinstance(size, int) and size != batch for size in leading):
        raise InputError(f"batch {batch} was asked for, but the models fix the first axis at {min(leading)}")
    feeds = {}
    for port in ports:
        dtype = _dtype(port)
        if port.name in given:
            feeds[port.name] = _checked(port, np.asarray(given[port.name]), dtype)
            continue
        shape = [_size(port, axis, size, batch, leading) for axis, size in enumerate(port.shape)]
        feeds[port.name] = random_array(rng, shape, dtype, port.name)
    return feeds


def random_array(rng: np.random.Generator, shape: Sequence[int], dtype: Any, name: str = "") -> np.ndarray:
    """Values that are safe and typical for an input of that type."""
    kind = np.dtype(dtype).kind
    if kind in "iu" and "mask" not in name:
        return rng.integers(0, 2, shape).astype(dtype)
    if kind in "iub":
        return np.ones(shape, dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def compare_outputs(outputs_a: Sequence[Any], outputs_b: Sequence[Any]) -> tuple[float | None, str]:
    """(largest relative difference ‖b − a‖/‖a‖ of an output or None, what was compared or why nothing was)."""
    if len(outputs_a) != len(outputs_b):
        return None, f"not compared: {len(outputs_a)} and {len(outputs_b)} outputs"
    largest = 0.0
    for i, (a, b) in enumerate(zip(outputs_a, outputs_b, strict=True)):
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape:
            return (
                None,
                f"not compared: output {i} has shapes {getattr(a, 'shape', '?')} and {getattr(b, 'shape', '?')}",
            )
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        same = (wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))
        wide_a, wide_b = np.where(same & ~np.isfinite(wide_a), 0, (wide_a, wide_b))
        if not (np.isfinite(wide_a).all() and np.isfinite(wide_b).all()):
            return None, f"not compared: output {i} is not finite in one of them"
        norm = float(np.linalg.norm(wide_a))
        difference = float(np.linalg.norm(wide_b - wide_a))
        largest = max(largest, difference / norm if norm else difference)
    return largest, f"{len(outputs_a)} compared"


def _open(model: str | Path | bytes, threads: int | None, called: str) -> tuple[ort.InferenceSession, str]:
    name = called if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"{name} is not a file; give an ONNX model")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, session_options(threads), providers=["CPUExecutionProvider"]), name
    except ORT_ERRORS as error:
        raise InputError(f"ONNX Runtime cannot open {name} as an ONNX model: {first_line(error)}") from error


def _run(session: ort.InferenceSession, feeds: dict[str, np.ndarray], name: str) -> Sequence[Any]:
    try:
        return session.run(None, feeds)
    except ORT_ERRORS as error:
        raise InputError(
            f"{name} does not run on these inputs: {first_line(error)}; give shapes that it takes with --input"
        ) from error


def _check_same_inputs(ports_a: Sequence[ort.NodeArg], ports_b: Sequence[ort.NodeArg]) -> None:
    names_a, names_b = ({port.name for port in ports} for ports in (ports_a, ports_b))
    for ports, others, owner in ((ports_a, names_b, "first"), (ports_b, names_a, "second")):
        alone = [port.name for port in ports if port.name not in others]
        if alone:
            raise InputError(f"only the {owner} model has the input {alone[0]!r}; both must take the same inputs")
    for a, b in _matched(ports_a, ports_b):
        fits = len(a.shape) == len(b.shape) and all(
            x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(a.shape, b.shape, strict=True)
        )
        if a.type != b.type or not fits:
            raise InputError(
                f"input {a.name!r} differs between the models: {a.type}{a.shape} in the first, "
                f"{b.type}{b.shape} in the second; both must take the same inputs"
            )


def _matched(ports_a: Sequence[ort.NodeArg], ports_b: Sequence[ort.NodeArg]) -> list[tuple[ort.NodeArg, ort.NodeArg]]:
    by_name = {port.name: port for port in ports_b}
    return [(port, by_name[port.name]) for port in ports_a]


@dataclass(frozen=True)
class _Port:
    name: str
    type: str
    shape: list[Any]


def _tighter(a: ort.NodeArg, b: ort.NodeArg) -> _Port:
    """The input as both models take it: a size that one of them fixes holds for both."""
    return _Port(a.name, a.type, [y if isinstance(y, int) else x for x, y in zip(a.shape, b.shape, strict=True)])


def _dtype(port: Any) -> Any:
    name = port.type.removeprefix("tensor(").removesuffix(")")
    if name not in _DTYPES:
        raise InputError(f"input {port.name!r} has type {port.type}, for which no values can be made")
    return _DTYPES[name]


def _checked(port: Any, value: np.ndarray, dtype: Any) -> np.ndarray:
    fits = value.ndim == len(port.shape) and all(
        expected == got or not isinstance(expected, int) for expected, got in zip(port.shape, value.shape, strict=True)
    )
    if not fits or value.dtype != dtype:
        raise InputError(
            f"input {port.name!r} is {value.dtype}{list(value.shape)}, "
            f"but the models take {np.dtype(dtype).name}{list(port.shape)}"
        )
    return value


def _size(port: Any, axis: int, size: Any, batch: int, leading: set[Any]) -> int:
    if isinstance(size, int):
        return size
    if axis == 0 or (size and size in leading):
        return batch
    raise InputError(
        f"axis {axis} of input {port.name!r} has no fixed size ({size or 'unnamed'}); "
        f"give the input, such as --input {port.name}=float32[…], or export the model with that axis fixed"
    )


def _warm_up(run: Run, seconds: float, clock: Clock) -> int:
    """Runs for a twentieth of the time and twice at least; returns how many runs fill a block."""
    start, least = clock(), math.inf
    done = 0
    while done < 2 or clock() - start < min(seconds / 20, 0.5):
        least = min(least, _timed(run, clock))
        done += 1
    return max(1, math.ceil(BLOCK_S / max(least, 1e-6)))


def _timed(run: Run, clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def _part(progress: Progress, i: int, parts: int) -> Progress:
    """The progress of part i of several as that of the whole."""
    return lambda stage, done, total: progress(stage, (100 * i + 100 * done // total) // parts, 100)


def _silent(stage: str, done: int, total: int) -> None:
    pass
