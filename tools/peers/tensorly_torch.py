"""tensorly-torch: each wide layer becomes a factorised one of the library, initialised by decomposing its weights.

What is fastest of what the library has, at a share, is taken: a linear layer as CP of its matrix (block tensor trains
of three modes take longer than the whole layer did), a 1 × 1 convolution as CP, another as Tucker with the spatial axes
kept. The order of products is opt-einsum's: in that of the formula, CP needs more memory than there is. Tensorly's
plugin for that fixes the batch of what is exported; here it is open.
"""

from __future__ import annotations

from typing import Any

import opt_einsum
import tensorly
import tltorch
import torch
from torch import Tensor, nn

from tools.peers.original import Compress, Compressed, NothingToDo, Original, put, wide_layers

BATCH = 64  # stands for an open size where the order of products is sought


def in_good_order(equation: str, *tensors: Tensor) -> Tensor:
    """An einsum two tensors at a time, in the order that takes the fewest multiplications."""
    shapes = [tuple(size if isinstance(size, int) else BATCH for size in tensor.shape) for tensor in tensors]
    _, path = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    left = list(tensors)
    for taken, _, step, *_ in path.contraction_list:
        left.append(torch.einsum(step, *(left.pop(i) for i in taken)))
    return left[0]


def prepared(original: Original, name: str) -> Compress:
    """The compression of a model to a share, which the library calls the rank.

    Raises:
        NothingToDo: the model has no layer that is wide enough.
    """
    if not any(wide_layers(original.model)):
        raise NothingToDo("it has no linear layer or plain convolution that is wide enough to factorise")
    tensorly.backend.BackendManager.register_backend_method("einsum", in_good_order)
    return lambda share: compressed(original.copy(), share)


def compressed(model: nn.Module, share: float) -> Compressed:
    """`model`, changed: its wide layers factorised at the library's rank `share`."""
    done, kept = 0, 0
    how: dict[str, Any] = {"rank": share, "implementation": "factorized"}
    for name, layer in list(wide_layers(model)):
        new: nn.Module
        if isinstance(layer, nn.Linear):
            new = tltorch.FactorizedLinear.from_linear(
                layer, factorization="cp", n_tensorized_modes=1, bias=layer.bias is not None, **how
            )
        elif len(set(layer.stride)) > 1:
            kept += 1
            continue
        elif max(layer.kernel_size) == 1:
            new = tltorch.FactorizedConv.from_conv(layer, factorization="cp", **how)
        else:
            new = tltorch.FactorizedConv.from_conv(layer, factorization="tucker", fixed_rank_modes="spatial", **how)
        put(model, name, new)
        done += 1
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32).contiguous()
    rest = f"; {kept} convolutions of unlike strides left alone" if kept else ""
    return Compressed(model, (f"{done} layers factorised{rest}",))
