"""Measures a CUDA GPU for its profile: `python -m tools.measure_gpu operations measured.jsonl --minutes 6`.

Parts: `operations` at random, each measured twice with others between; `networks`, whole networks with random weights,
replayed from a CUDA graph and called one operation after the other; `pairs`, layers and splits
of them. Lines appear in the file as they are measured. What takes the device's time is here, all fitting elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrcompile.devices.measure_cuda import CudaCostModel, measured, timed
from lrcompile.devices.repeated import chain
from lrcompile.devices.sampling import GPU, GPU_WEIGHTS, operations
from lrcompile.errors import DeviceError
from lrcompile.graph.op import ConvShape, OpDesc, conv_op, gemm_op
from tools.gpu_profile import row_of
from tools.published_models import MODELS

CHUNK = 100  # operations between two visits of one
NETWORKS = (
    "Resnet50_Pytorch_Infer", "Resnet18_for_PyTorch", "vit-small", "Bert_Base_Cased_SST2", "VGG16",
    "MobileNetV2_for_Pytorch", "ResNext101_32x8d", "EfficientNet_for_Pytorch", "R(2+1)D", "convmixer_1536_20",
    "Wide_ResNet50_2_for_Pytorch", "MobileNet-v1",
)  # fmt: skip
BATCHES = (1, 8, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure_operations(seed: int, visits: int, dtypes: Sequence[str], end: float) -> Iterator[dict[str, Any]]:
    drawn = operations(seed, replace(GPU, dtypes=tuple(dtypes)), GPU_WEIGHTS)
    while time.monotonic() < end:
        found: list[tuple[OpDesc, list[tuple[float, float]]]] = [(op, []) for op in islice(drawn, CHUNK)]
        for _ in range(visits):
            for op, timings in found:
                if time.monotonic() < end:
                    try:
                        cost = CudaCostModel(None).cost(op)
                        timings.append((cost.latency_s, cost.sigma_s))
                    except DeviceError as problem:
                        yield {"op": row_of(op), "problem": str(problem)}
        for op, timings in found:
            if len(timings) == visits:
                yield {"op": row_of(op), "timings_s": timings}


def measure_networks() -> Iterator[dict[str, Any]]:
    """Whole models of `tools/published_models.py`: from a CUDA graph, and called one operation after the other."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name in NETWORKS:
        make, example = MODELS[name]
        try:
            with torch.device("cuda"):
                module = make().eval()
        except (RuntimeError, ImportError, TypeError, ValueError, AttributeError) as problem:
            yield {"model": name, "problem": str(problem).splitlines()[0]}
            continue
        for dtype, kind in DTYPES.items():
            layout = torch.contiguous_format if dtype == "fp32" else torch.channels_last
            for batch in BATCHES:
                row: dict[str, Any] = {"model": name, "dtype": dtype, "batch": batch}
                try:
                    module.to(kind)
                    x = example.to("cuda").repeat(batch, *[1] * (example.dim() - 1))
                    x = torch.randn_like(x).to(kind) if x.is_floating_point() else x
                    if x.dim() == 4:
                        x = module.to(memory_format=layout) and x.to(memory_format=layout)  # type: ignore[call-overload]
                    run = torch.inference_mode()(lambda module=module, x=x: module(x))  # type: ignore[misc]
                    for _ in range(3):
                        run()
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for _ in range(5):
                        run()
                    torch.cuda.synchronize()
                    row["eager_s"] = (time.perf_counter() - begin) / 5
                    row["graph_s"] = timed(run)
                except (RuntimeError, ImportError, TypeError, ValueError) as problem:
                    row["problem"] = str(problem).splitlines()[0]
                yield row


def pairs(seed: int, dtypes: Sequence[str]) -> Iterator[tuple[list[OpDesc], list[OpDesc]]]:
    """Layers that are large enough to be split, and splits of them: at ranks on the device's step and beside it."""
    rng = np.random.default_rng(seed)
    for op in operations(seed, replace(GPU, dtypes=tuple(dtypes)), {"gemm": 2, "conv": 2, "pointwise": 1}):
        widths = (op.gemm.k, op.gemm.n) if op.gemm else (op.conv.channels_in, op.conv.channels_out) if op.conv else ()
        if min(widths) < 64 or op.flops < 1e8:
            continue
        step = int(rng.choice([8, 8, 32, 64]))
        rank = step * max(1, round(min(widths) * rng.uniform(0.1, 0.8) / step)) + int(rng.choice([0, 0, 0, 0, -1, 1]))
        if op.gemm is not None:
            m, k, n = op.gemm.m, op.gemm.k, op.gemm.n
            yield [op], [gemm_op(m, rank, k, op.dtype), gemm_op(m, n, rank, op.dtype)]
        elif op.conv is not None:
            yield [op], [conv_op(part, op.dtype) for part in _split(op.conv, rank, int(rng.integers(3)))]


def _split(shape: ConvShape, rank: int, form: int) -> list[ConvShape]:
    """Into a convolution of `rank` outputs and a 1×1; over rows and over columns; or with 1×1 on both sides."""

    def one_by_one(size: tuple[int, ...], into: int, out: int) -> ConvShape:
        return replace(
            shape, channels_in=into, channels_out=out, size_in=size, size_out=size, kernel=(1, 1), stride=(1, 1),
            padding=((0, 0), (0, 0)),
        )  # fmt: skip

    last = one_by_one(shape.size_out, rank, shape.channels_out)
    if shape.kernel == (1, 1) or form == 0:
        return [replace(shape, channels_out=rank), last]
    if form == 2:
        first = one_by_one(shape.size_in, shape.channels_in, rank)
        return [first, replace(shape, channels_in=rank, channels_out=rank), last]
    pad, none = shape.padding[0], (0, 0)
    size = (shape.size_out[0], shape.size_in[1])
    rows = replace(
        shape, channels_out=rank, kernel=(shape.kernel[0], 1), stride=(shape.stride[0], 1), padding=(pad, none),
        size_out=size,
    )  # fmt: skip
    columns = replace(
        shape, channels_in=rank, kernel=(1, shape.kernel[1]), stride=(1, shape.stride[1]), padding=(none, pad),
        size_in=size,
    )  # fmt: skip
    return [rows, columns]


def measure_pairs(seed: int, dtypes: Sequence[str], end: float) -> Iterator[dict[str, Any]]:
    """Each side of each pair as a whole."""
    for sides in pairs(seed, dtypes):
        if time.monotonic() > end:
            return
        row: dict[str, Any] = {"pair": [[row_of(op) for op in side] for side in sides]}
        try:
            graphs = [chain(side) for side in sides]
            yield {**row, "timings_s": [measured(graphs[side], sides[0][0].dtype) for side in (0, 1)]}
        except DeviceError as problem:
            yield {**row, "problem": str(problem)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("operations", "networks", "pairs"))
    parser.add_argument("out", type=Path, help="lines of JSON are added to this file")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0, help="of the operations (default: %(default)s)")
    parser.add_argument("--visits", type=int, default=2, help="of each operation (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=GPU.dtypes, help="as often as they are named")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    if options.part == "operations":
        rows = measure_operations(options.seed, options.visits, options.dtypes, end)
    elif options.part == "networks":
        rows = measure_networks()
    else:
        rows = measure_pairs(options.seed, options.dtypes, end)
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            if time.monotonic() > end:
                break
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
