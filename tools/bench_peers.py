"""lrcompile beside other tools: `python tools/bench_peers.py resnet --python PEERS/bin/python --out docs/peers.md`.

A model is compiled for this machine (`--target local`) at a speed-up. Every peer makes its own model of it, as small as
it takes to be as fast, measured in ONNX Runtime against the original, paired. All are judged before and after the same
minutes of the same recovery: on the original's outputs, without labels. Nothing that judges was seen before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import lrcompile
from lrcompile.compile import Result
from lrcompile.devices.bench import paired
from lrcompile.devices.measure import cpu_name, usable_cores
from lrcompile.errors import BudgetError
from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import Graph, weight_bytes
from lrcompile.passes import Stage
from lrcompile.plugins import discover
from lrcompile.prepared import Prepared
from lrcompile.quantization.quantize import RESERVE
from lrcompile.report.progress import ProgressDisplay
from tools.bench_accuracy import TASKS, Task
from tools.fetch_data import DataMissing
from tools.peers import int8
from tools.peers.catalogue import PEERS
from tools.peers.original import NothingToDo, Original
from tools.peers.process import PeerFailed, PeerProcess
from tools.peers.search import TOLERANCE, nearest
from tools.peers.table import INT8, OURS, OWN, Row, at_the_speed_of, is_integers, slower_and_better, table
from tools.validate_profiles import check_marks, put

TRY_S, TRY_OPENINGS = 1.5, 2
BATCHES = 16  # calibration batches that peers are given


@dataclass(frozen=True, eq=False)
class Bench:
    """What all models of one table share: the task, the original prepared and traced apart, and lengths."""

    task: Task
    prepared: Prepared
    teacher: Graph
    minutes: float
    seconds: float
    folder: Path
    progress: ProgressDisplay
    judged: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def batches(self) -> list[tuple[Tensor, ...]]:
        """Calibration batches, of which the first is the size of the example."""
        return [tuple(batch.values()) for batch in self.task.calibration.batches[:BATCHES]]

    @property
    def reference(self) -> bytes:
        """The original as ONNX."""
        assert self.prepared.reference is not None
        return self.prepared.reference.onnx

    def ratio(self, path: Path, seconds: float, openings: int = 6) -> tuple[float, float, float]:
        """Time of an ONNX model over the original's, with its interval."""
        traced = self.prepared.traced
        inputs = {name: value.numpy() for name, value in zip(traced.input_names, traced.flat, strict=True)}
        found = paired(self.reference, path, inputs=inputs, seconds=seconds, openings=openings)
        return found.ratio, found.ratio_low, found.ratio_high

    def recovered(self, result: Result, *, outputs_alone: bool = True) -> Result:
        """A model after recovery: of its outputs alone, or with what lrcompile adds."""
        original = self.teacher if outputs_alone else None
        return lrcompile.recover(
            result, self.task.training, original=original, minutes=self.minutes, progress=self.progress,
            **self.task.recovery,
        )  # fmt: skip

    def row(self, name: str, result: Result, path: Path) -> Row:
        """The row of a model that can be recovered."""
        ratio = self.ratio(path, self.seconds)
        size = weight_bytes(result.model) / weight_bytes(self.prepared.traced.graph.gm)
        before = self.task.judge(result.model)
        if not self.minutes:
            return Row(name, ratio, size, before)
        after = self.recovered(result)
        return Row(name, ratio, size, before, self.task.judge(after.model), steps_of(after))


def rows(bench: Bench, speedup: float, peers: Sequence[str], python: Path | None) -> Iterator[Row]:
    """That of lrcompile, one of each peer, and that of lrcompile in int8 at the speed of the fastest int8 peer.

    Where another int8 peer is slower than that and better, one more of lrcompile at its speed.

    Raises:
        BudgetError: lrcompile does not get that fast.
    """
    ours = lrcompile.solve(bench.prepared, lrcompile.Budget(speedup=speedup, measure=bench.task.measure))
    path = bench.folder / "ours.onnx"
    ours.save(path)
    first = bench.row(OURS, ours, path)
    assert first.ratio is not None
    found = [first]
    yield first
    if bench.minutes:
        own = bench.recovered(ours, outputs_alone=False)
        yield replace(first, name=OWN, after=bench.task.judge(own.model), steps=steps_of(own))
    for name in peers:
        found.append(of_peer(bench, name, first.ratio[0], python))
        yield found[-1]
    speeds = {row.name: speed_of(row) for row in found if is_integers(row.name) and row.ratio}
    found.append(in_int8(bench, max([speedup, *speeds.values()])))
    yield found[-1]
    for row in slower_and_better(found):
        yield replace(in_int8(bench, speeds[row.name]), name=at_the_speed_of(row.name))


def speed_of(row: Row) -> float:
    """The speed-up that is asked for to be as fast as a row: as near as peers have to be."""
    assert row.ratio is not None
    return 1 / (row.ratio[0] * (1 + TOLERANCE))


def of_peer(bench: Bench, name: str, wanted: float, python: Path | None) -> Row:
    """The row of a peer, which says so where it fails: the others are not lost."""
    try:
        if not PEERS[name].searched:
            return quantized(bench, name)
        assert python is not None
        return searched(bench, name, wanted, python)
    except NothingToDo as reason:
        return Row(name, notes=(f"nothing to do: {reason}",))
    except PeerFailed as problem:
        return Row(name, notes=(f"failed: {problem}",))
    except Exception as problem:  # of any kind: they are other tools
        return Row(name, notes=(f"failed: {type(problem).__name__}: {problem}",))


def in_int8(bench: Bench, speedup: float) -> Row:
    """That of lrcompile in 8-bit integers, which do what they can of the speed-up; rewrites add what is left of it."""
    path = bench.folder / "int8.onnx"
    budget = lrcompile.Budget(speedup=speedup, measure=bench.task.measure, int8=True, reserve=RESERVE)
    quantize = lrcompile.Quantization(bench.task.calibration)
    try:
        result = lrcompile.solve(bench.prepared, budget)
        figures = dict(result.save(path, quantize=quantize, progress=bench.progress).quantization or {})
    except BudgetError as problem:
        return Row(INT8, notes=(f"{speedup:.2f}× was asked for: {problem}",))
    count = sum(not rewrite.exact for rewrite in result.plan.rewrites)

    def measured(figures: Mapping[str, Any]) -> Row:
        kept = figures["layers"] - len(figures["left_float"]) if figures["written"] == "int8" else 0
        notes = (f"{kept} of {figures['layers']} layers in int8, {count} split",)
        size = path.stat().st_size / len(bench.reference)
        return Row(INT8, bench.ratio(path, bench.seconds), size, bench.task.judge(int8.as_callable(path)), notes=notes)

    row = measured(figures)
    if not bench.minutes or not count:
        return row
    own = bench.recovered(result, outputs_alone=False)
    try:
        figures = dict(own.save(path, quantize=quantize, progress=bench.progress).quantization or {})
    except BudgetError as problem:
        return replace(row, notes=(*row.notes, f"after recovery: {problem}"))
    trained = measured(figures)  # of the file that was trained: other layers may be in 8 bits there
    return replace(trained, before=row.before, after=trained.before, steps=steps_of(own))


def searched(bench: Bench, name: str, wanted: float, python: Path) -> Row:
    """The row of a peer at the share that makes it take the wanted time over the original's.

    Raises:
        NothingToDo: it acts on nothing in the model.
        PeerFailed, LrcompileError: it failed, or what it made cannot be compiled.
    """
    made: dict[float, tuple[Result, Path, list[str]]] = {}
    with PeerProcess(python, name, bench.folder) as peer:

        def attempt(share: float) -> float:
            archive, notes = peer.compressed(share)
            result = fused(bench.task, archive)
            path = archive.with_suffix(".onnx")
            result.save(path)
            made[share] = result, path, notes
            ratio = bench.ratio(path, TRY_S, TRY_OPENINGS)[0]
            say(f"{name}: share {share:.3f} takes {ratio:.3f}× the original's time, {wanted:.3f} wanted")
            return ratio

        points = nearest(attempt, wanted)
    share = points[0][0]
    result, path, notes = made[share]
    row = bench.row(name, result, path)
    assert row.ratio is not None
    if row.ratio[0] > wanted * (1 + TOLERANCE):
        notes = [*notes, f"not as fast: {len(points)} shares were tried, from {min(points)[0]:.2f}"]
    return replace(row, share=share, notes=tuple(notes))


def fused(task: Task, archive: Path) -> Result:
    """What a peer made, after the exact clean-up that lrcompile's own models had, so that the same is trained."""
    exact = [transform for transform in discover().passes if transform.stage is Stage.CANONICALIZE]
    return lrcompile.compile(torch.export.load(archive), task.example, passes=exact)


def quantized(bench: Bench, name: str) -> Row:
    """The row of ONNX Runtime's int8, at the speed that it has, without recovery."""
    path, notes = int8.quantized(
        name, bench.reference, bench.prepared.traced.input_names, bench.batches, bench.folder
    )  # fmt: skip
    before = bench.task.judge(int8.as_callable(path))
    size = path.stat().st_size / len(bench.reference)
    notes = (*notes, "one speed; no recovery: its weights are integers")
    return Row(name, bench.ratio(path, bench.seconds), size, before, notes=notes)


def steps_of(result: Result) -> int:
    """The steps of a recovery."""
    return int(result.report.recovery["steps"]) if result.report.recovery else 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepared_bench(task: Task, minutes: float, seconds: float, folder: Path, progress: ProgressDisplay) -> Bench:
    """The original prepared, and written where peers read it."""
    prepared = lrcompile.prepare_model(
        task.model, task.example, target="local", calibration=task.calibration, progress=progress
    )
    teacher = trace(task.model, task.example).graph
    bench = Bench(task, prepared, teacher, minutes, seconds, folder, progress)
    Original(task.model, tuple(bench.batches), task.classes).save(folder / "original.pt")
    return bench


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TASKS))
    parser.add_argument("--python", type=Path, help="of the peers' environment (docs/peers.md); int8 needs none")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER",
                        help=f"of {', '.join(PEERS)} (default: all)")  # fmt: skip
    parser.add_argument("--speedup", type=float, default=1.5, help="that lrcompile is asked for (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of recovery, each; 0: none (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each final measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    needing = [name for name in options.peers if PEERS[name].searched]
    if needing and (options.python is None or not options.python.is_file()):
        got = f"{options.python}, which is not a file" if options.python else "none"
        parser.error(
            f"{', '.join(needing)}: expected --python, the interpreter of the peers' environment, got {got}; "
            "docs/peers.md says how to make it, and --peers ort-static ort-dynamic need none"
        )
    warnings.simplefilter("ignore")
    try:
        task = TASKS[options.name]()
    except DataMissing as problem:
        say(f"bench_peers: {problem}")
        return 1
    marks = f"<!-- {options.name} -->", f"<!-- end of {options.name} -->"
    if options.out:
        check_marks(options.out, *marks)
    start = time.monotonic()
    found = []
    with tempfile.TemporaryDirectory() as folder, ProgressDisplay(Console(stderr=True)) as progress:
        bench = prepared_bench(task, options.minutes, options.seconds, Path(folder), progress)
        try:
            for row in rows(bench, options.speedup, options.peers, options.python):
                found.append(row)
                say(str(row))
        except BudgetError as problem:
            say(f"bench_peers: {problem}")
            return 1
    command = (
        f"python tools/bench_peers.py {options.name} --speedup {options.speedup:g} --minutes {options.minutes:g} "
        f"--seconds {options.seconds:g} --python PEERS/bin/python"
    )
    if options.peers != list(PEERS):
        command += f" --peers {' '.join(options.peers)}"
    head = f"{task.settings}; {options.minutes:g} min of recovery each; {cpu_name()}, {usable_cores()} cores"
    text = "\n".join([*table(task.judge(task.model), head, found), "", f"    {command}"])
    print(text)
    say(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    if options.out:
        put(options.out, marks[0], f"\n{text}\n", marks[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
