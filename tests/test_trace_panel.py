"""Every architecture of the panel traces, keeps its answers, its state-dict keys and a dynamic batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from panel import PANEL, resnet50_full
from torch import nn
from torch.utils import _pytree as pytree

from lrcompile.frontend.trace import Traced, run, trace
from lrcompile.graph.graph import attribute, prune, storage_id, used_storages

aten = torch.ops.aten
LIFTED = (nn.Linear, nn.modules.conv._ConvNd)
PARAMETRISED = {
    aten.linear.default, aten.addmm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.convolution.default, aten.batch_norm.default, aten.layer_norm.default, aten.embedding.default,
}  # fmt: skip
IN_PROJ = [f"layers.{i}.self_attn.in_proj" for i in range(2)]
NEW_KEYS = {"transformer_encoder": {f"{path}.{leaf}" for path in IN_PROJ for leaf in ("weight", "bias")}}
"""Keys beside the model's own: weights that had no module of their own."""

RECURRENT = {"lstm_tagger": aten.lstm.input, "gru_tagger": aten.gru.input}
"""Models whose recurrent layer stays one operation on stored tensors."""


def calls_of_layers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Any]:
    """How often the model calls linear layers and convolutions, and what it returns."""
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    hooks = [
        module.register_forward_pre_hook(add) for module in model.modules()
        if isinstance(module, LIFTED) or type(module).__name__ == "Conv1D"
    ]  # fmt: skip
    with torch.no_grad():
        result = model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return count, result


def at_another_batch(traced: Traced) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with one more sample: the first again, values reversed along the last axis."""

    def grow(value: Any) -> Any:
        return torch.cat([value, value[:1].flip(-1)]) if isinstance(value, torch.Tensor) else value

    return pytree.tree_map(grow, (traced.args, traced.kwargs))


def of_constants(node: torch.fx.Node) -> bool:
    """Whether an operation reads stored tensors only, like an embedding of fixed positions: nothing to rewrite."""
    return all(source.op == "get_attr" for source in node.all_input_nodes)


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected.double() - got.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", PANEL)
def test_panel(name: str) -> None:
    model, args, kwargs = PANEL[name]()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calls, _ = calls_of_layers(model, args, kwargs)
    traced = trace(model, args, kwargs)
    gm = traced.graph.gm

    used = used_storages(gm)
    own = gm.state_dict()
    needed = {key for key, tensor in model.state_dict().items() if storage_id(tensor.detach()) in used}
    assert needed
    assert not needed - set(own), "a used weight lost its state-dict key"
    assert set(own) - set(state) == NEW_KEYS.get(name, set())
    assert all(torch.equal(state[key], own[key]) for key in needed)

    sites = [node for node in gm.graph.nodes if isinstance(traced.graph.module(node), LIFTED)]
    functional = 4 if name == "transformer_encoder" else 0  # attention calls F.linear on in_proj and out_proj
    assert len(sites) == calls + functional
    left = [node.name for node in gm.graph.nodes if node.target in PARAMETRISED and not of_constants(node)]
    assert not left, f"not lifted: {left}"

    if name in RECURRENT:
        assert [node.target for node in gm.graph.nodes].count(RECURRENT[name]) == 1

    assert traced.dynamic_batch, traced.notes
    grown_args, grown_kwargs = at_another_batch(traced)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*grown_args, **grown_kwargs))
    by_name = dict(zip(traced.input_names, traced.flat, strict=True))
    flat = [torch.cat([value, value[:1].flip(-1)]) for value in by_name.values()]
    for want, got in zip(expected, run(gm, flat), strict=True):
        assert relative_error(want, got) < 1e-5


@pytest.mark.parametrize("name", ["transformer_encoder", "t5_encoder"])
def test_copy_and_prune_treat_other_names_alike(name: str) -> None:
    model, args, kwargs = PANEL[name]()
    graph = trace(model, args, kwargs).graph
    copied = graph.copy()
    assert copied.gm.state_dict().keys() == graph.gm.state_dict().keys()
    assert [n for n, b in copied.gm.named_buffers()] == [n for n, b in graph.gm.named_buffers()]

    prune(copied.gm)
    assert copied.gm.state_dict().keys() == graph.gm.state_dict().keys(), "nothing was unused"

    old = "layers.0.self_attn.in_proj_weight" if name == "transformer_encoder" else "shared.weight"
    new = "layers.0.self_attn.in_proj.weight" if name == "transformer_encoder" else "encoder.embed_tokens.weight"
    assert attribute(copied.gm, old) is attribute(copied.gm, new)
    site = copied.site(new.removesuffix(".weight"))
    for node in site.nodes:
        node.replace_all_uses_with(node.args[0])
        copied.gm.graph.erase_node(node)
    prune(copied.gm)
    assert not {old, new} & set(copied.gm.state_dict())
    assert {old, new} <= set(graph.gm.state_dict()), "the original is left alone"


class WeightInAddmm(nn.Module):
    """A weight that is the factor of a product and is also read by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Module()
        self.projection.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.projection.weight) + self.projection.weight.sum(0)


class NamesThatClash(nn.Module):
    """A bare parameter whose layer would be called like the module beside it, and one above a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_weight = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 8)
        self.block = nn.Module()
        self.block.weight = nn.Parameter(torch.randn(8, 8))
        self.block.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.fc(nn.functional.linear(x, self.fc_weight))
        y = self.block.inner(nn.functional.layer_norm(nn.functional.linear(x, self.block.weight), (8,)))
        return {"parts": (x, y), "sum": x + y}


class SharedLayer(nn.Module):
    """One layer called twice, and its weight once more without the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.first(self.first(x).relu()).relu())


def test_weight_read_elsewhere_is_not_transposed() -> None:
    traced = trace(WeightInAddmm(), (torch.randn(3, 6),))
    assert not traced.graph.sites()
    assert set(traced.graph.gm.state_dict()) == {"projection.weight", "bias"}


def test_names_that_clash() -> None:
    model = NamesThatClash()
    traced = trace(model, (torch.randn(3, 8),))
    gm = traced.graph.gm
    assert traced.output_names == ("parts_0", "parts_1", "sum")
    assert set(model.state_dict()) <= set(gm.state_dict())
    assert list(traced.graph.sites()) == ["fc_call2", "fc", "block.linear", "layer_norm", "block.inner"]
    copied = traced.graph.copy()
    assert copied.gm.get_submodule("block") is not gm.get_submodule("block")


class Function(nn.Module):
    """A function of any number of inputs, with modules to use."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


@pytest.mark.parametrize("inputs", [(torch.ones(2, 8), 3.0), ([torch.ones(1, 8), torch.zeros(1, 8)],)])
def test_dynamic_batch_of_variable_and_nested_inputs(inputs: tuple[Any, ...]) -> None:
    def function(self: Any, first: Any, factor: float = 1.0) -> torch.Tensor:
        return self.layer(first if isinstance(first, torch.Tensor) else first[0] + first[1]) * factor

    traced = trace(Function(function, layer=nn.Linear(8, 3)), inputs)
    assert traced.dynamic_batch, traced.notes


def test_one_layer_of_two_names_is_one_site() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Dropout(0.1), layer, nn.Dropout(0.2))
    traced = trace(model, (torch.randn(2, 8),))
    assert {path: len(site.nodes) for path, site in traced.graph.sites().items()} == {"0": 2, "1": 1, "3": 1}
    assert set(traced.graph.gm.state_dict()) == set(model.state_dict())


def test_copy_keeps_nested_graphs() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.inner(x)
        return self.outer(x.float())

    x = torch.randn(2, 8)
    traced = trace(Function(function, inner=nn.Linear(8, 8), outer=nn.Linear(8, 8)), (x,))
    copied = traced.graph.copy().gm
    prune(copied)
    assert torch.equal(run(copied, (x,))[0], run(traced.graph.gm, (x,))[0])


def test_shared_layer_stays_shared() -> None:
    traced = trace(SharedLayer(), (torch.randn(3, 8),))
    assert {path: len(site.nodes) for path, site in traced.graph.sites().items()} == {"first": 2, "tied": 1}
    assert attribute(traced.graph.gm, "first.weight") is attribute(traced.graph.gm, "tied.weight")


class Upscale(nn.Module):
    """Convolutions, plain, grouped and transposed, with a normalisation and a branch on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        if x.shape[1] == 8:
            x = x + self.grouped(x)
        return self.head(self.up(x).mean((2, 3)))


@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript(how: str) -> None:
    model = Upscale().eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(model, (x,)) if how == "trace" else torch.jit.script(model)
        expected = model(x)
    traced = trace(script, (x,))
    assert relative_error(expected, run(traced.graph.gm, (x,))[0]) < 1e-6
    kinds = {path: type(site.module) for path, site in traced.graph.sites().items()}
    for path in ("stem", "grouped", "up", "head"):
        assert kinds[path] is type(model.get_submodule(path))
    assert set(traced.graph.gm.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bert", torch.bfloat16), ("bert", torch.float16), ("resnet_3d", torch.float16), ("lstm_tagger", torch.bfloat16)],
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, args, kwargs = PANEL[name]()
    model = model.to(dtype)
    args, kwargs = pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
    traced = trace(model, args, kwargs)
    assert traced.dynamic_batch
    parameters = list(traced.graph.gm.parameters())
    assert parameters
    assert all(p.dtype == dtype for p in parameters)


@pytest.mark.slow
def test_trace_time_of_full_size_resnet50(capsys: pytest.CaptureFixture[str]) -> None:
    model, args, kwargs = resnet50_full()
    start_s = time.perf_counter()
    traced = trace(model, args, kwargs)
    with capsys.disabled():
        print(f"ResNet-50 at 224 x 224: traced in {time.perf_counter() - start_s:.1f} s")
    assert traced.dynamic_batch
