"""The decompositions that low-rank passes share: computed once a layer, every rank read from them.

Matrices are split by the left singular basis U of W·S with S·Sᵀ = G, the Gram matrix of the layer's inputs:
the best rank-r approximation of W for these inputs is U_r·(U_rᵀ·W), which needs no inverse of S. Without inputs
G is the identity and this is the plain SVD. (Activation-aware truncation as in SVD-LLM; the projection form is
our reading.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from lrcompile.planning.moments import Moments

DAMPING = 1e-4  # of the mean of G's diagonal, added to the diagonal: orders directions that the data do not excite

OUTPUT_DAMPING = 0.1  # the same for gradients at outputs, which are known less well

SINGLE_FROM = 512  # smaller side from which single-precision weights are decomposed in single precision


@dataclass(frozen=True, eq=False)
class Outputs:
    """What is decomposed in a layer's place: R·W, so that directions of outputs count by what the model feels of them.

    RᵀR = B is the damped Gram matrix of gradients at the outputs, and ‖R·ΔW·x‖² is what an error ΔW does to
    the model's outputs (our reading of Fisher-weighted low-rank factorization, arXiv 2207.00112). `root` is R, [S × S],
    `dtype` that of W. Rows of W are [S] or [S × taps].
    """

    root: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, gradients: Tensor, dtype: torch.dtype) -> Outputs:
        """From B [S × S]."""
        scale = gradients.diagonal().mean().clamp_min(1e-300)
        damped = gradients.double() / scale + OUTPUT_DAMPING * torch.eye(len(gradients), dtype=torch.float64)
        return cls(cholesky(damped).T, dtype)

    def weighted(self, matrix: Tensor) -> Tensor:
        """R·W, in single precision or double."""
        rows = matrix.detach().double().reshape(len(self.root), -1)
        return (self.root @ rows).reshape(matrix.shape).to(torch.promote_types(matrix.dtype, torch.float32))

    def restored(self, up: Tensor) -> Tensor:
        """R⁻¹ on the rows of a factor, [rows × rank]."""
        rows = torch.linalg.solve_triangular(self.root, up.double().reshape(len(self.root), -1), upper=True)
        return rows.reshape(up.shape)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """W [rows × columns] ≈ basis[:, :r] · (basis[:, :r]ᵀ · W) for every r.

    `singular_values` are those of `scaled` = W·S, descending; `vectors` are its singular vectors on the smaller side.
    Where `mean` is known, the mean input, S is that of centred inputs, and `lost_mean` belongs into the bias.
    `mean_energy` is what the mean adds to ‖W·S‖², in the units of S. `outputs` says what `matrix` is of the layer's.
    """

    matrix: Tensor
    singular_values: Tensor
    vectors: Tensor
    scaled: Tensor
    activation_aware: bool
    mean: Tensor | None = None
    mean_energy: float = 0.0
    outputs: Outputs | None = None

    @property
    def full_rank(self) -> int:
        """The rank at which the split is the identity: min(rows, columns)."""
        return len(self.singular_values)

    def tail(self, rank: int) -> float:
        """Relative error ‖(W − W_r)S‖ / ‖W·S‖ of keeping `rank` components: the layer's relative output error."""
        return float(self.tails[rank])

    @cached_property
    def tails(self) -> Tensor:
        """The relative error of each rank from 0 to the full one, [full rank + 1]."""
        energy = self.singular_values.square()
        left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        return (left / (left[0] + self.mean_energy).clamp_min(1e-300)).sqrt()

    @cached_property
    def basis(self) -> Tensor:
        """The left singular vectors of W·S, [rows × full rank], orthonormal columns in float64."""
        rows, columns = self.scaled.shape
        if rows <= columns:
            return self.vectors.double()
        return torch.linalg.qr(self.scaled @ self.vectors)[0].double()  # orthogonal already: spans stay nested

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(up [rows × rank], down [rank × columns]) in the dtype of W."""
        up = self.basis[:, :rank]
        up, down = restored(self.outputs, self.matrix.dtype, up, up.T @ self.matrix.double())
        return up, down

    def lost_mean(self, rank: int) -> Tensor | None:
        """(W − W_r)·mean, what the split takes from the mean output, [rows]; None at full rank or without a mean."""
        if self.mean is None or rank >= self.full_rank:
            return None
        output, up = self.matrix.double() @ self.mean, self.basis[:, :rank]
        return restored(self.outputs, self.matrix.dtype, output - up @ (up.T @ output))[0]


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
    outputs: Outputs | None = field(default=None, kw_only=True)

    def tail(self, rank_out: int, rank_in: int) -> float:
        """Relative error of keeping (rank_out, rank_in), as `Spectrum.tail`."""
        return float((1 - self.captured[rank_out - 1, rank_in - 1]).clamp_min(0).sqrt())

    def factors(self, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
        """(up [S × r2], core [r2 × r1 × taps…], down [r1 × C]) in the dtype of the kernel."""
        return self._projected(rank_out, rank_in)

    def lost_mean(self, rank_out: int, rank_in: int) -> Tensor | None:
        """As `Spectrum.lost_mean`; None, for a window's mean differs at the borders."""
        return None

    def _projected(self, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
        kernel, taps = self.kernel, self.kernel.shape[2:]
        up = self.out_basis[:, :rank_out]
        flat = kernel.double().flatten(2)
        core = torch.einsum("so,sck,ci->oik", up, flat, self.into_basis[:, :rank_in])
        down = self.into_inverse[:rank_in]
        up, core, down = restored(self.outputs, kernel.dtype, up, core.reshape(rank_out, rank_in, *taps), down)
        return up, core, down

    def branch_tail(self, rank_out: int, rank_in: int, groups: int) -> float:
        """Relative error of keeping the core's diagonal blocks alone, as `tail`: what was projected and what is cut."""
        order_out, order_in = self.branch_order(rank_out, rank_in, groups)
        blocks = self.energy[order_out][:, order_in].reshape(groups, rank_out // groups, groups, rank_in // groups)
        return float((1 - blocks.sum((1, 3)).diagonal().sum()).clamp_min(0).sqrt())

    def branches(self, rank_out: int, rank_in: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """(up [S × r2], diagonal blocks of the core [r2 × r1/groups × taps…], down [r1 × C]), ranks in new order."""
        up, core, down = self._projected(rank_out, rank_in)
        order_out, order_in = self.branch_order(rank_out, rank_in, groups)
        blocks = core[order_out][:, order_in].unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        kept = torch.cat([blocks[i, :, i] for i in range(groups)])
        return up[:, order_out].contiguous(), kept.contiguous(), down[order_in].contiguous()

    def branch_order(self, rank_out: int, rank_in: int, groups: int) -> tuple[Tensor, Tensor]:
        """The order of the ranks that keeps much of the core in `groups` diagonal blocks of equal size.

        Output and input ranks are dealt to the blocks in turn, each time the best deal for the other side as it
        stands, until nothing improves (our reading; finding the best of all is hard).
        """
        energy = self.energy[:rank_out, :rank_in]
        out, into = torch.arange(rank_out), torch.arange(rank_in)
        best, best_kept = (out, into), -1.0
        starts = (out % groups, into % groups), (out * groups // rank_out, into * groups // rank_in)
        for block_out, block_in in starts:
            kept = -1.0
            while True:
                block_out = _dealt(energy, block_out, block_in, groups)
                block_in = _dealt(energy.T, block_in, block_out, groups)
                now = float(energy[block_out.unsqueeze(1) == block_in].sum())
                if now <= kept * (1 + 1e-12):
                    break
                kept = now
            if now > best_kept:
                best, best_kept = (block_out.argsort(stable=True), block_in.argsort(stable=True)), now
        return best

    @cached_property
    def energy(self) -> Tensor:
        """The share of ‖W·S‖² at each pair of output and input rank, [S × C]."""
        rows = torch.diff(self.captured, dim=0, prepend=self.captured.new_zeros(1, self.captured.shape[1]))
        return torch.diff(rows, dim=1, prepend=rows.new_zeros(len(rows), 1)).clamp_min(0)


def restored(outputs: Outputs | None, dtype: torch.dtype, up: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Factors of what was decomposed as those of the layer: the first, whose rows are outputs, and the others."""
    if outputs is not None:
        up, dtype = outputs.restored(up), outputs.dtype
    return tuple(tensor.to(dtype).contiguous() for tensor in (up, *others))


def spectrum(matrix: Tensor, gram: Tensor | None = None, centered: Moments | None = None) -> Spectrum:
    """Decomposes W [rows × columns]; `gram` is XᵀX [columns × columns] of the inputs X, or None.

    With `centered` in its place, inputs count from their mean, and what a split takes from the mean is known.

    A `gram` of channels alone holds for columns that are [channels × taps]: taps are taken as alike (our reading).
    Works on the Gram matrix of the smaller side, so that a wide or tall layer costs min(rows, columns)³.
    """
    weight = matrix.detach()
    scaled = weight.double()
    mean, mean_energy = None, 0.0
    if centered is not None:
        gram, mean = centered.centered, centered.mean
        mean_energy = centered.rows * float((scaled @ mean).square().sum()) / _scale(gram)
    if gram is not None:
        taps = scaled.unflatten(1, (len(gram), -1)).mT  # [rows × taps × channels]
        whole = taps.flatten(0, 1) @ _root(gram)  # one product: a batch of small ones takes ten times longer
        scaled = whole.view(taps.shape).mT.flatten(1)
    scaled = scaled.to(_precision(weight))
    rows, columns = scaled.shape
    values, vectors = _eigh(scaled @ scaled.T if rows <= columns else scaled.T @ scaled)
    values = values.flip(0).double().clamp_min(0).sqrt()
    return Spectrum(weight, values, vectors.flip(1), scaled, gram is not None, mean, mean_energy)


def tucker(kernel: Tensor, gram: Tensor | None = None) -> Tucker:
    """Tucker-2 of a kernel [S × C × spatial…]; `gram` is the inputs' channel Gram matrix [C × C], or None.

    With a Gram matrix the input mode is whitened by it, positions of the window taken as alike (our reading).
    """
    weight = kernel.detach().double().flatten(2)
    root = None if gram is None else _root(gram)
    scaled = weight if root is None else torch.einsum("sck,cd->sdk", weight, root)
    scaled = scaled.to(_precision(kernel.flatten(2)[:, :, 0]))
    out_basis = _eigh(_mode_gram(scaled, 0))[1].flip(1)
    into_basis = _eigh(_mode_gram(scaled, 1))[1].flip(1)
    core = torch.einsum("so,sck,ci->oik", out_basis, scaled, into_basis)
    energy = core.double().square().sum(2)
    whole = energy.sum()
    captured = energy.cumsum(0).cumsum(1) / whole if whole > 0 else torch.ones_like(energy)
    out_basis, into_basis = out_basis.double(), into_basis.double()
    onto = into_basis if root is None else root @ into_basis
    back = into_basis.T
    if root is not None:  # Bᵀ·S⁻¹
        back = torch.linalg.solve_triangular(root, back, upper=False, left=False)
    return Tucker(kernel.detach(), out_basis, onto, back, captured, gram is not None)


def _dealt(energy: Tensor, blocks: Tensor, others: Tensor, groups: int) -> Tensor:
    """The block of each row, equally many in each, by which more energy is kept; `others` are those of the columns.

    The rows of two blocks are dealt by how much more they keep in one, which is best for the two, until none gains.
    """
    by_block = energy.new_zeros(len(energy), groups).index_add_(1, others, energy)
    blocks, size, kept = blocks.clone(), len(energy) // groups, -1.0
    while (now := float(by_block.gather(1, blocks.unsqueeze(1)).sum())) > kept * (1 + 1e-12):
        kept = now
        for one, other in combinations(range(groups), 2):
            (rows,) = torch.where((blocks == one) | (blocks == other))
            order = (by_block[rows, other] - by_block[rows, one]).argsort(stable=True)
            blocks[rows[order[:size]]], blocks[rows[order[size:]]] = one, other
    return blocks


def _precision(matrix: Tensor) -> torch.dtype:
    """Single for large matrices (2–3 times faster), unless the source is double; else double."""
    large = min(matrix.shape) >= SINGLE_FROM and matrix.dtype != torch.float64
    return torch.float32 if large else torch.float64


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors, ascending, in the given precision; scaled, so that squares of single stay in range."""
    scale = symmetric.diagonal().max().clamp_min(torch.finfo(symmetric.dtype).tiny)
    values, vectors = torch.linalg.eigh(symmetric / scale)
    return values * scale, vectors


def _mode_gram(tensor: Tensor, mode: int) -> Tensor:
    unfolded = tensor.movedim(mode, 0).flatten(1)
    return unfolded @ unfolded.T


def _root(gram: Tensor) -> Tensor:
    """S, lower triangular, with S·Sᵀ = the damped Gram matrix in units of its scale.

    Any root will do, for U and the subspaces do not depend on it; this one costs a tenth of a symmetric one.
    """
    damped = gram.double() / _scale(gram)
    return cholesky(damped + DAMPING * torch.eye(len(gram), dtype=torch.float64))


def cholesky(gram: Tensor) -> Tensor:
    """The lower factor of a Gram matrix; one that rounding made indefinite is damped until it is not.

    Raises:
        torch.linalg.LinAlgError: the matrix holds values that are not finite.
    """
    scale = float(gram.abs().max()) or 1.0  # of nothing, as of a layer whose weights are zero
    for power in range(-16, 5):  # at the last, the diagonal outweighs any row
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not int(failed):
            return lower
        gram = gram + 10.0**power * scale * torch.eye(len(gram), dtype=gram.dtype)
    raise torch.linalg.LinAlgError("a Gram matrix holds values that are not finite")


def _scale(gram: Tensor) -> float:
    return max(float(gram.diagonal().mean()), 1e-300)
