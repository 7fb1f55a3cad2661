from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrcompile_passes import FoldAffine
from torch import Tensor, nn

from lrcompile.errors import PassError
from lrcompile.graph.graph import Graph, fingerprint
from lrcompile.graph.rewrite import Refusal
from lrcompile.passes import apply
from lrcompile.planning.canonicalize import canonicalize
from tests.passes import common

PASS = FoldAffine()
aten = torch.ops.aten


class Around(nn.Module):
    """A layer with operations before and after it; `c` is a stored constant that they may use."""

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[[Any, Any], Any],
        c: Tensor | None = None,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.use = layer, forward
        if trained:
            self.c = nn.Parameter(c)
        else:
            self.register_buffer("c", c)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def folded(graph: Graph) -> tuple[Graph, list[str], dict[str, str]]:
    """The canonical graph, what was applied, and what was refused."""
    result, applied, refused = canonicalize(graph, [PASS], common.context())
    return result, [str(rewrite) for rewrite in applied], {r.site: r.reason for r in refused}


def operations(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op in ("call_module", "call_function")]


class Net(nn.Module):
    """Input range, layer scale behind a convolution, and the 1/√d of attention behind a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3, stride=2, groups=1, bias=False)
        self.gamma = nn.Parameter(torch.randn(4))
        self.query = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = 1 - self.conv((x - self.mean) / 0.25) * self.gamma.view(1, -1, 1, 1)
        q = self.query(torch.relu(y).permute(0, 2, 3, 1).flatten(1, 2))
        return q.unflatten(2, (2, 3)).transpose(1, 2) * 3**-0.5


def test_golden() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    graph = common.exported(model, x)
    assert [str(rewrite) for rewrite in common.rewrites(graph, PASS)] == [
        "fold-affine(conv, mul; layer=before, operation=aten.mul.Tensor)",
        "fold-affine(conv, rsub; layer=before, operation=aten.rsub.Scalar)",
        "fold-affine(query, mul_1; layer=before, operation=aten.mul.Tensor)",
        "fold-affine(conv, div; layer=after, operation=aten.div.Tensor)",
        "fold-affine(conv, sub; layer=after, operation=aten.sub.Tensor)",
    ]
    result, _, refused = folded(graph)
    assert refused == {}
    assert common.text(result) == (
        "x = placeholder x()\n"
        "conv_2 = call_module conv(x)\n"
        "relu = call_function relu.default(conv_2)\n"
        "permute = call_function permute.default(relu, [0, 2, 3, 1])\n"
        "flatten = call_function flatten.using_ints(permute, 1, 2)\n"
        "query = call_module query(flatten)\n"
        "unflatten = call_function unflatten.int(query, 2, [2, 3])\n"
        "transpose = call_function transpose.int(unflatten, 1, 2)\n"
        "output = output output((transpose,))"
    )
    assert sorted(result.gm.state_dict()) == ["conv.bias", "conv.weight", "query.bias", "query.weight"]
    other = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    assert common.on_other_batch(result, model, (x,), (other,)) < 1e-10


@pytest.mark.parametrize("at", [0, 2, 3])
def test_one_rewrite_keeps_the_contract(at: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    graph = common.exported(Net().double(), x)
    rewrite = common.rewrites(graph, PASS)[at]
    assert rewrite.exact
    result = common.applied(graph, PASS, rewrite)
    assert len(operations(result)) == len(operations(graph)) - (2 if at == 0 else 1)  # the view of γ goes too
    assert common.difference(result, graph, x) < 1e-10


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "mul": lambda y, c: aten.mul.Tensor(y, c),
    "mul reversed": lambda y, c: aten.mul.Tensor(c, y) if not isinstance(c, float) else aten.mul.Tensor(y, c),
    "div": lambda y, c: aten.div.Tensor(y, c),
    "add": lambda y, c: aten.add.Tensor(y, c),
    "add alpha": lambda y, c: aten.add.Tensor(y, c, alpha=3),
    "add reversed": lambda y, c: aten.add.Tensor(c, y, alpha=-2) if not isinstance(c, float) else y,
    "sub": lambda y, c: aten.sub.Tensor(y, c, alpha=0.5),
    "sub reversed": lambda y, c: aten.sub.Tensor(c, y) if not isinstance(c, float) else aten.neg.default(y),
    "rsub": lambda y, c: aten.rsub.Tensor(y, c, alpha=2) if not isinstance(c, float) else aten.rsub.Scalar(y, c),
    "neg": lambda y, c: aten.neg.default(y),
}


@st.composite
def layers(draw: Any) -> tuple[Any, int, int, list[int]]:
    """(layer, features before, features after, input size)."""
    if draw(st.booleans()):
        into, out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        size = [2, *draw(st.lists(st.integers(1, 3), max_size=2)), into]
        return nn.Linear(into, out, draw(st.booleans())), into, out, size
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    into, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return common.drawn_conv(draw, axes, into, out, groups), into, out, [2, into, *[7] * axes]


@given(layers(), st.sampled_from(sorted(STEPS)), st.sampled_from(["number", "one", "features"]), st.booleans())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_exact_for_all_options(drawn: tuple[Any, int, int, list[int]], name: str, kind: str, first: bool) -> None:
    layer, into, out, size = drawn
    torch.manual_seed(0)
    shape = [1] if kind != "features" else [into if first else out]
    if not isinstance(layer, nn.Linear):
        shape += [1] * (len(size) - 2)
    step, number = STEPS[name], kind == "number"

    def forward(m: Any, x: Any) -> Any:
        c = 0.7 if number else m.c
        return m.layer(step(x, c)) if first else step(m.layer(x), c)

    x = torch.randn(size, dtype=torch.float64)
    graph = common.drawn(Around(layer.double(), forward, torch.rand(shape).double() + 0.5), x)
    steps = len(operations(graph)) - 1
    found, refused = common.rewrites(graph, PASS), common.refusals(graph, PASS)
    assert len(found) + len(refused) == steps
    for reason in refused.values():
        assert reason.endswith(("the zeros that it pads", "spreads the shift unevenly"))
        assert first
    for rewrite in found:
        result = common.applied(graph, PASS, rewrite)
        assert operations(result) in (["layer"], ["layer_1"])
        assert common.difference(result, graph, x) < 1e-10


def test_single_precision() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 9, 9)
    graph = common.exported(Net(), x)
    assert common.difference(folded(graph)[0], graph, x) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6).to(dtype)
    graph = common.exported(
        Around(nn.Linear(6, 6), lambda m, x: m.layer(x) * m.c + 0.3, torch.tensor([2, 4, 0.5, 1, -1, 8])).to(dtype), x
    )
    result, applied, _ = folded(graph)
    assert len(applied) == 2
    assert common.outputs(result, x)[0].dtype == dtype
    assert common.difference(result, graph, x) < limit


def test_layer_called_twice() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    layer = nn.Linear(4, 4)
    graph = common.exported(Around(layer, lambda m, x: m.layer(m.layer(x) * m.c) * m.c, torch.randn(4)).double(), x)
    (rewrite,) = common.rewrites(graph, PASS)
    assert rewrite.site == ("layer", "mul", "mul_1")
    result = common.applied(graph, PASS, rewrite)
    assert operations(result) == ["layer", "layer_1"]
    assert common.difference(result, graph, x) < 1e-10
    twice = common.exported(Around(layer, lambda m, x: m.layer(x * 2) - m.layer(torch.relu(x) * 3)).double(), x)
    assert common.rewrites(twice, PASS) == []
    reason = "mul before it: module layer called at 2 sites, on different values"
    reasons = [found.reason for found in PASS.propose(twice, common.context()) if isinstance(found, Refusal)]
    assert reasons == [reason, reason.replace("mul", "mul_1")]


def test_several_readers() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)
            self.register_buffer("c", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            x = (torch.tanh(x) + self.c) * 2
            return torch.cat([self.q(x), self.k(x)], -1)

    x = torch.randn(3, 4, dtype=torch.float64)
    graph = common.exported(Heads().double(), x)
    assert [r.site for r in common.rewrites(graph, PASS)] == [("q", "k", "mul"), ("q", "k", "add")]
    result, applied, _ = folded(graph)
    assert len(applied) == 2
    assert operations(result) == ["tanh", "q_2", "k_2", "cat"]
    assert common.difference(result, graph, x) < 1e-10


def test_a_long_chain_is_one_round() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        for _ in range(30):
            y = y * 1.1
        y = m.layer(y)
        for _ in range(30):
            y = y + 0.1
        return y

    x = torch.randn(3, 4, dtype=torch.float64)
    graph = common.exported(Around(nn.Linear(4, 4), forward).double(), x)
    result, applied, _ = folded(graph)
    assert len(applied) == 60
    assert len(operations(result)) == 2
    assert common.difference(result, graph, x) < 1e-10


class Tied(nn.Module):
    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.layer, self.other, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        if constant:
            self.other.bias = self.c
        else:
            self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.layer(x) * self.c))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Around(nn.Linear(4, 4), lambda m, x: (y := m.layer(x)) * 2 + y), "its output is used without the constant"),
        (Around(nn.Linear(4, 4), lambda m, x: m.layer(m.layer(x) * 2) * 3), "module called at 2 sites, not each"),
        (Around(nn.Linear(4, 4), lambda m, x: m.layer(x) + m.c, torch.randn(4, 1)), "varies along other axes"),
        (Around(nn.Conv1d(4, 4, 1), lambda m, x: m.layer(x) * m.c, torch.randn(4)), "varies along other axes"),
        (
            Around(nn.Linear(4, 4), lambda m, x: m.layer(x).flatten(1) * m.c, torch.randn(16)),
            "the constant comes behind a reshape",
        ),
        (Around(nn.Linear(4, 4).half(), lambda m, x: m.layer(x) * 2**-18), "exceeds the range of float16"),
        (Around(nn.Linear(4, 4).half(), lambda m, x: m.layer(x) * 0.3), "be rounded once more in float16"),
        (Around(nn.Linear(4, 4).half(), lambda m, x: m.layer(x * 0.3)), "be rounded once more in float16"),
        (Around(nn.Linear(4, 4), lambda m, x: m.layer(x) * 1e38 * 1e10), "exceeds the range of float32"),
        (Around(nn.Linear(4, 4), lambda m, x: m.layer(x - 1e4)), "sub before it: a shift of 1e+04 would cancel"),
        (
            Around(nn.Linear(4, 4), lambda m, x: (y := torch.relu(x) * 2) + m.layer(y)),
            "mul before it: its result is read by add too",
        ),
        (
            Around(nn.Linear(4, 4), lambda m, x: m.layer(3 * (y := torch.relu(x) * 2)) + y),
            "mul before it: its result has other users",
        ),
        (
            Around(nn.Conv1d(4, 4, 3, padding=1), lambda m, x: m.layer(x + 1)),
            "add before it: layer: the shift does not reach the zeros that it pads",
        ),
        (Tied(constant=False), "weight tied with other"),
        (Tied(constant=True), "the constant is tied with other"),
    ],
)
def test_refusals(model: nn.Module, reason: str) -> None:
    x = torch.randn(2, 4, 4, dtype=next(model.parameters()).dtype)
    graph = common.exported(model, x)
    before = fingerprint(graph.gm)
    reasons = [found.reason for found in PASS.propose(graph, common.context()) if isinstance(found, Refusal)]
    assert any(reason in found for found in reasons)
    assert fingerprint(graph.gm) == before


@pytest.mark.parametrize(
    ("use", "where"),
    [
        (lambda m, x: m.layer((x - 1) / 2), "sub does not come right before layer"),
        (lambda m, x: (2 * m.layer(x)).reshape(-1, 4) + 1, "add does not come right after layer"),
    ],
)
def test_a_step_of_a_chain_needs_the_one_before_it(use: Callable[[Any, Any], Any], where: str) -> None:
    graph = common.exported(Around(nn.Linear(4, 4), use), torch.randn(3, 4))
    first, second = common.rewrites(graph, PASS)
    with pytest.raises(PassError, match=where):
        apply(graph.copy(), PASS, second, common.context())
    apply(graph, PASS, first, common.context())
    apply(graph, PASS, second, common.context())


@pytest.mark.parametrize(("bias", "folds"), [(5.0, True), (5000.0, False)])
def test_what_would_cancel_is_not_folded(bias: float, folds: bool) -> None:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.bias, bias)
    x = torch.randn(3, 4)
    _, applied, refused = folded(common.exported(Around(layer, lambda m, x: m.layer(x) - bias), x))
    assert bool(applied) == folds
    assert folds or refused["layer"].startswith("what the constant takes away is")
    shifted = folded(common.exported(Around(layer, lambda m, x: m.layer(x) + bias), x))[1]
    assert len(shifted) == 1


@pytest.mark.parametrize(("constant", "folds"), [(5.0, True), (5000.0, False)])
def test_a_constant_beside_which_the_layer_is_small_is_not_folded(constant: float, folds: bool) -> None:
    layer = nn.Linear(300, 8, bias=False)  # sums so long add to a bias in another order than to a constant behind it
    model, x = Around(layer, lambda m, x: (m.layer(x) - constant).relu() - constant), torch.randn(3, 300)
    _, applied, refused = folded(common.exported(model, x))
    assert bool(applied) == folds
    assert folds or refused["layer"].startswith("what the constant takes away is")


def test_what_is_no_constant_step() -> None:
    x = torch.randn(3, 4)
    for use in (
        lambda m, x: m.layer(x) * x,
        lambda m, x: 2 / m.layer(x),
        lambda m, x: m.layer(x).double() * 2,
        lambda m, x: torch.relu(m.layer(x)) * 2,
    ):
        graph = common.exported(Around(nn.Linear(4, 4), use), x)
        assert list(PASS.propose(graph, common.context())) == []
