"""What each pass does on architectures that others wrote: `python tools/architectures.py --out docs/architectures.md`.

Each model of `tests/panel.py` is compiled twice: with no error allowed, which must leave the output as it is, and
forced to half its weights, where the error that the report states is measured again in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import lrcompile
from lrcompile.errors import BudgetError
from lrcompile.graph.verify import relative_error

TARGET = "x86-ort"


@dataclass(frozen=True)
class Row:
    """One architecture: which pass acted where, what was refused, and the two errors."""

    name: str
    sites: int
    exact: Counter[str]
    exact_error: float
    half_size: str
    half: Counter[str]
    half_stated: float
    half_onnx: float
    refused: Counter[str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help="models of the panel (default: all)")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from panel import PANEL

    rows = []
    for name in options.names or PANEL:
        rows.append(examine(name, *PANEL[name]()))
        print(_line(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(_page(rows))
    return 0 if all(row.exact_error <= 1e-5 for row in rows) else 1


def examine(name: str, model: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Row:
    """Compiles a model with no error allowed and at half its size."""
    prepared = lrcompile.prepare_model(model, args, kwargs, target=TARGET)
    exact = lrcompile.solve(prepared, lrcompile.Budget(max_error=0.0))
    half, size = _half(prepared)
    onnx_error = _onnx_error(prepared, half)
    return Row(
        name=name,
        sites=len(exact.report.sites),
        exact=Counter(rewrite.pass_name for rewrite in exact.plan.rewrites),
        exact_error=exact.report.error["measured"],
        half_size=size,
        half=Counter(rewrite.pass_name for rewrite in half.plan.rewrites if not rewrite.exact),
        half_stated=half.report.error["measured"],
        half_onnx=onnx_error,
        refused=Counter(f"{r.pass_name}: {_general(r.reason)}" for r in prepared.pricing.refusals),
    )


def _half(prepared: lrcompile.Prepared) -> tuple[lrcompile.Result, str]:
    """The model at half its weights, or at the least share that can be reached."""
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        try:
            return lrcompile.solve(prepared, lrcompile.Budget(size=share)), f"{share:.0%}"
        except BudgetError:
            continue
    return lrcompile.solve(prepared, lrcompile.Budget(max_error=0.0)), "100%"


def _onnx_error(prepared: lrcompile.Prepared, result: lrcompile.Result) -> float:
    """The error of the written file, run in ONNX Runtime, against the original model."""
    traced = prepared.traced
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        result.save(path)
        session = onnxruntime.InferenceSession(path)
        feeds = {port.name: np.asarray(value) for port, value in zip(session.get_inputs(), traced.flat, strict=True)}
        outputs = [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]
    return relative_error(prepared.evaluator.reference[0], outputs)


def _general(reason: str) -> str:
    """A reason without the site's own sizes and names, so that equal reasons count together."""
    words = reason.split(" of ")[0] if reason.startswith("too small") else reason
    words = re.sub(r"^merging it with .*? would", "merging it would", words)
    words = re.sub(r"^with \S+: output of \S+", "output of the layer before it", words)
    return words.split(" with ")[0]


def _line(row: Row) -> str:
    return (
        f"{row.name:24} {row.sites:4} layers  exact {row.exact_error:.1e}  "
        f"{row.half_size:>4} of the size: stated {row.half_stated:.3f}, in ONNX Runtime {row.half_onnx:.3f}"
    )


def _page(rows: Iterable[Row]) -> str:
    lines = [
        "# Architectures",
        "",
        "Made by `python tools/architectures.py --out docs/architectures.md` (target "
        f"{TARGET}; random weights and reduced sizes, see `tests/panel.py`: structure, not accuracy).",
        "",
        "*Exact* is the relative output error of a compile with no error allowed. *Half* forces the weights to half "
        "their bytes, or the share given where no more can be taken away; the stated error is the report's, the next "
        "column is measured again on the written file in ONNX Runtime, both against the original model.",
        "",
        "| model | layers | exact rewrites | exact error | size | lossy rewrites | error stated | in ONNX Runtime |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.sites} | {counts(r.exact)} | {r.exact_error:.1e} | {r.half_size} | {counts(r.half)} "
        f"| {r.half_stated:.4f} | {r.half_onnx:.4f} |"
        for r in rows
    ]
    lines += ["", "## What was refused, and why", "", "| model | refusals |", "|---|---|"]
    lines += [f"| {r.name} | {counts(r.refused, '; ')} |" for r in rows]
    return "\n".join(lines) + "\n"


def counts(counter: Counter[str], separator: str = ", ") -> str:
    """What was counted, and how often each."""
    return separator.join(f"{name} ×{count}" for name, count in sorted(counter.items())) or "none"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
