"""Which values of a rewritten model are values of the original, over one compile or several in a row.

A rewrite says of what it puts in the place of a value which value that was. A model that was compiled before is traced
anew, and its values get other names; but the paths of its modules stay, and lead back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from lrcompile.graph.graph import Graph

Counterparts = Mapping[str, fx.Node]
"""Values of the original, by the names of those of another graph that are the same, or stand for them."""


@dataclass(frozen=True, eq=False)
class Lineage:
    """What the values of a graph that is compiled are in the `original`.

    `replaced` are the names of those that an earlier compile put in the place of the original's.
    """

    original: Graph
    compiled: Graph
    known: Counterparts = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()

    @classmethod
    def of(cls, graph: Graph) -> Lineage:
        """That of the original itself."""
        return cls(graph, graph, {node.name: node for node in graph.nodes})

    @property
    def direct(self) -> bool:
        """Whether the original itself is compiled."""
        return self.original is self.compiled

    def counterparts(self, rewritten: Graph) -> Counterparts:
        """Those of what the compiled graph was rewritten to: of what was replaced, and of layers that are left."""
        before = {node.name: node for node in self.compiled.nodes if node.op == "call_module"}
        found = {}
        for node in rewritten.nodes:
            names = [name for name in node.meta.get("stands_for", ()) if name in self.known]
            old = before.get(node.name)
            if names:
                found[node.name] = self.known[names[0]]
            elif old is not None and node.name in self.known and self.compiled.module(old) is rewritten.module(node):
                found[node.name] = self.known[node.name]  # a rewrite may also change the weights at a path: no more
        return found

    def substitutes(self, rewritten: Graph) -> Counterparts:
        """Those that were replaced, in this compile or an earlier one."""
        new = {node.name for node in rewritten.nodes if "stands_for" in node.meta}
        return {
            name: node for name, node in self.counterparts(rewritten).items() if name in new or name in self.replaced
        }

    def traced_anew(self, rewritten: Graph, traced: Graph) -> Lineage:
        """That of `traced`: the model of the rewritten graph, trained or not."""
        counterparts, substitutes = self.counterparts(rewritten), self.substitutes(rewritten)
        before = _called_once(rewritten)
        same = {node.name: before[path].name for path, node in _called_once(traced).items() if path in before}
        known = {name: counterparts[old] for name, old in same.items() if old in counterparts}
        replaced = frozenset(name for name, old in same.items() if old in substitutes)
        return Lineage(self.original, traced, known, replaced)


def _called_once(graph: Graph) -> dict[str, fx.Node]:
    """The calls of modules that are called in one place only, by path."""
    return {path: site.nodes[0] for path, site in graph.sites().items() if len(site.nodes) == 1}
