"""Operations as ONNX Runtime runs them on this machine's GPU, with its CUDA provider.

As on a CPU, two sessions run in turn of which one has some copies of an operation more. All values stay on the device;
what the host takes to start each kernel counts, since it takes that in a network too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import fx

from lrcompile.devices.bench import Run
from lrcompile.devices.cost import Cost
from lrcompile.devices.measure import UNMEASURABLE, cpu_name, measure, of_one, open_region
from lrcompile.devices.onnx_graph import PROTOBUF_BYTES
from lrcompile.devices.onnx_region import UnsupportedRegion, lower_region
from lrcompile.devices.repeated import least_copies, repeated
from lrcompile.devices.timings import default_cache_dir, forget, key_of, recall, remember
from lrcompile.errors import DeviceError, first_line
from lrcompile.graph.op import OpDesc

PROVIDER = "CUDAExecutionProvider"
DRAWN = ("fp16", "fp16", "fp32", "fp32", "tf32")  # how often each type is; few kernels of the provider are for bf16
COPIES = 16
MOST_BYTES = 4e9  # of all copies together


@dataclass(frozen=True)
class OrtCudaCostModel:
    """Measures operations in ONNX Runtime on the first CUDA device; results are kept in `cache_dir`, or not if None.

    `provider` runs them, on values that lie `on` a device.
    """

    cache_dir: Path | None = field(default_factory=default_cache_dir)
    provider: str = PROVIDER
    on: str = "cuda"

    def cost(self, op: OpDesc) -> Cost:
        """The price of one operation among others, with what the host takes to start it.

        Raises:
            DeviceError: it has no form in ONNX, or fails here.
        """
        key, least, copies = self._key(op), least_copies(op), copies_for(op)
        timings = recall(self.cache_dir, key, 2)
        if timings is None:
            graphs = [repeated(op, least + copies), repeated(op, least)]
            try:
                timings = measure([self._opened(graph, op) for graph in graphs])
            except UnsupportedRegion as problem:
                raise DeviceError(f"operation {op.kind} in {op.dtype} has no ONNX form: {problem.reason}") from problem
            except UNMEASURABLE as problem:
                raise DeviceError(f"ONNX Runtime with {self.provider}: {first_line(problem)}") from problem
            remember(self.cache_dir, key, timings)
        return Cost(*of_one(timings[0], timings[1], copies), op.flops, op.weight_bytes, op.activation_bytes)

    def forget(self, op: OpDesc) -> None:
        """Drops what is remembered of an operation, so that it is measured again."""
        forget(self.cache_dir, self._key(op))

    def _key(self, op: OpDesc) -> str:
        where = torch.cuda.get_device_name() if self.provider == PROVIDER else cpu_name()
        return key_of("onnxruntime", self.provider, where, ort.__version__, repr(op))

    def _opened(self, graph: fx.GraphModule | None, op: OpDesc) -> Run:
        if graph is None:
            raise DeviceError(f"operation {op.kind} in {op.dtype} has no ONNX form of its own")
        region = lower_region(graph, dynamic_batch=op.attention is not None)
        options: dict[str, Any] = {"use_tf32": int(op.dtype == "tf32")} if self.provider == PROVIDER else {}
        return open_region(
            region, providers=[(self.provider, options)], on=self.on, falls_back=self.provider != PROVIDER
        )


def copies_for(op: OpDesc) -> int:
    """How many copies to measure: their weights have to fit into one file, and all of them into the device."""
    of_weights = PROTOBUF_BYTES / max(op.weight_bytes, 1.0) - least_copies(op)
    of_all = MOST_BYTES / max(op.weight_bytes + op.activation_bytes, 1.0)
    return max(1, min(COPIES, int(of_weights), int(of_all)))
