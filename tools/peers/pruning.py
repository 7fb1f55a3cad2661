"""Torch-Pruning: whole channels, features and dimensions of heads are taken out, chosen over the whole model.

Settings are those of its examples: Taylor importance, ranked globally among groups of one structure (isomorphic
pruning, arXiv 2407.04616), in five steps with gradients computed anew. The loss is the cross-entropy with the classes
that the model says itself; of an output without classes, its products with random directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from tools.peers.original import Compress, Compressed, Original

STEPS = 5
BATCHES = 10
ROUND_TO = 8
MOST = 0.9  # of the channels of a layer may go
LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)


def prepared(original: Original, name: str) -> Compress:
    """The compression of a model to a share of its channels."""
    said = [output.argmax(-1) for output in original.outputs(BATCHES)] if original.classes else []
    return lambda share: compressed(original, share, said)


def compressed(original: Original, share: float, said: Sequence[Tensor]) -> Compressed:
    """The model with about `share` of the channels of each structure left; `said` are the classes of each batch."""
    model = original.copy()
    take_apart(model)
    before = widths(model)
    heads = dict(attention(model))
    pruner = torch_pruning.pruner.BasePruner(
        model,
        original.batches[0],
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=1 - share,
        max_pruning_ratio=MOST,
        iterative_steps=STEPS,
        ignored_layers=fixed(model, original),
        num_heads=heads,
        prune_head_dims=True,
        round_to=ROUND_TO,
        unwrapped_parameters=unwrapped(model),
    )
    for _ in range(STEPS):
        gradients(model, original, said)
        for group in pruner.step(interactive=True):
            group.prune()
        follow(model)
    model.zero_grad(set_to_none=True)
    changed = sum(width != before[name] for name, width in widths(model).items())
    return Compressed(model, (f"{changed} of {len(before)} layers made narrower",))


class Apart(nn.Module):
    """Queries, keys and values of a layer for all three, each by a layer of its own: the same values side by side."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        width = whole.out_features // 3
        self.layers = nn.ModuleList(nn.Linear(whole.in_features, width) for _ in range(3))
        for layer, weight, bias in zip(self.layers, whole.weight.split(width), whole.bias.split(width), strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def take_apart(model: nn.Module) -> None:
    """GPT-2's layers for queries, keys and values become three: Torch-Pruning loses count of those that are split."""
    module: Any
    for module in list(model.modules()):
        if isinstance(getattr(module, "c_attn", None), nn.Linear):
            module.c_attn = Apart(module.c_attn)


def gradients(model: nn.Module, original: Original, said: Sequence[Tensor]) -> None:
    """Gradients of the loss on calibration batches."""
    chance = torch.Generator().manual_seed(0)
    model.zero_grad()
    for i, batch in enumerate(original.batches[:BATCHES]):
        output = model(*batch)
        if said:
            loss = nn.functional.cross_entropy(output.flatten(0, -2), said[i].flatten())
        else:
            loss = (output * torch.randn(output.shape, generator=chance)).sum(-1).mean()
        loss.backward()


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of layers."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def attention(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The layers that make queries, keys and values, with their numbers of heads."""
    found: list[tuple[nn.Module, int]] = []
    module: Any
    for module in model.modules():
        if hasattr(module, "qkv"):
            found.append((module.qkv, module.heads))
        elif hasattr(module, "c_attn"):
            found += [(layer, module.num_heads) for layer in module.c_attn.layers]
        elif hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            found += [(layer, module.num_attention_heads) for layer in (module.query, module.key, module.value)]
    return found


def fixed(model: nn.Module, original: Original) -> list[nn.Module]:
    """Layers whose outputs keep their width: the head, and everything that is added to what the output is made of.

    The latter where there is no head, or its weight is that of the embedding, which Torch-Pruning would cut twice.
    """
    heads = [[module for module in model.modules() if isinstance(module, nn.Linear)][-1]] if original.classes else []
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = any(table.weight is head.weight for table in tables for head in heads)
    if heads and not tied:
        return [*heads]
    return [*heads, *tables, *(module for module in model.modules() if isinstance(module, nn.LayerNorm))]


def unwrapped(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Parameters outside of layers, with the axis that counts features."""
    inside = {id(p) for m in model.modules() if isinstance(m, LAYERS) for p in m.parameters(recurse=False)}
    return [(p, p.dim() - 1) for p in model.parameters() if id(p) not in inside]


def follow(model: nn.Module) -> None:
    """Numbers that attention modules keep of their width are set to what is left."""
    module: Any
    for module in model.modules():
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            module.all_head_size = module.query.out_features
            module.attention_head_size = module.all_head_size // module.num_attention_heads
        elif hasattr(module, "c_attn"):
            module.split_size = module.c_attn.layers[0].out_features
            module.head_dim = module.split_size // module.num_heads
