"""Splits of convolutions with larger windows, fitted to the patches that the window sees.

A chain reads z = V·x at every tap and maps the taps of the first r features of z to the output. Given V, the best such
map is the least-squares one for the patches' Gram matrix P, and its error is known exactly: with Q = L·Lᵀ the Gram
matrix of all of z's taps, feature by feature, the coordinates L⁻¹z are uncorrelated, and those of the first r features
span what the chain sees (Gram-Schmidt; our reading). V comes from `lrcompile.planning.decompose`, which takes taps as
alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lrcompile.planning.decompose import Spectrum, Tucker, cholesky, restored, spectrum, tucker
from lrcompile.planning.moments import Moments

RIDGE = 1e-6  # of the mean of P's diagonal, added to the diagonal: keeps the weights where the data excite nothing


@dataclass(frozen=True, eq=False)
class Fit:
    """Least squares of y = W·x, x [features × taps], on the taps of the first r rows of V·x, for every r; float64.

    `reader` is V [rank × features], `lower` is L, `parts` [out × rank × taps] is y in the coordinates L⁻¹z; `unit` is
    ‖y‖². Where `mean` is known, the mean patch [features × taps], x counts from it, and `mean_output` is W·mean.
    """

    reader: Tensor
    lower: Tensor
    parts: Tensor
    unit: float
    mean: Tensor | None
    mean_output: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, reader: Tensor, patches: Moments, is_centered: bool) -> Fit:
        """The fit for W [out × features × taps] and the moments of patches [features × taps]."""
        out, features, taps = weight.shape
        weight, reader = weight.double(), reader.double()
        gram = patches.centered if is_centered else patches.gram
        gram = gram.clone()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-300))
        seen = weight.flatten(1) @ gram  # [out × features·taps]
        unit = float((seen * weight.flatten(1)).sum())
        mean, mean_output = None, None
        if is_centered:
            mean, mean_output = patches.mean.view(features, taps), weight.flatten(1) @ patches.mean
            unit += patches.rows * float(mean_output.square().sum())
        mixed = (reader @ gram.view(features, -1)).view(len(reader), taps, features, taps)
        joint = torch.einsum("gf,itfu->itgu", reader, mixed).reshape(len(reader) * taps, -1)
        lower = cholesky(joint)
        cross = torch.einsum("gf,oft->ogt", reader, seen.view(out, features, taps)).flatten(1)
        parts = torch.linalg.solve_triangular(lower, cross.T, upper=False).T
        return cls(reader, lower, parts.view(out, len(reader), taps), max(unit, 1e-300), mean, mean_output)

    def coefficients(self, rank: int) -> Tensor:
        """The map of the taps of the first `rank` features of z to y, [out × rank × taps]."""
        taps = self.parts.shape[2]
        known = self.lower[: rank * taps, : rank * taps]
        parts = self.parts[:, :rank].flatten(1)
        return torch.linalg.solve_triangular(known, parts, upper=False, left=False).view(len(parts), rank, taps)

    def lost_mean(self, rank: int, up: Tensor | None = None) -> Tensor | None:
        """What the chain takes from the mean output, [out]; `up` is a basis that outputs are projected on."""
        if self.mean is None or self.mean_output is None:
            return None
        kept = torch.einsum("ort,rf,ft->o", self.coefficients(rank), self.reader[:rank], self.mean)
        return self.mean_output - (kept if up is None else up @ (up.T @ kept))


@dataclass(frozen=True, eq=False)
class WindowSpectrum(Spectrum):
    """A split of a kernel in two convolutions, W [(out, taps) × features], whose second is fitted to patches."""

    fit: Fit = field(kw_only=True)

    @cached_property
    def tails(self) -> Tensor:
        """The relative error of each rank from 0 to the full one, [full rank + 1]; exact on what was fitted to."""
        energy = self.fit.parts.square().sum((0, 2)) / self.fit.unit
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).sqrt()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(up [rows × rank], down [rank × columns]) in the dtype of W."""
        if rank >= self.full_rank:
            return super().factors(rank)  # needs no fit, and has none of its rounding
        up = self.fit.coefficients(rank).transpose(1, 2).flatten(0, 1)
        up, down = restored(self.outputs, self.matrix.dtype, up, self.fit.reader[:rank])
        return up, down

    def lost_mean(self, rank: int) -> Tensor | None:
        """What the split takes from the mean output over all positions, those at padded borders too, [out]."""
        lost = None if rank >= self.full_rank else self.fit.lost_mean(rank)
        return None if lost is None else restored(self.outputs, self.matrix.dtype, lost)[0]


@dataclass(frozen=True, eq=False)
class WindowTucker(Tucker):
    """Tucker-2 whose core and output basis are fitted to patches, for each input rank; branches are as in `Tucker`."""

    fit: Fit

    def tail(self, rank_out: int, rank_in: int) -> float:
        """Relative error of keeping (rank_out, rank_in), as `Spectrum.tail`; exact on what was fitted to."""
        lost = self.fit.parts[:, rank_in:].square().sum() + self._output(rank_in)[0][rank_out:].sum()
        return float((lost / self.fit.unit).sqrt())

    def factors(self, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
        """(up [S × r2], core [r2 × r1 × taps…], down [r1 × C]) in the dtype of the kernel."""
        if rank_out >= len(self.fit.parts) and rank_in >= len(self.fit.reader):
            return super().factors(rank_out, rank_in)
        up = self._output(rank_in)[1][:, :rank_out]
        core = torch.einsum("so,sik->oik", up, self.fit.coefficients(rank_in))
        core = core.reshape(rank_out, rank_in, *self.kernel.shape[2:])
        up, core, down = restored(self.outputs, self.kernel.dtype, up, core, self.fit.reader[:rank_in])
        return up, core, down

    def lost_mean(self, rank_out: int, rank_in: int) -> Tensor | None:
        """What the split takes from the mean output over all positions, those at padded borders too, [S]."""
        if rank_out >= len(self.fit.parts) and rank_in >= len(self.fit.reader):
            return None
        lost = self.fit.lost_mean(rank_in, self._output(rank_in)[1][:, :rank_out])
        return None if lost is None else restored(self.outputs, self.kernel.dtype, lost)[0]

    @cached_property
    def _outputs(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def _output(self, rank_in: int) -> tuple[Tensor, Tensor]:
        """Energies, descending, and basis [S × S] of the outputs that `rank_in` input features leave."""
        if rank_in not in self._outputs:
            kept = self.fit.parts[:, :rank_in].flatten(1)
            values, vectors = torch.linalg.eigh(kept @ kept.T)
            self._outputs[rank_in] = values.flip(0).clamp_min(0), vectors.flip(1)
        return self._outputs[rank_in]


def window_spectrum(matrix: Tensor, patches: Moments, is_centered: bool = False) -> WindowSpectrum:
    """Splits W [(out, taps) × features] for patches [features × taps], counted from their mean if `is_centered`."""
    features = matrix.shape[1]
    first = spectrum(matrix, _per_feature(patches.centered if is_centered else patches.gram, features))
    weight = matrix.detach().unflatten(0, (-1, len(patches.gram) // features)).transpose(1, 2)
    fit = Fit.of(weight, first.basis.T @ matrix.detach().double(), patches, is_centered)
    return WindowSpectrum(first.matrix, first.singular_values, first.vectors, first.scaled, True, fit=fit)


def window_tucker(kernel: Tensor, patches: Moments, is_centered: bool = False) -> WindowTucker:
    """Tucker-2 of a kernel [S × C × spatial…] for patches [C × taps], as `window_spectrum`."""
    first = tucker(kernel, _per_feature(patches.centered if is_centered else patches.gram, kernel.shape[1]))
    fit = Fit.of(kernel.detach().flatten(2), first.into_inverse, patches, is_centered)
    return WindowTucker(**vars(first), fit=fit)


def _per_feature(gram: Tensor, features: int) -> Tensor:
    """The Gram matrix of features, taps as rows of their own, of that of patches [features × taps]."""
    taps = len(gram) // features
    return gram.view(features, taps, features, taps).diagonal(dim1=1, dim2=3).sum(-1)
