"""Lowering to rank 4 at the level of the graph: exact in float64, for every option of what it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from lrcompile.frontend.trace import Traced, run, trace
from lrcompile.graph.graph import Graph, propagate
from lrcompile.graph.verify import relative_error
from lrcompile.lower.rank4 import folded_io, rank_of, to_rank

EXACT = 1e-10
aten = torch.ops.aten


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Volumes of a few elements: threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lowered(traced: Traced, io_rank: int | None = None) -> Graph:
    """The lowered graph, held to its contract and compared with the original at three batch sizes."""
    result = to_rank(traced, 4, io_rank, EXACT)  # compares at two
    assert rank_of(result.graph, inside=io_rank is None) <= 4
    count = 5 if traced.dynamic_batch else len(traced.flat[0])
    more = [torch.randn(count, *value.shape[1:], dtype=value.dtype) for value in traced.flat]
    expected, got = run(traced.graph.gm, more), run(result.graph.gm, [folded_io(x) if io_rank else x for x in more])
    assert relative_error([folded_io(y) if io_rank else y for y in expected], got) <= EXACT
    return result.graph


def single(layer: nn.Module | Any, x: Tensor, *args: Any) -> Traced:
    """A graph of one layer, or of one call of an operator."""
    root, graph = nn.Module(), fx.Graph()
    node = graph.placeholder("x")
    if isinstance(layer, nn.Module):
        root.add_module("layer", layer.eval())
        graph.output((graph.call_module("layer", (node,)),))
    else:
        graph.output((graph.call_function(layer, (node, *args)),))
    lifted = propagate(fx.GraphModule(root, graph), (x,))
    return Traced(lifted, (x,), {}, (x,), ("x",), ("y",), open_axes=((0,),))


def volume(channels: int, *sizes: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *sizes, dtype=torch.float64)


def three(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


@st.composite
def convolutions(draw: st.DrawFn, *, transposed: bool) -> tuple[dict[str, Any], tuple[int, int, int]]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group = draw(st.sampled_from([1, 2]))
    stride, dilation = draw(three(1, 3)), draw(three(1, 2))
    options: dict[str, Any] = {
        "in_channels": groups * per_group,
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": draw(st.one_of(three(1, 3), st.sampled_from([(1, 3, 3), (3, 1, 1), (2, 2, 2), (4, 1, 1)]))),
        "stride": draw(st.sampled_from([(1, 1, 1), stride])),
        "padding": draw(st.sampled_from([(0, 0, 0), draw(three(0, 2))])),
        "dilation": draw(st.sampled_from([(1, 1, 1), dilation])),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        spare = [max(s, d) - 1 for s, d in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, most)) for most in spare)
    elif options["stride"] == (1, 1, 1) and draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
    return options, draw(three(1, 6))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions(transposed=False))
def test_convolution(case: tuple[dict[str, Any], tuple[int, int, int]]) -> None:
    options, sizes = case
    spans = [d * (k - 1) + 1 for d, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    pads = options["padding"]
    if pads != "same":
        ends = (0, 0, 0) if pads == "valid" else pads
        assume(all(size + 2 * p >= span for size, p, span in zip(sizes, ends, spans, strict=True)))
    layer = nn.Conv3d(**options).double()
    graph = lowered(single(layer, volume(options["in_channels"], *sizes)))
    assert not list(graph.modules_of(nn.Conv3d))


@given(convolutions(transposed=True))
def test_transposed_convolution(case: tuple[dict[str, Any], tuple[int, int, int]]) -> None:
    options, sizes = case
    layer = nn.ConvTranspose3d(**options).double()
    x = volume(options["in_channels"], *sizes)
    try:
        out = layer(x)
    except RuntimeError:  # nothing is left of a small volume
        assume(False)
    assume(out.numel() > 0)
    graph = lowered(single(layer, x))
    assert not list(graph.modules_of(nn.ConvTranspose3d))


@st.composite
def pools(draw: st.DrawFn) -> tuple[Any, ...]:
    kernel = draw(three(1, 3))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    stride = draw(st.one_of(st.just([]), three(1, 3).map(list)))
    return draw(three(3, 7)), list(kernel), stride, padding, draw(three(1, 2)), draw(st.booleans()), draw(st.booleans())


@given(pools(), st.sampled_from([None, 1, 5]))
def test_pools(case: tuple[Any, ...], divisor: int | None) -> None:
    sizes, kernel, stride, padding, dilation, ceil, whole = case
    x = volume(3, *sizes)
    lowered(single(aten.avg_pool3d.default, x, kernel, stride, padding, ceil, whole, divisor))
    fits = all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(sizes, padding, dilation, kernel, strict=True))
    if fits:
        lowered(single(aten.max_pool3d.default, x, kernel, stride, padding, list(dilation), ceil))


@given(three(1, 7), three(1, 7), st.booleans(), st.booleans())
def test_trilinear(sizes: tuple[int, ...], wanted: tuple[int, ...], corners: bool, by_factors: bool) -> None:
    factors = [w / n + 0.01 * (w != n) for w, n in zip(wanted, sizes, strict=True)]
    options = (None, corners, factors) if by_factors else (list(wanted), corners, None)
    lowered(single(aten.upsample_trilinear3d.vec, volume(2, *sizes), *options))


@given(three(1, 7), three(1, 7), st.booleans())
def test_nearest(sizes: tuple[int, ...], wanted: tuple[int, ...], exact: bool) -> None:
    target = aten._upsample_nearest_exact3d.vec if exact else aten.upsample_nearest3d.vec
    lowered(single(target, volume(2, *sizes), list(wanted), None))
    lowered(single(target, volume(2, *sizes), None, [float(w) for w in wanted]))


@given(three(1, 7), three(1, 7))
def test_adaptive_pools(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    lowered(single(aten.adaptive_avg_pool3d.default, volume(2, *sizes), list(wanted)))


def windows(x: Tensor) -> Tensor:
    """Video Swin: windows of (2, 2, 2), rank 8 on the way, and back."""
    b, c, t, h, w = x.shape
    y = x.permute(0, 2, 3, 4, 1).reshape(b, t // 2, 2, h // 2, 2, w // 2, 2, c)
    y = y.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 8, c)
    y = (y @ y.mT).softmax(-1) @ y
    y = y.reshape(b, t // 2, h // 2, w // 2, 2, 2, 2, c).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, h, w, c)
    return torch.roll(y, (1, -1), (1, 2))


def shuffled(x: Tensor) -> Tensor:
    """Pixel shuffle in three dimensions."""
    b, c, t, h, w = x.shape
    y = torch.cat([x, x], 1).reshape(b, c // 4, 2, 2, 2, t, h, w)
    return y.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 4, 2 * t, 2 * h, 2 * w)


class With(nn.Module):
    """A function with a layer and two stored tensors of rank 5."""

    def __init__(self, layer: nn.Module, use: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.use = layer, use
        self.place = nn.Parameter(torch.randn(1, 4, 4, 6, 8))
        self.scale = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "elementwise": lambda m, x: torch.sigmoid(x * 2 + m.place) * m.scale - x.square(),
    "where": lambda m, x: torch.where(x > 0, x, x * m.place).clamp(-1, 1),
    "short operand in front": lambda m, x: m.layer(x) * x.mean((2, 3, 4), keepdim=True),
    "short in time": lambda m, x: x - x.mean(2, keepdim=True),
    "short in space": lambda m, x: x * x.amax((3, 4), keepdim=True) + x.sum(1, keepdim=True),
    "alternating": lambda m, x: x * m.place[:, :, :1, :, :1] * m.place[:, :1, :, :1],
    "no dim": lambda m, x: x.mean() + x.sum((0, 1, 2, 3, 4)),
    "spread": lambda m, x: x.std((1, 3), unbiased=False) + x.var((1, 3)),
    "over all in turn": lambda m, x: x.mean(4).mean(3).amax(2),
    "softmax": lambda m, x: x.softmax(1) + x.softmax(2) + torch.log_softmax(x, -1),
    "cumulative": lambda m, x: x.cumsum(2),
    "flattened": lambda m, x: m.layer(x).flatten(2).transpose(1, 2),
    "flattened from the start": lambda m, x: m.layer(x).flatten(1),
    "flattened frames": lambda m, x: m.layer(x).transpose(1, 2).flatten(0, 1).relu(),
    "channels last": lambda m, x: functional.layer_norm(m.layer(x).permute(0, 2, 3, 4, 1), [4]).permute(0, 4, 1, 2, 3),
    "frames": lambda m, x: [m.layer(x)[:, :, i] for i in (0, -1)],
    "slices": lambda m, x: m.layer(x)[:, 1:, ::2, 2:-1, 1::3],
    "unbound": lambda m, x: sum(x.unbind(2)),
    "split": lambda m, x: torch.cat(list(reversed(m.layer(x).split([1, 3], 1))), 1) + torch.cat(x.chunk(2, 2), 2),
    "stacked": lambda m, x: torch.stack([x[:, :, 0], x[:, :, 1]], 2) - torch.stack([x.mean(2)] * 2, -3),
    "repeated": lambda m, x: x[:, :1].expand(-1, 4, -1, -1, -1) + x.mean(3, keepdim=True).repeat(1, 1, 1, 6, 1),
    "flipped": lambda m, x: x.flip(2, 4).movedim(2, 0).movedim(0, 2),
    "padded": lambda m, x: functional.pad(m.layer(x), (1, 2, 0, 1, 1, 0), value=3.0),
    "reflected": lambda m, x: functional.pad(x, (1, 2, 0, 1, 1, 0), mode="reflect"),
    "replicated": lambda m, x: functional.pad(x, (1, 2, 0, 1, 1, 0), mode="replicate"),
    "circular": lambda m, x: functional.pad(x, (1, 2, 0, 1, 1, 0), mode="circular"),
    "group norm": lambda m, x: functional.group_norm(m.layer(x), 2, m.scale.flatten(), m.scale.flatten()),
    "instance norm": lambda m, x: functional.instance_norm(m.layer(x)),
    "batch statistics": lambda m, x: functional.batch_norm(m.layer(x), None, None, training=True)[:, :, 1:],
    "prelu": lambda m, x: functional.prelu(m.layer(x), m.scale.flatten()) + functional.prelu(x, m.scale.flatten()[:1]),
    "squeezed": lambda m, x: m.layer(x).mean((3, 4), keepdim=True).squeeze(-1).squeeze(-1),
    "squeeze and excite": lambda m, x: x * m.layer(functional.adaptive_avg_pool3d(x, 1)).sigmoid(),
    "layers in turn": lambda m, x: m.layer(m.layer(x).relu()) + m.layer(x),
    "adaptive": lambda m, x: (
        functional.adaptive_avg_pool3d(x, (3, 6, 5)) + functional.adaptive_max_pool3d(x, (3, 6, 5))
    ),
    "indices unused": lambda m, x: functional.max_pool3d(x, 2, return_indices=True)[0],
    "pooled pictures": lambda m, x: functional.adaptive_avg_pool2d(x[:, :, 0], (4, 3)),
    "windows": lambda m, x: windows(m.layer(x)),
    "shuffled": lambda m, x: shuffled(m.layer(x)),
    "attention": lambda m, x: functional.scaled_dot_product_attention(*[m.layer(x).permute(0, 2, 3, 4, 1)] * 3),
    "masked attention": lambda m, x: functional.scaled_dot_product_attention(x, x, x, m.place[:, :1, :, :, :6]),
    "products": lambda m, x: (x @ x.mT) @ m.place[0, :, :, :, :6] + m.layer(x)[..., :6].mT.mT,
    "matrix": lambda m, x: m.layer(x) @ m.place[0, 0, 0].mT + (x @ m.place[0, 0, 0, 0])[..., None],
    "sizes": lambda m, x: x.reshape(x.shape[0] * x.shape[2], x.shape[1], -1).mean(-1) * x.shape[3],
    "input and output": lambda m, x: (x, m.layer(x), x.mean(1)),
    "types": lambda m, x: (m.layer(x) > 0).to(torch.float64).contiguous(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize("io_rank", [None, 4])
@pytest.mark.parametrize("use", USES)
def test_operations(use: str, io_rank: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.Conv3d(4, 4, 1 if use == "squeeze and excite" else 3, padding="same")
    model, x = With(layer, USES[use]).double(), volume(4, 4, 6, 8)
    traced = trace(model, (x,))
    assert traced.dynamic_batch, traced.notes
    lowered(traced, io_rank)
