"""What the tests of the passes share: small graphs, golden text, and one application that checks the whole contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from lrcompile_passes.layers import CONVS, TRANSPOSED_CONVS
from torch import Tensor, fx, nn

from lrcompile.devices.profile import load_device
from lrcompile.frontend.export import batch_axes, export
from lrcompile.frontend.trace import run, trace
from lrcompile.graph.graph import Graph, fingerprint, propagate
from lrcompile.graph.rewrite import Refusal, Rewrite
from lrcompile.passes import Context, Pass, apply, proposals
from lrcompile.planning.calibration import collect

V100 = load_device("v100")


class Tied(nn.Module):
    """Two layers with an activation between them, that share one weight."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def drawn_conv(draw: Any, axes: int, into: int, out: int, groups: int) -> Any:
    """A convolution, transposed or not, with any options that hypothesis draws."""
    options: dict[str, Any] = {
        "stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1)), "dilation": draw(st.integers(1, 2)),
        "groups": groups, "bias": draw(st.booleans()),
    }  # fmt: skip
    kernel = draw(st.integers(1, 3))
    if draw(st.booleans()):
        options["output_padding"] = draw(st.integers(0, options["stride"] - 1))
        return TRANSPOSED_CONVS[axes - 1](into, out, kernel, **options)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if draw(st.booleans()):
        options |= {"padding": "same", "stride": 1}
    return CONVS[axes - 1](into, out, kernel, padding_mode=mode, **options)


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not m._modules


def exported(model: nn.Module, *args: Any) -> Graph:
    """The lifted graph of a model, as the compiler sees it; with a dynamic batch."""
    result = trace(model, args)
    assert result.dynamic_batch, result.notes
    return result.graph


def drawn(model: nn.Module, *args: Any) -> Graph:
    """A graph of the same form in a few milliseconds: modules are calls, other operations torch functions."""
    return propagate(fx.GraphModule(model, _Leaves().trace(model.eval())), args)


def context(graph: Graph | None = None, *batches: Sequence[Any]) -> Context:
    """A V100 in fp32, with statistics of the batches where there are any."""
    if graph is None:
        return Context(V100)
    statistics = collect(graph, batches)
    return Context(V100, grams=statistics.grams, token_counts=statistics.token_counts)


def rewrites(graph: Graph, transform: Pass, ctx: Context | None = None) -> list[Rewrite]:
    return [p for p in proposals(graph, transform, ctx or context()) if isinstance(p, Rewrite)]


def refusals(graph: Graph, transform: Pass, ctx: Context | None = None) -> dict[str, str]:
    return {p.site: p.reason for p in proposals(graph, transform, ctx or context()) if isinstance(p, Refusal)}


def applied(graph: Graph, transform: Pass, rewrite: Rewrite, ctx: Context | None = None) -> Graph:
    """The rewritten copy.

    Checks that the original is untouched, that a trial on fake tensors builds the same structure, and that the
    rewrite read back from JSON gives the same weights.
    """
    ctx = ctx or context()
    before = fingerprint(graph.gm)
    result, again, trial = graph.copy(), graph.copy(), graph.copy()
    apply(result, transform, rewrite, ctx)
    replayed = Rewrite.from_json(json.loads(json.dumps(rewrite.to_json())))
    assert replayed == rewrite
    apply(again, transform, replayed, Context(ctx.device, ctx.dtype, ctx.grams, ctx.token_counts))
    apply(trial, transform, rewrite, ctx.on_trial(graph.fake_mode))
    result.gm.graph.lint()
    assert fingerprint(graph.gm) == before
    assert text(trial) == text(again) == text(result)
    assert layers(trial) == layers(again) == layers(result)
    assert sizes(trial) == sizes(again) == sizes(result)
    state, replay = result.gm.state_dict(), again.gm.state_dict()
    assert list(state) == list(replay)
    assert all(torch.equal(state[key], replay[key]) for key in state)
    return result


def text(graph: Graph) -> str:
    """One line a node: name = operation target(arguments)."""
    lines = []
    for node in graph.nodes:
        target = getattr(node.target, "__name__", node.target) if node.op == "call_function" else node.target
        arguments = ", ".join(map(str, [*node.args, *(f"{k}={v}" for k, v in node.kwargs.items())]))
        lines.append(f"{node.name} = {node.op} {target}({arguments})")
    return "\n".join(lines)


def layers(graph: Graph) -> dict[str, str]:
    """The called modules with their options."""
    return {path: repr(site.module) for path, site in graph.sites().items()}


def sizes(graph: Graph) -> list[tuple[str, str]]:
    return [(node.name, str(getattr(node.meta.get("val"), "shape", ""))) for node in graph.nodes]


def outputs(graph: Graph, *args: Any) -> tuple[Any, ...]:
    return run(graph.gm, args)


def difference(got: Graph, expected: Graph, *args: Any) -> float:
    """The largest relative difference of the outputs."""
    pairs = zip(outputs(got, *args), outputs(expected, *args), strict=True)
    return max(relative(a, b) for a, b in pairs)


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def on_other_batch(graph: Graph, model: nn.Module, args: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """Exports a rewritten graph again and compares it with the model on inputs of another batch size."""
    program, kept, _ = export(graph.gm, args, {}, batch_axes(args))
    assert all(kept)
    with torch.no_grad():
        return relative(program.module()(*other), model(*other))
