"""Plots of how good predictions are, and of fronts; needs matplotlib, the extra `plot`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.errors import InputError

SUFFIXES = (".svg", ".png", ".pdf")


def check_plottable(path: Path) -> None:
    """Raises InputError where a plot cannot be made: before anything is measured for it."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot write {path}: a plot's name ends in {', '.join(SUFFIXES)}; got {path.suffix!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib, which is not installed: pip install 'lrcompile[plot]'")


def plot_calibration(points: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Predicted against measured latency: `points` are (measured, predicted) in s, by family of operations."""
    figure, axes = _axes()
    low = min(float(measured.min()) for measured, _ in points.values()) * 1e6
    high = max(float(measured.max()) for measured, _ in points.values()) * 1e6
    axes.fill_between([low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color="0.85", label="within 10 %")
    for name, (measured, predicted) in points.items():
        near = float(np.mean(np.abs(predicted / measured - 1) <= 0.1))
        label = f"{name} ({near:.0%} within)"  # the points as an image: there are thousands
        axes.plot(measured * 1e6, predicted * 1e6, ".", markersize=3, alpha=0.6, label=label, rasterized=True)
    axes.set(xscale="log", yscale="log", xlabel="measured, µs", ylabel="predicted without it, µs")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_reliability(bars: Sequence[tuple[float, float, int]], path: Path) -> None:
    """How often rewrites were faster against the chance stated: (mean chance, share that is faster, count) each."""
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color="0.7", label="as stated")
    chances, shares, counts = (np.array(column) for column in zip(*bars, strict=True))
    errors = np.sqrt(np.maximum(shares * (1 - shares), 1 / (4 * counts)) / counts)
    axes.errorbar(chances, shares, yerr=errors, fmt="o", capsize=3, label="measured, ± one standard error")
    for chance, share, count in bars:
        axes.annotate(str(count), (chance, share), textcoords="offset points", xytext=(6, -10), fontsize="small")
    axes.set(
        xlabel="chance of being faster, as predicted", ylabel="share that is faster", xlim=(0, 1.02), ylim=(0, 1.02)
    )
    axes.legend(loc="upper left", fontsize="small")
    _save(figure, path)


def plot_front(figures: Mapping[str, Any], path: Path) -> None:
    """A front: latency as a share of the original against output error; bars are ± one sigma of the saving."""
    figure, axes = _axes()
    points = figures["points"]
    latency = [point["latency_ms"] for point in points]
    shares = [found["after"] / found["before"] for found in latency]
    sigmas = [found["sigma"] / found["before"] for found in latency]
    errors = [point["error"] for point in points]
    axes.errorbar(shares, errors, xerr=sigmas, fmt="o-", linewidth=1, markersize=4, capsize=3)
    for point, share, error in zip(points, shares, errors, strict=True):
        label = str(point["point"])
        axes.annotate(label, (share, error), textcoords="offset points", xytext=(5, 5), fontsize="small")
    kind = latency[0]["kind"] if latency[0]["kind"] == "measured" else f"predicted, {latency[0]['kind']}"
    axes.set(
        xlabel=f"latency on {figures['target']}, share of the original ({kind})", ylabel=figures["error"]["metric"]
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _save(figure, path)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    try:  # text as text, and the same bytes each time
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lrcompile"}):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
