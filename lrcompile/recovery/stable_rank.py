"""A penalty that makes a model fit to be split while it is trained: the modified stable rank of BSR (arXiv 2111.15179).

It is added to the loss of a training of the *original* model, before that is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompile.errors import InputError
from lrcompile.graph.graph import TRANSPOSED_CONVS
from lrcompile.graph.rewrite import Rewrite


def _by_outputs(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _by_inputs(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flatten(1)


def _spatial(weight: Tensor) -> Tensor:
    """Outputs × width by inputs × height."""
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def _space_first(weight: Tensor) -> Tensor:
    """Outputs × time by inputs × space."""
    return weight.permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)


def _time_first(weight: Tensor) -> Tensor:
    """Outputs × space by inputs × time."""
    return weight.permute(0, 3, 4, 1, 2).flatten(3).flatten(0, 2)


_BY_FORM = {"spatial": _spatial, "2plus1": _space_first, "1plus2": _time_first}


@dataclass
class _Unfolding:
    """A weight seen as a matrix, the rank it is to have, and the directions [rows × rank] of its largest part."""

    path: str
    weight: nn.Parameter
    rank: int
    view: Callable[[Tensor], Tensor] = _by_outputs
    basis: Tensor | None = None

    def matrix(self) -> Tensor:
        """[rows × columns], rows the fewer."""
        matrix = self.view(self.weight.float())
        return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix

    def renew(self) -> None:
        """Finds the directions anew."""
        with torch.no_grad():
            matrix = self.matrix()
            self.basis = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -self.rank :]

    def ratio(self) -> Tensor:
        """Σ_{i>r} σᵢ² / Σ_{i≤r} σᵢ², as long as the directions are those of the r largest."""
        assert self.basis is not None
        matrix = self.matrix()
        whole, head = matrix.square().sum(), (self.basis.T @ matrix).square().sum()
        return (whole - head).clamp_min(0) / head.clamp_min(1e-12)


class StableRank:
    """R = Σ_l Σ_{i>r_l} σᵢ² / Σ_{i≤r_l} σᵢ² over layers l with singular values σ and the ranks r they are to have.

    `ranks` gives the rank of each layer by its path: of the weight as the matrix [outputs × all else]. Called with the
    share of the training that is done, 0 to 1, it returns the penalty, a scalar: `strength` times R, rising from 0
    over the first `ramp` of the training. The directions that the sums are taken along are found anew every `refresh`
    calls and are constants in between, so that a call costs a product a layer.

    `layers` are the paths it acts on. Ramp, and directions of one side only, are our reading of the paper.

    Raises:
        InputError: a path is no layer with a matrix or kernel, or a rank is not between 1 and what the layer has.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int],
        *,
        strength: float = 0.1,
        ramp: float = 0.3,
        refresh: int = 20,
    ) -> None:
        self.strength, self.ramp, self.refresh = strength, ramp, max(1, refresh)
        self._calls = 0
        self._weights = [_Unfolding(path, _weight(model, path), rank) for path, rank in ranks.items()]
        self._check()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rewrites: Iterable[Rewrite],
        *,
        strength: float = 0.1,
        ramp: float = 0.3,
        refresh: int = 20,
    ) -> StableRank:
        """The penalty for the splits of a plan, each seen as it is split: `StableRank.of(model, result.plan.rewrites)`.

        Splits of what the model itself has no layer for, such as merged ones, are left out; `layers` says what is in.

        Raises:
            InputError: no layer of the model is split.
        """
        found = cls(model, {}, strength=strength, ramp=ramp, refresh=refresh)
        modules = dict(model.named_modules())
        for rewrite in rewrites:
            path = rewrite.site[0]
            module = modules.get(path)
            weight = getattr(module, "weight", None)
            if rewrite.exact or not isinstance(weight, nn.Parameter) or weight.dim() < 2:
                continue
            found._weights += _split_as(rewrite, path, weight, isinstance(module, TRANSPOSED_CONVS))
        if not found._weights:
            raise InputError("no rewrite splits a layer of this model; compile it for a budget that needs splits")
        found._check()
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the layers it acts on."""
        return tuple(dict.fromkeys(weight.path for weight in self._weights))

    def __call__(self, progress: float = 1.0) -> Tensor:
        """The penalty, a scalar to add to the loss, when so much of the training is done."""
        if self._calls % self.refresh == 0:
            for weight in self._weights:
                weight.renew()
        self._calls += 1
        rise = min(1.0, progress / self.ramp) if self.ramp else 1.0
        return self.strength * rise * torch.stack([weight.ratio() for weight in self._weights]).sum()

    def _check(self) -> None:
        for weight in self._weights:
            most = min(weight.matrix().shape)
            if not 1 <= weight.rank <= most:
                raise InputError(f"stable rank: {weight.path} has ranks 1 to {most}, got {weight.rank}")


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    weight = getattr(dict(model.named_modules()).get(path), "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
        raise InputError(f"stable rank: {path!r} is no layer with a matrix or kernel; give paths as in named_modules()")
    return weight


def _split_as(rewrite: Rewrite, path: str, weight: nn.Parameter, inputs_first: bool) -> list[_Unfolding]:
    """The unfoldings that a split truncates."""
    ranks = {name: value for name, value in rewrite.params.items() if isinstance(value, int)}
    form = rewrite.params.get("form")
    if form in _BY_FORM:
        return [_Unfolding(path, weight, ranks["rank"], _BY_FORM[str(form)])]
    outputs, inputs = (_by_inputs, _by_outputs) if inputs_first else (_by_outputs, _by_inputs)
    found = [_Unfolding(path, weight, ranks[name], outputs) for name in ("rank", "rank_out") if name in ranks]
    if "rank_in" in ranks:
        found.append(_Unfolding(path, weight, ranks["rank_in"], inputs))
    return found
