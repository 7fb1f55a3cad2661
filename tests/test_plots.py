"""Plots of predictions, and what is said where they cannot be made."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lrcompile.cli import run
from lrcompile.errors import InputError
from lrcompile.report.plots import check_plottable, plot_calibration, plot_reliability


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots_are_written(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    measured = np.array([1e-5, 1e-4, 1e-3])
    points = {"gemm": (measured, measured * 1.05), "conv": (measured, measured * [1.0, 1.3, 0.8])}
    plot_calibration(points, tmp_path / f"a{suffix}")
    plot_reliability([(0.05, 0.0, 4), (0.6, 0.5, 10), (0.99, 1.0, 40)], tmp_path / f"b{suffix}")
    for name in "ab":
        assert (tmp_path / f"{name}{suffix}").stat().st_size > 1000
    if suffix == ".svg":
        text = (tmp_path / "a.svg").read_text()
        assert "gemm (100% within)" in text
        assert "conv (33% within)" in text


def test_the_same_plot_is_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        plot_reliability([(0.5, 0.5, 10)], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_cannot_be_plotted_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"ends in \.svg, \.png, \.pdf; got '\.txt'"):
        check_plottable(tmp_path / "plot.txt")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    out = tmp_path / "mine.toml"
    assert run(["calibrate", "--out", str(out), "--plot", str(tmp_path / "a.svg")]) == 2
    assert "pip install 'lrcompile[plot]'" in capsys.readouterr().err
    assert not out.exists()
