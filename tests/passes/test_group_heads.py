from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrcompile_passes import GroupHeads, LowRankLinear
from onnx.shape_inference import infer_shapes
from torch import Tensor, nn

import lrcompile
from lrcompile.emit.onnx import to_onnx
from lrcompile.errors import InputError
from lrcompile.frontend.trace import Traced, trace
from lrcompile.graph.graph import Graph, aten, parameter_count, prune
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import apply
from tests import panel
from tests.passes import common

PASS = GroupHeads(inits=("mean", "first", "similar"))
SDPA = aten.scaled_dot_product_attention.default
ROLES = ("q", "k", "v")


@dataclass(frozen=True)
class Options:
    """One way to write attention. Sizes are constants, so that a graph is drawn in milliseconds."""

    heads: int = 4
    size: int = 4
    width: int = 6
    length: int = 5
    bias: bool = True
    layout: str = "separate"  # or chunk, unbind, interleaved, flat, sequence first
    mask: str = "none"  # or causal, padded, added
    cross: bool = False
    rotary: str = "none"  # or late (heads before positions), early (positions before heads)
    scaled: bool = False

    @property
    def memory(self) -> int:
        return self.length + 2 if self.cross else self.length


class Attention(nn.Module):
    """Attention in ATen operators, as the compiler sees it."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.o = options
        inner = options.heads * options.size
        if options.layout == "separate" or options.cross:
            self.q, self.k, self.v = (nn.Linear(options.width, inner, bias=options.bias) for _ in ROLES)
        else:
            self.qkv = nn.Linear(options.width, 3 * inner, bias=options.bias)
        self.out = nn.Linear(inner, options.width)
        angles = torch.rand(options.memory, options.size)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """x [batch, length, width], memory [batch, memory, width], mask [batch, 1, length, memory] or [1, …]."""
        o = self.o
        if o.layout == "separate" or o.cross:
            source = memory if o.cross else x
            parts = [
                aten.reshape.default(layer(y), [-1, n, o.heads, o.size])
                for layer, y, n in ((self.q, x, o.length), (self.k, source, o.memory), (self.v, source, o.memory))
            ]
        else:
            parts = self.fused(x)
        if o.scaled:
            parts[0] = aten.mul.Tensor(parts[0], 0.3)
        if o.rotary == "early":
            parts[:2] = [self.rotated(part, n, 1) for part, n in zip(parts, (o.length, o.memory), strict=False)]
        parts = [aten.transpose.int(part, 1, 2) for part in parts]
        if o.rotary == "late":
            parts[:2] = [self.rotated(part, n, 0) for part, n in zip(parts, (o.length, o.memory), strict=False)]
        options: dict[str, Any] = {"scale": 0.4} if o.scaled else {}
        if o.mask == "causal":
            options["is_causal"] = True
        elif o.mask != "none":
            options["attn_mask"] = mask
        y = aten.transpose.int(SDPA(*parts, **options), 1, 2)
        return self.out(aten.reshape.default(y, [-1, o.length, o.heads * o.size]))

    def fused(self, x: Tensor) -> list[Tensor]:
        """q, k and v [batch, length, heads, size] of one layer."""
        o = self.o
        inner = o.heads * o.size
        shape = [-1, o.length, o.heads, o.size]
        if o.layout == "chunk":
            parts = aten.chunk.default(self.qkv(x), 3, -1)
            return [aten.reshape.default(parts[i], shape) for i in range(3)]
        if o.layout == "unbind":
            y = aten.reshape.default(self.qkv(x), [-1, o.length, 3, o.heads, o.size])
            parts = aten.unbind.int(aten.permute.default(y, [2, 0, 3, 1, 4]), 0)
            return [aten.transpose.int(parts[i], 1, 2) for i in range(3)]
        if o.layout == "interleaved":
            y = aten.reshape.default(self.qkv(x), [-1, o.length, o.heads, 3 * o.size])
            return [aten.slice.Tensor(y, 3, i * o.size, (i + 1) * o.size) for i in range(3)]
        if o.layout == "flat":
            y = aten.reshape.default(self.qkv(aten.reshape.default(x, [-1, o.width])), [-1, o.length, 3 * inner])
            parts = aten.split.Tensor(y, inner, 2)
            return [aten.reshape.default(parts[i], shape) for i in range(3)]
        assert o.layout == "sequence first"
        y = aten.reshape.default(self.qkv(aten.transpose.int(x, 0, 1)), [o.length, -1, 3, inner])
        parts = [aten.select.int(aten.permute.default(y, [2, 0, 1, 3]), 0, i) for i in range(3)]
        return [aten.transpose.int(aten.reshape.default(part, [o.length, -1, o.heads, o.size]), 0, 1) for part in parts]

    def rotated(self, x: Tensor, length: int, spare: int) -> Tensor:
        """Rotary embedding by halves; `spare` axes of heads follow that of positions."""
        half = self.o.size // 2
        first, second = aten.slice.Tensor(x, 3, 0, half), aten.slice.Tensor(x, 3, half, 2 * half)
        turned = aten.cat.default([aten.neg.default(second), first], -1)
        cos, sin = (aten.slice.Tensor(t, 0, 0, length) for t in (self.cos, self.sin))
        if spare:
            cos, sin = aten.unsqueeze.default(cos, 1), aten.unsqueeze.default(sin, 1)
        return aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(turned, sin))

    def rows(self, role: int) -> Tensor:
        """Features of the layer for a role, [heads × size]."""
        o = self.o
        index = torch.arange(o.heads * o.size).reshape(o.heads, o.size)
        if o.layout == "separate" or o.cross:
            return index
        if o.layout == "interleaved":
            return index % o.size + role * o.size + 3 * o.size * torch.arange(o.heads)[:, None]
        return index + role * o.heads * o.size

    def layer(self, role: int) -> nn.Linear:
        return getattr(self, "qkv", None) or getattr(self, ROLES[role])

    @torch.no_grad()
    def repeat(self, form: str, queries: int, keys: int, order: list[int] | None = None) -> Attention:
        """Makes the heads that a grouping puts together equal, then reorders them all."""
        for role in range(3):
            layer, rows = self.layer(role), self.rows(role)
            heads = [(o if form == "GKVA" else group(form, queries, keys, o)[1]) for o in range(self.o.heads)]
            if role == 0:
                heads = [(o if form == "GQA" else group(form, queries, keys, o)[0]) for o in range(self.o.heads)]
            heads = [heads[i] for i in order or range(self.o.heads)]
            for tensor in filter(lambda t: t is not None, (layer.weight, layer.bias)):
                tensor[rows] = tensor[rows][heads]
        return self

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        o = self.o
        x = torch.randn(batch, o.length, o.width, generator=generator).to(dtype)
        memory = torch.randn(batch, o.memory, o.width, generator=generator).to(dtype)
        mask = torch.rand(batch, 1, o.length, o.memory, generator=generator) > 0.3
        mask[..., 0] = True
        return x, memory, mask if o.mask == "padded" else torch.where(mask, 0.0, -2.0).to(dtype)[:1, 0]


def group(form: str, queries: int, keys: int, head: int) -> tuple[int, int]:
    """(query group, key group) of a head of GQA, GKVA or GQKVA."""
    if form == "GQKVA":
        return head // keys, head % keys
    heads = queries if form == "GQA" else keys
    return head // (heads // queries), head // (heads // keys)


def chosen(graph: Graph, form: str, queries: int, keys: int, init: str = "mean", **settings: Any) -> Rewrite:
    params = {"form": form, "queries": queries, "keys": keys, "init": init}
    found = [r for r in common.rewrites(graph, PASS, **settings) if r.params == params]
    assert len(found) == 1, (params, found, common.refusals(graph, PASS))
    return found[0]


def divisors(heads: int) -> list[int]:
    return [d for d in range(1, heads) if heads % d == 0]


def variants(heads: int) -> list[tuple[str, int, int]]:
    grids = [("GQKVA", d, heads // d) for d in divisors(heads) if d > 1]
    return [("GQA", heads, d) for d in divisors(heads)] + [("GKVA", d, heads) for d in divisors(heads)] + grids


@st.composite
def cases(draw: Any) -> tuple[Options, tuple[str, int, int], str, int]:
    heads = draw(st.sampled_from([2, 3, 4, 6, 8]))
    cross = draw(st.booleans())
    layouts = ["separate", "chunk", "unbind", "interleaved", "flat", "sequence first"]
    options = Options(
        heads=heads,
        size=draw(st.sampled_from([2, 4, 6])),
        width=draw(st.integers(3, 8)),
        length=draw(st.integers(1, 5)),
        bias=draw(st.booleans()),
        layout="separate" if cross else draw(st.sampled_from(layouts)),
        mask=draw(st.sampled_from(["none", "padded", "added"] + ["causal"] * (not cross))),
        cross=cross,
        rotary=draw(st.sampled_from(["none", "late", "early"])),
        scaled=draw(st.booleans()),
    )
    variant = draw(st.sampled_from(variants(heads)))
    inits = ["mean", "first"] + ["similar"] * (variant[0] == "GQKVA" or min(variant[1:]) > 1)
    return options, variant, draw(st.sampled_from(inits)), draw(st.integers(1, 3))


@pytest.mark.slow
@given(cases())
def test_equal_heads_are_shared_exactly(case: tuple[Options, tuple[str, int, int], str, int]) -> None:
    options, variant, init, batch = case
    torch.manual_seed(0)
    order = torch.randperm(options.heads).tolist() if init == "similar" and variant[0] != "GQKVA" else None
    model = Attention(options).double().repeat(*variant, order)
    inputs = model.inputs(batch)
    graph = common.drawn(model, *inputs)
    rewrite = chosen(graph, *variant, init)
    assert rewrite.error < 1e-6
    result = common.applied(graph, PASS, rewrite)
    assert common.difference(result, graph, *inputs) < 1e-10
    assert parameter_count(result.gm) < parameter_count(graph.gm)


@pytest.mark.parametrize("variant", variants(6), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precisions(variant: tuple[str, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Attention(Options(heads=6, layout="chunk")).repeat(*variant).to(dtype)
    inputs = model.inputs(dtype=dtype)
    graph = common.drawn(model, *inputs)
    result = common.applied(graph, PASS, chosen(graph, *variant))
    limit = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.02}[dtype]
    assert common.difference(result, graph, *inputs) < limit


class Plain(nn.Module):
    """Self-attention as people write it."""

    def __init__(self, heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


GOLDEN = {
    ("GQA", 4, 2): [
        "q = call_module q(x)",
        "unflatten = call_function unflatten.int(q, -1, [4, -1])",
        "transpose = call_function transpose.int(unflatten, 1, 2)",
        "k = call_module k(x)",
        "v = call_module v(x)",
        "reshape_default = call_function reshape.default(k, [-1, 5, 2, 4])",
        "transpose_int = call_function transpose.int(reshape_default, 1, 2)",
        "reshape_default_1 = call_function reshape.default(v, [-1, 5, 2, 4])",
        "transpose_int_1 = call_function transpose.int(reshape_default_1, 1, 2)",
        "scaled_dot_product_attention_default = call_function scaled_dot_product_attention.default("
        "transpose, transpose_int, transpose_int_1, enable_gqa=True)",
    ],
    ("GKVA", 1, 4): [
        "q = call_module q(x)",
        "k = call_module k(x)",
        "unflatten_1 = call_function unflatten.int(k, -1, [4, -1])",
        "transpose_1 = call_function transpose.int(unflatten_1, 1, 2)",
        "v = call_module v(x)",
        "unflatten_2 = call_function unflatten.int(v, -1, [4, -1])",
        "transpose_2 = call_function transpose.int(unflatten_2, 1, 2)",
        "reshape_default = call_function reshape.default(q, [-1, 5, 1, 4])",
        "transpose_int = call_function transpose.int(reshape_default, 1, 2)",
        "expand_default = call_function expand.default(transpose_int, [-1, 4, -1, -1])",
        "scaled_dot_product_attention_default = call_function scaled_dot_product_attention.default("
        "expand_default, transpose_1, transpose_2)",
    ],
}


@pytest.mark.parametrize("variant", GOLDEN, ids=str)
def test_golden(variant: tuple[str, int, int]) -> None:
    torch.manual_seed(0)
    model, x = Plain().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    graph = common.exported(model, x)
    rewrite = chosen(graph, *variant)
    assert not rewrite.exact
    touched = {"GQA": ("k", "v"), "GKVA": ("q",)}[variant[0]]
    assert rewrite.site == (*touched, "scaled_dot_product_attention")
    result = common.applied(graph, PASS, rewrite)
    lines = [line for line in common.text(result).splitlines() if "sym_size" not in line]
    assert lines[1 : 1 + len(GOLDEN[variant])] == GOLDEN[variant]
    width = 16 * variant[2 if variant[0] == "GQA" else 1] // 4
    assert common.layers(result)[touched[0]] == f"Linear(in_features=16, out_features={width}, bias=True)"
    other = torch.randn(3, 5, 16, dtype=torch.float64)
    result.gm.recompile()
    assert common.on_other_batch(result, result.gm, (x,), (other,)) < 1e-10


@cache
def traced(causal: bool) -> Traced:
    class Model(Plain):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    torch.manual_seed(0)
    return trace(Model(), (torch.randn(2, 5, 16),))


@pytest.mark.parametrize("variant", variants(4), ids=str)
@pytest.mark.parametrize(
    ("causal", "opset"),
    [(True, 20), (False, 23), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 20), (True, 23)))],
)
def test_onnx_at_two_batch_sizes(variant: tuple[str, int, int], causal: bool, opset: int) -> None:
    graph, (x,) = traced(causal).graph, traced(causal).args
    result = common.applied(graph, PASS, chosen(graph, *variant))
    model = to_onnx(result.gm, (x,), {}, input_names=["x"], output_names=["y"], open_axes=((0,),), opset=opset)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == (opset == 23)
    if opset == 23 and variant[0] == "GQA":
        assert "Expand" not in kinds  # grouped heads are the operator's own
    assert not {"Shape", "Concat"} & set(kinds)
    ranks = {len(value.type.tensor_type.shape.dim) for value in infer_shapes(model, strict_mode=True).graph.value_info}
    assert max(ranks) <= 4
    session = ort.InferenceSession(model.SerializeToString())
    for batch in (x, torch.randn(3, 5, 16)):
        (got,) = session.run(None, {"x": batch.numpy()})
        np.testing.assert_allclose(got, common.outputs(result, batch)[0].detach().numpy(), rtol=1e-4, atol=1e-5)


TRANSFORMERS = {
    "vit": "GQKVA", "clip_vision": "GKVA", "bert": "GQKVA", "distilbert": "GQA", "gpt2": "GQKVA", "llama": "GQKVA",
    "llama_grouped": "GQA", "whisper_encoder": "GQKVA", "transformer_encoder": "GQA",
}  # fmt: skip
RELATIVE = "the mask has an axis of heads, which may differ, as a relative position bias"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_panel(name: str) -> None:
    """Heads made equal in the lifted graph of a real architecture are shared without a difference."""
    model, args, kwargs = panel.PANEL[name]()
    traced = trace(model, args, kwargs)
    graph, flat = traced.graph, traced.flat
    assert common.refusals(graph, PASS) == {}
    found = common.rewrites(graph, PASS)
    attentions = [node.name for node in graph.nodes if node.target is SDPA]
    assert {r.site[-1] for r in found} == set(attentions)
    first = [r for r in found if r.site[-1] == attentions[0] and r.params["form"] == TRANSFORMERS[name]]
    mine = [r for r in first if r.params["init"] == "mean"]
    shared = common.applied(graph, PASS, mine[-1])  # its heads are equal in the groups of `mine`
    equal = _with_equal_heads(graph, shared, mine[-1])
    result = common.applied(equal, PASS, mine[-1])
    assert common.difference(result, equal, *flat) < 1e-5
    assert mine[-1].error > 0.1
    for rewrite in first:
        other = common.applied(graph, PASS, rewrite)
        prune(other.gm)
        assert parameter_count(other.gm) < parameter_count(graph.gm)
        assert common.difference(other, graph, *flat) > 0


def _with_equal_heads(graph: Graph, shared: Graph, rewrite: Rewrite) -> Graph:
    """The graph with the weights that the shared one computes with, written out for each head."""
    result = graph.copy()
    parts = [(path, graph.site(path).module, shared.site(path).module) for path in rewrite.site[:-1]]
    for path, old, new in parts:
        if new.weight.shape == old.weight.shape:
            continue
        module = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        rows = _written_out(rewrite, old.out_features, path, len(parts))
        with torch.no_grad():
            module.weight.copy_(new.weight[rows])
            if old.bias is not None:
                module.bias.copy_(new.bias[rows])
        result.gm.set_submodule(path, module.eval())
    return result


def _written_out(rewrite: Rewrite, features: int, path: str, layers: int) -> list[int]:
    form, queries, keys = (rewrite.params[key] for key in ("form", "queries", "keys"))
    size, heads = 12, 4
    fused = features == 3 * heads * size
    stored = features // size // (3 if fused else 1)
    rows: list[int] = []
    start = 0
    for role in range(3) if fused else [0 if path.rsplit(".", 1)[-1][0] == "q" else 1]:
        groups = queries if role == 0 else keys
        if groups == stored:
            which = list(range(stored))
        elif form == "GQKVA":
            which = [group(form, queries, keys, o)[min(role, 1)] for o in range(stored)]
        else:
            which = [o // (stored // groups) for o in range(stored)]
        rows += [start + g * size + d for g in which for d in range(size)]
        start += groups * size
    return rows


@pytest.mark.parametrize("name", ["t5_encoder", "swin"])
def test_relative_position_biases_are_refused(name: str) -> None:
    model, args, kwargs = panel.PANEL[name]()
    graph = trace(model, args, kwargs).graph
    assert common.rewrites(graph, PASS) == []
    refused = common.refusals(graph, PASS)
    assert set(refused.values()) == {RELATIVE}
    assert len(refused) == sum(node.target is SDPA for node in graph.nodes)
    assert refused.keys() <= graph.sites().keys()


def test_models_without_attention_are_left_alone() -> None:
    graph = common.drawn(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    assert common.rewrites(graph, PASS) == []
    assert common.refusals(graph, PASS) == {}


class WithNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.norm(q), self.norm(k), v)


class RootMeanSquare(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6), v)


class Gated(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, torch.relu(k), v)


class Scrambled(Plain):
    """Forgets to move the axis of heads."""

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.heads, x.shape[1], -1)


class Biased(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 5, 5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, self.bias)


class HeadScales(Plain):
    """A temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * self.scale, k, v)


class Caching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.k(x)], -1)


class Returning(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) + k


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.k.weight = self.v.weight


class OneForTwo(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.k = self.v


class HalfRead(Plain):
    """Keys of a layer that computes more than is read."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(16, 32)

    def split(self, x: Tensor) -> Tensor:
        return super().split(x[..., :16])


class Tiled(Plain):
    """Heads 0 and 2 share keys, and 1 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)

    def split(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        return y if y.shape[1] == 4 else y.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2)


class OfInput(Plain):
    """Values are the input itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(torch.relu(x))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Single(Plain):
    def split(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)


class WithoutHeads(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(self.q(x), self.k(x), self.v(x)))


class Short(Plain):
    """Attends over no positions."""

    def split(self, x: Tensor) -> Tensor:
        return super().split(x[:, :0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, super().forward(x)), 1)


class Dropping(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1e-9)


class Mixed(Plain):
    """Adds neighbouring heads after they were split, as talking heads do."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k + k.flip(1), v)


class FlatFirst(Plain):
    """Scales all heads in one table, before they are laid out as heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.placed(q), self.placed(k), self.placed(v))

    def placed(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).reshape(-1, x.shape[-1]) * torch.arange(1.0, x.shape[-1] + 1)
        return (rows.reshape(x.shape[0], x.shape[2], x.shape[1], -1) + torch.ones(1, 1, 1, x.shape[-1])).transpose(1, 2)


QK_NORM = "queries or keys are normalised (QK-norm): an average would go through it"
REFUSALS: dict[type[nn.Module], dict[str, str]] = {
    WithNorm: {"q": QK_NORM},
    RootMeanSquare: {"q": QK_NORM},
    Gated: {"q": "relu between the layer and attention is not understood"},
    Scrambled: {"q": "features and positions are mixed before attention"},
    Biased: {"q": RELATIVE},
    HeadScales: {"q": "mul between the layer and attention is not understood"},
    Caching: {"q": "k is called at 2 sites"},
    Returning: {"q": "k is read outside attention too, as for a cache of keys"},
    Tied: {"q": "weight tied with v"},
    OneForTwo: {"q": "k is called at 2 sites"},
    HalfRead: {"q": "heads do not read every row of k once"},
    Tiled: {"q": "heads share key projections in an unusual order"},
    OfInput: {"q": "no linear layer computes what attention reads from relu"},
    Single: {"q": "attention has one head"},
    Short: {"q": "attention over tensors that hold nothing"},
    WithoutHeads: {"q": "attention over tensors that are not [batch, heads, length, size]"},
    Dropping: {"q": "attention drops weights at random"},
    FlatFirst: {"q": "what is read of q is of rank 2, not heads of rank 4"},
    Mixed: {"q": "flip between the layer and attention is not understood"},
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    graph = common.exported(kind(), torch.randn(2, 5, 16))
    assert common.rewrites(graph, PASS) == []
    assert common.refusals(graph, PASS) == REFUSALS[kind]


def test_open_sequence_is_refused() -> None:
    class Sequence(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.unsqueeze(0))

    graph = common.exported(Sequence(), torch.randn(5, 16))
    assert common.refusals(graph, PASS) == {"q": "the sequence length is open"}


def test_small_vision_transformer_saves_what_was_published() -> None:
    """ViT-S of 22.05 million parameters, GQKVA (arXiv 2311.03426); a percentage is of all parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000,
        image_size=32,
    )  # fmt: skip
    graph = trace(ViTForImageClassification(config).eval(), (torch.zeros(1, 3, 32, 32),)).graph
    small = parameter_count(graph.gm)
    before = small + 384 * (14**2 - 2**2)  # positions of an image of 224 pixels: 14 × 14 patches
    assert before == pytest.approx(22.05e6, rel=1e-3)
    context = common.context()
    trial, found = context.on_trial(graph.fake_mode), common.rewrites(graph, PASS)
    saved = {}
    for variant in variants(6):
        mine = [r for r in found if (*r.params.values(),) == (*variant, "mean")]
        assert len(mine) == 12
        result = graph.copy()
        for rewrite in mine:
            apply(result, PASS, rewrite, trial)
        saved[variant] = 100 * (small - parameter_count(result.gm)) / before
    assert saved == pytest.approx(PUBLISHED, abs=0.1)


PUBLISHED = {
    ("GQA", 6, 1): 13.37, ("GQA", 6, 2): 10.70, ("GQA", 6, 3): 8.02,
    ("GKVA", 1, 6): 6.69, ("GKVA", 2, 6): 5.35, ("GKVA", 3, 6): 4.01,
    ("GQKVA", 2, 3): 13.37, ("GQKVA", 3, 2): 14.71,
}  # fmt: skip


def test_error_is_that_of_the_layers_on_the_calibration_data() -> None:
    torch.manual_seed(0)
    options = Options(heads=6, bias=False)
    model = Attention(options).double()
    x, memory, mask = model.inputs(4)
    x = x * torch.logspace(-2, 0, options.width, dtype=torch.float64)  # some features hardly matter
    graph = common.drawn(model, x, memory, mask)
    context = common.context(graph, (x, memory, mask))
    for variant in variants(6):
        for init in ("mean", "similar"):
            if init == "similar" and min(variant[1:]) == 1:
                continue
            rewrite = chosen(graph, *variant, init, ctx=context)
            result = common.applied(graph, PASS, rewrite, context)
            assert rewrite.error == pytest.approx(_measured(graph, result, rewrite, x), rel=1e-5)


@torch.no_grad()
def _measured(graph: Graph, result: Graph, rewrite: Rewrite, x: Tensor) -> float:
    """The change of q, k and v as attention reads them, with the new order of heads found by the columns of W_o."""
    old_out, new_out = (g.site("out").module.weight for g in (graph, result))
    size = old_out.shape[1] // 6
    order = [
        [torch.equal(new_out[:, n], old_out[:, o]) for o in range(6 * size)].index(True) // size
        for n in range(0, 6 * size, size)
    ]
    lost = total = 0.0
    for role in range(3):
        old, new = (g.site(ROLES[role]).module.weight for g in (graph, result))
        form, queries, keys = (rewrite.params[key] for key in ("form", "queries", "keys"))
        places = [group(form, queries, keys, o)[min(role, 1)] for o in range(6)]
        if new.shape == old.shape:
            places = list(range(6))
        wide = new.unflatten(0, (-1, size))[places]
        expected = old.unflatten(0, (6, size))[order]
        lost += float((x @ (wide - expected).flatten(0, 1).T).square().sum())
        total += float((x @ old.T).square().sum())
    return (lost / total) ** 0.5


def test_similar_heads_are_brought_together() -> None:
    torch.manual_seed(0)
    model = Attention(Options(heads=6)).double().repeat("GQA", 6, 3, order=[0, 2, 4, 1, 3, 5])
    graph = common.drawn(model, *model.inputs())
    assert chosen(graph, "GQA", 6, 3, "mean").error > 0.3
    assert chosen(graph, "GQA", 6, 3, "similar").error < 1e-6
    assert chosen(graph, "GQA", 6, 3, "similar").site == ("q", "k", "v", "out", "scaled_dot_product_attention_default")


def test_groups_can_be_grouped_again() -> None:
    torch.manual_seed(0)
    model = Attention(Options(heads=8, rotary="late")).double().repeat("GQA", 8, 1)
    inputs = model.inputs()
    graph = common.drawn(model, *inputs)
    halved = common.applied(graph, PASS, chosen(graph, "GQA", 8, 4))
    found = {(r.params["form"], r.params["keys"]) for r in common.rewrites(halved, PASS)}
    assert found == {("GQA", 2), ("GQA", 1)}
    once = common.applied(halved, PASS, chosen(halved, "GQA", 8, 1))
    assert common.refusals(once, PASS) == {"q": "its keys and values are one group already"}
    assert common.difference(once, graph, *inputs) < 1e-10
    model.repeat("GKVA", 1, 8)
    queries = common.applied(graph, PASS, chosen(graph, "GKVA", 4, 8))
    again = common.applied(queries, PASS, chosen(queries, "GKVA", 2, 8))
    assert common.difference(again, graph, *inputs) < 1e-10
    grid = common.applied(graph, PASS, chosen(graph, "GQKVA", 4, 2))
    assert list(common.refusals(grid, PASS)) == ["q"]
    assert common.rewrites(grid, PASS) == []


def test_layers_that_are_not_named_may_be_split_too() -> None:
    torch.manual_seed(0)
    model = Attention(Options(heads=4, size=8, width=32)).double().repeat("GQA", 4, 2)
    inputs = model.inputs()
    graph = common.drawn(model, *inputs)
    context = common.context(graph, inputs)
    splits = [r for r in common.rewrites(graph, LowRankLinear(), context) if r.site == ("q",)]
    shared = chosen(graph, "GQA", 4, 2)
    first, second = graph.copy(), graph.copy()
    for result, rewrites in ((first, (splits[0], shared)), (second, (shared, splits[0]))):
        for rewrite in rewrites:
            apply(result, {"low-rank-linear": LowRankLinear()}.get(rewrite.pass_name, PASS), rewrite, context)
    assert common.layers(first) == common.layers(second)
    assert common.difference(first, second, *inputs) < 1e-10


def test_compile_shares_equal_heads_and_replays() -> None:
    torch.manual_seed(0)
    model = Plain(heads=8, width=256).eval()
    with torch.no_grad():
        for layer in (model.k, model.v):
            layer.weight.copy_(layer.weight[:32].repeat(8, 1))
            layer.bias.copy_(layer.bias[:32].repeat(8))
    x = torch.randn(8, 128, 256)
    passes = [GroupHeads()]
    result = lrcompile.compile(model, (x,), target="v100", passes=passes, budget=lrcompile.Budget(max_error=1e-4))
    assert "group-heads" in {rewrite.pass_name for rewrite in result.report.rewrites}
    assert result.report.error["measured"] < 1e-5
    rows = {row.site: row for row in result.report.sites}
    assert rows["k"].pass_name == "group-heads"
    assert rows["k"].params["keys"] == 1
    assert rows["k"].reason.endswith("faster here; KV cache of 1 heads for 8 of queries")
    assert result.model.get_submodule("k").weight.shape == (32, 256)
    again = lrcompile.compile(model, (x,), plan=result.plan, passes=passes)
    assert torch.equal(again.model(x), result.model(x))
    other = lrcompile.compile(
        Plain(heads=8, width=256), (x,), target="v100", passes=passes, budget=lrcompile.Budget(max_error=1e-4)
    )
    assert other.report.rewrites == ()


@pytest.mark.parametrize(
    ("form", "queries", "keys", "expected"),
    [
        ("GQA", 6, 2, "KV cache of 2 heads for 6 of queries"),
        ("GKVA", 2, 6, "KV cache as large as before"),
        ("GQKVA", 3, 2, "KV cache of 2 heads for 6 of queries"),
    ],
)
def test_remarks(form: str, queries: int, keys: int, expected: str) -> None:
    params = {"form": form, "queries": queries, "keys": keys, "init": "mean"}
    assert PASS.remark(Rewrite(PASS.name, ("k",), params)) == expected
    lossy = PASS.remark(Rewrite(PASS.name, ("k",), params, 0.3))
    assert lossy == f"{expected}; further training recovers accuracy"


def test_heads_without_divisors_have_one_group() -> None:
    graph = common.drawn(Attention(Options(heads=5)), *Attention(Options(heads=5)).inputs(dtype=torch.float32))
    found = {(r.params["form"], r.params["queries"], r.params["keys"]) for r in common.rewrites(graph, PASS)}
    assert found == {("GQA", 5, 1), ("GKVA", 1, 5)}


def test_unknown_start() -> None:
    with pytest.raises(InputError, match="unknown init median; known: mean, first, similar"):
        GroupHeads(inits=("median",))
