"""tensorly-torch: each wide layer becomes a factorised one of the library, initialised by decomposing its weights."""

from __future__ import annotations

import tltorch
import torch
from torch import nn

from tools.peers.original import Compress, Compressed, NothingToDo, Original, put, wide_layers


def prepared(original: Original, name: str) -> Compress:
    """The compression of a model to a share, which the library calls the rank.

    Raises:
        NothingToDo: the model has no layer that is wide enough.
    """
    if not any(wide_layers(original.model)):
        raise NothingToDo("it has no linear layer or plain convolution that is wide enough to factorise")
    return lambda share: compressed(original.copy(), share)


def compressed(model: nn.Module, share: float) -> Compressed:
    """`model`, changed: its wide layers factorised at the library's rank `share`."""
    done, kept = 0, 0
    for name, layer in list(wide_layers(model)):
        if isinstance(layer, nn.Linear):
            new = tltorch.FactorizedLinear.from_linear(
                layer, rank=share, factorization="blocktt", implementation="factorized", bias=layer.bias is not None
            )
        elif len(set(layer.stride)) == 1 and max(layer.kernel_size) > 1:
            new = tltorch.FactorizedConv.from_conv(
                layer, rank=share, factorization="tucker", implementation="factorized", fixed_rank_modes="spatial"
            )
        else:
            kept += 1
            continue
        put(model, name, new)
        done += 1
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32).contiguous()
    rest = f"; {kept} convolutions of 1 × 1 left alone" if kept else ""
    return Compressed(model, (f"{done} layers factorised{rest}",))
