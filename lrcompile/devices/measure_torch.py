"""Operations as eager PyTorch runs them on this machine's CPU, measured and remembered like those of ONNX Runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lrcompile.devices.bench import Clock, waited_s
from lrcompile.devices.cost import Cost
from lrcompile.devices.measure import cpu_name, measure
from lrcompile.devices.repeated import call_of, repeated
from lrcompile.devices.timings import default_cache_dir, key_of, recall, remember
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc


@dataclass(frozen=True)
class TorchCostModel:
    """Measures operations in fp32, each alone, without gradients. Results are kept in `cache_dir`, or not if None."""

    cache_dir: Path | None = field(default_factory=default_cache_dir)
    clock: Clock = time.perf_counter
    waited: Clock = waited_s

    def cost(self, op: OpDesc) -> Cost:
        """The price of one operation.

        Raises:
            DeviceError: this operation is not measured in PyTorch.
        """
        graph = repeated(op, 1, wake=False) if op.dtype == "fp32" else None
        if graph is None:
            raise DeviceError(f"operation {op.kind} in {op.dtype} is not measured in PyTorch; give one in fp32")
        traffic = op.weight_bytes, op.activation_bytes
        shape = repr((op.kind, op.dtype, op.gemm, op.conv, op.attention, op.function, op.row, *traffic))
        key = key_of("torch", torch.__version__, cpu_name(), torch.get_num_threads(), shape)
        timings = recall(self.cache_dir, key, 1)
        if timings is None:
            timings = measure([call_of(graph)], self.clock, self.waited)
            remember(self.cache_dir, key, timings)
        return Cost(*timings[0], op.flops, op.weight_bytes, op.activation_bytes)
