"""A rewrite as data, and the one way to edit a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from lrcompile.graph.graph import Graph, Site
    from lrcompile.passes import Context

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


class Deferred:
    """A dataclass field that reads as a number; given a function, it calls that when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> float:
        if instance is None:
            return 0.0  # the field's default
        held = instance.__dict__[self.key]
        if callable(held):
            held = instance.__dict__[self.key] = held()
        return float(held)

    def __set__(self, instance: Any, value: float | Callable[[], float]) -> None:
        instance.__dict__[self.key] = value


@dataclass(frozen=True)
class Rewrite:
    """One proposed edit: which pass, where, with which parameters, at what relative output error of the site.

    `site` names the modules (or nodes) concerned, the main one first. `exact` promises equality up to rounding.
    Where the error costs a decomposition, give a function: most proposals turn out not to be faster, and nobody asks.
    """

    pass_name: str
    site: tuple[str, ...]
    params: Mapping[str, JSON] = field(default_factory=dict)
    error: Deferred = Deferred()
    exact: bool = False

    def renamed(self, pass_name: str | None = None, site: tuple[str, ...] | None = None) -> Rewrite:
        """The same rewrite of another pass or site; unlike `dataclasses.replace`, this does not compute its error."""
        names = (self.pass_name if pass_name is None else pass_name, self.site if site is None else site)
        return Rewrite(*names, self.params, self.__dict__["_error"], self.exact)

    def to_json(self) -> dict[str, Any]:
        """The rewrite as plain JSON values."""
        return {
            "pass": self.pass_name,
            "site": list(self.site),
            "params": dict(self.params),
            "error": self.error,
            "exact": self.exact,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rewrite:
        """The rewrite that `to_json` wrote.

        Raises:
            KeyError, TypeError: a field is missing or of the wrong type.
        """
        return cls(data["pass"], tuple(data["site"]), dict(data["params"]), float(data["error"]), bool(data["exact"]))

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.params.items())
        return f"{self.pass_name}({', '.join(self.site)}{'; ' + options if options else ''})"


@dataclass(frozen=True)
class Refusal:
    """A site that a pass looked at and left alone, with the reason."""

    pass_name: str
    site: str
    reason: str


class Rewriter:
    """Edits one graph on behalf of one rewrite: fresh names, shapes, provenance, and what was touched."""

    def __init__(self, graph: Graph, context: Context, rewrite: Rewrite) -> None:
        self.graph = graph
        self.context = context
        self.rewrite = rewrite
        self.created: list[fx.Node] = []
        self.erased: list[str] = []

    def site(self, path: str | None = None) -> Site:
        """The named site as the graph is now; by default the rewrite's main site."""
        return self.graph.site(self.rewrite.site[0] if path is None else path)

    def node(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            KeyError: there is none.
        """
        for node in self.graph.gm.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def add_module(self, path: str, module: nn.Module) -> str:
        """Registers a module under `path`, or under `path_2`, `path_3`… if that is taken; returns the path.

        In a part of a graph, as rewrites are tried on, what the whole graph has is taken too: `meta["part_of"]`.
        """
        gm, candidate, count = self.graph.gm, path, 1
        while _exists(gm, candidate) or _exists(gm.meta.get("part_of"), candidate):
            count += 1
            candidate = f"{path}_{count}"
        self._put(candidate, module)
        return candidate

    def set_module(self, path: str, module: nn.Module) -> None:
        """Puts `module` in the place of the one at `path`; its state-dict keys stay."""
        self._put(path, module)
        for node in self.graph.gm.graph.nodes:
            if node.op == "call_module" and node.target == path:
                self._finish(node)

    def call_module(self, path: str, *args: Any, before: fx.Node) -> fx.Node:
        """Inserts a call of the module at `path` before a node; returns the new node with its shape."""
        with self.graph.gm.graph.inserting_before(before):
            node = self.graph.gm.graph.create_node("call_module", path, args)
        return self._finish(node)

    def call_function(self, target: Any, *args: Any, before: fx.Node, **kwargs: Any) -> fx.Node:
        """Inserts a call of an ATen operator before a node; returns the new node with its shape."""
        with self.graph.gm.graph.inserting_before(before):
            node = self.graph.gm.graph.call_function(target, args, kwargs)
        return self._finish(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Lets `new` take every use of `old`, and erases `old`.

        Raises:
            ValueError: the two have different shapes or dtypes.
        """
        got, expected = new.meta.get("val"), old.meta.get("val")
        if isinstance(expected, torch.Tensor):
            if not isinstance(got, torch.Tensor):
                raise ValueError(f"{new.name} is no tensor, but {old.name} was one")
            if got.shape != expected.shape or got.dtype != expected.dtype:
                raise ValueError(
                    f"{new.name} has shape {tuple(got.shape)} {got.dtype}, "
                    f"but {old.name} had {tuple(expected.shape)} {expected.dtype}"
                )
        new.meta["stands_for"] = tuple(dict.fromkeys((*value_names(old), *new.meta.get("stands_for", ()))))
        if "sizes" in old.meta:
            new.meta.setdefault("sizes", old.meta["sizes"])
        old.replace_all_uses_with(new)
        self.erase(old)

    def erase(self, node: fx.Node) -> None:
        """Erases a node without users, and then its arguments that nothing else uses (never an input)."""
        arguments = node.all_input_nodes
        self.erased.append(node.name)
        self.created = [n for n in self.created if n is not node]
        self.graph.gm.graph.erase_node(node)
        for argument in arguments:
            if not argument._erased and not argument.users and argument.op not in ("placeholder", "output"):
                self.erase(argument)

    def put_modules(self, site: Site, modules: Sequence[nn.Module]) -> list[str]:
        """Keeps modules as `nn.Sequential` in the place of a site's, of which every call is then to be replaced.

        Returns their paths: `path.0`, `path.1`, …
        """
        self._put(site.path, nn.Sequential(*modules))
        return [f"{site.path}.{i}" for i in range(len(modules))]

    def replace_module(self, site: Site, chain: Sequence[nn.Module]) -> list[str]:
        """Replaces every call of a site by a chain of modules, kept as `nn.Sequential` at the site's path.

        Returns the paths of the chain's modules: `path.0`, `path.1`, …
        """
        paths = self.put_modules(site, chain)
        for node in site.nodes:
            value: Any = node.args[0]
            for path in paths:
                value = self.call_module(path, value, before=node)
            self.replace(node, value)
        return paths

    def _put(self, path: str, module: nn.Module) -> None:
        """Registers a module in the graph's mode, training or not."""
        set_module(self.graph.gm, path, module.train(self.graph.gm.training))

    def _finish(self, node: fx.Node) -> fx.Node:
        from lrcompile.graph.graph import infer

        node.meta["val"] = infer(self.graph, node)
        node.meta["provenance"] = str(self.rewrite)
        if node not in self.created:
            self.created.append(node)
        return node


def value_names(node: fx.Node) -> tuple[str, ...]:
    """The names that a node's value went by, the latest first: statistics of a replaced node hold for its successor."""
    return (*node.meta.get("stands_for", ()), node.name)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers `module` at a dotted path, making plain containers on the way."""
    *parents, leaf = path.split(".")
    parent = root
    for name in parents:
        child = parent._modules.get(name)
        if child is None:
            child = nn.Module().train(root.training)
            parent.add_module(name, child)
        parent = child
    parent._modules[leaf] = module


def _exists(root: nn.Module | None, path: str) -> bool:
    value: Any = root
    for part in path.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
