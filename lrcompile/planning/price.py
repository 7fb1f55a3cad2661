"""Prices rewrites by trial: each is applied to a small copy of its neighbourhood, and the device prices both sides.

Passes know nothing of latency and nothing of each other; composition comes from trying: what a rewrite made is
offered to the FUSE passes, what an exact merge made is offered to the FACTORIZE passes, and sites that could be
merged are also factorised together.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from lrcompile.devices.cost import Cost, CostModel
from lrcompile.graph.graph import Graph, attribute, owners, read_by_strides, set_tensor, share, submodule, tied_with
from lrcompile.graph.rewrite import Refusal, Rewrite, set_module
from lrcompile.passes import Context, Pass, ShapesOnly, Stage, apply, proposals

SIBLINGS = 4  # layers on either side of one that reads the same value, with which what it is split into is tried
Family = tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Candidate:
    """A priced choice: rewrites to apply in order, the original nodes they take up, and what they buy.

    `before` and `after` are the costs of what changes.
    """

    rewrites: tuple[Rewrite, ...]
    sites: tuple[str, ...]
    footprint: frozenset[str]
    before: Cost
    after: Cost
    bytes_saved: float

    @property
    def gain(self) -> Cost:
        """Latency, operations and bytes saved; negative where the rewrite costs more."""
        return self.before - self.after

    @cached_property
    def error(self) -> float:
        """The relative output error at the footprint; the first call may compute a decomposition."""
        return max(rewrite.error for rewrite in self.rewrites)

    @property
    def p_faster(self) -> float:
        """Probability that the rewrite is truly faster on the device."""
        return self.gain.p_positive

    @cached_property
    def family(self) -> Family:
        """What is lossy in it, apart from numbers such as ranks; within a family errors can be compared."""
        return tuple(
            (r.pass_name, r.site, tuple(str(v) for v in r.params.values() if not isinstance(v, int | float)))
            for r in self.rewrites
            if not r.exact
        )

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
_Outcome = tuple[tuple[Rewrite, ...], Priced, tuple[int, ...]]  # what follows, price, positions of nodes taken up


@dataclass(frozen=True, eq=False)
class _Trial:
    """A rewritten copy of a region: the names of all nodes that went or changed, and of the new ones still there.

    `parts` are the paths of the layers that each split made, with what they were merged into in their place.
    """

    graph: Graph
    touched: frozenset[str] = frozenset()
    created: frozenset[str] = frozenset()
    parts: tuple[frozenset[str], ...] = ()


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
    trial = _Trials(graph, {p.name: p for p in passes}, context, model, keep)
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
    candidates.sort(key=lambda candidate: tuple(map(str, candidate.rewrites)))  # not by the order of the passes
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
    """Applies chains of rewrites to copies of their neighbourhood; equal trials are made and priced once."""

    def __init__(
        self,
        graph: Graph,
        passes: Mapping[str, Pass],
        context: Context,
        model: CostModel,
        keep: Callable[[str], bool],
    ) -> None:
        self.graph = graph
        self.passes = passes
        self.context = context
        self.shapes = ShapesOnly()
        self.trial_context = context.on_trial(self.shapes)
        self.model = model
        self.sites = graph.sites()
        self.ordered = list(graph.nodes)
        self.places = {node: i for i, node in enumerate(self.ordered)}
        self.node_by_name = {node.name: node for node in self.ordered}
        tied = owners(graph)
        self.closed = {
            path for path, site in self.sites.items()
            if not keep(path) or tied_with(graph, site, tied) or any(map(any, map(read_by_strides, site.nodes)))
        }  # fmt: skip
        self.blanks: dict[int, Any] = {}
        self.regions: dict[tuple[str, ...], _Region] = {}
        self.known: dict[str, list[_Outcome]] = {}
        self.priced: dict[str, Priced] = {}

    def price(self, chain: tuple[Rewrite, ...], fuse: Sequence[Pass]) -> Iterator[Candidate]:
        """The chain as a candidate, and one more for each FUSE rewrite of what it made that makes it faster, and so on.

        A chain that does the same to an equal region as an earlier one is not tried again.
        """
        region = self.region(chain)
        key = region.key + "\n" + "\n".join(region.worded(rewrite) for rewrite in chain)
        outcomes = self.known.get(key)
        if outcomes is None:
            outcomes = list(self.outcomes(region, chain, fuse))
            if all(site.startswith("#") for follows, _, _ in outcomes for follow in follows for site in follow.site):
                self.known[key] = outcomes
        for follows, costs, touched in outcomes:
            whole = (*chain, *map(region.spoken, follows))
            sites = tuple(dict.fromkeys(s for r in whole for s in r.site if s in self.sites or s in self.node_by_name))
            footprint = frozenset(region.names[i] for i in touched)
            yield Candidate(whole, sites, footprint, *costs)

    def outcomes(self, region: _Region, chain: tuple[Rewrite, ...], fuse: Sequence[Pass]) -> Iterator[_Outcome]:
        """What the chain alone comes to, and each FUSE rewrite after it that makes it faster; names left out.

        The fastest of these is followed in the same way: a split in three can be merged on both sides.
        """
        trial = self.applied(_Trial(region.graph), chain)
        alone = self.compared(region, trial.graph)
        yield (), alone, region.positions(trial.touched)
        if len(chain) == 1 and self.passes[chain[0].pass_name].stage is Stage.FUSE:
            return
        whole, fastest = chain, max(0.0, _gain_s(alone))
        while True:
            best: tuple[tuple[Rewrite, ...], _Trial, Priced] | None = None
            for follow in self.follows(region, whole, trial, fuse):
                further = (*whole, follow)
                fused = self.applied(trial, [follow])
                costs = self.compared(region, fused.graph)
                if _gain_s(costs) > _gain_s(alone) and _gain_s(costs) > 0:
                    touched = region.positions(fused.touched)
                    yield tuple(map(region.unspoken, further[len(chain) :])), costs, touched
                if _gain_s(costs) > fastest:
                    best, fastest = (further, fused, costs), _gain_s(costs)
            if best is None:
                return
            whole, trial, alone = best

    def follows(
        self, region: _Region, chain: tuple[Rewrite, ...], trial: _Trial, fuse: Sequence[Pass]
    ) -> Iterator[Rewrite]:
        """The FUSE rewrites of what a chain made, together with sites around it."""
        made = _modules_made(trial)
        for transform in fuse:
            for follow in list(proposals(trial.graph, transform, self.trial_context)):
                if isinstance(follow, Refusal) or not made & set(follow.site):
                    continue
                if not all(site in made or site in region.open for site in follow.site):
                    continue
                if any(len(part) > 1 and part <= set(follow.site) for part in trial.parts):
                    continue  # it would put together again what a rewrite took apart
                yield follow

    def continuations(
        self, chain: tuple[Rewrite, ...], passes: Sequence[Pass], context: Context
    ) -> Iterator[tuple[Rewrite, ...]]:
        """The chain followed by each FACTORIZE rewrite of the modules that it made, with their real spectra."""
        after = extract(self.graph, self.neighbourhood(chain))
        created: list[fx.Node] = []
        for rewrite in chain:
            created += apply(after, self.passes[rewrite.pass_name], rewrite, context).created
        made = {node.target for node in created if node.op == "call_module"}
        for transform in passes:
            for follow in proposals(after, transform, context):
                if isinstance(follow, Rewrite) and made & set(follow.site):
                    yield (*chain, follow)

    def applied(self, start: _Trial, rewrites: Iterable[Rewrite]) -> _Trial:
        """A copy of a trial with more rewrites applied."""
        graph = _copied(start.graph)
        touched, created, parts = set(start.touched), set(start.created), list(start.parts)
        for rewrite in rewrites:
            before = {node.name for node in graph.nodes}
            with torch.device("meta"):
                rewriter = apply(graph, self.passes[rewrite.pass_name], rewrite, self.trial_context)
            new = {node.name for node in rewriter.created}
            touched |= new | set(rewriter.erased)
            created |= new
            fresh = [node for node in rewriter.created if node.name not in before]
            layers = frozenset(str(node.target) for node in fresh if node.op == "call_module")
            if self.passes[rewrite.pass_name].stage is Stage.FUSE:
                parts = [part.difference(rewrite.site) | layers if part & set(rewrite.site) else part for part in parts]
            else:
                parts.append(layers)
        created &= {node.name for node in graph.nodes}
        return _Trial(graph, frozenset(touched), frozenset(created), tuple(parts))

    def compared(self, region: _Region, after: Graph) -> Priced:
        """(cost before, cost after, bytes saved); pairs of the same structure are priced once."""
        key = region.structure + "→" + _structure(after)
        if key not in self.priced:
            saved = _parameter_bytes(region.graph) - _parameter_bytes(after)
            self.priced[key] = (*self.model.compare(region.graph.gm, after.gm), saved)
        return self.priced[key]

    def region(self, chain: Sequence[Rewrite]) -> _Region:
        """The sites of a chain with their neighbours, as a graph of its own that has shapes and no values."""
        key = tuple(dict.fromkeys(site for rewrite in chain for site in rewrite.site))
        if key not in self.regions:
            graph = extract(self.graph, self.neighbourhood(chain), self.shapes, self.blank)
            inside = {node.name for node in graph.nodes}
            free = (inside & self.node_by_name.keys()) - self.sites.keys()
            for path in graph.sites():
                if path not in self.closed and all(node.name in inside for node in self.sites[path].nodes):
                    free.add(path)
            self.regions[key] = _Region(graph, frozenset(free))
        return self.regions[key]

    def neighbourhood(self, chain: Iterable[Rewrite]) -> set[fx.Node]:
        """The nodes of a chain's sites and between them, their layers' near siblings, and what reads them."""
        nodes: set[fx.Node] = set()
        for rewrite in chain:
            for site in rewrite.site:
                if site in self.sites:
                    nodes.update(self.sites[site].nodes)
                elif site in self.node_by_name:
                    nodes.add(self.node_by_name[site])
        nodes |= self.between(nodes)
        for node in list(nodes):
            for source in node.all_input_nodes:
                if source.op == "call_module":
                    nodes.add(source)
                siblings = [user for user in source.users if user.op == "call_module"]
                nodes.update(self.nearest(node, siblings))
            nodes.update(user for user in node.users if user.op in ("call_module", "call_function"))
        return nodes

    def nearest(self, node: fx.Node, siblings: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """A node and at most `SIBLINGS` on either side, in graph order: with all, work grows with their square."""
        ordered = sorted({*siblings, node}, key=self.places.__getitem__)
        i = ordered.index(node)
        return ordered[max(0, i - SIBLINGS) : i + SIBLINGS + 1]

    def between(self, nodes: set[fx.Node]) -> set[fx.Node]:
        """The nodes on every way from one of some nodes to another."""
        places = sorted(self.places[node] for node in nodes)
        if len(places) < 2:
            return set()
        span = self.ordered[places[0] : places[-1] + 1]
        after, before = set(nodes), set(nodes)
        for node in span:
            if any(source in after for source in node.all_input_nodes):
                after.add(node)
        for node in reversed(span):
            if any(user in before for user in node.users):
                before.add(node)
        return {node for node in after & before if node.op in ("call_module", "call_function")}

    def blank(self, value: Any) -> Any:
        """A tensor, or a module, without values; what is shared stays shared."""
        if not isinstance(value, Tensor | nn.Module):
            return value
        if id(value) not in self.blanks:
            if isinstance(value, Tensor):
                fake = self.shapes.from_tensor(value)
                known: Any = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
            else:
                known = copy.copy(value)
                for table in ("_parameters", "_buffers", "_modules"):
                    known.__dict__[table] = {name: self.blank(item) for name, item in getattr(value, table).items()}
            self.blanks[id(value)] = known
        return self.blanks[id(value)]


class _Region:
    """A neighbourhood on its own, without values.

    `open` are the original sites and nodes that FUSE passes may take in: of layers, those of which all calls are
    inside, that nothing is tied to, that nothing reads by its strides (which may be outside) and that are not to be
    kept. Regions are compared with sites as positions.
    """

    def __init__(self, graph: Graph, open_sites: frozenset[str]) -> None:
        self.graph = graph
        self.open = open_sites
        self.names = [node.name for node in graph.nodes]
        self.paths = list(graph.sites())
        self.structure = _structure(graph)
        self.key = f"{self.structure}\n{[i for i, path in enumerate(self.paths) if path in open_sites]}"

    def positions(self, names: Iterable[str]) -> tuple[int, ...]:
        """The region's nodes of these names, as positions."""
        return tuple(i for i, name in enumerate(self.names) if name in names)

    def unspoken(self, rewrite: Rewrite) -> Rewrite:
        """The rewrite with the region's paths replaced by their positions, also at the start of a longer path."""
        return rewrite.renamed(site=tuple(map(self._position, rewrite.site)))

    def spoken(self, rewrite: Rewrite) -> Rewrite:
        """What `unspoken` was made from, in this region's words."""
        sites = []
        for site in rewrite.site:
            position, dot, rest = site.removeprefix("#").partition(".")
            sites.append(self.paths[int(position)] + dot + rest if site.startswith("#") else site)
        return rewrite.renamed(site=tuple(sites))

    def worded(self, rewrite: Rewrite) -> str:
        """A rewrite in words that do not depend on the region's paths."""
        sites = [f"%{self.names.index(site)}" if site in self.names else site for site in self.unspoken(rewrite).site]
        return f"{rewrite.pass_name} {sites} {sorted(rewrite.params.items())}"

    def _position(self, site: str) -> str:
        matches = [i for i, path in enumerate(self.paths) if site == path or site.startswith(f"{path}.")]
        if not matches:
            return site
        longest = max(matches, key=lambda i: len(self.paths[i]))
        return f"#{longest}{site[len(self.paths[longest]) :]}"


def extract(
    graph: Graph,
    nodes: set[fx.Node],
    mode: FakeTensorMode | None = None,
    convert: Callable[[Any], Any] = lambda value: value,
) -> Graph:
    """A graph of some nodes alone: what they read becomes inputs, what others read of them becomes outputs.

    Names, shapes and modules are kept; modules and values go through `convert`, to what `mode` computes with.
    """
    new = fx.Graph()
    root = nn.Module()
    env: dict[fx.Node, fx.Node] = {}

    def copied(old: fx.Node, node: fx.Node) -> None:
        env[old] = node
        node.meta = dict(old.meta)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(convert, node.meta["val"])

    ordered = [node for node in graph.nodes if node in nodes and node.op in ("call_module", "call_function")]
    sources = dict.fromkeys(source for node in ordered for source in node.all_input_nodes if source not in nodes)
    for source in sources:
        if source.op == "get_attr":
            copied(source, new.get_attr(str(source.target)))
            held = convert(attribute(graph.gm, source.target))  # type: ignore[arg-type]
            (set_tensor if isinstance(held, Tensor) else set_module)(root, str(source.target), held)
        else:
            copied(source, new.placeholder(source.name))
        env[source].name = source.name
    for node in ordered:
        copied(node, new.node_copy(node, lambda n: env[n]))
        if node.op == "call_module":
            set_module(root, node.target, convert(submodule(graph.gm, node.target)))  # type: ignore[arg-type]
    inside = set(ordered)
    new.output(tuple(env[node] for node in ordered if any(user not in inside for user in node.users)))
    return _unrun(root, new, mode or graph.fake_mode, graph.gm)


def _gain_s(priced: Priced) -> float:
    return priced[0].latency_s - priced[1].latency_s


def _copied(graph: Graph) -> Graph:
    """A graph that can be edited on its own, nodes under the same names; its code is not generated: it is never run."""
    new, env = fx.Graph(), dict[fx.Node, fx.Node]()
    new.output(new.graph_copy(graph.gm.graph, env))
    for old, copied in env.items():
        copied.meta = dict(old.meta)
    return _unrun(share(graph.gm), new, graph.fake_mode, graph.gm.meta["part_of"])


def _modules_made(trial: _Trial) -> set[Any]:
    """The paths of the layers that a trial's rewrites made."""
    return {n.target for n in trial.graph.nodes if n.op == "call_module" and n.name in trial.created}


def _unrun(root: nn.Module, graph: fx.Graph, mode: FakeTensorMode, whole: fx.GraphModule) -> Graph:
    """A graph over a root's own containers, which fx would copy one by one; its code is not generated.

    `whole` is what it is a part of, so that what is made in it gets the name that it would get there.
    """
    with _use_lazy_graph_module(True):
        gm = fx._lazy_graph_module._make_graph_module(nn.Module().eval(), fx.Graph())
    for table in ("_parameters", "_buffers", "_modules"):
        gm.__dict__[table] = root.__dict__[table]
    gm.graph = graph
    gm.meta["part_of"] = whole
    return Graph(gm, mode)


def _structure(graph: Graph) -> str:
    """What a price depends on: operations, options, shapes and how they are connected; not names or weights."""
    index: dict[fx.Node, int] = {}
    lines = []
    for i, node in enumerate(graph.nodes):
        index[node] = i
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
        value = node.meta.get("val")
        sizes = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else ""
        target = repr(submodule(graph.gm, node.target)) if node.op == "call_module" else node.target  # type: ignore[arg-type]
        if node.op in ("placeholder", "get_attr", "output"):
            target = ""
        lines.append(f"{node.op} {target} {arguments} {sizes}")
    return "\n".join(lines)


def _parameter_bytes(graph: Graph) -> float:
    held = {id(t): t for site in graph.sites().values() for t in site.module.parameters()}
    return float(sum(t.numel() * t.element_size() for t in held.values()))
