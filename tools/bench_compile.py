"""How long a whole compile takes beside plain `torch.onnx.export(dynamo=True)`: `python tools/bench_compile.py`.

Both run in one process on ResNet-50 at 224², one after the other, round by round; quote the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import lrcompile
from lrcompile.emit.onnx import quiet


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig()).eval()
    x = torch.randn(options.batch, 3, 224, 224)
    export_s, compile_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"

        def export() -> None:
            with quiet():
                program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
                assert program is not None
                program.save(path)

        def compile_whole() -> None:
            report = lrcompile.compile(model, (x,), target=options.target).save(path)
            stages.append(report.timings_s)

        stages: list[Mapping[str, float]] = []
        seconds(export)  # first use: imports and operator tables
        for _ in range(options.rounds):
            export_s.append(seconds(export))
            compile_s.append(seconds(compile_whole))
            print(
                f"export {export_s[-1]:.1f} s, compile {compile_s[-1]:.1f} s ({compile_s[-1] / export_s[-1]:.2f}×): "
                + ", ".join(f"{stage} {spent:.1f}" for stage, spent in stages[-1].items()),
                flush=True,
            )
    ratio = statistics.median(c / e for c, e in zip(compile_s, export_s, strict=True))
    print(f"median: the whole compile takes {ratio:.2f}× a plain export (target {options.target})")
    return 0 if ratio <= 3 else 1


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
