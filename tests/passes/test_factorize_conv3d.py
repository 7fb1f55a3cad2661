from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lrcompile_passes import FactorizeConv3d, MergeSiblings
from torch import nn
from torch.utils import _pytree as pytree

import lrcompile
from lrcompile.frontend.trace import trace
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import apply
from lrcompile.planning.plan import Plan
from tests.passes import common

PASS = FactorizeConv3d()
PARALLEL = FactorizeConv3d(parallel=True)
EXACT = ["exact-sum", "exact-chan", "exact-shift"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def single(module: nn.Module, *size: int, dtype: torch.dtype = torch.float64) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*size, dtype=dtype)
    return common.drawn(nn.Sequential(module.to(dtype)), x), x


def full(form: str, module: Any) -> Rewrite:
    into, out, taps = module.in_channels, module.out_channels, module.kernel_size[0]
    cells = module.kernel_size[1] * module.kernel_size[2]
    rank = min(out * taps, into * cells) if form == "2plus1" else min(out * cells, into * taps)
    return Rewrite(PASS.name, ("0",), {"form": form, "rank": rank})


def forms(graph: Any) -> list[str]:
    return [r.params["form"] for r in common.rewrites(graph, PASS) if r.exact]


def exact(form: str, path: str = "0") -> Rewrite:
    return Rewrite(PASS.name, (path,), {"form": form}, exact=True)


def triples(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(least, most)] * 3)


@st.composite
def convolutions(draw: Any) -> tuple[Any, tuple[int, ...]]:
    """A layer with any options and the size of an input, at times smaller than the kernel."""
    groups, per_group = draw(st.sampled_from([1, 1, 2, 3])), (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    into, out = groups * per_group[0], groups * per_group[1]
    kernel, stride, dilation = draw(triples(1, 3)), draw(triples(1, 3)), draw(triples(1, 2))
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    size = (draw(st.integers(1, 3)), into, *draw(triples(1, 5)))
    kind = draw(st.sampled_from(["conv", "conv", "named", "transposed"]))
    if kind == "transposed":
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        options |= {"output_padding": extra, "padding": draw(triples(0, 2)), "stride": stride}
        return nn.ConvTranspose3d(into, out, kernel, **options), size
    if kind == "named":
        return nn.Conv3d(into, out, kernel, padding=draw(st.sampled_from(["same", "valid"])), **options), size
    return nn.Conv3d(into, out, kernel, stride=stride, padding=draw(triples(0, 3)), **options), size


def has_output(module: Any, size: tuple[int, ...]) -> bool:
    try:
        return module(torch.zeros(size, dtype=module.weight.dtype)).numel() > 0
    except RuntimeError:  # the kernel does not fit
        return False


@settings(suppress_health_check=list(HealthCheck))
@given(convolutions())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_exact_forms_are_the_layer_for_all_options(drawn: tuple[Any, tuple[int, ...]]) -> None:
    module, size = drawn
    assume(has_output(module, size))
    graph, x = single(module, *size)
    found = forms(graph)
    assume(found)
    (expected,) = common.outputs(graph, x)
    for form in found:
        result = graph.copy()
        apply(result, PASS, exact(form), common.context())
        (got,) = common.outputs(result, x)
        assert got.is_contiguous()
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert most_axes(result) <= 4


def most_axes(graph: Any) -> int:
    """Of the values between the input and the result."""
    inner = [node for node in graph.nodes if node.op in ("call_module", "call_function")][:-1]
    return max(value.dim() for node in inner for value in pytree.tree_leaves(node.meta["val"]))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(convolutions(), st.booleans())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_full_rank_is_the_layer_for_all_options(drawn: tuple[Any, tuple[int, ...]], calibrated: bool) -> None:
    module, size = drawn
    taps, *cells = module.kernel_size
    assume(isinstance(module, nn.Conv3d) and module.groups == 1 and taps > 1 and max(cells) > 1)
    assume(has_output(module, size))
    graph, x = single(module, *size)
    (expected,) = common.outputs(graph, x)
    ctx = common.context(graph, (x,)) if calibrated else common.context()
    for form in ("2plus1", "1plus2"):
        result = common.applied(graph, PASS, full(form, module), ctx)
        (got,) = common.outputs(result, x)
        assert got.is_contiguous()
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert most_axes(result) <= 4


LAYERS = [
    nn.Conv3d(6, 8, 3, stride=(2, 1, 2), padding=(2, 1, 0), dilation=(1, 2, 1)),
    nn.Conv3d(6, 6, (3, 2, 3), padding="same", bias=False),
    nn.Conv3d(6, 6, 3, padding=1, groups=6),
    nn.Conv3d(6, 4, 3, padding=1, groups=2, bias=False),
    nn.Conv3d(6, 8, (1, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1)),
    nn.Conv3d(6, 8, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
    nn.Conv3d(6, 8, 1, bias=False),
    nn.ConvTranspose3d(6, 8, 2, stride=2),
    nn.ConvTranspose3d(6, 4, 3, stride=2, padding=1, output_padding=(1, 0, 1), groups=2),
    nn.ConvTranspose3d(6, 4, 3, padding=1, bias=False),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_trial_replay_and_precision(layer: Any, dtype: torch.dtype) -> None:
    """`applied` checks that a trial without values and a replay from JSON build the same."""
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    graph, x = single(layer, 2, 6, 5, 7, 6, dtype=dtype)
    found = common.rewrites(graph, FactorizeConv3d(parallel=True))
    assert found
    for rewrite in found:
        result = common.applied(graph, PASS, rewrite)
        assert {p.dtype for p in result.gm.parameters()} == {dtype}
        if rewrite.exact:
            assert common.difference(result, graph, x) < limit
            macs = sum(m.module.weight.numel() for m in result.sites().values())
            assert macs == layer.weight.numel()


def test_forms_of_each_kernel() -> None:
    def of(module: nn.Module) -> list[str]:
        return forms(single(module, 1, 4, 5, 5, 5)[0])

    assert of(nn.Conv3d(4, 4, 3)) == EXACT
    assert of(nn.Conv3d(4, 4, (3, 1, 1))) == ["columns", *EXACT]
    assert of(nn.Conv3d(4, 4, (3, 1, 1), padding="same")) == ["columns", *EXACT]
    assert of(nn.Conv3d(4, 4, (3, 1, 1), stride=(1, 2, 1))) == EXACT
    assert of(nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 1))) == EXACT
    assert of(nn.Conv3d(4, 4, (1, 3, 3), groups=2)) == ["frames"]
    assert of(nn.Conv3d(4, 4, 1)) == ["columns", "frames"]
    assert of(nn.ConvTranspose3d(4, 4, 2, stride=2)) == EXACT
    assert of(nn.ConvTranspose3d(4, 4, (1, 2, 2), stride=(1, 2, 2))) == ["frames"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(16, 32, 3, stride=(1, 2, 2), padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x)).flatten(1)


def net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sizes = [(batch, 16, 5, 8, 6) for batch in (2, 3)]
    return Net().double().eval(), *(torch.randn(size, dtype=torch.float64) for size in sizes)


def test_golden_proposals() -> None:
    model, x, _ = net()
    found = common.rewrites(common.exported(model, x), PASS)
    assert [str(r) for r in found] == [
        *(f"factorize-conv3d(conv; form={form})" for form in EXACT),
        *(f"factorize-conv3d(conv; form=2plus1, rank={rank})" for rank in range(8, 64, 8)),
        *(f"factorize-conv3d(conv; form=1plus2, rank={rank})" for rank in range(8, 32, 8)),
    ]
    assert [r.exact for r in found] == [True] * 3 + [False] * 10


def test_golden_exact() -> None:
    model, x, other = net()
    graph = common.exported(model, x)
    results = {form: common.applied(graph, PASS, exact(form, "conv")) for form in EXACT}
    for result in results.values():
        assert common.difference(result, graph, x) < 1e-12
        assert common.on_other_batch(result, model, (x,), (other,)) < 1e-12
    assert common.text(results["exact-chan"]) == (
        "x = placeholder x()\n"
        "reshape_default = call_function reshape.default(x, [-1, 16, 5, 48])\n"
        "pad_default = call_function pad.default(reshape_default, [0, 0, 1, 1])\n"
        "transpose_int = call_function transpose.int(pad_default, 1, 2)\n"
        "slice_tensor = call_function slice.Tensor(transpose_int, 1, 0, 5, 1)\n"
        "slice_tensor_1 = call_function slice.Tensor(transpose_int, 1, 1, 6, 1)\n"
        "slice_tensor_2 = call_function slice.Tensor(transpose_int, 1, 2, 7, 1)\n"
        "cat_default = call_function cat.default([slice_tensor, slice_tensor_1, slice_tensor_2], 2)\n"
        "reshape_default_1 = call_function reshape.default(cat_default, [-1, 48, 8, 6])\n"
        "conv_0 = call_module conv.0(reshape_default_1)\n"
        "reshape_default_2 = call_function reshape.default(conv_0, [-1, 5, 32, 12])\n"
        "transpose_int_1 = call_function transpose.int(reshape_default_2, 1, 2)\n"
        "clone_default = call_function clone.default(transpose_int_1, memory_format=torch.contiguous_format)\n"
        "reshape_default_3 = call_function reshape.default(clone_default, [-1, 32, 5, 4, 3])\n"
        "relu = call_function relu.default(reshape_default_3)\n"
        "flatten = call_function flatten.using_ints(relu, 1)\n"
        "output = output output((flatten,))"
    )
    layer = "kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)"
    assert {form: common.layers(result) for form, result in results.items()} == {
        "exact-sum": {
            "conv.0": f"Conv2d(16, 32, {layer})",
            "conv.1": f"Conv2d(16, 32, {layer}, bias=False)",
            "conv.2": f"Conv2d(16, 32, {layer}, bias=False)",
        },
        "exact-chan": {"conv.0": f"Conv2d(48, 32, {layer})"},
        "exact-shift": {"conv.0": f"Conv2d(16, 96, {layer})"},
    }


def test_golden_factors() -> None:
    model, x, other = net()
    graph = common.exported(model, x)
    split = common.applied(graph, PASS, Rewrite(PASS.name, ("conv",), {"form": "2plus1", "rank": 96}))
    assert common.text(split) == (
        "x = placeholder x()\n"
        "reshape_default = call_function reshape.default(x, [-1, 16, 5, 48])\n"
        "transpose_int = call_function transpose.int(reshape_default, 1, 2)\n"
        "clone_default = call_function clone.default(transpose_int, memory_format=torch.contiguous_format)\n"
        "reshape_default_1 = call_function reshape.default(clone_default, [-1, 16, 8, 6])\n"
        "conv_0 = call_module conv.0(reshape_default_1)\n"
        "reshape_default_2 = call_function reshape.default(conv_0, [-1, 5, 96, 12])\n"
        "transpose_int_1 = call_function transpose.int(reshape_default_2, 1, 2)\n"
        "clone_default_1 = call_function clone.default(transpose_int_1, memory_format=torch.contiguous_format)\n"
        "conv_1 = call_module conv.1(clone_default_1)\n"
        "reshape_default_3 = call_function reshape.default(conv_1, [-1, 32, 5, 4, 3])\n"
        "relu = call_function relu.default(reshape_default_3)\n"
        "flatten = call_function flatten.using_ints(relu, 1)\n"
        "output = output output((flatten,))"
    )
    assert common.layers(split) == {
        "conv.0": "Conv2d(16, 96, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)",
        "conv.1": "Conv2d(96, 32, kernel_size=(3, 1), stride=(1, 1), padding=(1, 0))",
    }
    other_way = common.applied(graph, PASS, Rewrite(PASS.name, ("conv",), {"form": "1plus2", "rank": 48}))
    assert common.layers(other_way) == {
        "conv.0": "Conv2d(16, 48, kernel_size=(3, 1), stride=(1, 1), padding=(1, 0), bias=False)",
        "conv.1": "Conv2d(48, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))",
    }
    for result in (split, other_way):
        assert common.difference(result, graph, x) < 1e-10
        assert common.on_other_batch(result, model, (x,), (other,)) < 1e-10


def kernel(graph: Any, module: Any) -> torch.Tensor:
    """What a rewritten layer, without bias and padded to its input's size, computes: its answers to single ones."""
    channels, sizes = module.in_channels, module.kernel_size
    count = channels * sizes[0] * sizes[1] * sizes[2]
    ones = torch.eye(count, dtype=torch.float64).view(count, channels, *sizes)
    (answers,) = common.outputs(graph, ones)
    middle = answers[:, :, sizes[0] // 2, sizes[1] // 2, sizes[2] // 2]
    return middle.T.reshape(-1, channels, *sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_error_is_that_of_the_weights(dtype: torch.dtype) -> None:
    module = nn.Conv3d(16, 24, (3, 3, 5), padding="same", bias=False)
    graph, _ = single(module, 2, 16, 3, 3, 5, dtype=dtype)
    lossy = [r for r in common.rewrites(graph, PARALLEL) if not r.exact]
    assert {r.params["form"] for r in lossy} == {"2plus1", "1plus2", "add", "cat"}
    for rewrite in lossy:
        result = common.applied(graph, PARALLEL, rewrite)
        result.gm.double()
        got = kernel(result, module)
        assert common.relative(got, module.weight) == pytest.approx(
            rewrite.error, rel=1e-8 if dtype.itemsize > 4 else 1e-4
        )
        if "rank" in rewrite.params:
            assert sum(p.numel() for p in result.gm.parameters()) < module.weight.numel()


@pytest.mark.parametrize("form", ["2plus1", "1plus2"])
def test_calibration_helps(form: str) -> None:
    torch.manual_seed(2)
    mixing = torch.diag(torch.logspace(-1.5, 0.5, 16).double()) @ torch.randn(16, 16).double()
    x = torch.einsum("dc,ncthw->ndthw", mixing, torch.randn(8, 16, 5, 6, 6, dtype=torch.float64))
    graph = common.drawn(nn.Sequential(nn.Conv3d(16, 16, 3, bias=False).double()), x)
    ctx = common.context(graph, (x,))
    found = [r for r in common.rewrites(graph, PASS, ctx) if r.params["form"] == form]
    assert found
    for rewrite in found:
        error = common.difference(common.applied(graph, PASS, rewrite, ctx), graph, x)
        assert error < common.difference(common.applied(graph, PASS, rewrite), graph, x)
        assert error == pytest.approx(rewrite.error, rel=0.3)  # positions are taken as alike, and frames


class Twice(nn.Module):
    """One layer on two sizes, after padding of the past alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(8, 8, (3, 3, 3), padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, 0, 2, 0))
        return self.conv(torch.relu(self.conv(padded))[:, :, :, 1:, ::2])


def test_module_called_twice() -> None:
    torch.manual_seed(3)
    model, x = Twice().double(), torch.randn(2, 8, 6, 5, 6, dtype=torch.float64)
    graph = common.exported(model, x)
    ctx = common.context(graph, (x,))
    full_rank = [Rewrite(PASS.name, ("conv",), {"form": form, "rank": 24}) for form in ("2plus1", "1plus2")]
    for rewrite in [*(exact(form, "conv") for form in EXACT), *full_rank]:
        result = common.applied(graph, PASS, rewrite, ctx)
        assert all(len(site.nodes) == 2 for site in result.sites().values())
        assert common.difference(result, graph, x) < 1e-10
        other = torch.randn(5, 8, 6, 5, 6, dtype=torch.float64)
        assert common.on_other_batch(result, model, (x,), (other,)) < 1e-10


def test_refusals() -> None:
    def reason(module: nn.Module, *size: int) -> str:
        graph, _ = single(module, *size)
        assert common.rewrites(graph, PASS) == []
        return common.refusals(graph, PASS)["0"]

    assert reason(nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"), 1, 4, 5, 5, 5) == "padding mode circular"
    assert reason(nn.Conv3d(4, 4, 3), 4, 5, 5, 5) == "input has no batch axis"
    assert reason(nn.ConvTranspose3d(4, 4, (1, 2, 2), stride=2), 1, 4, 5, 5, 5) == (
        "taps in time are sparser than the stride of 2: some frames are bias alone"
    )
    graph, _ = single(nn.Conv2d(4, 4, 3), 1, 4, 5, 5)
    assert (common.rewrites(graph, PASS), common.refusals(graph, PASS)) == ([], {})


def test_tied_weight() -> None:
    graph = common.drawn(
        common.Tied(nn.Conv3d(4, 4, 3, padding=1), nn.ConvTranspose3d(4, 4, 3, padding=1)), torch.randn(1, 4, 5, 5, 5)
    )
    assert common.refusals(graph, PASS) == {"down": "weight tied with up", "up": "weight tied with down"}


@pytest.mark.parametrize("axis", [2, 3])
def test_open_sizes(axis: int) -> None:
    x = torch.randn(2, 4, 6, 7, 8)
    shapes = ({0: torch.export.Dim("batch", max=64), axis: torch.export.Dim("size", min=5, max=64)},)
    program = torch.export.export(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1)), (x,), dynamic_shapes=shapes)
    graph = trace(program, (x,)).graph
    assert common.rewrites(graph, PASS) == []
    (reason,) = common.refusals(graph, PASS).values()
    assert reason.startswith("sizes other than the batch are open: s")


class Clips(nn.Module):
    """A small video net with a layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 32, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2))
        self.norm = nn.BatchNorm3d(32)
        self.deep = nn.Conv3d(32, 32, 3, padding="same", bias=False)
        self.own = nn.Conv3d(32, 32, 3, stride=2, padding=1, groups=32)
        self.up = nn.ConvTranspose3d(32, 16, 2, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.up(torch.relu(self.own(torch.relu(self.deep(x)))))
        return self.head(x.mean((2, 3, 4)))


def clips() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(5)
    return Clips().eval(), torch.randn(2, 3, 5, 12, 12)


@pytest.fixture(scope="module")
def plan() -> Plan:
    model, x = clips()
    return lrcompile.compile(model, (x,), passes=[PASS]).plan


@pytest.mark.parametrize("form", [*EXACT, "2plus1"])
def test_onnx(form: str, plan: Plan, tmp_path: Path) -> None:
    """A plan with one form everywhere, at the batch that was traced and at another."""
    model, x = clips()
    sites = ("stem", "deep") if form == "2plus1" else ("stem", "deep", "own", "up")
    extra = {"rank": 48} if form == "2plus1" else {}
    rewrites = tuple(Rewrite(PASS.name, (s,), {"form": form, **extra}, exact=not extra) for s in sites)
    compiled = lrcompile.compile(model, (x,), passes=[PASS], plan=replace(plan, rewrites=rewrites))
    report = compiled.save(tmp_path / "clips.onnx")
    assert report.verification["onnx_vs_torch"] < 1e-5
    other = torch.randn(5, 3, 5, 12, 12)
    session = onnxruntime.InferenceSession(tmp_path / "clips.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    with torch.no_grad():
        assert common.relative(torch.from_numpy(got), compiled.model(other)) < 1e-5
        if not extra:
            assert common.relative(torch.from_numpy(got), model(other)) < 1e-5


@pytest.mark.parametrize("target", ["x86-ort", "v100"])
def test_whole_compile(target: str, tmp_path: Path) -> None:
    model, x = clips()
    result = lrcompile.compile(model, (x,), target=target)
    report = result.save(tmp_path / "clips.onnx")
    assert report.verification["onnx_vs_torch"] < 1e-5
    again = lrcompile.compile(model, (x,), target=target, plan=result.plan)
    assert torch.equal(again.model(x), result.model(x))


def test_siblings_are_split_and_merged() -> None:
    """Two layers on one value: what the compiler tries together is what it can apply."""

    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    torch.manual_seed(6)
    model, x = Siblings().eval(), torch.randn(2, 8, 4, 6, 6)
    budget = lrcompile.Budget(size=0.4)
    result = lrcompile.compile(model, (x,), target="x86-ort", passes=[PASS, MergeSiblings()], budget=budget)
    assert {rewrite.pass_name for rewrite in result.plan.rewrites} == {PASS.name, "merge-siblings"}
    with torch.no_grad():
        error = float((result.model(x) - model(x)).norm() / model(x).norm())
    assert error == pytest.approx(result.report.error["measured"], rel=1e-3)
