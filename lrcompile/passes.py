"""What a pass is, and what it may ask while it proposes and applies."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompile.devices.device import Device
from lrcompile.errors import LrcompileError, PassError, is_out_of_memory
from lrcompile.graph.graph import TRANSPOSED_CONVS, Graph, Site
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter, value_names
from lrcompile.planning.decompose import Outputs, Spectrum, Tucker, spectrum, tucker
from lrcompile.planning.moments import Moments, Window
from lrcompile.planning.store import Store
from lrcompile.planning.windows import window_spectrum, window_tucker

T = TypeVar("T")
S = TypeVar("S", Tensor, Moments)
D = TypeVar("D", Spectrum, Tucker)


class Stage(Enum):
    """When a pass acts.

    CANONICALIZE: exact and always welcome; applied until nothing is proposed any more, before anything is priced.
    FACTORIZE: priced candidates, usually lossy. FUSE: exact, priced; also tried on what FACTORIZE passes made.
    """

    CANONICALIZE = "canonicalize"
    FACTORIZE = "factorize"
    FUSE = "fuse"


@dataclass(frozen=True)
class Pass(ABC):
    """One kind of rewrite. A frozen dataclass: its fields are its options; the docstring's first line is the equation.

    `name` defaults to the class name in kebab-case. `propose` is pure and cheap and never edits; `apply` makes
    the edit that a rewrite describes, through the rewriter only.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Yields the rewrites that are legal on this graph, and a refusal with its reason for each near miss."""

    @abstractmethod
    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Edits `rewriter.graph` as `rewrite` says.

        Raises:
            KeyError: a site that the rewrite names is not in the graph.
        """

    def remark(self, rewrite: Rewrite) -> str:
        """What a user should know of one of its rewrites besides the figures, such as that it needs training."""
        return ""


@dataclass(frozen=True, eq=False)
class Context:
    """What passes may ask: the device, the model's precision, and decompositions, which are computed once.

    `grams` maps (node name, feature axis, or window of a convolution) to the moments of what is seen of that value,
    collected on calibration data;
    `token_counts` maps the name of an index node to how often each row was looked up; `gradients` maps the name of a
    layer's node to the moments of what the model's outputs feel of it. `store` remembers decompositions
    from one compile to the next.
    """

    device: Device
    dtype: str = "fp32"
    grams: Mapping[tuple[str, int | Window], Moments] = field(default_factory=dict)
    token_counts: Mapping[str, Tensor] = field(default_factory=dict)
    store: Store | None = None
    gradients: Mapping[str, Moments] = field(default_factory=dict)
    _memo: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)
    _digests: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False)

    def ranks(self, below: int) -> tuple[int, ...]:
        """Rank candidates under `below`, at the device's steps for this precision, ascending."""
        return self.device.ranks(below, self.dtype)

    def gram(self, node: fx.Node, axis: int = -1) -> Tensor | None:
        """XᵀX over a value's feature axis (-1 for linear layers, 1 for convolutions), or None without calibration."""
        known = self.moments(node, axis)
        return None if known is None else known.gram

    def input_gram(self, site: Site, axis: int = -1) -> Tensor | None:
        """XᵀX over the inputs of all of a site's calls, or None unless each of them was calibrated."""
        known = self.input_moments(site, axis)
        return None if known is None else known.gram

    def moments(self, node: fx.Node, seen: int | Window = -1) -> Moments | None:
        """Moments of a value's features, or of the patches that a window sees of it, or None without calibration."""
        return next((self.grams[name, seen] for name in value_names(node) if (name, seen) in self.grams), None)

    def input_moments(self, site: Site, seen: int | Window = -1) -> Moments | None:
        """Moments over the inputs of all of a site's calls, or None unless each of them was calibrated."""
        return _sum(self.moments(node.args[0], seen) for node in site.nodes)  # type: ignore[arg-type]

    def patches(self, site: Site) -> Moments | None:
        """Moments of the patches [channels × taps] that a convolution sees at every position of its output.

        None without calibration, and where `Window.of` makes none of the convolution.
        """
        window = Window.of(site.module)
        return None if window is None else self.input_moments(site, window)

    def lookups(self, site: Site) -> Tensor | None:
        """How often all of an embedding's calls looked up each row, or None unless each call was calibrated."""
        rows: Any = site.module.num_embeddings  # another table that the same is looked up in may be longer
        known = self.token_counts
        return _sum(
            next((known[name][:rows] for name in value_names(node.args[0]) if name in known), None)  # type: ignore[arg-type]
            for node in site.nodes
        )

    def outputs(self, site: Site) -> Outputs | None:
        """How directions of a site's outputs count, over all of its calls; None where that is not known of each.

        Of a layer that was merged of several, each part counts by itself.
        """
        weight: Any = site.module.weight
        felt = _sum(self._felt(node) for node in site.nodes)
        if felt is None:
            return None
        return self.once(site, "outputs", lambda: Outputs.of(felt, weight.dtype))

    def _felt(self, node: fx.Node) -> Tensor | None:
        """The Gram matrix of gradients at a node, [features × features]."""
        known = next((self.gradients[name] for name in value_names(node) if name in self.gradients), None)
        if known is not None:
            return known.gram
        users = list(node.users)
        if len(users) != 1 or users[0].target is not torch.ops.aten.split_with_sizes.default:
            return None
        pieces = sorted(users[0].users, key=lambda piece: piece.args[1])  # type: ignore[arg-type, return-value]
        blocks = [self._felt(piece) for piece in pieces]
        if len(blocks) < len(users[0].args[1]) or any(block is None for block in blocks):  # type: ignore[arg-type]
            return None
        return torch.block_diag(*(block for block in blocks if block is not None))

    def constant(self, tensor: Tensor) -> Tensor:
        """A weight as `apply` may compute with it: itself, or on trial a fake of its shape."""
        return tensor.detach()

    def spectrum(self, site: Site, centered: bool = False) -> Spectrum:
        """The activation-aware SVD of a linear layer's weight, or of a 1×1 convolution's as [S × C].

        With `centered` the inputs count from their mean, so `apply` has to add `lost_mean` to the bias. Transposed and
        padded 1×1 convolutions, whose outputs do not all see inputs, are never taken so.
        """
        weight: Any = site.module.weight
        if isinstance(site.module, nn.Linear):
            return self.svd(site, "linear", lambda: weight, self.input_moments(site), centered)
        transposed = isinstance(site.module, TRANSPOSED_CONVS)
        padding: Any = site.module.padding
        seen = self.patches(site) or self.input_moments(site, 1)  # patches are what a stride leaves
        centered &= not transposed and (isinstance(padding, str) or not any(padding))
        return self.svd(
            site, "pointwise", lambda: weight.flatten(1).T if transposed else weight.flatten(1), seen, centered
        )

    def error(self, site: Site, rank: int, centered: bool = False) -> float:
        """The relative output error of a site split by `spectrum` at a rank."""
        return self.spectrum(site, centered).tail(rank)

    def svd(
        self,
        site: Site,
        form: str,
        matrix: Callable[[], Tensor],
        known: Moments | None = None,
        centered: bool = False,
    ) -> Spectrum:
        """The SVD of a matrix made from a site's weight, its rows (outputs, …); `form` names how, for the key."""
        if known is None:
            return self.once(site, form, lambda: self._decomposed(spectrum, matrix()))
        outputs = self.outputs(site)
        if centered:
            words = f"{form} centered"
            return self.once(site, words, lambda: self._decomposed(spectrum, matrix(), None, known, outputs=outputs))
        return self.once(site, form, lambda: self._decomposed(spectrum, matrix(), known.gram, outputs=outputs))

    def separable(self, site: Site, axes: tuple[int, ...], centered: bool = False) -> Spectrum:
        """The SVD of a convolution's kernel as [(S, other taps) × (C, taps of `axes`)], `axes` counting spatial ones.

        With calibration data the second factor is fitted to the patches that the window sees, where they were kept,
        and with `centered` they count from their mean, as in `spectrum`.
        """
        weight: Any = site.module.weight
        others = [axis for axis in range(weight.dim() - 2) if axis not in axes]

        def matrix() -> Tensor:
            order = (0, *(axis + 2 for axis in others), 1, *(axis + 2 for axis in axes))
            return weight.permute(order).flatten(0, len(others)).flatten(1)

        form, known = f"separable {axes}", self.patches(site)
        if known is None:
            return self.svd(site, form, matrix, self.input_moments(site, 1))
        places = torch.arange(len(known.total)).view(weight.shape[1:])
        places = places.permute(0, *(axis + 1 for axis in axes), *(axis + 1 for axis in others)).flatten()
        return self.windowed(site, form, matrix, lambda: known.reordered(places), centered)

    def windowed(
        self, site: Site, form: str, matrix: Callable[[], Tensor], patches: Callable[[], Moments], centered: bool
    ) -> Spectrum:
        """A split of a kernel's matrix that is fitted to patches, as `window_spectrum`; `form` as in `svd`."""
        words = f"{form} centered" if centered else form
        outputs = self.outputs(site)
        return self.once(
            site, words, lambda: self._decomposed(window_spectrum, matrix(), patches(), centered, outputs=outputs)
        )

    def tucker(self, site: Site, centered: bool = False) -> Tucker:
        """Tucker-2 of a convolution's kernel as [S × C × taps]; a transposed convolution's is turned that way first.

        With calibration data its core is fitted to the patches that the window sees, where they were kept, and with
        `centered` they count from their mean, as in `spectrum`.
        """
        weight: Any = site.module.weight
        known = self.patches(site)
        if known is not None:
            form = "tucker centered" if centered else "tucker"
            outputs = self.outputs(site)
            return self.once(
                site, form, lambda: self._decomposed(window_tucker, weight, known, centered, outputs=outputs)
            )
        transposed = isinstance(site.module, TRANSPOSED_CONVS)
        kernel = weight.transpose(0, 1) if transposed else weight
        gram = self.input_gram(site, 1)
        outputs = None if gram is None else self.outputs(site)
        return self.once(site, "tucker", lambda: self._decomposed(tucker, kernel, gram, outputs=outputs))

    def _decomposed(
        self,
        decompose: Callable[..., D],
        weight: Tensor,
        *inputs: Moments | Tensor | bool | None,
        outputs: Outputs | None = None,
    ) -> D:
        weight = weight if outputs is None else outputs.weighted(weight)
        found = decompose(weight, *inputs) if self.store is None else self.store.of(decompose, weight, *inputs)
        return found if outputs is None else replace(found, outputs=outputs)

    def once(self, site: Site, form: str, compute: Callable[[], T]) -> T:
        """What `compute` makes of a site's weight and calls, computed once; `form` names what that is."""
        calls = " ".join(f"{value_names(node.args[0])[0]} {value_names(node)[0]}" for node in site.nodes)  # type: ignore[arg-type]
        weight: Any = site.module.weight
        if weight not in self._digests:
            self._digests[weight] = _digest(weight)
        key = (self._digests[weight], f"{form} {calls}")
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def on_trial(self, fake_mode: FakeTensorMode) -> Context:
        """The same context for pricing: decompositions and statistics have shapes and no values, so it is cheap."""
        return TrialContext(
            self.device, self.dtype, self.grams, self.token_counts, None, {}, self._memo, self._digests,
            fake_mode=fake_mode,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class TrialContext(Context):
    """Answers every decomposition with fake factors of the right shapes."""

    fake_mode: FakeTensorMode = field(kw_only=True, default_factory=FakeTensorMode)

    def constant(self, tensor: Tensor) -> Tensor:
        """A fake of the weight's shape and type."""
        return self._fake(tensor)

    def gram(self, node: fx.Node, axis: int = -1) -> Tensor | None:
        """A fake of the Gram matrix, where there is one."""
        known = super().gram(node, axis)
        return None if known is None else self._fake(known)

    def input_gram(self, site: Site, axis: int = -1) -> Tensor | None:
        """A fake of the Gram matrix over all calls, where there is one."""
        return _sum(self.gram(node.args[0], axis) for node in site.nodes)  # type: ignore[arg-type]

    def lookups(self, site: Site) -> Tensor | None:
        """A fake of the counts, where there are any."""
        known = super().lookups(site)
        return None if known is None else self._fake(known)

    def svd(
        self,
        site: Site,
        form: str,
        matrix: Callable[[], Tensor],
        known: Moments | None = None,
        centered: bool = False,
    ) -> Spectrum:
        """A spectrum whose factors have shapes only."""
        return self._spectrum(matrix, known is not None, centered and known is not None, None)

    def windowed(
        self, site: Site, form: str, matrix: Callable[[], Tensor], patches: Callable[[], Moments], centered: bool
    ) -> Spectrum:
        """A split whose factors have shapes only."""
        return self._spectrum(matrix, True, centered, len(site.module.weight))  # type: ignore[arg-type]

    def _spectrum(self, matrix: Callable[[], Tensor], aware: bool, shifts: bool, outputs: int | None) -> Spectrum:
        with self.fake_mode, torch.no_grad():
            fake = self._fake(matrix())
            values = torch.empty(min(fake.shape))
        mean = fake if shifts else None
        return TrialSpectrum(fake, values, fake, fake, aware, mean, width=outputs or len(fake))

    def tucker(self, site: Site, centered: bool = False) -> Tucker:
        """A Tucker decomposition whose factors have shapes only."""
        weight: Any = site.module.weight
        transposed = isinstance(site.module, TRANSPOSED_CONVS)
        with self.fake_mode, torch.no_grad():
            kernel = self._fake(weight.transpose(0, 1) if transposed else weight)
        shifts = centered and self.patches(site) is not None
        return TrialTucker(kernel, kernel, kernel, kernel, kernel, False, shifts=shifts)

    def _fake(self, tensor: Tensor) -> Tensor:
        return (
            tensor if isinstance(tensor, FakeTensor) or tensor.is_meta else self.fake_mode.from_tensor(tensor.detach())
        )


class ShapesOnly(FakeTensorMode):
    """A fake mode whose fakes are plain tensors on the meta device: ten times cheaper, where all of a graph is meta."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def from_tensor(self, tensor: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """A tensor of the same shape, strides and type without values."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class TrialSpectrum(Spectrum):
    """A spectrum without values; the layer has `width` outputs."""

    width: int = field(kw_only=True)

    @property
    def basis(self) -> Tensor:  # type: ignore[override]
        """An empty basis, [rows × full rank]."""
        return self.matrix.new_empty(len(self.matrix), self.full_rank)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Empty (up [rows × rank], down [rank × columns])."""
        rows, columns = self.matrix.shape
        return self.matrix.new_empty(rows, rank), self.matrix.new_empty(rank, columns)

    def lost_mean(self, rank: int) -> Tensor | None:
        """Empty, [outputs], where a mean is lost."""
        return None if self.mean is None or rank >= self.full_rank else self.matrix.new_empty(self.width)


@dataclass(frozen=True, eq=False)
class TrialTucker(Tucker):
    """A Tucker decomposition without values; `shifts` says that it loses a mean."""

    shifts: bool = field(kw_only=True)

    def factors(self, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty (up [S × r2], core [r2 × r1 × taps…], down [r1 × C])."""
        out, into, *taps = self.kernel.shape
        new = self.kernel.new_empty
        return new(out, rank_out), new(rank_out, rank_in, *taps), new(rank_in, into)

    def lost_mean(self, rank_out: int, rank_in: int) -> Tensor | None:
        """Empty, [S], where a mean is lost."""
        out, into, *_ = self.kernel.shape
        return self.kernel.new_empty(out) if self.shifts and (rank_out < out or rank_in < into) else None

    def branches(self, rank_out: int, rank_in: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty (up [S × r2], diagonal blocks [r2 × r1/groups × taps…], down [r1 × C])."""
        up, core, down = self.factors(rank_out, rank_in)
        return up, core[:, : rank_in // groups].contiguous(), down


def proposals(graph: Graph, transform: Pass, context: Context) -> Iterator[Rewrite | Refusal]:
    """What a pass proposes, each stamped with the pass's name.

    Raises:
        PassError: the pass failed.
    """
    try:
        for proposal in transform.propose(graph, context):
            if isinstance(proposal, Rewrite):
                yield _checked(proposal.renamed(pass_name=transform.name))
            elif isinstance(proposal, Refusal):
                yield replace(proposal, pass_name=transform.name)
            else:
                raise TypeError(f"expected a Rewrite or a Refusal, got a {type(proposal).__name__}")
    except LrcompileError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way: the user should know which one
        raise PassError(transform.name, "the graph", f"failed to propose: {type(error).__name__}: {error}") from error


def _checked(rewrite: Rewrite) -> Rewrite:
    """A rewrite whose site and parameters a plan can hold, and whose error names the pass where it cannot be told."""
    if not isinstance(rewrite.site, tuple) or not all(isinstance(name, str) for name in rewrite.site):
        raise TypeError(f"the site of a rewrite is {rewrite.site!r}; expected a tuple of names")
    json.dumps(rewrite.params)

    def error() -> float:
        try:
            return rewrite.error
        except Exception as error:
            if isinstance(error, LrcompileError) or is_out_of_memory(error):
                raise
            problem = f"cannot tell the error of {rewrite}: {type(error).__name__}: {error}"
            raise PassError(rewrite.pass_name, ", ".join(rewrite.site), problem) from error

    return Rewrite(rewrite.pass_name, rewrite.site, rewrite.params, error, rewrite.exact)


def remark(transform: Pass, rewrite: Rewrite) -> str:
    """What a pass has to say of one of its rewrites.

    Raises:
        PassError: the pass failed.
    """
    try:
        return transform.remark(rewrite)
    except Exception as error:
        problem = f"failed to remark on {rewrite}: {type(error).__name__}: {error}"
        raise PassError(transform.name, ", ".join(rewrite.site), problem) from error


def apply(graph: Graph, transform: Pass, rewrite: Rewrite, context: Context) -> Rewriter:
    """Applies one rewrite to a graph in place; returns the rewriter with what it made and erased.

    Raises:
        PassError: the pass failed; the graph may be half edited and must be dropped.
    """
    rewriter = Rewriter(graph, context, rewrite)
    try:
        with torch.no_grad():
            transform.apply(rewriter, rewrite)
    except LrcompileError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way: the user should know which one, and where
        problem = f"cannot apply {rewrite}: {type(error).__name__}: {error}"
        raise PassError(transform.name, ", ".join(rewrite.site), problem) from error
    if transform.stage is Stage.FACTORIZE and not rewriter.created and not rewriter.erased:
        problem = f"{rewrite} edits nothing; `apply` has to make its edit through the rewriter"
        raise PassError(transform.name, ", ".join(rewrite.site), problem)
    return rewriter


def _sum(terms: Iterable[S | None]) -> S | None:
    total: S | None = None
    for term in terms:
        if term is None:
            return None
        total = term if total is None else total + term
    return total


def _digest(tensor: Tensor) -> str:
    if isinstance(tensor, FakeTensor):
        return f"fake {id(tensor)}"
    data = tensor.detach().clone(memory_format=torch.contiguous_format)
    digest = hashlib.sha1(f"{tuple(data.shape)} {data.dtype}".encode())
    digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
