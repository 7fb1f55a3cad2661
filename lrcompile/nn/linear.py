"""A linear layer whose checkpoint keeps the weight transposed, as GPT-2's Conv1D does."""

from __future__ import annotations

from typing import Any

from torch import nn


class TransposedLinear(nn.Linear):
    """y = xWᵀ + b like `nn.Linear`; only `state_dict` differs: there the weight is [in_features, out_features].

    It lets passes treat a layer written as `addmm(bias, x, weight)` as a linear layer while checkpoints of the
    original model go on loading.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        if key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].t()}
        super()._load_from_state_dict(state_dict, prefix, *args)
