"""A graph called as its model is: by position or by name, in any order, with defaults, precisions and folded axes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lrcompile
from lrcompile.emit.folder import load_folder
from lrcompile.emit.write import emit
from lrcompile.errors import InputError
from lrcompile.frontend.calls import CalledAsGiven, in_place_of
from lrcompile.frontend.prepare import prepare
from lrcompile.frontend.trace import Traced, trace
from lrcompile.graph.graph import Graph
from lrcompile.lower.rank4 import to_rank

X, A, B, C = (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(
        self, input: Tensor, a: Tensor | None = None, b: Tensor | None = None, negate: bool = False
    ) -> dict[str, Any]:
        y = self.linear(input)
        y = y if a is None else y * a
        y = y if b is None else y - b
        return {"y": -y if negate else y, "rest": (input, [y.sum()])}


def as_given(program: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    traced = trace(program, args, kwargs)
    return CalledAsGiven(traced.graph.gm, traced)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_inputs_by_position_or_name_in_any_order() -> None:
    net = Net().eval()
    for model in (as_given(net, X, b=B, a=A), as_given(net, X, A, B), as_given(net, X, A, B, False)):
        expected = net(C, A, B)
        same(model(C, A, B), expected)
        same(model(C, b=B, a=A), expected)
        same(model(b=B, input=C, a=A), expected)
        same(model(C, A, B, False), expected)
        assert list(model(C, A, B)) == ["y", "rest"]


def test_another_batch() -> None:
    net = Net().eval()
    x = torch.randn(9, 8)
    same(as_given(net, X)(x), net(x))


def test_it_infers_as_the_model_does() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).eval()
    net[1].running_mean.fill_(3.0)
    model = as_given(net, X)
    assert not any(module.training for module in model.modules())  # type: ignore[attr-defined]
    same(model(A), net(A))


class Variadic(nn.Module):
    def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
        y = parts[0] - 2 * parts[1]
        return y * named["scale"] - named["shift"]


def test_any_number_of_inputs() -> None:
    net = Variadic()
    model = as_given(net, X, A, shift=B, scale=C)
    same(model(A, X, scale=B, shift=C), net(A, X, scale=B, shift=C))
    with pytest.raises(TypeError, match="another number of inputs"):
        model(X, A, B, scale=B, shift=C)


class Nested(nn.Module):
    def forward(self, pair: tuple[Tensor, dict[str, Tensor]], scale: Tensor) -> Tensor:
        return (pair[0] - pair[1]["b"]) * scale


def test_nested_inputs() -> None:
    net = Nested()
    model = as_given(net, (X, {"b": B}), A)
    same(model(scale=C, pair=(A, {"b": X})), net((A, {"b": X}), C))
    same(model((A, {"b": X}), C), net((A, {"b": X}), C))
    with pytest.raises(TypeError, match=r"another number of inputs, or other keys: .*mismatch"):
        model((A, {"b": X, "c": X}), C)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X, A), {}, "a was given, but the model was traced without it"),
        ((X,), {"negate": True}, "negate was given"),
        ((X,), {"mask": A}, "mask"),
        ((), {}, "input"),
        ((3.0,), {}, "a float was given where the model was traced with a tensor"),
    ],
)
def test_what_the_graph_was_not_traced_with(args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        as_given(Net().eval(), X)(*args, **kwargs)


def test_values_that_export_fixed() -> None:
    net = Net().eval()
    model = as_given(net, X, A, None, True)
    same(model(C, A, negate=True), net(C, A, negate=True))
    same(model(C, A, None, True), net(C, A, negate=True))
    with pytest.raises(TypeError, match="False was given where the model was traced with True"):
        model(C, A)
    with pytest.raises(TypeError, match="where the model was traced with None"):
        model(C, A, B, True)


def test_archives() -> None:
    net = Net().eval()
    model = as_given(torch.export.export(net, (X,), {"b": B}), X, b=B)
    same(model(input=C, b=A), net(C, b=A))
    same(model(C, b=A), net(C, b=A))
    with pytest.raises(TypeError, match="positional"):
        model(C, A)  # of the original, the second is a, and the archive does not say


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - 2 * y

    model = as_given(torch.jit.trace(Two().eval(), (X, A)), X, A)
    same(model(B, y=C), B - 2 * C)
    same(model(y=C, x=B), B - 2 * C)


def test_another_precision() -> None:
    net = Net().eval()
    program, args, kwargs, _ = prepare(net, (X,), {}, "bf16", None)
    traced = trace(program, args, kwargs)
    y = CalledAsGiven(traced.graph.gm, traced)(X)["y"]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(X)["y"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("archive", [False, True])
def test_another_precision_is_of_real_numbers_alone(archive: bool) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.last.weight = self.first.weight
            self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.view_as_complex(self.first(x).float().unflatten(-1, (4, 2))) * self.turn
            return self.last(torch.view_as_real(y).flatten(-2).to(self.first.weight.dtype))

    net = Turned().eval()
    given = torch.export.export(net, (X,)) if archive else net
    program = prepare(given, (X,), {}, "bf16", None)[0]
    assert isinstance(program, nn.Module)
    assert [(p.dtype, p.numel()) for p in program.parameters()] == [(torch.bfloat16, 64)]  # tied weights stay one
    assert torch.equal(dict(program.named_buffers())["turn"], net.turn)


def test_inputs_keep_their_precision_where_the_model_takes_it() -> None:
    class Clock(nn.Module):
        def __init__(self, stem: nn.Module) -> None:
            super().__init__()
            self.stem, self.head, self.drop = stem, nn.Linear(4, 16), nn.Dropout()

        def forward(self, x: Tensor, seconds: Tensor) -> Tensor:
            age = (seconds - 1.7e9).float()
            return self.head(self.drop(self.stem(x).float()) + age)

    seconds = torch.full((4, 1), 1.7e9, dtype=torch.float64) + torch.arange(4).unsqueeze(1)
    net = Clock(nn.Linear(8, 4).half()).train()
    for dtype in (None, "fp32"):  # a plan says the second
        _, args, _, own = prepare(net, (X.half(), seconds), {}, dtype, None)
        assert (args[0].dtype, args[1].dtype, own) == (torch.float16, torch.float64, "fp32")
    assert net.drop.training
    same(as_given(net.eval(), X.half(), seconds)(X.half(), seconds), net(X.half(), seconds))
    assert prepare(nn.Linear(8, 8), (X.double(),), {}, None, None)[1][0].dtype == torch.float32
    assert prepare(net, (X.half(), seconds), {}, "bf16", None)[1][1].dtype == torch.bfloat16


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, self.head(y.mean((2, 3, 4)))


def folded(net: nn.Module, x: Tensor) -> Traced:
    return to_rank(trace(net, (x,)), 4, 4, 1e-5)


def test_folded_axes_are_as_the_model_has_them() -> None:
    net = Video().eval()
    x = torch.randn(2, 2, 3, 8, 8)
    traced = folded(net, x)
    assert traced.flat[0].dim() == 4
    model = CalledAsGiven(traced.graph.gm, traced)
    for batch in (x, torch.randn(5, 2, 3, 8, 8)):
        same(model(batch), net(batch))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # copy, torch's own
def test_whole_numbers_of_another_width_are_as_the_example() -> None:
    """What runs in the place of the graph may not take others: ONNX Runtime does not."""
    kinds = []

    def elsewhere(flat: Sequence[Any]) -> Sequence[Any]:
        kinds.append(flat[0].dtype)
        return [torch.zeros(2, 3, 4)]

    ids = torch.arange(6).reshape(2, 3)
    traced = trace(nn.Embedding(8, 4).eval(), (ids,))
    model = CalledAsGiven(copy.deepcopy(in_place_of(traced.graph.gm, elsewhere)), traced)
    for given in (ids, ids.int(), ids.to(torch.uint8)):
        assert model(given).shape == (2, 3, 4)
    assert kinds == [torch.int64] * 3
    small = trace(nn.Embedding(8, 4).eval(), (ids.int(),))
    model_of_small = CalledAsGiven(in_place_of(small.graph.gm, elsewhere), small)
    assert model_of_small(ids).shape == (2, 3, 4)
    assert kinds[3:] == [torch.int64]  # wider ones would be cut
    (weight,) = model.parameters()  # of a type and on a device, as those of the model
    assert weight.dtype == torch.float32
    assert weight is not next(traced.graph.gm.parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # copy and pickle, torch's own
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X,), {"b": B, "a": A}), ((), {"b": B, "a": A, "input": X}), ((X, A, B, False), {})],
)
def test_the_graph_itself_is_called_as_the_model_is(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    net = Net().eval()
    traced = trace(net, args, kwargs)
    gm = traced.graph.gm
    expected = net(C, A, B)
    for got in (gm(C, A, B), gm(b=B, input=C, a=A), gm(C, A, b=B, negate=False)):
        same(got, expected)
    again = Graph(gm, FakeTensorMode()).copy().gm
    for copied in (copy.deepcopy(gm), again, fx.symbolic_trace(gm), pickle.loads(pickle.dumps(gm))):
        same(copied(C, A, B), expected)
    flat = (C, A, B, False)[: len(traced.flat)]
    same(torch.export.export(gm, flat).module()(*flat), expected)
    assert not gm.training
    assert net.state_dict().keys() == gm.state_dict().keys()


def test_the_graph_itself_refuses_what_it_was_not_traced_with() -> None:
    gm = trace(Net().eval(), (X,), {"b": B}).graph.gm
    for args, says in [
        ((X, A, B), "a was given, but the model was traced without it"),
        ((X, A), "a was given"),
        ((X, None, B, True), "negate was given"),
        ((X,), "a NoneType was given where the model was traced with a tensor"),
    ]:
        with pytest.raises(TypeError, match=says):
            gm(*args)
    same(gm(C, None, A), Net().eval()(C, b=A))


def test_dictionaries_may_have_their_keys_in_any_order() -> None:
    class Named(nn.Module):
        def forward(self, d: dict[str, Tensor], device: str = "cpu") -> Tensor:
            return d["x"] - 2 * d["y"]

    traced = trace(Named(), ({"y": A, "x": B},))
    for model in (traced.graph.gm, CalledAsGiven(traced.graph.gm, traced)):
        same(model({"x": X, "y": C}), X - 2 * C)
        same(model({"y": C, "x": X}), X - 2 * C)
    archive = torch.export.export(Named(), ({"y": A, "x": B},))
    same(trace(archive, ({"x": B, "y": A},)).graph.gm({"x": X, "y": C}), X - 2 * C)


def test_any_number_of_inputs_of_the_graph_itself() -> None:
    net = Variadic()
    gm = trace(net, (X, A), {"shift": B, "scale": C}).graph.gm
    same(gm(A, X, scale=B, shift=C), net(A, X, scale=B, shift=C))
    with pytest.raises(TypeError, match="another number of inputs"):
        gm(X, A, B, scale=B, shift=C)


def test_inputs_may_be_called_what_the_code_of_graphs_calls() -> None:
    class Named(nn.Module):
        def forward(self, flat_inputs: Tensor, device: Tensor) -> Tensor:
            return flat_inputs + 3 * device

    gm = trace(Named().eval(), (X, A)).graph.gm
    same(gm(C, B), C + 3 * B)


def test_a_name_that_torch_takes_for_itself_is_refused_where_it_is_given() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, device: Tensor) -> Tensor:
            return x + device

    with pytest.raises(InputError, match=r"an input named 'device', which torch.fx uses .* give it by position"):
        trace(Named().eval(), (X,), {"device": A})


@pytest.mark.parametrize(
    ("net", "args", "kwargs", "call"),
    [
        (Net(), (X,), {"b": B, "a": A}, "model(input, a, b)"),
        (Net(), (X,), {"b": B}, "model(input, b=b)"),
        (Variadic(), (X, A), {"shift": B, "scale": C}, "model(*parts, shift=shift, scale=scale)"),
    ],
)
def test_a_folder_is_called_as_the_model_is(net: nn.Module, args: Any, kwargs: Any, call: str, tmp_path: Path) -> None:
    traced = trace(net.eval(), args, kwargs)
    emit(tmp_path / "model", traced.graph.gm, traced)
    same(load_folder(tmp_path / "model")(*args, **kwargs), net(*args, **kwargs))
    assert call in (tmp_path / "model" / "model.py").read_text()


class Scripted(nn.Module):
    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        return x - scale * y


def test_a_compiled_model_is_in_the_mode_of_the_traced() -> None:
    torch.manual_seed(0)
    factor = torch.randn(64, 256) / 64
    net = nn.Sequential(nn.Sequential(nn.Linear(256, 256), nn.ReLU()), nn.Linear(256, 256)).eval()
    for layer in (net[0][0], net[1]):  # type: ignore[index]
        layer.weight.data = factor.T @ factor
    result = lrcompile.compile(net, (torch.randn(8, 256),), budget=lrcompile.Budget(size=0.6))
    assert any(not rewrite.exact for rewrite in result.plan.rewrites)
    assert not any(module.training for module in result.model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_with_inputs_by_name() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - 2 * y

    script = torch.jit.trace(Two().eval(), (X, A))
    for args, kwargs in (((), {"y": A, "x": X}), ((X,), {"y": A})):
        gm = trace(script, args, kwargs).graph.gm
        same(gm(B, C), B - 2 * C)
        same(gm(y=C, x=B), B - 2 * C)
    for given, says in [
        ({"x": X}, r"missing a required argument: 'y'; it takes x, y"),
        ({"x": X, "y": A, "z": B}, r"unexpected keyword argument 'z'; it takes x, y"),
    ]:
        with pytest.raises(InputError, match=says):
            trace(script, (), given)
    with pytest.raises(InputError, match=r"parameter scale is 2\.0, and TorchScript can be converted with tensors"):
        trace(torch.jit.script(Scripted()), (), {"y": A, "x": X})


def test_the_signature_is_that_of_the_model() -> None:
    assert trace(Net().eval(), (X,)).signature == inspect.signature(Net.forward.__get__(Net()))


class Keyed(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.layer, self.key = nn.Linear(8, 8), key

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.layer(inputs[self.key])


@pytest.mark.parametrize("key", ["user-id", "class", "self"])
def test_keys_that_are_no_names_are_refused_in_words(key: str) -> None:
    with pytest.raises(InputError, match=f"an input named '{key}', which torch.export cannot write as a name"):
        trace(Keyed(key).eval(), (), {key: X})


def test_an_archive_of_keys_that_are_no_names_is_refused_in_words() -> None:
    program = torch.export.export(Keyed("user-id").eval(), (), {"user-id": X}, strict=False)
    with pytest.raises(InputError, match="an input named 'user-id'"):
        trace(program, (), {"user-id": X})
