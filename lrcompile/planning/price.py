"""Prices rewrites by trial: each is applied to a small copy of its neighbourhood, and the device prices both sides.

Passes know nothing of latency and nothing of each other; composition comes from trying: what a rewrite made is
offered to the FUSE passes, what an exact merge made is offered to the FACTORIZE passes, and sites that could be
merged are also factorised together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from lrcompile.devices.cost import Cost, CostModel
from lrcompile.errors import PassError
from lrcompile.graph.graph import Graph, attribute, unique_tensors
from lrcompile.graph.rewrite import Refusal, Rewrite, set_module
from lrcompile.passes import Context, Pass, Stage, apply, proposals


@dataclass(frozen=True)
class Candidate:
    """A priced choice: rewrites to apply in order, the original nodes they take up, and what they buy.

    `before` and `after` are the costs of what changes; `error` is the relative output error at the footprint.
    """

    rewrites: tuple[Rewrite, ...]
    sites: tuple[str, ...]
    footprint: frozenset[str]
    before: Cost
    after: Cost
    bytes_saved: float
    error: float

    @property
    def gain(self) -> Cost:
        """Latency, operations and bytes saved; negative where the rewrite costs more."""
        return self.before - self.after

    @property
    def p_faster(self) -> float:
        """Probability that the rewrite is truly faster on the device."""
        return self.gain.p_positive

    @property
    def exact(self) -> bool:
        """Whether every rewrite promises equality up to rounding."""
        return all(rewrite.exact for rewrite in self.rewrites)


@dataclass(frozen=True)
class Pricing:
    """All candidates and refusals of a graph, and the latency of each of its nodes as it stands."""

    candidates: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...]
    node_costs: Mapping[str, Cost] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]
Priced = tuple[Cost, Cost, float]


def price(
    graph: Graph,
    passes: Sequence[Pass],
    context: Context,
    model: CostModel,
    keep: Callable[[str], bool] = lambda site: True,
    progress: Progress = lambda stage, done, total: None,
) -> Pricing:
    """Proposes with every FACTORIZE and FUSE pass, and prices each proposal and its compositions.

    `keep` says which sites may be rewritten.

    Raises:
        PassError: a pass proposed a rewrite that it cannot apply.
    """
    trial = _Trials(graph, {p.name: p for p in passes}, context, model)
    refusals: list[Refusal] = []
    chains: list[tuple[Rewrite, ...]] = []
    by_stage: dict[Stage, list[Rewrite]] = defaultdict(list)
    for transform in passes:
        if transform.stage is Stage.CANONICALIZE:
            continue
        for proposal in proposals(graph, transform, context):
            if isinstance(proposal, Refusal):
                refusals.append(proposal)
            elif all(keep(site) for site in proposal.site):
                by_stage[transform.stage].append(proposal)
    fuse = [p for p in passes if p.stage is Stage.FUSE]
    factorize = [p for p in passes if p.stage is Stage.FACTORIZE]
    chains += [(rewrite,) for rewrite in by_stage[Stage.FACTORIZE] + by_stage[Stage.FUSE]]
    chains += _joint(by_stage[Stage.FUSE], by_stage[Stage.FACTORIZE])
    for rewrite in by_stage[Stage.FUSE]:
        chains += trial.continuations((rewrite,), factorize, context)
    candidates: list[Candidate] = []
    for i, chain in enumerate(chains):
        progress("price", i, len(chains))
        candidates += trial.price(chain, fuse)
    progress("price", len(chains), len(chains))
    return Pricing(tuple(candidates), tuple(refusals))


def _joint(merges: Iterable[Rewrite], splits: Iterable[Rewrite]) -> list[tuple[Rewrite, ...]]:
    """For sites that could merge: the same split of each of them, in one candidate."""
    by_site: dict[str, dict[str, Rewrite]] = defaultdict(dict)
    for split in splits:
        if len(split.site) == 1:
            by_site[split.site[0]][f"{split.pass_name} {sorted(split.params.items())}"] = split
    chains = []
    for merge in merges:
        shared = [by_site[site] for site in merge.site]
        if len(shared) > 1 and all(shared):
            chains += [tuple(s[key] for s in shared) for key in shared[0] if all(key in s for s in shared)]
    return chains


class _Trials:
    """Applies chains of rewrites to copies of their neighbourhood; equal trials are priced once."""

    def __init__(self, graph: Graph, passes: Mapping[str, Pass], context: Context, model: CostModel) -> None:
        self.graph = graph
        self.passes = passes
        self.context = context
        self.trial_context = context.on_trial(graph.fake_mode)
        self.model = model
        self.nodes_of = {path: site.nodes for path, site in graph.sites().items()}
        self.node_by_name = {node.name: node for node in graph.nodes}
        self.priced: dict[str, Priced] = {}
        self.lone: dict[str, tuple[Priced, tuple[int, ...]]] = {}

    def price(self, chain: tuple[Rewrite, ...], fuse: Sequence[Pass]) -> Iterator[Candidate]:
        """The chain as a candidate, and one more for each FUSE rewrite of what the chain made, if that is cheaper.

        A chain that does the same to an equal region as an earlier one, and offers nothing to fuse, is not tried again.
        """
        region = self.region(chain)
        names = [node.name for node in region.nodes]
        key = _structure(region) + _wording(chain, region)
        if key in self.lone:
            costs, positions = self.lone[key]
            yield self.candidate(chain, *costs, {names[i] for i in positions})
            return
        after, touched, created = self.applied(region, chain)
        costs = self.compared(region, after)
        base = self.candidate(chain, *costs, touched)
        yield base
        follows = []
        if len(chain) > 1 or self.passes[chain[0].pass_name].stage is not Stage.FUSE:
            made = {node.target for node in created if node.op == "call_module"}
            for transform in fuse:
                for follow in list(proposals(after, transform, self.trial_context)):
                    if isinstance(follow, Rewrite) and made & set(follow.site):
                        follows.append(follow)
        if not follows:
            self.lone[key] = costs, tuple(i for i, name in enumerate(names) if name in touched)
        for follow in follows:
            longer = (*chain, follow)
            fused, fused_touched, _ = self.applied(region, longer)
            candidate = self.candidate(longer, *self.compared(region, fused), fused_touched)
            if candidate.gain.latency_s > max(0.0, base.gain.latency_s):
                yield candidate

    def continuations(
        self, chain: tuple[Rewrite, ...], passes: Sequence[Pass], context: Context
    ) -> Iterator[tuple[Rewrite, ...]]:
        """The chain followed by each FACTORIZE rewrite of the modules that it made, with their real spectra."""
        region = self.region(chain)
        after = region.copy()
        created: list[fx.Node] = []
        for rewrite in chain:
            created += apply(after, self.passes[rewrite.pass_name], rewrite, context).created
        made = {node.target for node in created if node.op == "call_module"}
        for transform in passes:
            for follow in proposals(after, transform, context):
                if isinstance(follow, Rewrite) and made & set(follow.site):
                    yield (*chain, follow)

    def applied(self, region: Graph, chain: Iterable[Rewrite]) -> tuple[Graph, set[str], list[fx.Node]]:
        """(rewritten copy, names of the original nodes that went or changed, new nodes)."""
        after = region.copy()
        original = {node.name for node in region.nodes}
        created: list[fx.Node] = []
        touched: set[str] = set()
        for rewrite in chain:
            try:
                rewriter = apply(after, self.passes[rewrite.pass_name], rewrite, self.trial_context)
            except (KeyError, ValueError, RuntimeError, AttributeError) as error:
                problem = f"cannot apply its own proposal {rewrite}: {type(error).__name__}: {error}"
                raise PassError(rewrite.pass_name, rewrite.site[0], problem) from error
            created += rewriter.created
            touched |= {node.name for node in rewriter.created} | set(rewriter.erased)
        alive = set(after.nodes)
        return after, touched & original, [node for node in created if node in alive]

    def compared(self, region: Graph, after: Graph) -> Priced:
        """(cost before, cost after, bytes saved); pairs of the same structure are priced once."""
        key = _structure(region) + "→" + _structure(after)
        if key not in self.priced:
            saved = _parameter_bytes(region) - _parameter_bytes(after)
            self.priced[key] = (*self.model.compare(region.gm, after.gm), saved)
        return self.priced[key]

    def candidate(
        self, chain: tuple[Rewrite, ...], before: Cost, after: Cost, saved: float, touched: set[str]
    ) -> Candidate:
        """The candidate of a priced trial."""
        sites = tuple(dict.fromkeys(s for rewrite in chain for s in rewrite.site if self._is_original(s)))
        error = max((rewrite.error for rewrite in chain), default=0.0)
        return Candidate(chain, sites, frozenset(touched), before, after, saved, error)

    def _is_original(self, site: str) -> bool:
        return site in self.nodes_of or site in self.node_by_name

    def region(self, chain: Iterable[Rewrite]) -> Graph:
        """The sites of a chain with their neighbours, as a graph of its own."""
        nodes: set[fx.Node] = set()
        for rewrite in chain:
            for site in rewrite.site:
                if site in self.nodes_of:
                    nodes.update(self.nodes_of[site])
                elif site in self.node_by_name:
                    nodes.add(self.node_by_name[site])
        for node in list(nodes):
            for source in node.all_input_nodes:
                if source.op == "call_module":
                    nodes.add(source)
                nodes.update(user for user in source.users if user.op == "call_module")
            nodes.update(user for user in node.users if user.op in ("call_module", "call_function"))
        return extract(self.graph, nodes)


def extract(graph: Graph, nodes: set[fx.Node]) -> Graph:
    """A graph of some nodes alone: what they read becomes inputs, what others read of them becomes outputs.

    Names, shapes and modules are kept (modules by reference).
    """
    new = fx.Graph()
    root = nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    ordered = [node for node in graph.nodes if node in nodes and node.op in ("call_module", "call_function")]
    sources = dict.fromkeys(source for node in ordered for source in node.all_input_nodes if source not in nodes)
    for source in sources:
        if source.op == "get_attr":
            env[source] = new.get_attr(source.target)
            _set_attribute(root, str(source.target), attribute(graph.gm, source.target))  # type: ignore[arg-type]
        else:
            env[source] = new.placeholder(source.name)
        env[source].name = source.name
        env[source].meta = dict(source.meta)
    for node in ordered:
        env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
        if node.op == "call_module":
            set_module(root, node.target, graph.gm.get_submodule(node.target))  # type: ignore[arg-type]
    inside = set(ordered)
    new.output(tuple(env[node] for node in ordered if any(user not in inside for user in node.users)))
    with _use_lazy_graph_module(True):
        return Graph(fx._lazy_graph_module._make_graph_module(root, new), graph.fake_mode)


def _set_attribute(root: nn.Module, path: str, value: object) -> None:
    parent, _, leaf = path.rpartition(".")
    if parent:
        set_module(root, parent, nn.Module()) if not hasattr(root, parent.split(".")[0]) else None
        holder = root
        for part in parent.split("."):
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]  # type: ignore[assignment]
    else:
        holder = root
    setattr(holder, leaf, value)


def _structure(graph: Graph) -> str:
    """What a price depends on: operations, options, shapes and how they are connected; not names or weights."""
    index: dict[fx.Node, int] = {}
    lines = []
    for i, node in enumerate(graph.nodes):
        index[node] = i
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: _Ref(index[n]))
        value = node.meta.get("val")
        sizes = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else ""
        target = repr(graph.gm.get_submodule(node.target)) if node.op == "call_module" else node.target  # type: ignore[arg-type]
        if node.op in ("placeholder", "get_attr", "output"):
            target = ""
        lines.append(f"{node.op} {target} {arguments} {sizes}")
    return "\n".join(lines)


def _wording(chain: Iterable[Rewrite], region: Graph) -> str:
    """A chain with its sites as positions in the region; sites that the chain itself makes keep their endings."""
    position = {path: f"#{i}" for i, path in enumerate(region.sites())}
    words = []
    for rewrite in chain:
        sites = [position.get(site, site) for site in rewrite.site]
        words.append(f"{rewrite.pass_name} {sites} {sorted(rewrite.params.items())}")
    return "\n" + "\n".join(words)


@dataclass(frozen=True)
class _Ref:
    index: int


def _parameter_bytes(graph: Graph) -> float:
    modules = nn.ModuleList(site.module for site in graph.sites().values())
    return float(sum(t.numel() * t.element_size() for t in unique_tensors(modules)))
