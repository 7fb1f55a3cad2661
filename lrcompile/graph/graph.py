"""Reading a lifted graph: sites, shapes, parameters and who shares them. Nothing here edits."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lrcompile.graph.rewrite import JSON, Refusal, Rewrite

aten = torch.ops.aten
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Their weights have inputs first."""
ALL_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_CONVS)

_BY_STRIDES = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype)


@dataclass(frozen=True, eq=False)
class Site:
    """A module of the graph and every node that calls it. Its `path` is its name in tables, plans and globs."""

    path: str
    module: nn.Module
    nodes: tuple[fx.Node, ...]

    @property
    def input(self) -> fx.Node:
        """The first argument of the first call."""
        return self.nodes[0].args[0]  # type: ignore[return-value]

    def rewrite(self, *, error: float | Callable[[], float] = 0.0, exact: bool = False, **params: JSON) -> Rewrite:
        """A rewrite of this site alone; the compiler fills in the name of the proposing pass."""
        return Rewrite("", (self.path,), params, error, exact)

    def refuse(self, reason: str) -> Refusal:
        """Says why this site is left alone; the reason is printed in the decision table."""
        return Refusal("", self.path, reason)


@dataclass(frozen=True, eq=False)
class Graph:
    """A lifted fx graph: parametrised operations are `call_module` nodes, the rest ATen, shapes in `meta["val"]`."""

    gm: fx.GraphModule
    fake_mode: FakeTensorMode

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in execution order."""
        return iter(self.gm.graph.nodes)

    def modules_of(self, *types: type[nn.Module]) -> Iterator[Site]:
        """Sites whose module is an instance of one of `types`, in execution order."""
        for site in self.sites().values():
            if isinstance(site.module, types):
                yield site

    def sites(self) -> dict[str, Site]:
        """Every called module by path, in execution order."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.gm.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(node.target, []).append(node)
        return {path: Site(path, submodule(self.gm, path), tuple(nodes)) for path, nodes in calls.items()}

    def site(self, path: str) -> Site:
        """The site of that path.

        Raises:
            KeyError: no node calls a module of that path.
        """
        nodes = tuple(n for n in self.gm.graph.nodes if n.op == "call_module" and n.target == path)
        if not nodes:
            raise KeyError(path)
        return Site(path, submodule(self.gm, path), nodes)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return submodule(self.gm, node.target) if node.op == "call_module" else None

    def copy(self, own: bool = False) -> Graph:
        """A graph that can be edited on its own; modules and parameters stay shared, unless it is to `own` copies."""
        root = copy.deepcopy(share(self.gm)) if own else share(self.gm)
        env: dict[fx.Node, fx.Node] = {}
        new = fx.Graph()
        output = new.graph_copy(self.gm.graph, env)
        new_output = new.output(output)
        old_output = next(n for n in reversed(self.gm.graph.nodes) if n.op == "output")
        new_output.meta = dict(old_output.meta)
        new.set_codegen(self.gm.graph._codegen)
        for old, copied in env.items():
            copied.meta = dict(old.meta)
        return Graph(rebuild(root, new), self.fake_mode)


def share(module: nn.Module) -> nn.Module:
    """A module tree with the same leaves: containers are new, so that replacing a child leaves the original alone."""
    result = nn.Module()
    held = vars(result)
    held |= {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    held["_parameters"], held["_buffers"] = dict(module._parameters), dict(module._buffers)
    held["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    held["_modules"] = {
        name: share(child) if child is not None and is_container(child) else child
        for name, child in module._modules.items()
    }
    result.training = module.training
    return result


def rebuild(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule of `graph` over `root` that keeps what fx drops: state-dict keys that the graph does not name.

    A weight that the graph uses under another name keeps its old one too, as the same Parameter; buffers and
    constants that `root` does not save are not saved.
    """
    result = fx.GraphModule(root, graph)
    for holder in result.modules():
        if is_container(holder):  # which fx has made anew
            holder.training = root.training
    saved = set()
    missing: list[tuple[str, torch.Tensor]] = []
    for path, holder in root.named_modules(remove_duplicate=False):
        for name, tensor in {**holder._parameters, **holder._buffers}.items():
            if tensor is None or name in holder._non_persistent_buffers_set:
                continue
            full = f"{path}.{name}" if path else name
            saved.add(full)
            if not has_attribute(result, full):
                missing.append((full, tensor))
    for path, holder in result.named_modules(remove_duplicate=False):
        for name in holder._buffers:
            if (f"{path}.{name}" if path else name) not in saved:
                holder._non_persistent_buffers_set.add(name)
    used = used_storages(result) if missing else frozenset()
    for full, tensor in missing:
        if storage_id(tensor) in used:
            set_tensor(result, full, tensor)
    return result


def prune(gm: fx.GraphModule) -> None:
    """Drops the modules, parameters and buffers that no node uses any more, other names of erased weights included."""
    called = {node.target for node in gm.graph.nodes if node.op == "call_module"}
    called |= {
        node.target for node in gm.graph.nodes
        if node.op == "get_attr" and isinstance(attribute(gm, node.target), nn.Module)
    }  # fmt: skip
    _prune(gm, "", called, used_storages(gm))


def _prune(holder: nn.Module, path: str, called: set[Any], used: frozenset[int]) -> None:
    for tensors in (holder._parameters, holder._buffers):
        for name in [n for n, tensor in tensors.items() if tensor is not None and storage_id(tensor) not in used]:
            del tensors[name]
            holder._non_persistent_buffers_set.discard(name)
    for name, child in list(holder._modules.items()):
        full = f"{path}.{name}" if path else name
        if full in called or child is None:
            continue
        if not is_container(child):  # another graph may call it: take it apart in a new place
            child = holder._modules[name] = share(child)
        _prune(child, full, called, used)
        if not (child._modules or child._parameters or child._buffers):
            del holder._modules[name]


def used_storages(gm: fx.GraphModule) -> frozenset[int]:
    """`storage_id` of every tensor that a node uses, by itself or through the module that it calls."""
    found: set[int] = set()
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        value = attribute(gm, node.target)
        if isinstance(value, nn.Module):
            found |= {storage_id(t) for t in tensors_of(value)}
        elif isinstance(value, torch.Tensor):
            found.add(storage_id(value))
    return frozenset(found)


def is_container(module: nn.Module) -> bool:
    """Whether the module only holds others: it has no forward of its own that a graph could call."""
    return type(module) in (nn.Module, nn.Sequential, nn.ModuleList)


def shape(node: fx.Node) -> tuple[int, ...]:
    """The concrete output shape of a node with one tensor output.

    Raises:
        ValueError: the node has no single tensor output.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"node {node.name} has no single tensor output")
    return tuple(int(size) for size in value.shape)


def dtype(node: fx.Node) -> torch.dtype | None:
    """The output dtype of a node, or None if it is not a tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def packet_of(node: fx.Node) -> Any:
    """The ATen operator that a node calls, whatever its overload, or None."""
    return getattr(node.target, "overloadpacket", None)


def owners(graph: Graph) -> Mapping[int, frozenset[str]]:
    """For each tensor storage that a node uses: the module paths and `get_attr` targets that use it.

    A parameter with more than one owner is tied; a rewrite of one owner would break the tie.
    """
    found: dict[int, set[str]] = defaultdict(set)
    for node in graph.gm.graph.nodes:
        if node.op == "call_module":
            for tensor in tensors_of(submodule(graph.gm, node.target)):
                found[storage_id(tensor)].add(node.target)
        elif node.op == "get_attr":
            value = attribute(graph.gm, node.target)
            if isinstance(value, torch.Tensor):
                found[storage_id(value)].add(node.target)
    return {key: frozenset(names) for key, names in found.items()}


def tied_with(graph: Graph, site: Site, owner_map: Mapping[int, frozenset[str]] | None = None) -> str | None:
    """Another owner of one of the site's parameters, or None."""
    owner_map = owners(graph) if owner_map is None else owner_map
    for tensor in site.module.parameters():
        others = owner_map.get(storage_id(tensor), frozenset()) - {site.path}
        if others:
            return min(others)
    return None


def feature_axis(module: Any) -> int:
    """The axis, from the end, of what a linear layer or convolution reads and gives that holds its features."""
    return -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)


def rows_of(value: torch.Tensor, axis: int) -> torch.Tensor:
    """A value's features, which lie along an axis, as rows in single precision; a vector is one row."""
    return value.movedim(axis, -1).unsqueeze(0).flatten(0, -2).float()


def read_by_strides(value: fx.Node) -> Iterator[fx.Node]:
    """What depends on how a value lies in memory, directly or through views and parts of it."""
    for user in value.users:
        if user.target in _BY_STRIDES:
            yield user
        elif _is_view(user):
            yield from read_by_strides(user)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's output may share the memory of what it reads, as its schema says."""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return node.target is operator.getitem or any(value.alias_info is not None for value in returns)


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor: equal for a parameter and its transposed view, not for parts of one."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr()


def submodule(root: nn.Module, target: Any) -> nn.Module:
    """The module at a dotted path; five times faster than `get_submodule`, which matters in trials by the thousand.

    Raises:
        KeyError: there is none.
    """
    module: Any = root
    for part in target.split("."):
        module = module._modules[part]
    return module


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module and of all inside it; what is shared may come twice."""
    held = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    for child in module._modules.values():
        if child is not None:
            held += tensors_of(child)
    return held


def attribute(root: nn.Module, target: str) -> Any:
    """The value at a dotted attribute path."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def has_attribute(root: nn.Module, target: str) -> bool:
    """Whether there is a value at a dotted attribute path."""
    try:
        attribute(root, target)
    except AttributeError:
        return False
    return True


def set_tensor(root: nn.Module, target: str, tensor: torch.Tensor) -> None:
    """Registers a parameter or a saved buffer at a dotted path, making plain containers on the way."""
    *parents, leaf = target.split(".")
    holder = root
    for name in parents:
        if holder._modules.get(name) is None:
            holder.add_module(name, nn.Module())
        holder = holder.get_submodule(name)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    else:
        holder.register_buffer(leaf, tensor)


def infer(graph: Graph, node: fx.Node) -> Any:
    """The fake output value of a node, from the values of its arguments.

    Raises:
        Exception: whatever the operation raises for impossible shapes.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with graph.fake_mode, torch.no_grad():
        if node.op == "call_module":
            return submodule(graph.gm, node.target)(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
    raise ValueError(f"cannot infer the shape of a {node.op} node")


def propagate(gm: fx.GraphModule, flat_args: tuple[Any, ...]) -> Graph:
    """Fills `meta["val"]` of every node with a fake tensor of the concrete shape that `flat_args` lead to.

    What export knew of the shape, with symbols for open sizes, is kept as text in `meta["sizes"]`.
    """
    fresh = not any("sizes" in node.meta for node in gm.graph.nodes)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if fresh and isinstance(value, torch.Tensor):
            node.meta["sizes"] = tuple(str(size) for size in value.shape)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in flat_args]
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fake_args)
    return Graph(gm, mode)


def parameter_count(gm: nn.Module) -> int:
    """Number of parameter elements, each storage counted once."""
    return sum(t.numel() for t in unique_tensors(gm))


def weight_bytes(gm: nn.Module) -> int:
    """Bytes of the parameters, each storage counted once."""
    return sum(t.numel() * t.element_size() for t in unique_tensors(gm))


def unique_tensors(gm: nn.Module) -> list[torch.Tensor]:
    """The module's parameters, one of each storage."""
    seen: dict[int, torch.Tensor] = {}
    for tensor in gm.parameters():
        seen.setdefault(storage_id(tensor), tensor)
    return list(seen.values())


def fingerprint(gm: fx.GraphModule) -> str:
    """SHA-256 of the graph's structure, the options of its layers, and every parameter and buffer that is saved.

    What a model computes when it is made (buffers that are not saved, constants) counts by its shape and type alone:
    its last bits depend on the machine.
    """
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        digest.update(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}\n".encode())
        if node.op == "call_module":
            digest.update(f"{submodule(gm, node.target)}\n".encode())
        elif node.op == "get_attr" and isinstance(value := attribute(gm, node.target), torch.Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
    for name, tensor in sorted(gm.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
