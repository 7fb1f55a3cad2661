"""Regions as ONNX graphs: they compute what torch does, and ONNX Runtime makes of them what it makes of an export."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lrcompile.devices.onnx_graph import Weight
from lrcompile.devices.onnx_region import UnsupportedRegion, lower_region, region_to_onnx
from lrcompile.frontend.trace import trace
from lrcompile.nn.linear import TransposedLinear
from tests.regions import of, region

aten = torch.ops.aten


def run_onnx(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {port.name: value.numpy() for port, value in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)


def fresh(module: nn.Module) -> nn.Module:
    """The module in inference mode with statistics and parameters that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.eval()


X2, X3 = torch.linspace(-3, 3, 24).reshape(3, 8), torch.linspace(-4, 4, 48).reshape(2, 3, 8)
SIGNAL, IMAGE, VOLUME = (torch.randn(2, 4, *[9] * n, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3))
TOKENS = torch.tensor([[1, 2, 0], [3, 3, 1]])
HEADS = tuple(torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
MASK = torch.ones(5, 5, dtype=torch.bool).tril()

VECTORS = (torch.linspace(0.1, 0.4, 4), torch.linspace(-1, 1, 4))
ACTIVATIONS = (
    *("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "relu6", "leaky_relu", "hardtanh"),
    *("neg", "exp", "erf"),
)
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear 2d": (of(nn.Linear(8, 5)), (X2,)),
    "linear 3d": (of(nn.Linear(8, 5)), (X3,)),
    "linear without bias": (of(nn.Linear(8, 5, bias=False)), (X3,)),
    "linear subclass": (of(TransposedLinear(8, 5)), (X3,)),
    "conv1d": (of(nn.Conv1d(4, 6, 3, padding=1)), (SIGNAL,)),
    "conv2d": (of(nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False)), (IMAGE,)),
    "conv2d same": (of(nn.Conv2d(4, 6, 4, padding="same", dilation=2)), (IMAGE,)),
    "conv2d valid": (of(nn.Conv2d(4, 6, 3, padding="valid")), (IMAGE,)),
    "conv3d": (of(nn.Conv3d(4, 6, 3, dilation=2)), (VOLUME,)),
    "conv transpose 1d": (of(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)), (SIGNAL,)),
    "conv transpose 2d": (of(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)), (IMAGE,)),
    "conv transpose 3d": (of(nn.ConvTranspose3d(4, 6, 2, stride=2)), (VOLUME,)),
    "batch norm 2d": (of(fresh(nn.BatchNorm2d(4))), (IMAGE,)),
    "batch norm plain": (of(nn.BatchNorm1d(4, affine=False).eval()), (SIGNAL,)),
    "layer norm": (of(fresh(nn.LayerNorm((3, 8)))), (X3,)),
    "layer norm plain": (of(nn.LayerNorm(8, elementwise_affine=False)), (X3,)),
    "embedding": (of(nn.Embedding(5, 6)), (TOKENS,)),
    "dropout": (of(nn.Dropout(0.5).eval()), (X3,)),
    **{name: (of(getattr(aten, name).default), (X3,)) for name in ACTIVATIONS},
    "gelu tanh": (of(aten.gelu.default, approximate="tanh"), (X3,)),
    "clamp": (of(aten.clamp.default, -1, 2), (X3,)),
    "clamp below": (of(aten.clamp.default, 0.5), (X3,)),
    "clamp above": (of(aten.clamp_max.default, 0.5), (X3,)),
    "add scalar": (of(aten.add.Tensor, 2), (X3,)),
    "add with factor": (of(aten.add.Tensor, alpha=2), (X3, X3 + 1)),
    "sub": (of(aten.sub.Tensor), (X3, X3[:1])),
    "mul": (of(aten.mul.Tensor), (X3, X3[:, :1])),
    "mul promotes": (of(aten.mul.Tensor), (X3, TOKENS[..., None])),
    "div": (of(aten.div.Tensor, 3), (X3,)),
    "rsub": (of(aten.rsub.Scalar, 1), (X3,)),
    "rsqrt": (of(aten.rsqrt.default), (X3.abs() + 0.1,)),
    "in place": (of(aten.relu_.default), (X3,)),
    "pow": (of(aten.pow.Tensor_Scalar, 2), (X3,)),
    "view": (of(aten.view.default, [6, 8]), (X3,)),
    "reshape": (of(aten.reshape.default, [2, -1]), (X3,)),
    "flatten": (of(aten.flatten.using_ints, 1), (X3,)),
    "unflatten": (of(aten.unflatten.int, -1, [2, 4]), (X3,)),
    "permute": (of(aten.permute.default, [2, 0, -2]), (X3,)),
    "transpose": (of(aten.transpose.int, 1, -1), (X3,)),
    "swapaxes": (of(aten.swapaxes.default, 0, 1), (X3,)),
    "t": (of(aten.t.default), (X2,)),
    "mT": (of(aten.mT.default), (X3,)),
    "unsqueeze": (of(aten.unsqueeze.default, -1), (X3,)),
    "squeeze": (of(aten.squeeze.dim, 1), (X3[:, :1],)),
    "squeeze nothing": (of(aten.squeeze.dim, 1), (X3,)),
    "slice": (of(aten.slice.Tensor, -1, 1, -2, 2), (X3,)),
    "slice all": (of(aten.slice.Tensor, 0, 0, 2**63 - 1), (X3,)),
    "select": (of(aten.select.int, 1, -1), (X3,)),
    "cat": (lambda tape, x: tape(aten.cat.default, [x, tape(aten.relu.default, x)], -1), (X3,)),
    "expand": (of(aten.expand.default, [-1, 4, 3, -1]), (X3[:, None],)),
    "softmax": (of(aten.softmax.int, 1), (X3,)),
    "to": (of(aten.to.dtype, torch.float64), (X3,)),
    "matmul": (of(aten.matmul.default), (X3, X2.T.contiguous())),
    "bmm": (of(aten.bmm.default), (X3, X3.mT.contiguous())),
    "addmm": (of(aten.addmm.default, alpha=2), (X2[:, :3].contiguous(), X2, X2.T[:, :3].contiguous())),
    "mean": (of(aten.mean.dim, [-1], True), (X3,)),
    "mean of all": (of(aten.mean.default), (X3,)),
    "sum": (of(aten.sum.dim_IntList, [0, 2]), (X3,)),
    "pad": (of(aten.pad.default, [1, 2, 0, 3], "constant", 1.5), (X3,)),
    "max pool": (of(aten.max_pool2d.default, [3, 3], [2, 2], [1, 1], [1, 1], True), (IMAGE,)),
    "average pool": (of(aten.avg_pool2d.default, [3], [2], [1], False, False), (IMAGE,)),
    "global pool": (of(aten.adaptive_avg_pool2d.default, [1, 1]), (IMAGE,)),
    "adaptive pool": (of(aten.adaptive_avg_pool2d.default, [3, 3]), (IMAGE,)),
    "attention": (of(aten.scaled_dot_product_attention.default), HEADS),
    "attention causal": (of(aten.scaled_dot_product_attention.default, None, 0.0, True), HEADS),
    "attention scaled": (of(aten.scaled_dot_product_attention.default, scale=0.3), HEADS),
    "attention masked": (of(aten.scaled_dot_product_attention.default), (*HEADS, MASK)),
    "attention biased": (of(aten.scaled_dot_product_attention.default), (*HEADS, MASK.float())),
    "attention grouped": (
        of(aten.scaled_dot_product_attention.default, enable_gqa=True),
        (HEADS[0], *(x[:, :1] for x in HEADS[1:])),
    ),
    "attention 3d": (of(aten.scaled_dot_product_attention.default), tuple(h[0] for h in HEADS)),
    "instance norm": (of(aten.instance_norm.default, *[None] * 4, True, 0.1, 1e-5, False), (IMAGE,)),
    "instance norm affine": (of(aten.instance_norm.default, None, None, True, 0.1, 1e-5, False), (IMAGE, *VECTORS)),
    "group norm": (lambda tape, x, w, c: tape(aten.group_norm.default, x, 2, w, c), (IMAGE, *VECTORS)),
    "group norm plain": (of(aten.group_norm.default, 2), (IMAGE,)),
    "rms norm": (of(aten.rms_norm.default, [3, 8]), (X3,)),
    "rms norm weighted": (lambda tape, x, w: tape(aten.rms_norm.default, x, [8], w, 0.1), (X3, X3[0, 0])),
    "prelu": (of(aten.prelu.default), (IMAGE, VECTORS[0][:1])),
    "prelu of channels": (of(aten.prelu.default), (IMAGE, VECTORS[0])),
    "nearest": (of(aten.upsample_nearest2d.vec, None, [2.0, 3.0]), (IMAGE,)),
    "nearest to a size": (of(aten.upsample_nearest1d.vec, [27], None), (SIGNAL,)),
    "bilinear": (of(aten.upsample_bilinear2d.vec, None, False, [2.0, 2.0]), (IMAGE,)),
    "trilinear": (of(aten.upsample_trilinear3d.vec, None, True, [2.0, 2.0, 2.0]), (VOLUME,)),
    "layer norm function": (of(aten.layer_norm.default, [8]), (X3,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_region_computes_what_torch_does(name: str, dynamic_batch: bool) -> None:
    function, inputs = CASES[name]
    gm = region(function, *inputs)
    with torch.no_grad():
        expected = gm(*(value.clone() for value in inputs))
    [got] = run_onnx(region_to_onnx(gm, dynamic_batch=dynamic_batch), inputs)
    assert got.shape == tuple(expected.shape)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "attention" in name])
def test_attention_is_one_operator_from_opset_23_on(name: str) -> None:
    function, inputs = CASES[name]
    gm = region(function, *inputs)
    model = region_to_onnx(gm, opset=23)
    heads = inputs[0].dim() == 4
    assert [node.op_type for node in model.graph.node].count("Attention") == heads
    [got] = run_onnx(model, inputs)
    torch.testing.assert_close(torch.from_numpy(got), gm(*inputs), rtol=1e-5, atol=1e-5)


def test_split_outputs_and_shared_values() -> None:
    def split(tape: Any, x: fx.Node) -> Any:
        parts = tape(aten.split_with_sizes.default, x, [3, 5], -1)
        first, second = (tape(operator.getitem, parts, i) for i in (0, 1))
        return x, second, second, tape(aten.mul.Tensor, first, 2)

    gm = region(split, X3)
    got = run_onnx(region_to_onnx(gm), (X3,))
    for value, expected in zip(got, gm(X3), strict=True):
        np.testing.assert_array_equal(value, expected.numpy())


def test_numbers_computed_from_shapes_are_constants() -> None:
    gm = region(lambda tape, x: tape(aten.view.default, x, [tape(aten.sym_size.int, x, 0), 24]), X3)
    [got] = run_onnx(region_to_onnx(gm), (X3,))
    assert got.shape == (2, 24)


def test_a_shared_module_is_stored_once() -> None:
    layer = nn.Linear(8, 8)
    model = region_to_onnx(region(lambda tape, x: tape(layer, tape(layer, x)), X3))
    assert len(model.graph.initializer) == 2


def test_fake_weights_become_small_values_without_zeros_or_denormals() -> None:
    with FakeTensorMode():
        fake = nn.Linear(8, 5)
    gm = region(of(nn.Linear(8, 5)), X3)
    gm.m0.weight = fake.weight
    gm.m0.bias = nn.Parameter(torch.empty(5, device="meta"))
    first, second = region_to_onnx(gm), region_to_onnx(gm)
    assert first == second
    for initializer in first.graph.initializer:
        values = np.abs(onnx.numpy_helper.to_array(initializer))
        assert values.min() > 1e-3
        assert values.max() < 0.1


@pytest.mark.parametrize("shape", [(1,), (3, 7), (400, 300)], ids=["one", "few", "more than are drawn"])
def test_no_two_fake_weights_are_equal(shape: tuple[int, ...]) -> None:
    """Or ONNX Runtime would compute only once what is done with them."""
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bfloat16)]
    for tensor, bits in zip(tensors, (24, 8), strict=True):
        found = {Weight(f"w{i}", tensor, positive=True).proto().raw_data for i in range(100)}
        assert len(found) == 100 or (bits == 8 and shape == (1,))  # so many different values it does not have
        values = onnx.numpy_helper.to_array(Weight("w0", tensor, positive=True).proto()).astype(np.float32)
        assert values.shape == shape
        assert 0.0099 < values.min() <= values.max() < 0.0301


UNSUPPORTED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "module": (of(nn.GroupNorm(2, 4)), (IMAGE,), "module GroupNorm"),
    "operator": (of(aten.cumsum.default, 1), (X3,), "operator aten.cumsum"),
    "padding mode": (of(nn.Conv2d(4, 4, 3, padding_mode="circular")), (IMAGE,), "padding mode circular"),
    "statistics": (of(nn.BatchNorm2d(4, track_running_stats=False)), (IMAGE,), "without running statistics"),
    "rounding": (of(aten.div.Tensor_mode, 2, rounding_mode="floor"), (X3,), "division with rounding"),
    "unbatched": (of(nn.Conv2d(4, 4, 3)), (IMAGE[0],), "without a batch axis"),
    "in place": (
        lambda tape, x: (lambda y: tape(aten.add.Tensor, tape(aten.relu_.default, y), y))(tape(aten.neg.default, x)),
        (X3,),
        "relu_ writes into a value that others read",
    ),
    "scale": (
        lambda tape, x: tape(aten.scaled_dot_product_attention.default, x, x, x, scale=-1.0),
        (X3,),
        "a negative scale",
    ),
    "data type": (of(aten.abs.default), (torch.zeros(2, dtype=torch.complex64),), "data type torch.complex64"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_nodes_are_named(name: str) -> None:
    function, inputs, reason = UNSUPPORTED[name]
    with pytest.raises(UnsupportedRegion, match=reason):
        region_to_onnx(region(function, *inputs))


def test_signature_is_of_structure_alone() -> None:
    def signature(layer: nn.Module, x: Tensor = X3, **options: Any) -> str:
        return lower_region(region(of(layer), x), **options).signature()

    assert signature(nn.Linear(8, 5)) == signature(nn.Linear(8, 5))
    different = {
        signature(nn.Linear(8, 5)),
        signature(nn.Linear(8, 6)),
        signature(nn.Linear(8, 5, bias=False)),
        signature(nn.Linear(8, 5), X2),
        signature(nn.Linear(8, 5), dynamic_batch=False),
        signature(nn.Linear(8, 5).double(), X3.double()),
    }
    assert len(different) == 6


class _Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class _ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.conv(x))


class _GroupedHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (4, 2)).transpose(1, 2).split(2, 1)
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


class _Block(nn.Module):
    """Attention from one layer, whose pieces have the batch on another axis in between, and norms of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(8, 24), nn.Linear(8, 8), _Perceptron()
        self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2).flatten(2)
        x = self.first(x + self.out(y))
        return self.last(x + self.mlp(x))


class _LengthFirst(nn.Module):
    """Layers on sequences that are laid out by their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = _Perceptron(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.norm(x + self.mlp(x)).transpose(0, 1)


@pytest.mark.parametrize(
    ("module", "x", "opset"),
    [
        (_Perceptron(), X3, 20), (_ConvBlock(), IMAGE, 20), (_GroupedHeads(), X3, 23), (_Block(), X3, 20),
        (_LengthFirst(), X3, 20),
    ],
    ids=["mlp", "conv", "grouped heads", "block", "length first"],
)  # fmt: skip
def test_onnx_runtime_makes_the_same_of_it_as_of_an_export(
    module: nn.Module, x: Tensor, opset: int, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            module, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
        ).model_proto  # fmt: skip
    ours = region_to_onnx(trace(module, (x,)).graph.gm, opset=opset)
    found, expected = _optimized(ours, tmp_path), _optimized(exported, tmp_path)
    sizes = {"Shape", "Gather", "Slice", "Concat"}  # that an export computes for the keys that are turned
    assert found == Counter({name: count for name, count in expected.items() if name not in sizes})


def _optimized(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
