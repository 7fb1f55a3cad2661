"""Every pair of passes through the whole compile: errors as reported, plans that replay to the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import lrcompile
from lrcompile.emit.folder import load_folder
from lrcompile.frontend.export import batch_axes, export
from lrcompile.graph.graph import weight_bytes
from lrcompile.passes import Pass, Stage
from lrcompile.planning.choose import Limits, choose
from lrcompile.planning.plan import Plan
from tests.passes import common
from tests.passes.pair_models import MODELS, inputs, make
from tests.passes.test_pairs import ALL

NOISE = 0.02  # so that lossy rewrites have an error to measure
CALIBRATED = ("text",)
NOTHING_TO_DO: dict[str, set[str]] = {
    "image": {"fold-layer-norm", "factorize-conv3d", "low-rank-embedding", "group-heads"},
    "text": {"factorize-conv3d"},
    "video": set(),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A model exported once, its samples, and the calibration data made of them, or None.

    `seen` are the samples that errors are measured on: of calibration data all, else those of the example.
    """

    program: ExportedProgram
    samples: tuple[Tensor, ...]
    expected: Tensor
    calibration: lrcompile.CalibrationData | None
    seen: tuple[int, ...]

    @property
    def example(self) -> tuple[Tensor, ...]:
        return tuple(x[:2] for x in self.samples)

    def output(self, module: Any, *samples: int) -> Tensor:
        with torch.no_grad():
            return module(*(x[list(samples)] for x in self.samples))


@cache
def case(name: str) -> Case:
    model, samples = make(name, torch.float32, NOISE), inputs(name, 8, torch.float32)
    example = tuple(x[:2] for x in samples)
    exported, kept, _ = export(model, example, {}, batch_axes(example))
    assert all(kept)
    with torch.no_grad():
        expected = model(*samples)
    if name not in CALIBRATED:
        return Case(exported, samples, expected, None, (0, 1))
    data = lrcompile.calibration_from(samples[0], ["tokens"], 4)
    return Case(exported, samples, expected, data, tuple(range(8)))


def compiled(name: str, passes: list[Pass]) -> list[lrcompile.Result]:
    """The fastest within an error, and the most accurate of nearly the least size, for which every pass is needed."""
    model = case(name)
    prepared = lrcompile.prepare_model(
        model.program, model.example, target="rpi5", passes=passes, calibration=model.calibration
    )
    budgets = [lrcompile.Budget(max_error=0.03, confidence=0.0)]
    candidates = prepared.pricing.candidates
    smallest = choose(candidates, [0.0] * len(candidates), Limits(), "size") or []
    saved = sum(candidates[i].bytes_saved for i in smallest)
    if saved > 0:
        budgets.append(lrcompile.Budget(size=1 - 0.9 * saved / weight_bytes(prepared.graph.gm), confidence=0.0))
    return [lrcompile.solve(prepared, budget) for budget in budgets]


def files(result: lrcompile.Result, path: Path) -> dict[str, bytes]:
    result.save(path)
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in found}


def replayed(name: str, result: lrcompile.Result) -> lrcompile.Result:
    """From the plan as JSON, and with all passes that are installed: their options are the plan's."""
    model, plan = case(name), Plan.loads(result.plan.dumps())
    again = lrcompile.compile(model.program, model.example, plan=plan, calibration=model.calibration)
    assert again.plan.dumps() == result.plan.dumps()
    assert again.report.error == result.report.error
    return again


def priced(result: lrcompile.Result) -> set[str]:
    return {str(r) for r in result.plan.rewrites if ALL[r.pass_name].stage is not Stage.CANONICALIZE}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ALL)
def test_every_pair_compiles_and_replays(first: str, name: str, tmp_path: Path) -> None:
    later = list(ALL)[list(ALL).index(first) :]
    model, without_both = case(name), []
    for number, second in enumerate(later):
        passes, used = list(dict.fromkeys((ALL[first], ALL[second]))), set[str]()
        pairs = zip(compiled(name, passes), compiled(name, passes[::-1]), strict=True)
        for i, (result, reverse) in enumerate(pairs):
            place, got = tmp_path / f"{number}-{i}", model.output(result.model, *model.seen)
            used |= {rewrite.pass_name for rewrite in result.plan.rewrites}
            measured = result.report.error["measured"]
            assert common.relative(got, model.expected[list(model.seen)]) == pytest.approx(measured, 1e-3, 1e-6)
            written = files(result, place)
            assert written == files(replayed(name, result), place.with_name(f"{place.name}-again"))
            assert common.relative(model.output(load_folder(place), 1, 0, 1), got[[1, 0, 1]]) <= 1e-5
            assert priced(reverse) == priced(result)
            assert reverse.report.latency_ms["after"] == pytest.approx(result.report.latency_ms["after"], rel=1e-9)
            assert common.relative(model.output(reverse.model, *model.seen), got) <= 1e-5
        if not {first, second} <= used | NOTHING_TO_DO[name]:
            without_both.append(second)
    assert len(without_both) <= 1  # one may be of no use beside the other


ONNX = [
    ("image", "fold-batch-norm fold-affine"),
    ("image", "fold-batch-norm merge-pointwise"),
    ("image", "low-rank-conv compose-linear"),
    ("image", "branch-tucker merge-siblings"),
    ("text", "fold-layer-norm merge-siblings"),
    ("text", "fold-layout low-rank-linear"),
    ("text", "low-rank-embedding compose-linear"),
    ("text", "low-rank-linear group-heads"),
    ("text", "group-heads merge-siblings"),
    ("video", "factorize-conv3d merge-pointwise"),
    ("video", "factorize-conv3d compose-linear"),
    ("video", "remove-identity group-heads"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "passes"), ONNX)
def test_onnx_replays_to_the_same_bytes(name: str, passes: str, tmp_path: Path) -> None:
    *_, result = compiled(name, [ALL[transform] for transform in passes.split()])
    assert {rewrite.pass_name for rewrite in result.plan.rewrites} == set(passes.split())
    written = files(result, tmp_path / "model.onnx")
    (tmp_path / "again").mkdir()
    assert written == files(replayed(name, result), tmp_path / "again" / "model.onnx")
