"""A graph called as its model is: by position or by name, in any order, with defaults, precisions and folded axes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompile.frontend.calls import CalledAsGiven
from lrcompile.frontend.prepare import prepare
from lrcompile.frontend.trace import Traced, trace
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
    with pytest.raises(TypeError, match="4 inputs were given, but the model was traced with 3"):
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
    same(model(C, A), net(C, b=A))


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


def test_the_signature_is_that_of_the_model() -> None:
    assert trace(Net().eval(), (X,)).signature == inspect.signature(Net.forward.__get__(Net()))
