"""Predictions against published measurements, and the tool that scores them."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lrcompile.devices.fit import figure, with_figures
from lrcompile.devices.profile import load_device
from tools import validate_profiles
from tools.validate_profiles import (
    CONV,
    LATENCY,
    SETS,
    SXM,
    Score,
    Set,
    Table,
    fitted_to,
    held_out,
    score,
)

LIMITED = [limits for limits in SETS if limits.mape < np.inf]
needs_tables = pytest.mark.skipif(not LATENCY.is_dir(), reason=f"published measurements are not here: {LATENCY}")


@needs_tables
@pytest.mark.parametrize("limits", LIMITED, ids=lambda s: s.name)
def test_profiles_as_shipped(limits: Set) -> None:
    found = score(limits)
    assert found.n >= 10
    assert found.holds(limits), found


@needs_tables
@pytest.mark.slow
@pytest.mark.parametrize("limits", [limits for limits in LIMITED if limits.fitted], ids=lambda s: s.name)
def test_held_out_shapes(limits: Set) -> None:
    found = held_out(limits)
    assert found.holds(limits), found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Measurements that a V100 with slower tensor cores would give."""
    device = with_figures(load_device("v100"), {"engines.tensor_core.gemm.efficiency": 0.5, "launch_s.gemm": 2e-5})
    table = Table("deepbench_gemm", SXM, "fp16", ("gemm",))
    sizes = [(m, n, k) for m in (512, 2048, 8192) for n in (72, 1000, 4800) for k in (512, 2048, 4096)]
    rows = [
        {"device": SXM, "dtype": "fp16", "op": "gemm", "m": m, "n": n, "k": k, "ta": "N", "tb": "N"}
        for m, n, k in sizes
    ]
    texts = [{key: str(value) for key, value in row.items()} for row in rows]
    with (tmp_path / "deepbench_gemm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "ms"])
        writer.writeheader()
        for row, latency_ms in zip(rows, table.predicted_ms(texts, device, 0.0), strict=True):
            writer.writerow({**row, "ms": latency_ms - validate_profiles.HALF_US_MS})
    (tmp_path / "devices.csv").write_text(f"device,launch_us_eager\n{SXM},32\nA100-SXM-40GB,26\n")
    return tmp_path


def test_a_fit_finds_the_figures_again(folder: Path) -> None:
    names = ("engines.tensor_core.gemm.efficiency", "launch_s.gemm")
    table = SETS[0].tables[0]
    found = fitted_to(load_device("v100"), names, [(table, table.rows(folder), 0.0)])
    assert [figure(found, name) for name in names] == pytest.approx([0.5, 2e-5], rel=0.03)
    limits = replace(SETS[0], fitted=names)
    assert score(limits, folder).mape > 20
    unseen = held_out(limits, folder)
    assert unseen.mape < 2
    assert unseen.tau > 0.95


def test_figures_of_a_device_by_their_paths() -> None:
    shipped = load_device("v100")
    device = with_figures(shipped, {"engines.tensor_core.conv.overlap": 0.125, "launch_s.conv": 1e-3})
    assert figure(device, "engines.tensor_core.conv.overlap") == device.engines["tensor_core"].conv.overlap == 0.125
    assert device.launch_s == {**shipped.launch_s, "conv": 1e-3}
    assert device.engines["cuda_core"] == shipped.engines["cuda_core"]
    assert shipped.engines["tensor_core"].conv.overlap != 0.125


def test_eager_calls_have_a_floor(folder: Path) -> None:
    table = Table("neusight_gemm", "A100-PCIE-40GB", "fp32", ("linear",), eager=True)
    assert table.floor_ms(folder) == 0.026
    small = [{"op": "linear", "m": "8", "n": "8", "k": "8"}]
    assert table.predicted_ms(small, load_device("a100"), 0.026) == pytest.approx([2.1 * 0.026])


def test_a_miss_fails_and_the_page_gets_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = replace(SETS[0], fitted=())
    monkeypatch.setattr(validate_profiles, "SETS", [shipped, replace(shipped, mape=1e9, tau=-1.0)])
    page = folder / "page.md"
    marks = "<!-- validation: start -->\nold\n<!-- validation: end -->\n<!-- alike: start --><!-- alike: end -->\n"
    page.write_text(f"before\n{marks}after\n")
    assert validate_profiles.main(["--data", str(folder), "--out", str(page)]) == 1
    assert capsys.readouterr().out.count("MISSED") == 1
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- alike: end -->\nafter\n")
    assert "| assumed, in the middle | 0.53 |" in text
    assert "old" not in text
    assert "| V100 GEMM fp16 | 27 |" in text
    assert validate_profiles.main(["--data", str(folder / "nowhere")]) == 1


def test_score_by_hand() -> None:
    found = Score.of(np.array([1.0, 2.2, 2.7]), np.array([1.0, 2.0, 3.0]))
    assert (found.n, found.mape, found.median, found.tau) == pytest.approx((3, 20 / 3, 10, 1.0))
    assert found.sigma == pytest.approx(np.log([1.0, 1.1, 0.9]).std())
    assert found.sigma_robust == pytest.approx(1.4826 * math.log(1.1))
    assert {op for limits in SETS for table in limits.tables for op in table.ops} >= set(CONV)
