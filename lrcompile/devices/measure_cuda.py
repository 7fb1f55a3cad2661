"""Operations as PyTorch runs them on this machine's GPU: copies in a CUDA graph, so that the host takes no part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lrcompile.devices.cost import Cost
from lrcompile.devices.repeated import call_of, repeated
from lrcompile.devices.timings import Timing, default_cache_dir, forget, key_of, recall, remember
from lrcompile.errors import DeviceError, first_line
from lrcompile.graph.op import OpDesc

COPIES = 16  # with weights of their own
MOST_WEIGHTS, MOST_MEMORY = 1 / 64, 1 / 4  # shares of the GPU's that weights of all copies take, and all of them
GRAPH_S, MOST_LAUNCHES = 1e-3, 400  # how long a graph takes, and how many calls it has at most
SAMPLES, SAMPLE_S = 9, 2e-3
SIGMA_FLOOR = 0.005
_HALF = ("fp16", "bf16")


@dataclass(frozen=True)
class CudaCostModel:
    """Measures operations on the first CUDA device, without gradients; cuDNN searches for its fastest algorithm.

    In half precision and TF32, maps are laid out with the channels last. Results are kept in `cache_dir`, or not if
    None.
    """

    cache_dir: Path | None = field(default_factory=default_cache_dir)

    def cost(self, op: OpDesc) -> Cost:
        """The price of one operation: device time alone, with its share of the gaps between kernels.

        Raises:
            DeviceError: this operation is not measured in PyTorch, or fails here.
        """
        key = _key(op)
        timings = recall(self.cache_dir, key, 1)
        if timings is None:
            memory = torch.cuda.get_device_properties(0).total_memory
            of_weights = MOST_WEIGHTS * memory / max(op.weight_bytes, 1.0)
            of_all = MOST_MEMORY * memory / max(op.weight_bytes + op.activation_bytes, 1.0)
            copies = max(2, min(COPIES, int(of_weights), int(of_all)))
            graph = repeated(op, copies, alone=True)
            if graph is None:
                raise DeviceError(f"operation {op.kind} in {op.dtype} is not measured in PyTorch")
            latency_s, sigma_s = measured(graph, op.dtype)
            timings = ((latency_s / copies, sigma_s / copies),)
            remember(self.cache_dir, key, timings)
        return Cost(*timings[0], op.flops, op.weight_bytes, op.activation_bytes)

    def forget(self, op: OpDesc) -> None:
        """Drops what is remembered of an operation, so that it is measured again."""
        forget(self.cache_dir, _key(op))

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        """Prices of a region before and after a rewrite, each measured as a whole, in fp32 or the type of its weights.

        Raises:
            DeviceError: one of them fails here.
        """
        old, new = (Cost(*measured(gm, _dtype(gm))) for gm in (before, after))
        return old, new


def _key(op: OpDesc) -> str:
    return key_of("torch-cuda", torch.__version__, torch.cuda.get_device_name(), repr(op))


def measured(gm: fx.GraphModule, dtype: str) -> Timing:
    """Device time in s of a graph on meta tensors and its standard deviation; `dtype` tells TF32 from fp32.

    Raises:
        DeviceError: it fails here.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        return timed(call_of(gm, device="cuda", channels_last=dtype in (*_HALF, "tf32")))
    except RuntimeError as problem:  # out of memory too
        raise DeviceError(f"PyTorch on {torch.cuda.get_device_name()}: {first_line(problem)}") from problem


def timed(call: Callable[[], Any]) -> Timing:
    """Device time in s of a call that was made once, and its standard deviation: of replays of a CUDA graph of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def took(run: Callable[[], Any], times: int) -> float:
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    eager_s = took(call, 1)
    calls = max(1, min(math.ceil(GRAPH_S / max(eager_s, 1e-7)), MOST_LAUNCHES // COPIES))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    took(graph.replay, 2)
    replays = max(1, math.ceil(SAMPLE_S / max(took(graph.replay, 1), 1e-7)))
    samples = [took(graph.replay, replays) / (replays * calls) for _ in range(SAMPLES)]
    middle = statistics.median(samples)
    spread = statistics.median(abs(sample - middle) for sample in samples)
    return middle, max(1.4826 * spread, SIGMA_FLOOR * middle)


def _dtype(gm: fx.GraphModule) -> str:
    kinds = {parameter.dtype for parameter in gm.parameters()}
    return "bf16" if torch.bfloat16 in kinds else "fp16" if torch.float16 in kinds else "fp32"
