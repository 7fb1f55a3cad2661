"""The decompositions that low-rank passes share: computed once a layer, every rank read from them.

Matrices are split by the left singular basis U of W·S with S·Sᵀ = G, the Gram matrix of the layer's inputs:
the best rank-r approximation of W for these inputs is U_r·(U_rᵀ·W), which needs no inverse of S. Without inputs
G is the identity and this is the plain SVD. (Activation-aware truncation as in SVD-LLM; the projection form is
our reading.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-4  # of the mean of G's diagonal, added to the diagonal: orders directions that the data do not excite

SINGLE_FROM = 512  # side from which eigenvectors of single-precision weights are computed in single precision


@dataclass(frozen=True, eq=False)
class Spectrum:
    """W [rows × columns] ≈ basis[:, :r] · (basis[:, :r]ᵀ · W) for every r.

    `singular_values` are those of W·S, descending; `basis` is [rows × k] with orthonormal columns, float64.
    """

    matrix: Tensor
    singular_values: Tensor
    basis: Tensor
    activation_aware: bool

    @property
    def full_rank(self) -> int:
        """The rank at which the split is the identity: min(rows, columns)."""
        return len(self.singular_values)

    def tail(self, rank: int) -> float:
        """Relative error ‖(W − W_r)S‖ / ‖W·S‖ of keeping `rank` components: the layer's relative output error."""
        energy = self.singular_values.square()
        total = float(energy.sum())
        return float((energy[rank:].sum() / total).clamp_min(0).sqrt()) if total > 0 else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(up [rows × rank], down [rank × columns]) in the dtype of W."""
        up = self.basis[:, :rank]
        down = up.T @ self.matrix.double()
        return up.to(self.matrix.dtype).contiguous(), down.to(self.matrix.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Tucker:
    """Tucker-2 of a kernel [S × C × taps]: W ≈ out[:, :r2] · core[:r2, :r1] · into[:r1, :] (HOSVD, all ranks nested).

    `kernel` keeps its spatial axes; `captured[i, j]` is the share of ‖W·S‖² kept with r2 = i+1, r1 = j+1.
    """

    kernel: Tensor
    out_basis: Tensor
    into_basis: Tensor
    into_inverse: Tensor
    captured: Tensor
    activation_aware: bool

    def tail(self, rank_out: int, rank_in: int) -> float:
        """Relative error of keeping (rank_out, rank_in), as `Spectrum.tail`."""
        return float((1 - self.captured[rank_out - 1, rank_in - 1]).clamp_min(0).sqrt())

    def factors(self, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
        """(up [S × r2], core [r2 × r1 × taps…], down [r1 × C]) in the dtype of the kernel."""
        kernel, taps = self.kernel, self.kernel.shape[2:]
        up = self.out_basis[:, :rank_out]
        flat = kernel.double().flatten(2)
        core = torch.einsum("so,sck,ci->oik", up, flat, self.into_basis[:, :rank_in])
        down = self.into_inverse[:rank_in]
        parts = (up, core.reshape(rank_out, rank_in, *taps), down)
        up, core, down = (t.to(kernel.dtype).contiguous() for t in parts)
        return up, core, down


def spectrum(matrix: Tensor, gram: Tensor | None = None) -> Spectrum:
    """Decomposes W [rows × columns]; `gram` is XᵀX [columns × columns] of the inputs X, or None.

    Works on the Gram matrix of the smaller side, so that a wide or tall layer costs min(rows, columns)³.
    """
    weight = matrix.detach().double()
    rows, columns = weight.shape
    scaled = weight if gram is None else weight @ _root(gram)[0]
    if rows <= columns:
        values, basis = _eigh(scaled @ scaled.T, matrix)
        values, basis = values.flip(0), basis.flip(1)
    else:
        values, right = _eigh(scaled.T @ scaled, matrix)
        values = values.flip(0)
        basis, _ = torch.linalg.qr(scaled @ right.flip(1))  # columns are orthogonal already: spans stay nested
    return Spectrum(matrix.detach(), values.clamp_min(0).sqrt(), basis, gram is not None)


def tucker(kernel: Tensor, gram: Tensor | None = None) -> Tucker:
    """Tucker-2 of a kernel [S × C × spatial…]; `gram` is the inputs' channel Gram matrix [C × C], or None.

    With a Gram matrix the input mode is whitened by it, positions of the window taken as alike (our reading).
    """
    weight = kernel.detach().double().flatten(2)
    channels = weight.shape[1]
    identity = torch.eye(channels, dtype=torch.float64)
    root, inverse = (identity, identity) if gram is None else _root(gram)
    scaled = weight if gram is None else torch.einsum("sck,cd->sdk", weight, root)
    _, out_basis = _eigh(_mode_gram(scaled, 0), kernel)
    _, into_basis = _eigh(_mode_gram(scaled, 1), kernel)
    out_basis, into_basis = out_basis.flip(1), into_basis.flip(1)
    core = torch.einsum("so,sck,ci->oik", out_basis, scaled, into_basis)
    energy = core.square().sum(2)
    captured = energy.cumsum(0).cumsum(1) / energy.sum().clamp_min(1e-300)
    return Tucker(kernel.detach(), out_basis, root @ into_basis, into_basis.T @ inverse, captured, gram is not None)


def _eigh(symmetric: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors, ascending; large ones in single precision (twice as fast) unless W is double."""
    if len(symmetric) < SINGLE_FROM or source.dtype == torch.float64:
        return torch.linalg.eigh(symmetric)
    scale = symmetric.diagonal().max().clamp_min(1e-300)
    values, vectors = torch.linalg.eigh((symmetric / scale).float())
    return values.double() * scale, vectors.double()


def _mode_gram(tensor: Tensor, mode: int) -> Tensor:
    unfolded = tensor.movedim(mode, 0).flatten(1)
    return unfolded @ unfolded.T


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(S, S⁻¹) with S·Sᵀ = the damped Gram matrix."""
    damped = gram.double()
    scale = damped.diagonal().mean().clamp_min(1e-300)
    damped = damped / scale + DAMPING * torch.eye(len(gram), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root = values.clamp_min(DAMPING).sqrt()
    return vectors * root, (vectors / root).T
