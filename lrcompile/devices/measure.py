"""The `local` target: regions measured on this machine with ONNX Runtime, each pair once, and remembered on disk.

A rewrite is judged by two sessions run in turn, A B B A, because on a shared machine the ratio of neighbours is
steady where latencies are not. Interference only ever adds time, so the fastest quarter of the samples counts.
"""

from __future__ import annotations

import math
import os
import pickle
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import helper
from torch import fx

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.bench import ORT_ERRORS, Clock, Run, fastest_quarter, random_array, session_options, waited_s
from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.onnx_graph import OPSET
from lrcompile.devices.onnx_region import LoweredRegion, UnsupportedRegion, lower_region
from lrcompile.devices.pace import Paced
from lrcompile.devices.profile import load_device
from lrcompile.devices.repeated import copies_for, handing_over, least_copies, repeated, waking
from lrcompile.devices.timings import Timing, default_cache_dir, forget, key_of, recalled, remember
from lrcompile.errors import DeviceError, first_line
from lrcompile.graph.describe import describe
from lrcompile.graph.op import OpDesc

SAMPLE_S = 2e-4  # longer samples are hit by interference more often, shorter ones by the timer
MIN_ROUNDS, MAX_ROUNDS = 6, 30
BUDGET_S = 0.1  # a side
SETTLED, UNSETTLED = 0.03, 0.2  # difference between the halves of the samples
SIGMA_FLOOR = 0.02
CONTENDED = 0.2  # part of the time that threads waited for a core
SIGMA_CONTENDED = 0.3
HOPELESS = 1.3
FEW = 1 << 14  # random values, repeated to fill an input: making them takes longer than running most operations
CONFIDENCE = 0.9
CPU_PROVIDERS = ("CPUExecutionProvider",)
VECTOR_UNITS = {  # by the flags of x86, the widest first
    "amx_tile": "AMX", "avx512_vnni": "AVX-512 with VNNI", "avx512f": "AVX-512", "avx_vnni": "AVX2 with VNNI",
    "avx2": "AVX2",
}  # fmt: skip
UNMEASURABLE: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError)
LEAST_S = 2e-8  # what any operation takes, where noise hides it


@dataclass
class Counters:
    """What a cost model did: pairs measured, remembered and skipped as hopeless, and regions it had to predict.

    Of those `reused`, some were `recalled` from disk, where they are of another hour or of a busy machine.
    """

    measured: int = 0
    reused: int = 0
    recalled: int = 0
    skipped: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class LocalCostModel:
    """Measures operations and regions on this machine's CPU with ONNX Runtime.

    `dynamic_batch` and `opset` say how the model will be emitted; ONNX Runtime fuses accordingly. `threads` is its
    intra-op count, its own default when None. Results are kept in `cache_dir`, or only in memory when that is None;
    very noisy ones for an hour. `clock` and `waited` are those of `measure`. What ONNX Runtime cannot run is predicted
    with the x86-ort profile, scaled to this machine, and its wide error bars; `counters.fallbacks` counts it by reason.
    Where it `measures_only`, that is a DeviceError instead. With `recent_only` it takes from disk what was measured in
    the last minutes, undisturbed.
    """

    cache_dir: Path | None = field(default_factory=default_cache_dir)
    dynamic_batch: bool = True
    opset: int = OPSET
    threads: int | None = None
    clock: Clock = time.perf_counter
    waited: Clock = waited_s
    measures_only: bool = False
    recent_only: bool = False
    kind: str = field(default="measured", init=False)
    counters: Counters = field(default_factory=Counters, init=False, repr=False, compare=False)
    _memory: dict[str, tuple[Timing, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _unmeasurable: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _open: dict[LoweredRegion, Run] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def measured(self) -> int:
        """How many operations and pairs were measured."""
        return self.counters.measured

    @property
    def reused(self) -> int:
        """How many were known, from this process or from disk."""
        return self.counters.reused

    @property
    def fallbacks(self) -> Counter[str]:
        """How many could not be measured and were predicted instead, by reason."""
        return self.counters.fallbacks

    def cost(self, op: OpDesc) -> Cost:
        """The price of one operation among others: what some more of it take in a session; views cost nothing."""
        if op.kind == "view":
            return Cost()
        try:
            copies, regions = _repeated(op, self.opset)
        except UnsupportedRegion as error:
            return self._predicted(error.reason, _prior().cost(op))
        if not regions:
            return self._predicted(f"operation {op.kind} in {op.dtype} has no ONNX form of its own", _prior().cost(op))
        timings = self._timings(regions)
        if isinstance(timings, str):
            return self._predicted(timings, _prior().cost(op))
        latency_s, deviation_s = of_one(timings[0], timings[1], copies)
        product_s, handed_s = timings[3 if len(timings) > 3 else 1][0], timings[2][0]  # where the second is the product
        return Paced(latency_s, deviation_s, op.flops, op.weight_bytes, op.activation_bytes, product_s, handed_s)

    def forget(self, op: OpDesc) -> None:
        """Drops what is remembered of an operation, so that it is measured again."""
        with suppress(UnsupportedRegion):
            _, regions = _repeated(op, self.opset)
            if regions:
                key, _ = self._identified(regions)
                self._memory.pop(key, None)
                forget(self.cache_dir, key)

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        """Prices of a region before and after a rewrite, measured as a pair, all nodes included.

        The error bars are those of the difference, shared between the sides. A pair that is not `worth_measuring`
        or that ONNX Runtime cannot run gets the analytic prediction.
        """
        try:
            regions = tuple(
                lower_region(gm, dynamic_batch=self.dynamic_batch, opset=self.opset) for gm in (before, after)
            )
        except UnsupportedRegion as error:
            return self._predicted(error.reason, _prior().compare(before, after))
        key, distinct = self._identified(regions)
        timings = self._known(key, len(distinct))
        if timings is None and not self.worth_measuring(before, after):
            self.counters.skipped += 1
            return _prior().compare(before, after)
        timings = timings or self._measured(key, distinct)
        if isinstance(timings, str):
            return self._predicted(timings, _prior().compare(before, after))
        if len(distinct) == 1:  # what is the same costs the same, to the last bit
            timings = ((timings[0][0], 0.0),)
        return _with_traffic(before, timings[0]), _with_traffic(after, timings[-1])

    def worth_measuring(self, before: fx.GraphModule, after: fx.GraphModule) -> bool:
        """False where the x86-ort profile is 90 % sure that the rewrite is more than 1.3 times slower.

        Launches are left out, because their length varies most between machines.
        """
        old, new = _arithmetic().compare(before, after)
        excess = new.latency_s - HOPELESS * old.latency_s
        sigma = math.hypot(new.sigma_s, HOPELESS * old.sigma_s)
        return Cost(excess, sigma).p_positive < CONFIDENCE

    def of_now(self) -> LocalCostModel:
        """One that knows nothing of what was measured before the last minutes."""
        return replace(self, recent_only=True)

    def _timings(self, regions: Sequence[LoweredRegion]) -> tuple[Timing, ...] | str:
        """The timings of some regions, known or new; the reason where there are none."""
        key, distinct = self._identified(regions)
        return self._known(key, len(distinct)) or self._measured(key, distinct)

    def _identified(self, regions: Sequence[LoweredRegion]) -> tuple[str, Sequence[LoweredRegion]]:
        """What the timings of regions are remembered by, and which are measured: a pair of equals as one."""
        signatures = list(dict.fromkeys(region.signature() for region in regions))
        return _key(signatures, self.threads), regions[: len(signatures)]

    def _known(self, key: str, count: int) -> tuple[Timing, ...] | str | None:
        """Remembered timings, or the reason why there are none; None where nothing is remembered."""
        if key in self._unmeasurable:
            return self._unmeasurable[key]
        if key not in self._memory:
            found = recalled(self.cache_dir, key, count)
            if found is None or (self.recent_only and not found.recent):
                return None
            self._memory[key] = found.timings
            self.counters.recalled += not found.recent
        self.counters.reused += 1
        return self._memory[key]

    def _measured(self, key: str, regions: Sequence[LoweredRegion]) -> tuple[Timing, ...] | str:
        try:
            timings = measure([self._opened(region) for region in regions], self.clock, self.waited)
        except UNMEASURABLE as error:
            self._unmeasurable[key] = f"ONNX Runtime: {first_line(error)}"
            return self._unmeasurable[key]
        self.counters.measured += 1
        self._memory[key] = timings
        remember(self.cache_dir, key, timings)
        return timings

    def _opened(self, region: LoweredRegion) -> Run:
        """A region to run; what tells the pace stays open."""
        if region not in _telling("fp32", self.opset):
            return open_region(region, self.threads)
        if region not in self._open:
            self._open[region] = open_region(region, self.threads)
        return self._open[region]

    def _predicted(self, reason: str, prediction: Any) -> Any:
        if self.measures_only:
            raise DeviceError(f"it cannot be measured here: {reason}")
        self.counters.fallbacks[reason] += 1
        return prediction


def of_one(more: Timing, less: Timing, copies: int) -> Timing:
    """What one operation takes, of two graphs of which the first has so many copies of it more."""
    return max((more[0] - less[0]) / copies, LEAST_S), math.hypot(more[1], less[1]) / copies


def open_region(
    region: LoweredRegion,
    threads: int | None = None,
    *,
    providers: Sequence[Any] = CPU_PROVIDERS,
    on: str = "cpu",
    falls_back: bool = True,
) -> Run:
    """A call that runs the region once in ONNX Runtime, on bound inputs and outputs, so that nothing is copied.

    `providers` are ONNX Runtime's names of what runs it, with their options; `on` is the device that values lie on.
    Unless it `falls_back`, nothing of it may run on the CPU instead.

    Raises:
        ORT_ERRORS: ONNX Runtime cannot open the region or allocate its inputs.
    """
    model = region.model().SerializeToString()
    options = session_options(threads)
    if not falls_back:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(model, options, providers=list(providers))
    binding = session.io_binding()
    held = []  # a bound value does not own its memory
    for port in region.inputs:
        few = _few_values(port.elem_type)[: math.prod(port.shape)]
        held.append(ort.OrtValue.ortvalue_from_numpy(np.resize(few, port.shape), on))
        binding.bind_ortvalue_input(port.name, held[-1])
    for port in region.outputs:
        dtype = helper.tensor_dtype_to_np_dtype(port.elem_type)
        held.append(ort.OrtValue.ortvalue_from_shape_and_type(list(port.shape), dtype, on))
        binding.bind_ortvalue_output(port.name, held[-1])

    def run(held: list[ort.OrtValue] = held) -> None:
        session.run_with_iobinding(binding)

    run()
    return run


@lru_cache(maxsize=8)
def _few_values(elem_type: int) -> np.ndarray:
    return random_array(np.random.default_rng(0), (FEW,), helper.tensor_dtype_to_np_dtype(elem_type))


def pace_now() -> Paced:
    """What tells the pace of this machine now, of no operation."""
    (handed_s, _), (product_s, _) = measure([open_region(region) for region in _telling("fp32", OPSET)])
    return Paced(product_s=product_s, handed_s=handed_s)


def paced(latency_s: Callable[[], float]) -> Paced:
    """What a measurement of another kind gives, with what tells the pace before and after it."""
    before, found_s, after = pace_now(), latency_s(), pace_now()
    product_s, handed_s = (before.product_s + after.product_s) / 2, (before.handed_s + after.handed_s) / 2
    return Paced(found_s, product_s=product_s, handed_s=handed_s)


def measure(runs: Sequence[Run], clock: Clock = time.perf_counter, waited: Clock = waited_s) -> tuple[Timing, ...]:
    """Latency in s of some calls, and its standard deviation; they are run in turn.

    Of several, the deviation is that of the difference of the first two, shared, so that drift which both felt does not
    count. `waited` gives the seconds that other programs have kept this one's threads from running. A steady load of
    that kind slows both halves of the samples alike: a poor measurement is repeated if the load goes, and what remains
    of it widens the deviation (our reading: what waits all the time takes up to twice as long where it runs on several
    cores).
    """
    counts = [_runs_in_a_sample(run, clock) for run in runs]

    def attempt(rounds: int) -> tuple[float, list[list[float]]]:
        start, waited_before = clock(), waited()
        samples = _sample(runs, counts, clock, rounds)
        share = (waited() - waited_before) / max(clock() - start, 1e-9)
        return min(1.0, max(0.0, share)), samples  # threads that ended take what they waited with them

    contention, samples = attempt(MAX_ROUNDS)
    poor = contention > CONTENDED or _spread(samples) > UNSETTLED
    if poor and attempt(MIN_ROUNDS)[0] <= CONTENDED:
        again = attempt(MAX_ROUNDS)
        contention, samples = min((contention, samples), again, key=lambda found: found[0] + _spread(found[1]))
    floor = SIGMA_FLOOR + SIGMA_CONTENDED * contention
    return tuple((fastest_quarter(side), max(_noise(samples), floor * fastest_quarter(side))) for side in samples)


def local_device() -> Device:
    """The x86-ort profile with this machine's cores and vector width; what it predicts is not calibrated."""
    profile = load_device("x86-ort")
    cores, wide = usable_cores(), "avx512f" in _cpu_facts().get("flags", "").split()
    block = 16 if wide else 8  # channels in a block of ONNX Runtime's NCHWc convolutions
    faster = cores * (2 if wide else 1) / profile.units
    source = f"assumed (x86-ort, scaled to {cores} cores{' with AVX-512' if wide else ''})"
    blocks = "measured here (what ONNX Runtime makes of convolutions: blocks of channels as wide as the vectors)"
    changed = {"dtype.fp32.alignment_conv": blocks, "dtype.fp32.rank_step": blocks, "hardware.units": "measured here"}
    return replace(
        profile,
        name="local",
        description=f"{cpu_name()}, ONNX Runtime {ort.__version__}, {cores} cores",
        units=cores,
        peak_flops={name: rate * faster for name, rate in profile.peak_flops.items()},
        alignment_conv={**profile.alignment_conv, "fp32": block},
        rank_step={**profile.rank_step, "fp32": block},
        provenance={**profile.provenance, **{f"dtype.{name}.peak": source for name in profile.peak_flops}, **changed},
    )


def usable_cores() -> int:
    """Cores that this process may use: what ONNX Runtime's default thread count follows, at every batch size."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_facts() -> list[str]:
    """What tells this processor from others of its name: family, model, stepping and cache."""
    return [cpu_name(), *(_cpu_facts().get(key, "") for key in ("cpu family", "model", "stepping", "cache size"))]


def cpu_name() -> str:
    """The processor's name as the system tells it, and its vector units: virtual machines hide which model it is."""
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return next((f"{name} ({words})" for flag, words in VECTOR_UNITS.items() if flag in flags), name)


@lru_cache(maxsize=1)
def _cpu_facts() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _repeated(op: OpDesc, opset: int) -> tuple[int, list[LoweredRegion]]:
    """(how many copies more the first graph of an operation holds than the second, these and what tells the pace).

    There are none if it has no such form. Attention has the open batch that models have: with static shapes ONNX
    Runtime need not turn the keys.

    Raises:
        UnsupportedRegion: it has no form in ONNX.
    """
    copies, held = _lowered(op, opset)
    regions = pickle.loads(held)
    return copies, [*regions, *_telling(op.dtype, opset)] if regions else []


@lru_cache(maxsize=400)  # a calibration and a check of it come back to an operation after over 200 others
def _lowered(op: OpDesc, opset: int) -> tuple[int, bytes]:
    """(how many copies, the two graphs), held as bytes.

    Held as they are, their many small objects scatter what sessions allocate between them, and operations of a few µs
    take longer.
    """
    copies = copies_for(op, _arithmetic_here().cost(op).latency_s)
    least = least_copies(op, copies)
    graphs = [gm for gm in (repeated(op, least + copies), repeated(op, least)) if gm is not None]
    regions = [lower_region(gm, dynamic_batch=op.attention is not None, opset=opset) for gm in graphs]
    return copies, pickle.dumps(regions)


@lru_cache(maxsize=8)
def _telling(dtype: str, opset: int) -> tuple[LoweredRegion, LoweredRegion]:
    """What tells the pace: small convolutions that threads share, and the product that graphs of a type start with."""
    handed, product = (lower_region(gm, dynamic_batch=False, opset=opset) for gm in (handing_over(), waking(dtype)))
    return handed, product


@lru_cache(maxsize=1)
def _prior() -> AnalyticCostModel:
    return AnalyticCostModel(local_device())


@lru_cache(maxsize=1)
def _arithmetic() -> AnalyticCostModel:
    device = load_device("x86-ort")
    return AnalyticCostModel(replace(device, launch_s=dict.fromkeys(device.launch_s, 0.0)))


@lru_cache(maxsize=1)
def _arithmetic_here() -> AnalyticCostModel:
    device = local_device()
    return AnalyticCostModel(replace(device, launch_s=dict.fromkeys(device.launch_s, 0.0)))


def _key(signatures: Sequence[str], threads: int | None) -> str:
    return key_of(ort.__version__, cpu_facts(), usable_cores() if threads is None else threads, *signatures)


def _with_traffic(gm: fx.GraphModule, timing: Timing) -> Cost:
    ops = [describe(gm, node) for node in gm.graph.nodes if node.op in ("call_module", "call_function")]
    return Cost(
        *timing,
        sum(op.flops for op in ops),
        sum(op.weight_bytes for op in ops),
        sum(op.activation_bytes for op in ops),
    )


def _runs_in_a_sample(run: Run, clock: Clock) -> int:
    least = math.inf
    for _ in range(3):
        start = clock()
        run()
        least = min(least, clock() - start)
    return min(1000, max(1, math.ceil(SAMPLE_S / max(least, 1e-7))))


def _sample(runs: Sequence[Run], counts: Sequence[int], clock: Clock, rounds: int) -> list[list[float]]:
    """Samples of every call, in A B B A order, until both halves agree or the time is spent."""
    samples: list[list[float]] = [[] for _ in runs]
    sides = list(range(len(runs)))
    start = clock()
    for done in range(rounds):
        if done >= MIN_ROUNDS and (_spread(samples) <= SETTLED or clock() - start > BUDGET_S * len(runs)):
            break
        for side in sides if done % 2 == 0 else sides[::-1]:
            begin = clock()
            for _ in range(counts[side]):
                runs[side]()
            samples[side].append((clock() - begin) / counts[side])
    return samples


def _noise(samples: Sequence[Sequence[float]]) -> float:
    """Standard deviation in s of a side, from how far the halves of the samples disagree."""
    differences = [first - second for first, second in map(_halves, samples)]
    if len(differences) == 1:
        return abs(differences[0]) / 2
    return abs(differences[0] - differences[1]) / 2 / math.sqrt(2)


def _halves(samples: Sequence[float]) -> tuple[float, float]:
    middle = len(samples) // 2
    return fastest_quarter(samples[:middle]), fastest_quarter(samples[middle:])


def _spread(samples: Sequence[Sequence[float]]) -> float:
    """The largest relative difference between the first and second half of a side's samples."""
    halves = [_halves(side) for side in samples]
    return max(abs(first - second) / max(min(first, second), 1e-12) for first, second in halves)
