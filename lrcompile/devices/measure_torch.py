"""Operations as eager PyTorch runs them on this machine's CPU, measured and remembered like those of ONNX Runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from lrcompile.devices.bench import Clock, Run, waited_s
from lrcompile.devices.cost import Cost
from lrcompile.devices.measure import cpu_name, measure
from lrcompile.devices.timings import default_cache_dir, key_of, recall, remember
from lrcompile.errors import DeviceError
from lrcompile.graph.op import ConvShape, GemmShape, OpDesc

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


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
        shape = repr((op.kind, op.dtype, op.gemm, op.conv, op.weight_bytes, op.activation_bytes))
        key = key_of("torch", torch.__version__, cpu_name(), torch.get_num_threads(), shape)
        timings = recall(self.cache_dir, key, 1)
        if timings is None:
            with torch.inference_mode():
                timings = measure([call_of(op)], self.clock, self.waited)
            remember(self.cache_dir, key, timings)
        return Cost(*timings[0], op.flops, op.weight_bytes, op.activation_bytes)


def call_of(op: OpDesc) -> Run:
    """A call that runs the operation once on random values; it was run once when this returns.

    Raises:
        DeviceError: see `TorchCostModel.cost`.
    """
    if op.dtype != "fp32":
        raise DeviceError(f"operations in {op.dtype} are not measured in PyTorch; give fp32")
    if op.gemm is not None:
        run = _gemm(op.gemm, weight=op.weight_bytes > 0)
    elif op.conv is not None and not op.conv.transposed:
        run = _conv(op.conv)
    elif op.kind == "elementwise":
        values = torch.randn(max(1, round((op.weight_bytes + op.activation_bytes) / 8)))
        run = lambda: torch.relu(values)  # noqa: E731
    else:
        raise DeviceError(f"operation {op.kind} is not measured alone in PyTorch")
    run()
    return run


def _gemm(shape: GemmShape, *, weight: bool) -> Run:
    """A linear layer with its bias, or a batch of products."""
    if weight and shape.batch == 1:
        x, w, b = torch.randn(shape.m, shape.k), torch.randn(shape.n, shape.k), torch.randn(shape.n)
        return lambda: functional.linear(x, w, b)
    first, second = torch.randn(shape.batch, shape.m, shape.k), torch.randn(shape.batch, shape.k, shape.n)
    return lambda: first @ second


def _conv(shape: ConvShape) -> Run:
    if any(before != after for before, after in shape.padding):
        raise DeviceError(f"a convolution with uneven padding {shape.padding} is not measured alone in PyTorch")
    x = torch.randn(shape.batch, shape.channels_in, *shape.size_in)
    w = torch.randn(shape.channels_out, shape.channels_in // shape.groups, *shape.kernel)
    convolution, padding = _CONVOLUTIONS[len(shape.kernel)], [before for before, _ in shape.padding]
    return lambda: convolution(x, w, None, shape.stride, padding, shape.dilation, shape.groups)
