from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrcompile_passes import FoldLayout, RemoveIdentity
from torch import Tensor, nn

from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import Graph
from lrcompile.planning.canonicalize import canonicalize
from tests.passes import common

PASS = FoldLayout()
aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def folded(graph: Graph) -> Graph:
    return canonicalize(graph, [RemoveIdentity(), PASS], common.context())[0]


def operations(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op in ("call_module", "call_function")]


def test_golden() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x).permute(0, 2, 3, 1).transpose(1, 3).contiguous()
        y = m.layer(y.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3))
        return y.flatten(1, 2).unflatten(1, (2, 8)).transpose(1, 2).movedim(1, 2).unsqueeze(1).flatten(2)

    model, x = Function(forward).double(), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    graph = common.exported(model, x)
    for rewrite in common.rewrites(graph, PASS):
        assert rewrite.exact
        assert common.difference(common.applied(graph, PASS, rewrite), graph, x) == 0
    assert [str(rewrite) for rewrite in common.rewrites(graph, PASS)] == [
        "fold-layout(permute, transpose; cancels=False)",
        "fold-layout(permute_1, permute_2; cancels=True)",
        "fold-layout(flatten, unflatten; cancels=False)",
        "fold-layout(transpose_1, movedim; cancels=True)",
        "fold-layout(unsqueeze, flatten_1; cancels=False)",
    ]
    result = folded(graph)
    assert common.text(result) == (
        "x = placeholder x()\n"
        "relu = call_function relu.default(x)\n"
        "permute_default = call_function permute.default(relu, [0, 1, 3, 2])\n"
        "contiguous = call_function contiguous.default(permute_default)\n"
        "layer = call_module layer(contiguous)\n"
        "reshape_default_2 = call_function reshape.default(layer, [-1, 1, 64])\n"
        "output = output output((reshape_default_2,))"
    )
    other = torch.randn(5, 4, 4, 4, dtype=torch.float64)
    assert common.on_other_batch(result, model, (x,), (other,)) < 1e-10


@st.composite
def moves(draw: Any) -> Callable[[Any], Any]:
    """One operation that moves or regroups the axes of a value; sizes follow from the value."""
    kind = draw(st.sampled_from(["permute", "transpose", "movedim", "mT", "copy", "reshape", "flatten", "squeeze"]))
    seed = draw(st.integers(0, 10**6))

    def apply(x: Tensor) -> Tensor:
        choose, rank = random.Random(seed), x.dim()
        a, b = (choose.randrange(-rank, rank) for _ in range(2))
        if kind == "permute":
            return x.permute(choose.sample(range(rank), rank))
        if kind == "reshape":
            return x.reshape(x.shape[0], -1, 2) if x.numel() // x.shape[0] % 2 == 0 else x
        if kind == "flatten":
            return x.flatten(1) if rank > 1 else x
        if kind == "squeeze":
            return x.unsqueeze(a).squeeze(a)
        simple: dict[str, Callable[[], Tensor]] = {
            "transpose": lambda: x.transpose(a, b), "movedim": lambda: x.movedim(a, b),
            "mT": lambda: x.mT if rank > 1 else x, "copy": lambda: x.contiguous(),
        }  # fmt: skip
        return simple[kind]()

    return apply


@given(st.lists(moves(), min_size=2, max_size=6), st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4))
def test_chains_become_shorter_and_stay_equal(chain: list[Callable[[Any], Any]], sizes: list[int]) -> None:
    x = torch.randn(2, *sizes[1:], 2, dtype=torch.float64)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        for move in chain:
            y = move(y)
        return torch.tanh(y)

    graph = static(Function(forward), x)
    for rewrite in common.rewrites(graph, PASS):
        result = common.applied(graph, PASS, rewrite)
        assert len(operations(result)) < len(operations(graph))
        assert common.difference(result, graph, x) == 0
    assert common.difference(folded(graph), graph, x) == 0


def static(model: nn.Module, x: Tensor) -> Graph:
    """A graph of ATen operations with its sizes as export writes them, without the seconds that export takes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from lrcompile.graph.graph import propagate

    gm = make_fx(model, pre_dispatch=True)(x)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise AssertionError("the model has no parameters in use")
    graph = propagate(gm, (x,))
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            node.meta["sizes"] = tuple(str(size) for size in node.meta["val"].shape)
    return graph


def test_other_users() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = aten.permute.default(aten.relu.default(x), [0, 2, 1])
        return aten.mul.Tensor(aten.permute.default(y, [2, 0, 1]), aten.permute.default(y, [2, 0, 1]))

    x = torch.randn(4, 4, 4)
    graph = common.drawn(Function(forward), x)
    assert common.rewrites(graph, PASS) == []
    assert set(common.refusals(graph, PASS).values()) == {"permute_default before it has 2 users"}


def test_a_pair_that_cancels_goes_though_the_first_is_read_elsewhere() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = aten.transpose.int(aten.relu.default(x), 0, 1)
        return aten.mul.Tensor(aten.tanh.default(y), aten.mT.default(y))

    x = torch.randn(4, 4)
    graph = common.drawn(Function(forward), x)
    (rewrite,) = common.rewrites(graph, PASS)
    result = common.applied(graph, PASS, rewrite)
    assert operations(result) == ["relu_default", "transpose_int", "tanh_default", "mul_tensor"]
    assert common.difference(result, graph, x) == 0


def test_the_output_is_not_an_input() -> None:
    graph = common.drawn(
        Function(lambda m, x: aten.transpose.int(aten.transpose.int(x, 0, 1), 0, 1)), torch.randn(3, 4)
    )
    assert common.rewrites(graph, PASS) == []
    reason = "with transpose_int before it: the model's output would be its input"
    assert common.refusals(graph, PASS) == {"transpose_int_1": reason}


def test_reshapes_that_cancel_at_this_batch_size_only_stay() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.relu(x).reshape(-1, 2, 4).flatten(1, 2).reshape(-1, 4)[:4]

    x = torch.randn(4, 4)
    graph = common.exported(Function(forward), x)
    result = folded(graph)
    assert common.on_other_batch(result, Function(forward), (x,), (torch.randn(6, 4),)) < 1e-6


def test_what_is_read_by_its_strides_stays() -> None:
    """The first reshape copies what a transpose left in another order."""
    model = Function(lambda m, x: torch.relu(x.t()).reshape(-1).reshape(4, 3).as_strided((2, 2), (1, 1)))
    x = torch.randn(3, 4)
    graph = trace(model, (x,)).graph
    assert torch.equal(common.outputs(folded(graph), x)[0], model(x))
    assert "as_strided reads it by its strides" in common.refusals(graph, PASS).values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4).to(dtype)
    graph = common.exported(Function(lambda m, x: torch.relu(x).transpose(1, 2).permute(0, 2, 1) * 2), x)
    result = folded(graph)
    assert operations(result) == ["relu", "mul"]
    assert torch.equal(common.outputs(result, x)[0], common.outputs(graph, x)[0])
