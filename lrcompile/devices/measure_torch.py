"""Operations as PyTorch runs them on this machine's CPU, measured and remembered like those of ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lrcompile.devices.bench import Clock, waited_s
from lrcompile.devices.cost import Cost
from lrcompile.devices.measure import cpu_facts, measure
from lrcompile.devices.repeated import call_of, repeated
from lrcompile.devices.timings import default_cache_dir, forget, key_of, recall, remember
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc


@dataclass(frozen=True)
class TorchCostModel:
    """Measures operations in fp32, each alone, without gradients. Results are kept in `cache_dir`, or not if None.

    `compiled` ones are made by torch.compile, others are called one by one.
    """

    cache_dir: Path | None = field(default_factory=default_cache_dir)
    compiled: bool = False
    clock: Clock = time.perf_counter
    waited: Clock = waited_s

    def cost(self, op: OpDesc) -> Cost:
        """The price of one operation.

        Raises:
            DeviceError: this operation is not measured in PyTorch, or torch.compile cannot make it here.
        """
        graph = repeated(op, 1, alone=True) if op.dtype == "fp32" else None
        if graph is None:
            raise DeviceError(f"operation {op.kind} in {op.dtype} is not measured in PyTorch; give one in fp32")
        key = self._key(op)
        timings = recall(self.cache_dir, key, 1)
        if timings is None:
            timings = measure([self._call(graph)], self.clock, self.waited)
            remember(self.cache_dir, key, timings)
        return Cost(*timings[0], op.flops, op.weight_bytes, op.activation_bytes)

    def forget(self, op: OpDesc) -> None:
        """Drops what is remembered of an operation, so that it is measured again."""
        forget(self.cache_dir, self._key(op))

    def _key(self, op: OpDesc) -> str:
        traffic = op.weight_bytes, op.activation_bytes
        shape = repr((op.kind, op.dtype, op.gemm, op.conv, op.attention, op.recurrent, op.function, op.row, *traffic))
        kind = "torch-compile, alone" if self.compiled else "torch, alone"
        return key_of(kind, torch.__version__, cpu_facts(), torch.get_num_threads(), shape)

    def _call(self, graph: fx.GraphModule) -> Callable[[], Any]:
        if not self.compiled:
            return call_of(graph)
        from torch._dynamo.exc import TorchDynamoException  # which takes long to import

        try:
            return call_of(graph, compiled=True)
        except TorchDynamoException as problem:
            reason = str(problem).strip().splitlines()[-1]
            raise DeviceError(
                f"torch.compile failed: {reason}; it needs a C++ compiler, or measure another --runtime"
            ) from problem
