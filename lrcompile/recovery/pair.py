"""The original and the rewritten model side by side, and how far the one is from the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.graph.graph import Graph, attribute
from lrcompile.graph.verify import filled
from lrcompile.memory import samples_in
from lrcompile.recovery.attention import divergence, log_weights_of, same_calls
from lrcompile.recovery.lineage import Counterparts
from lrcompile.recovery.settings import Outputs

Scales = tuple[list[Tensor], list[Tensor]]

_LAST = torch.finfo(torch.bfloat16).max
UNRELATED = 1.0  # relative squared difference from which two values are taken for values of different things


Values = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Outputs, values inside, and the logarithms of attention weights."""


@dataclass(frozen=True, eq=False)
class Differences:
    """Mean differences of each sample, [samples] each, and the outputs that were got."""

    outputs: Tensor
    inside: Tensor
    attention: Tensor
    got: list[Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two graphs that take flat inputs and give `Values`, of the same things in both.

    `trained` is the rewritten graph whose weights `student` uses. `inside` names the values, as the original does.
    """

    teacher: fx.GraphModule
    student: fx.GraphModule
    trained: Graph
    inside: tuple[str, ...]

    @property
    def attends(self) -> bool:
        """Whether weights of attention are compared."""
        values: Any = self.teacher.graph.output_node().args[0]
        return bool(values[2])

    @property
    def device(self) -> torch.device:
        """Where the weights that are trained are."""
        return next((p.device for p in self.student.parameters()), torch.device("cpu"))

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Pair]:
        """Inside, the pair on a device: a copy of the original, and the very weights that are trained."""
        if device.type == "cpu":
            yield self
            return
        there = Pair(
            _moved(copy.deepcopy(self.teacher), device), _moved(self.student, device), self.trained, self.inside
        )
        try:
            yield there
        finally:
            _moved(self.student, torch.device("cpu"))

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Inside, the weights that are trained are on the CPU."""
        if self.device.type == "cpu":
            yield
            return
        device = self.device
        _moved(self.student, torch.device("cpu"))
        try:
            yield
        finally:
            _moved(self.student, device)

    def expected(self, batch: Sequence[Any]) -> Values:
        """What the original makes of flat inputs."""
        with torch.no_grad():
            return self.teacher(*batch)  # type: ignore[no-any-return]

    def scales(self, batches: Iterable[Sequence[Any]]) -> Scales:
        """The mean squares of (outputs, values inside) that the original makes of parts of one batch of flat inputs."""
        sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        samples = 0
        for batch in batches:
            count = samples_in(batch)
            samples += count
            for held, values in zip(sums, self.expected(batch)[:2], strict=True):
                squares = [count * _mean_square(y) if y.is_floating_point() else y.new_ones(()) for y in values]
                held[:] = [a + b for a, b in zip(held, squares, strict=True)] if held else squares
        return [total / samples for total in sums[0]], [total / samples for total in sums[1]]

    def differences(
        self,
        batch: Sequence[Any],
        expected: Values,
        outputs: Outputs,
        scales: Scales | None = None,
        within: bool = True,
    ) -> Differences:
        """How far the rewritten model is from what is expected; of outputs alone if not `within` too.

        `scales` are those of the batch that this one is a part of.
        """
        values: Values = self.student(*batch)
        if not within:
            expected, values = (expected[0], [], []), (values[0], [], [])
            scales = scales and (scales[0], [])
        got, inside, attention = values
        samples = samples_in(batch)
        known: tuple[Sequence[Tensor | None], ...] = scales or ([None] * len(got), [None] * len(inside))
        of_outputs = [
            difference(y, z, samples, outputs, scale)
            for y, z, scale in zip(expected[0], got, known[0], strict=True) if y.is_floating_point()
        ]  # fmt: skip
        of_inside = [
            difference(y, z, samples, "mse", scale)
            for y, z, scale in zip(expected[1], inside, known[1], strict=True)
        ]  # fmt: skip
        of_attention = [divergence(y, z, samples) for y, z in zip(expected[2], attention, strict=True)]
        nothing = got[0].new_zeros(samples, dtype=torch.float32)
        return Differences(_mean(of_outputs, nothing), _mean(of_inside, nothing), _mean(of_attention, nothing), got)


def pair(
    teacher: Graph, student: Graph, probe: Sequence[Any], substitutes: Counterparts, attention: bool = False
) -> Pair:
    """The pair of an original and a rewritten graph; `student` is left as it is, its copy is trained.

    The values inside that are compared are those of `substitutes`, by their names in `student`, that differ by less
    than themselves on `probe`, flat inputs. With `attention` the weights of the attention calls that both graphs have
    by one name are compared too.
    """
    trained = independent(student)
    named = [(substitutes[node.name], node) for node in trained.nodes if node.name in substitutes]
    found = [(original, node) for original, node in named if _comparable(original, node)]
    with torch.no_grad():
        given = _observed(teacher.gm, [t for t, _ in found])(*probe)[1]
        got = _observed(trained.gm, [s for _, s in found])(*probe)[1]
    kept = [
        nodes for nodes, y, z in zip(found, given, got, strict=True)
        if float(difference(y, z, 1, "mse")) < UNRELATED
    ]  # fmt: skip
    calls = same_calls(teacher, trained) if attention else []
    return Pair(
        _observed(teacher.gm, [t for t, _ in kept], [call for call, _ in calls]),
        _observed(trained.gm, [s for _, s in kept], [call for _, call in calls]),
        trained,
        tuple(t.name for t, _ in kept),
    )


def independent(graph: Graph) -> Graph:
    """A copy whose weights are its own, trainable ones; those that are shared inside stay shared."""
    result = graph.copy(own=True)
    for parameter in result.gm.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return result


def difference(expected: Tensor, got: Tensor, samples: int, form: Outputs, scale: Tensor | None = None) -> Tensor:
    """How far values are from those expected, a figure for each sample, [samples].

    "mse": squared difference over `scale`, the mean square of what is expected; "kl": divergence of the softmax over
    the last axis, in nats; both without what a mask put into both. Where the first axis holds no whole number of
    values a sample, every sample gets the mean.
    """
    y, z = expected.float(), got.float()
    if form == "kl":
        y, z, scale = y.log_softmax(-1), z.log_softmax(-1), torch.tensor(1.0)
        y, z = _without(y, z, y.isneginf() & z.isneginf())
        each = nn.functional.kl_div(z, y, log_target=True, reduction="none").sum(-1)
    else:
        scale = _mean_square(expected) if scale is None else scale
        y, z = _without(y, z, filled(expected, got))
        each = (z - y).square()
    if not each.dim() or each.shape[0] % samples:
        return (each.mean() / scale).expand(samples)
    return each.reshape(samples, -1).mean(1) / scale


def _moved(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph with its weights, and with what it makes itself, on a device; its parameters stay the same objects."""
    for node in gm.graph.nodes:
        swap = lambda value: device if isinstance(value, torch.device) else value  # noqa: E731
        node.args, node.kwargs = fx.node.map_aggregate(node.args, swap), fx.node.map_aggregate(node.kwargs, swap)
    gm.recompile()
    return gm.to(device)


def _mean_square(y: Tensor) -> Tensor:
    """Of what no mask put there."""
    return y.float().masked_fill(filled(y, y), 0.0).square().mean().clamp_min(1e-12)


def _without(y: Tensor, z: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    return y.masked_fill(where, 0.0), z.masked_fill(where, 0.0)


def _comparable(original: fx.Node, node: fx.Node) -> bool:
    given, got = original.meta.get("val"), node.meta.get("val")
    if not (isinstance(given, Tensor) and isinstance(got, Tensor)):
        return False
    return given.shape == got.shape and given.is_floating_point() and got.is_floating_point() and given.dim() > 0


def _observed(gm: fx.GraphModule, nodes: Iterable[fx.Node], calls: Iterable[fx.Node] = ()) -> fx.GraphModule:
    """A graph over the same weights that takes flat inputs and gives `Values`, in bfloat16 too."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    outputs = pytree.tree_leaves(new.graph_copy(gm.graph, env))
    for node in list(new.nodes):
        node.args, node.kwargs = (fx.node.map_aggregate(given, _in_reach) for given in (node.args, node.kwargs))
        if node.op == "get_attr" and _is_past_reach(attribute(gm, node.target)):
            with new.inserting_after(node):
                inside = new.call_function(torch.ops.aten.clamp.default, (node, -_LAST, _LAST))
            node.replace_all_uses_with(inside, delete_user_cb=lambda user, inside=inside: user is not inside)
    weights = [log_weights_of(new, call, env) for call in calls]
    tensors = [y for y in outputs if isinstance(y, fx.Node) and isinstance(y.meta.get("val"), Tensor)]
    new.output((tensors, [env[node] for node in nodes], weights))
    return fx.GraphModule(gm, new)


def _in_reach(value: Any) -> Any:
    """A number that single precision holds and bfloat16 does not, such as the lowest, as the last that it does."""
    is_past = isinstance(value, float) and _LAST < abs(value) <= torch.finfo(torch.float32).max
    return math.copysign(_LAST, value) if is_past else value


def _is_past_reach(value: Any) -> bool:
    """Whether that is a constant tensor of single precision with such numbers, and without infinities."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.dtype != torch.float32:
        return False
    return bool(value.numel()) and _LAST < float(value.abs().max()) < math.inf


def _mean(values: Sequence[Tensor], nothing: Tensor) -> Tensor:
    return torch.stack(list(values)).mean(0) if values else nothing
