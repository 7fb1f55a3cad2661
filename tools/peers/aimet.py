"""AIMET's weight SVD and spatial SVD with its greedy choice of ratios.

The score that the greedy choice asks for is one less the relative error of the outputs on calibration batches: there
are no labels here, for lrcompile neither. Scores are computed once and used for every share, as AIMET's guide says.
"""

from __future__ import annotations

import sys
from decimal import Decimal
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tools.peers.original import Compress, Compressed, NothingToDo, Original

CANDIDATES = 10
SCORED = 4  # batches
SCORES = Path("data/greedy_selection_eval_scores_dict.pkl")  # where AIMET writes them
TORCHVISION = {"ops": ("RoIPool", "nms", "roi_align"), "transforms": ("Resize",), "datasets": ()}


class Cast(nn.Module):
    """The model on inputs of any type: AIMET finds out shapes with random floats, also where indices belong."""

    def __init__(self, model: nn.Module, kinds: list[torch.dtype]) -> None:
        super().__init__()
        self.model, self.kinds = model, kinds

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*(value.to(kind) for value, kind in zip(inputs, self.kinds, strict=True)))


def stand_in() -> None:
    """A torchvision of empty classes: AIMET names some while it is imported, and its compression uses none."""
    for part, names in {"": (), **TORCHVISION}.items():
        full = f"torchvision.{part}".rstrip(".")
        module = ModuleType(full)
        module.__spec__ = ModuleSpec(full, None, is_package=not part)
        for name in names:
            setattr(module, name, type(name, (), {}))
        sys.modules[full] = module
        if part:
            setattr(sys.modules["torchvision"], part, module)


def prepared(original: Original, name: str) -> Compress:
    """The compression of a model to a share of its cost.

    Raises:
        NothingToDo: the scheme acts on no layer of the model.
    """
    spatial = name == "aimet-spatial-svd"
    convs = [m for m in original.model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1][1:]
    if spatial and not convs:
        raise NothingToDo("spatial SVD is for convolutions, and it has none besides the first")
    expected = original.outputs(SCORED)

    def score(model: nn.Module, iterations: int | None, use_cuda: bool) -> float:
        with torch.no_grad():
            got = [model(*batch) for batch in original.batches[:SCORED]]
        apart = sum(float((y - z).square().sum()) for y, z in zip(expected, got, strict=True))
        return 1 - (apart / sum(float(y.square().sum()) for y in expected)) ** 0.5

    return lambda share: compressed(original, share, spatial, score)


def compressed(original: Original, share: float, spatial: bool, score: Any) -> Compressed:
    """A model of AIMET's `target_comp_ratio` `share`."""
    if "torchvision" not in sys.modules:
        stand_in()
    from aimet_torch.common.defs import (
        CompressionScheme,
        CostMetric,
        GreedySelectionParameters,
        RankSelectScheme,
    )
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters, WeightSvdParameters

    example = original.batches[0]
    model = Cast(original.copy(), [value.dtype for value in example])
    first = [m for m in model.modules() if isinstance(m, nn.Conv2d)][:1]
    greedy = GreedySelectionParameters(
        target_comp_ratio=Decimal(share),
        num_comp_ratio_candidates=CANDIDATES,
        saved_eval_scores_dict=str(SCORES) if SCORES.exists() else None,
    )
    if spatial:
        scheme = CompressionScheme.spatial_svd
        parameters = SpatialSvdParameters(
            SpatialSvdParameters.Mode.auto, SpatialSvdParameters.AutoModeParams(greedy, first)
        )
    else:
        scheme = CompressionScheme.weight_svd
        parameters = WeightSvdParameters(
            WeightSvdParameters.Mode.auto,
            WeightSvdParameters.AutoModeParams(RankSelectScheme.greedy, greedy, first),
        )
    metric = CostMetric.memory if on_tokens(original) else CostMetric.mac
    shapes: Any = [tuple(value.shape) for value in example]
    found, stats = ModelCompressor.compress_model(
        model, score, SCORED, shapes if len(shapes) > 1 else shapes[0], scheme, metric, parameters
    )
    split = sum(layer.compression_ratio is not None for layer in stats.per_layer_stats)
    return Compressed(found.model, (f"{split} layers split",))


def on_tokens(original: Original) -> bool:
    """Whether a linear layer reads more than [batch × features]: AIMET then counts its products wrongly."""
    found: list[bool] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dim() > 2))
        for module in original.model.modules()
        if isinstance(module, nn.Linear)
    ]
    original.outputs(1)
    for hook in hooks:
        hook.remove()
    return any(found)
