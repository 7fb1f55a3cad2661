"""What can be calibrated here: a runtime on this machine's CPU or GPU, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import onnxruntime as ort
import torch

from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.elsewhere import Elsewhere
from lrcompile.devices.measure import LocalCostModel, cpu_name, local_device
from lrcompile.devices.measure_cuda import CudaCostModel
from lrcompile.devices.measure_ort_cuda import DRAWN, PROVIDER, OrtCudaCostModel
from lrcompile.devices.measure_torch import TorchCostModel
from lrcompile.devices.profile import load_device
from lrcompile.devices.sampling import GPU, GPU_WEIGHTS, operations
from lrcompile.devices.timings import default_cache_dir
from lrcompile.devices.visits import VISITS
from lrcompile.errors import InputError
from lrcompile.graph.op import OpDesc

RUNTIMES = ("onnxruntime", "torch", "torch-compile", "torch-cuda", "onnxruntime-cuda")
# What ONNX Runtime makes of any graph before its CUDA provider runs it (our reading).
_CUDA_FUSES = frozenset({"conv_normalization", "conv_padding", "skip_layer_norm", "bias_gelu"})
_FUSED_ALONE = ("skip_layer_norm", "bias_gelu")  # that are one kernel there
_ONNX_RUNTIME_LACKS = {"strided_views", "product_bias", "plain_images", "free_views"}  # on a CPU
_CUDA_LACKS = frozenset({"flash_attention", "strided_views", "product_bias"})
_PROFILES = ("h200", "h100", "a100", "v100", "t4")
_TWICE_FP32 = ((8, 6), (8, 7), (8, 9))  # units with 128 lanes for fp32, where an A100's have 64
_BY_CAPABILITY = {(9, 0): "h100", (8, 0): "a100", (7, 5): "t4", (7, 0): "v100"}


class _Measuring(Protocol):
    def cost(self, op: OpDesc) -> Cost: ...

    def forget(self, op: OpDesc) -> None: ...


@dataclass(frozen=True)
class Runtime:
    """A runtime: the profile that a fit starts from, and what measures operations at each of `VISITS` visits.

    `drawn` gives operations without end for a seed; they are measured `elsewhere`, where that is another process: it
    measures whole networks too.
    """

    device: Device
    described: str
    visits: Sequence[_Measuring]
    drawn: Callable[[int], Iterator[OpDesc]] = operations
    elsewhere: Elsewhere | None = None

    def measure(self, op: OpDesc, visit: int) -> Cost:
        """The price of an operation as measured at a visit, counted from 0.

        Raises:
            DeviceError: it cannot be measured.
        """
        return self.elsewhere.cost(op, visit) if self.elsewhere else self.visits[visit].cost(op)

    def forget(self, op: OpDesc) -> None:
        """Has an operation measured again at all visits."""
        for visit in self.visits:
            visit.forget(op)

    def close(self) -> None:
        """Ends what measures elsewhere."""
        if self.elsewhere:
            self.elsewhere.close()


def runtime_here(name: str) -> Runtime:
    """The runtime of a name.

    Raises:
        InputError: there is no such runtime, torch sees no GPU for it, or ONNX Runtime has no provider for that.
    """
    if name not in RUNTIMES:
        raise InputError(f"unknown runtime {name!r}: expected {' or '.join(RUNTIMES)}")
    folders = [default_cache_dir() / f"visit{i}" for i in range(VISITS)]
    if name == "torch-cuda":
        return _torch_on_cuda([CudaCostModel(folder) for folder in folders])
    if name == "onnxruntime-cuda":
        return _onnxruntime_on_cuda([OrtCudaCostModel(folder) for folder in folders])
    device = local_device()
    described = f"{cpu_name()}, {{}}, {device.units} threads"
    if name == "onnxruntime":
        visits = [LocalCostModel(folder, measures_only=True) for folder in folders]
        version = f"ONNX Runtime {ort.__version__}"
        return Runtime(device, described.format(version), visits, elsewhere=Elsewhere(folders))
    compiled = name == "torch-compile"
    calls = [TorchCostModel(folder, compiled) for folder in folders]
    version = f"PyTorch {torch.__version__}, {'compiled' if compiled else 'eager'}"
    return Runtime(_eager(device), described.format(version), calls)


def _torch_on_cuda(visits: list[CudaCostModel]) -> Runtime:
    _check_cuda("torch-cuda")
    version = f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, CUDA graphs"
    device = _eager(cuda_device())
    native = tuple(name for name in GPU.dtypes if name not in device.computed_as)  # others run on another engine
    return Runtime(
        device, f"{torch.cuda.get_device_name()}, {version}", visits,
        partial(operations, sizes=replace(GPU, dtypes=native), weights=GPU_WEIGHTS),
    )  # fmt: skip


def _onnxruntime_on_cuda(visits: list[OrtCudaCostModel]) -> Runtime:
    _check_cuda("onnxruntime-cuda")
    if PROVIDER not in (found := ort.get_available_providers()):
        raise InputError(
            f"runtime onnxruntime-cuda: expected an ONNX Runtime with {PROVIDER}, got one with {', '.join(found)}; "
            "install onnxruntime-gpu in the place of onnxruntime, or calibrate another --runtime"
        )
    device = cuda_device()
    source = "assumed (as ONNX Runtime's CPU provider)"
    places = {*(f"fuses.{name}" for name in _CUDA_FUSES), *(f"lacks.{name}" for name in _CUDA_LACKS - device.lacks)}
    device = replace(
        device, fuses=_CUDA_FUSES, lacks=device.lacks | _CUDA_LACKS,
        provenance={**device.provenance, **dict.fromkeys(places, source)},
    )  # fmt: skip
    return Runtime(
        device, f"{torch.cuda.get_device_name()}, ONNX Runtime {ort.__version__}, CUDA provider", visits,
        partial(operations, sizes=replace(GPU, dtypes=DRAWN), weights=GPU_WEIGHTS | dict.fromkeys(_FUSED_ALONE, 1)),
    )  # fmt: skip


def _check_cuda(runtime: str) -> None:
    if not torch.cuda.is_available():
        raise InputError(
            f"runtime {runtime}: torch sees no CUDA GPU here; install a CUDA build of torch on a machine with one, or "
            "calibrate another --runtime"
        )


def _eager(device: Device) -> Device:
    """The device with PyTorch, where kernels are those of single operators, which add biases and take any strides."""
    return replace(device, fuses=frozenset(), lacks=device.lacks - _ONNX_RUNTIME_LACKS)


def cuda_device() -> Device:
    """The shipped profile that is nearest to the first CUDA GPU, with the units that the driver tells of."""
    name, facts = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0)
    known = next((profile for profile in _PROFILES if profile in name.lower().replace("-", " ").split()), None)
    device = load_device(known or _BY_CAPABILITY.get((facts.major, facts.minor), "a100"))
    units = facts.multi_processor_count
    if units == device.units:
        return replace(device, residuals={}, network={})
    source = f"assumed ({device.name}, scaled to {units} units)"
    scaled = {dtype: rate * units / device.units for dtype, rate in device.peak_flops.items()}
    if (facts.major, facts.minor) in _TWICE_FP32 and device.name == "a100":
        scaled["fp32"] *= 2
    places = {"hardware.units", *(f"dtype.{dtype}.peak" for dtype in scaled)}
    provenance = {**device.provenance, **dict.fromkeys(places, source)}
    return replace(device, units=units, peak_flops=scaled, residuals={}, network={}, provenance=provenance)
