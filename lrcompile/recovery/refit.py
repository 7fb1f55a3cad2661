"""A recovery without training: layers are fitted anew to what the original computes, one by one.

A split is fitted to the inputs that its layer has in the original. In the rewritten model it and all layers behind it
get others. So, from the first to the last, the weights of each layer are set to what maps the inputs that it really
gets best, in least squares, to the outputs that the original has there: errors do not add up as they would, and shifts
of the mean are taken out. (Layer-wise reconstruction from the compressed model's own inputs is known from pruning,
arXiv 1707.06168; this form is our reading.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.graph.graph import Graph, feature_axis, owners, rows_of, shape, storage_id, submodule
from lrcompile.graph.rewrite import set_module
from lrcompile.memory import samples_in
from lrcompile.recovery.lineage import Counterparts

RIDGE = 1e-2  # of the mean of the Gram matrix's diagonal: how strongly weights are held where they are
LIVE_BYTES = 2**31  # of values that are held at one time, over all batches


def refit(
    teacher: Graph, student: Graph, batches: Sequence[Sequence[Any]], known: Counterparts
) -> tuple[Graph, tuple[str, ...]]:
    """(a copy of the rewritten graph with fitted layers, the paths of those); batches are flat inputs.

    `known` are the values of the original that those of the rewritten graph stand for. Fitted are linear layers and
    1 × 1 convolutions, behind the first lossy rewrite, that are called once and share no weight: those that end what a
    rewrite made, and those that are as they were.
    """
    result = student.copy()
    targets = fitted_layers(result, known)
    if not targets:
        return result, ()
    larger = samples_in(batches[0]) / samples_in(
        [node.meta["val"] for node in teacher.nodes if node.op == "placeholder"]
    )
    live = larger * (_live_bytes(teacher) + _live_bytes(result))
    batches = batches[: max(1, int(LIVE_BYTES // (1 + live)))]
    kept = frozenset(original.name for original in targets.values())
    originals = [_Run(teacher.gm, batch, kept) for batch in batches]
    copies = [_Run(result.gm, batch) for batch in batches]
    for node in result.nodes:
        if node in targets:
            expected = [run.take(targets[node].name) for run in originals]
            path, inputs = str(node.target), [run.value(node.args[0]) for run in copies]
            set_module(result.gm, path, fitted(submodule(result.gm, path), inputs, expected))
        for run in copies:
            run.step()
    return result, tuple(str(node.target) for node in targets)


def fitted_layers(student: Graph, known: Counterparts) -> dict[fx.Node, fx.Node]:
    """The layers of the rewritten graph that can be fitted, each with the value of the original that it stands for."""
    owner_map = owners(student)
    single = {site.nodes[0]: site for site in student.sites().values() if len(site.nodes) == 1}
    found = {}
    changed = False
    for node in student.nodes:
        changed |= "provenance" in node.meta
        site = single.get(node)
        if site is None or not changed or not _is_matrix(site.module):
            continue
        if any(owner_map[storage_id(parameter)] > {site.path} for parameter in site.module.parameters()):
            continue
        original = known.get(node.name)
        if original is not None and shape(original) == shape(node):
            found[node] = original
    return found


def _is_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if (
        not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        or module.groups > 1
        or isinstance(module.padding, str)
    ):
        return False
    taps = (*module.kernel_size, *module.stride)
    return all(size == 1 for size in taps) and not any(module.padding)


def fitted(old: Any, inputs: Sequence[Tensor], expected: Sequence[Tensor], ridge: float = RIDGE) -> Any:
    """A layer like `old`, linear or a 1 × 1 convolution, with the weights that map inputs to what is expected best.

    `ridge`, over the mean of the diagonal of the inputs' Gram matrix, holds the weights where they are.
    """
    layer = copy.deepcopy(old)
    axis = feature_axis(old)
    gram, cross = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, y in zip(inputs, expected, strict=True):
        rows, wanted = (rows_of(value, axis) for value in (x, y))
        if old.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        gram, cross = gram + (rows.T @ rows).double(), cross + (wanted.T @ rows).double()
    weight = old.weight.detach().double().flatten(1)
    if old.bias is not None:
        weight = torch.cat([weight, old.bias.detach().double().unsqueeze(1)], 1)
    hold = ridge * gram.diagonal().mean().clamp_min(1e-300) * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram + hold, (cross + weight @ hold).T).T
    if not torch.isfinite(solved).all():
        return layer
    columns = old.weight[0].numel()
    with torch.no_grad():
        layer.weight.copy_(solved[:, :columns].reshape(old.weight.shape))
        if old.bias is not None:
            layer.bias.copy_(solved[:, columns])
    return layer


class _Run:
    """One batch on its way through a graph, node by node; values are let go after their last use, if not `kept`."""

    def __init__(self, gm: fx.GraphModule, batch: Sequence[Any], kept: frozenset[str] = frozenset()) -> None:
        self.interpreter = fx.Interpreter(gm)
        self.interpreter.args_iter = iter(batch)
        self.order = iter(gm.graph.nodes)
        self.kept = kept
        self.held: dict[str, Tensor] = {}

    def step(self) -> None:
        """Computes the next node."""
        node = next(self.order)
        if node.op == "output":
            return
        env = self.interpreter.env
        with torch.no_grad():
            env[node] = self.interpreter.run_node(node)
        if node.name in self.kept:
            self.held[node.name] = env[node]
        for used in self.interpreter.user_to_last_uses.get(node, ()):
            del env[used]

    def value(self, node: Any) -> Tensor:
        """The value of a node that was computed and is still used."""
        value: Tensor = self.interpreter.env[node]
        return value

    def take(self, name: str) -> Tensor:
        """The value of a kept node, computed now if need be; it is kept no longer."""
        while name not in self.held:
            self.step()
        return self.held.pop(name)


def _live_bytes(graph: Graph) -> int:
    """The bytes of the values that are alive at one time on the example inputs, at most."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last |= dict.fromkeys(node.all_input_nodes, node)
    ends: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        ends.setdefault(user, []).append(node)
    most = live = 0
    for node in graph.nodes:
        live += _bytes(node)
        most = max(most, live)
        live -= sum(map(_bytes, ends.get(node, ())))
    return most


def _bytes(node: fx.Node) -> int:
    leaves = pytree.tree_leaves(node.meta.get("val")) if node.op != "output" else []
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
