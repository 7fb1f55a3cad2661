"""Is any compiled model slower than the original here? `python tools/never_slower.py --out docs/never-slower.md`

Every model of `tests/panel.py`, and the trained ones of `tools/models.py`, is compiled for this machine (`--target
local`, default budget) and measured in ONNX Runtime against the model as torch exports it with the same open batch
(or as lrcompile writes it untouched, where torch cannot): paired, in alternating blocks, the ratio of neighbours. Quote
the ratio; latencies on a shared machine drift.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

import lrcompile
from lrcompile.confirm import Reference
from lrcompile.devices.bench import BenchResult, paired
from lrcompile.devices.measure import cpu_name, usable_cores
from lrcompile.emit.onnx import quiet
from lrcompile.frontend.export import export
from lrcompile.frontend.trace import Traced
from tools import models
from tools.architectures import counts

LIMIT = 1.02


class LongAttention(nn.Module):
    """Two blocks of attention over 512 tokens; `equal` heads of keys and values can be shared without an error."""

    def __init__(self, *, equal: bool, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.out = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(4)
        )  # fmt: skip
        with torch.no_grad():
            for layer in [*self.k, *self.v] if equal else []:
                for tensor in (layer.weight, layer.bias):
                    tensor.copy_(torch.cat([tensor[: width // heads]] * heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, *layers, out in zip(self.norms, self.q, self.k, self.v, self.out, strict=True):
            y = norm(x)
            q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
            x = x + out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


def long_attention(*, equal: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of `LongAttention` with an example input."""
    torch.manual_seed(0)
    return LongAttention(equal=equal).eval(), (torch.randn(1, 512, 256),), {}


LONG = {
    "512 tokens": partial(long_attention, equal=False),
    "512 tokens, equal heads": partial(long_attention, equal=True),
}
TRAINED = {"MiniLM-L6": "minilm", "EfficientNet-Lite0": "efficientnet-lite0"}


@dataclass(frozen=True)
class Row:
    """One model: what was rewritten, its error, the compile's own verdict, and the measurement of the two files."""

    name: str
    rewrites: Counter[str]
    error: float
    remark: str
    compile_s: float
    result: BenchResult


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help="default: all of the panel, and the trained ones")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measurement a model (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from panel import PANEL

    rows = []
    for name in options.names or [*TRAINED, *LONG, *PANEL]:
        if name in TRAINED:
            (model, args), data = models.trained(TRAINED[name])
            rows.append(examine(name, model, args, {}, options.seconds, data))
        else:
            model, args, kwargs = (LONG | PANEL)[name]()
            rows.append(examine(name, model, args, kwargs, options.seconds))
        print(_line(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(_page(rows, options.seconds))
    return 0 if all(row.result.ratio <= LIMIT for row in rows) else 1


def examine(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float,
    data: Sequence[torch.Tensor] | None = None,
) -> Row:
    """Compiles a model for this machine and measures the file against torch's own export of it."""
    start = time.perf_counter()
    calibration = None
    if data is not None:
        names = list(inspect.signature(model.forward).parameters)[: len(data)]
        calibration = lrcompile.calibration_from(dict(zip(names, data, strict=True)), names, batch=len(args[0]))
    result = lrcompile.compile(model, args, kwargs, target="local", calibration=calibration)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        report = result.save(after)
        spent = time.perf_counter() - start
        _export(model, result.traced, before)
        named = zip(result.traced.input_names, result.traced.flat, strict=True)
        inputs = {key: value.numpy() for key, value in named if isinstance(value, torch.Tensor)}
        measured = paired(before, after, inputs=inputs, seconds=seconds)
    return Row(
        name=name,
        rewrites=Counter(rewrite.pass_name for rewrite in result.plan.rewrites),
        error=report.error["measured"],
        remark="; ".join(note for note in report.notes if "measured" in note or "gains" in note or "busy" in note),
        compile_s=spent,
        result=measured,
    )


def _export(model: nn.Module, traced: Traced, path: Path) -> None:
    """Writes the original as torch does."""
    program, *_ = export(model, traced.args, dict(traced.kwargs), traced.open_axes)
    with quiet():
        try:
            torch.onnx.export(program, f=path, dynamo=True, verbose=False, external_data=False)
        except torch.onnx.OnnxExporterError:
            path.write_bytes(Reference.of(traced).onnx)


def _line(row: Row) -> str:
    r = row.result
    busy = " (noisy)" if r.noisy else ""
    return (
        f"{row.name:22} {r.ratio:.3f}× the time [{r.ratio_low:.3f}, {r.ratio_high:.3f}]{busy}  error {row.error:.4f}  "
        f"{counts(row.rewrites)}  compiled in {row.compile_s:.0f} s  {row.remark}"
    )


def _page(rows: Iterable[Row], seconds: float) -> str:
    lines = [
        "# Never slower",
        "",
        "Made by `python tools/never_slower.py --out docs/never-slower.md`: each model compiled with `--target local` "
        "and the default budget, then measured against torch's own export of it with the same open batch, paired and "
        f"interleaved, {seconds:g} s each. *Time* is compiled ÷ original, with its 95 % interval; above {LIMIT} the "
        "command fails. "
        "The panel has random weights and reduced sizes: structure, not accuracy; the first two are trained, "
        "and two are made to have heads to share at a length at which it may pay.",
        "",
        f"{cpu_name()}, {usable_cores()} cores, ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}.",
        "",
        "| model | time | interval | original ms | error | rewrites |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.result.ratio:.3f} | {r.result.ratio_low:.3f}–{r.result.ratio_high:.3f} "
        f"| {r.result.median_a_s * 1e3:.3g} | {r.error:.4f} | {counts(r.rewrites)} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
