"""The contract of rank 4, end to end: what is emitted holds it, computes the same, and replays to the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from lrcompile_passes import GroupHeads
from torch import Tensor, nn
from torch.nn import functional

import lrcompile
from lrcompile.cli import run as command
from lrcompile.errors import InputError, VerificationError
from lrcompile.frontend.trace import trace
from lrcompile.lower.rank4 import check_rank, rank_of, to_rank
from tests.panel import PANEL, Example, bert, llama_grouped, randomise, resnet_3d, volumes


class Factored(nn.Module):
    """A (2+1)D video network: convolutions over frames, then over time, and a depthwise one over both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(8)
        self.space, self.norm_1 = nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(12)
        self.time, self.norm_2 = nn.Conv3d(12, 8, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), nn.BatchNorm3d(8)
        self.deep, self.norm_3 = nn.Conv3d(8, 8, 3, padding=1, groups=8), nn.BatchNorm3d(8)
        self.short, self.head = nn.Conv3d(8, 8, 1, stride=(2, 1, 1)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm_2(self.time(self.norm_1(self.space(x)).relu()))
        x = functional.silu(self.norm_3(self.deep((y + self.short(x)).relu())))
        return self.head(functional.max_pool3d(x, 2).mean((2, 3, 4)))


class Tubelets(nn.Module):
    """VideoMAE in small: patches of 2×8×8 pixels, by a convolution or by a reshape of rank 8, and a transformer."""

    def __init__(self, *, reshaped: bool) -> None:
        super().__init__()
        self.patches: nn.Module = nn.Linear(384, 48) if reshaped else nn.Conv3d(3, 48, (2, 8, 8), (2, 8, 8))
        self.place = nn.Parameter(0.02 * torch.randn(1, 32, 48))
        self.qkv, self.out, self.norm = nn.Linear(48, 144), nn.Linear(48, 48), nn.LayerNorm(48)
        self.up, self.down, self.head = nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.patches, nn.Conv3d):
            x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        else:
            b, c, t, h, w = x.shape
            x = x.reshape(b, c, t // 2, 2, h // 8, 8, w // 8, 8).permute(0, 2, 4, 6, 3, 5, 7, 1)
            x = self.patches(x.reshape(b, -1, 384)) + self.place
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


def clip() -> tuple[Tensor]:
    return (torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)),)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())


DEEP = ("resnet_3d", "unet_3d", "densenet_3d", "segresnet")
"""Of the panel; what is emitted is checked on shallow ones, because torch.onnx takes half a minute for each."""
SHALLOW: dict[str, Callable[[], Example]] = {
    "resnet_3d": resnet_3d,
    "unet_3d": lambda: volumes(
        "UNet", 16, spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 24), strides=(2, 2),
        num_res_units=2, norm="batch",
    ),
    "densenet_3d": lambda: volumes(
        "DenseNet", 32, spatial_dims=3, in_channels=1, out_channels=3, init_features=16, growth_rate=8,
        block_config=(2, 2),
    ),
    "segresnet": lambda: volumes(
        "SegResNet", 16, spatial_dims=3, in_channels=1, out_channels=2, init_filters=8, blocks_down=(1, 2),
        blocks_up=(1,),
    ),
}  # fmt: skip
MODELS: dict[str, Callable[[], Example]] = {
    **SHALLOW,
    "factored": lambda: (seeded(Factored), clip(), {}),
    "tubelets": lambda: (seeded(lambda: Tubelets(reshaped=False)), clip(), {}),
    "reshaped tubelets": lambda: (seeded(lambda: Tubelets(reshaped=True)), clip(), {}),
}
EXACT = lrcompile.Budget(max_error=0)


def ranks(path: Path) -> tuple[int, list[int]]:
    """(the highest rank inside an ONNX file as strict shape inference finds it, those of its inputs and outputs)."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
    inside = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    ends = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.output)}
    made = {name for node in graph.node for name in node.output if name}
    assert made <= {*inside, *ends}, "a value whose rank is not known"
    weights = [len(tensor.dims) for tensor in graph.initializer]
    return max([*(rank for name, rank in inside.items() if name not in ends), *weights]), list(ends.values())


def difference(path: Path, model: nn.Module, args: tuple[Any, ...], *, folded: bool) -> float:
    """The relative error of an ONNX file against the model."""
    session = onnxruntime.InferenceSession(path)
    inputs = [x.flatten(1, -3) if folded and x.dim() > 4 else x for x in args]
    names = [value.name for value in session.get_inputs()]
    got = torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])
    with torch.no_grad():
        expected = model(*args)
    assert folded or got.shape == expected.shape
    return float((got.flatten() - expected.flatten()).norm() / expected.norm())


SLOW = ("densenet_3d", "segresnet")
CASES = [
    pytest.param(name, io_rank, marks=pytest.mark.slow if name in SLOW else ())
    for name in MODELS
    for io_rank in (None, 4)
    if io_rank is None or name not in SHALLOW
]


@pytest.mark.parametrize(("name", "io_rank"), CASES)
def test_emitted_graph_keeps_the_rank(name: str, io_rank: int | None, tmp_path: Path) -> None:
    model, args, kwargs = MODELS[name]()
    result = lrcompile.compile(model, args, kwargs, target="x86-ort", budget=EXACT, max_rank=4, io_rank=io_rank)
    assert result.traced.dynamic_batch, result.report.notes
    report = result.save(tmp_path / "model.onnx")
    assert report.verification["onnx_vs_torch"] <= 1e-4
    inside, ends = ranks(tmp_path / "model.onnx")
    assert inside <= 4
    assert (max(ends) <= 4) == (io_rank is not None)
    for count in (2, 3):
        more = tuple(torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(2)) for x in args)
        assert difference(tmp_path / "model.onnx", model, more, folded=io_rank is not None) <= 1e-4


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in DEEP])
def test_folded_ends(name: str) -> None:
    model, args, kwargs = PANEL[name]()
    lowered = to_rank(trace(model, args, kwargs), 4, 4, 1e-5)
    assert rank_of(lowered.graph) <= 4
    assert lowered.flat[0].shape == (2, 32, 32, 32)


def test_lossy_rewrites_of_a_lowered_model(tmp_path: Path) -> None:
    model, args, kwargs = MODELS["factored"]()
    budget = lrcompile.Budget(size=0.6)
    result = lrcompile.compile(model, args, kwargs, target="x86-ort", budget=budget, max_rank=4)
    assert any(not rewrite.exact for rewrite in result.report.rewrites)
    figures = result.report.model
    assert figures["weight_bytes_after"] <= 0.6 * figures["weight_bytes_before"]
    result.save(tmp_path / "model.onnx")
    assert ranks(tmp_path / "model.onnx")[0] <= 4


def test_calibration_data_as_the_user_has_them() -> None:
    model, args, kwargs = MODELS["factored"]()
    data = lrcompile.calibration_from({"x": torch.randn(4, 3, 4, 32, 32)}, ["x"], batch=2)
    options: dict[str, Any] = {"budget": lrcompile.Budget(max_error=0.3), "calibration": data, "max_rank": 4}
    results = [lrcompile.compile(model, args, kwargs, io_rank=rank, **options) for rank in (None, 4)]
    assert results[0].report.error["measured"] == pytest.approx(results[1].report.error["measured"], abs=1e-6)
    assert results[1].model(args[0].flatten(1, -3)).shape == (2, 5)
    assert (
        "input x is taken as [2, 12, 32, 32] instead of [2, 3, 4, 32, 32]: x.flatten(1, -3)" in results[1].report.notes
    )


@pytest.mark.parametrize("make", [pytest.param(bert, marks=pytest.mark.slow), llama_grouped])
def test_transformers_keep_the_rank(make: Callable[..., Example], tmp_path: Path) -> None:
    """Their masks are read by two tensors of positions, and heads share keys: torch writes both on five axes."""
    model, args, kwargs = make(layers=1)
    result = lrcompile.compile(model, args, kwargs, target="x86-ort", budget=EXACT, max_rank=4)
    assert result.save(tmp_path / "model.onnx").verification["onnx_vs_torch"] <= 1e-4
    assert ranks(tmp_path / "model.onnx")[0] <= 4


@pytest.mark.parametrize("form", [*(pytest.param(form, marks=pytest.mark.slow) for form in ("GQA", "GKVA")), "GQKVA"])
def test_heads_that_share_keep_the_rank(form: str, tmp_path: Path) -> None:
    class Only(GroupHeads):
        """The groupings of one form."""

        name = "group-heads"

        def propose(self, graph: lrcompile.Graph, context: lrcompile.Context) -> Iterator[Any]:
            found = super().propose(graph, context)
            return (p for p in found if not isinstance(p, lrcompile.Rewrite) or p.params["form"] == form)

    torch.manual_seed(0)
    model, x = Tubelets(reshaped=False).eval(), clip()[0]
    with torch.no_grad():
        for part in (model.qkv.weight, model.qkv.bias):
            for start in (0, 48, 96):
                part[start : start + 48] = torch.cat([part[start : start + 12]] * 4)
    options = {"passes": [Only()], "max_rank": 4, "target": "v100"}
    result = lrcompile.compile(model, (x,), budget=lrcompile.Budget(size=0.97), **options)
    assert {rewrite.params["form"] for rewrite in result.report.rewrites} == {form}
    result.save(tmp_path / "model.onnx")
    assert ranks(tmp_path / "model.onnx")[0] <= 4
    assert difference(tmp_path / "model.onnx", model, (x,), folded=False) < 1e-4


@pytest.mark.parametrize("suffix", [".pt2", ""])
def test_other_outputs(suffix: str, tmp_path: Path) -> None:
    model, args, kwargs = MODELS["factored"]()
    result = lrcompile.compile(model, args, kwargs, target="x86-ort", budget=EXACT, max_rank=4, io_rank=4)
    assert rank_of(result.save(tmp_path / f"model{suffix}") and trace(result.model, result.traced.args).graph) <= 4


def test_devices_that_lack_rank_5() -> None:
    model, args, kwargs = MODELS["factored"]()
    result = lrcompile.compile(model, args, kwargs, target="ascend310", budget=EXACT)
    assert (result.plan.max_rank, result.plan.io_rank) == (4, None)
    assert any(note.startswith("lowered to rank 4") for note in result.report.notes)
    assert rank_of(lrcompile.Graph(result.model, result.traced.graph.fake_mode), inside=True) <= 4
    kept = lrcompile.compile(model, args, kwargs, target="ascend310", budget=EXACT, max_rank=8)
    assert any(isinstance(module, nn.Conv3d) for module in kept.model.modules())


def test_models_that_keep_the_rank_stay_as_they_are() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    plain = lrcompile.compile(model, (x,), target="x86-ort", budget=EXACT)
    limited = lrcompile.compile(model, (x,), target="x86-ort", budget=EXACT, max_rank=4, io_rank=4)
    assert limited.model.code == plain.model.code
    assert limited.plan.fingerprint == plain.plan.fingerprint


def test_weights_keep_their_keys_and_ties() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(x).relu()))

    model, x = randomise(Twice()), torch.randn(2, 4, 5, 6, 6)
    lowered = to_rank(trace(model, (x,)), 4, None, 1e-5).graph
    assert sorted(lowered.gm.state_dict()) == sorted(model.state_dict())
    assert len(lowered.site("conv").nodes) == 2
    assert isinstance(lowered.site("conv").module, nn.Conv2d)


def test_fixed_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).reshape(2, 4, -1)

    traced = trace(Fixed(), (torch.randn(2, 4, 5, 6, 6),))
    assert not traced.dynamic_batch
    assert rank_of(to_rank(traced, 4, 4, 1e-5).graph) <= 4


def test_half_precision_may_differ_by_what_rounding_does() -> None:
    model, x = nn.Sequential(nn.Conv3d(4, 8, 3), nn.Conv3d(8, 4, 3)).eval(), torch.randn(2, 4, 5, 6, 6)
    with pytest.raises(VerificationError, match="lowered to rank 4 differs"):
        to_rank(trace(model, (x,)), 4, None, 1e-9)
    half = trace(model.half(), (x.half(),))
    assert rank_of(to_rank(half, 4, None, 1e-9).graph, inside=True) <= 4


def test_indices_of_another_batch_stay_in_their_tables() -> None:
    class Rated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items, self.conv = nn.Embedding(9, 8), nn.Embedding(4, 8), nn.Conv3d(1, 2, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv((self.users(ids[:, 0]) + self.items(ids[:, 1])).reshape(-1, 1, 2, 2, 2))

    assert rank_of(to_rank(trace(Rated(), (torch.tensor([[8, 3]]),)), 4, 4, 1e-5).graph) <= 4


class Odd(nn.Module):
    """A layer, and something after it that has no form of rank 4."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.use = nn.Conv3d(3, 4, 3, padding=1), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.conv(x))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "einsum": (lambda x: torch.einsum("bcthw,bcshw->bts", x, x), "there is no form of rank 4 for it yet"),
    "unfold": (lambda x: x.unfold(2, 2, 2), "there is no form of rank 4 for it yet"),
    "argmax": (lambda x: x.argmax() + x, "it counts positions of the flattened value"),
    "max_pool3d_with_indices": (
        lambda x: functional.max_pool3d(x, 2, return_indices=True)[1].float(), "its output 1 is used",
    ),
    "upsample_nearest3d": (
        lambda x: functional.interpolate(x, scale_factor=1.3), "scale factor 1.3 does not make 5 of 4: give the size"
    ),
    "roll": (lambda x: x.roll(1), "it shifts the flattened value"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_site_and_reason(name: str) -> None:
    use, reason = REFUSED[name]
    with pytest.raises(InputError) as caught:
        lrcompile.compile(Odd(use), clip(), max_rank=4)
    message = str(caught.value)
    assert reason in message
    assert "cannot be lowered to rank 4" in message
    assert "compile without --max-rank 4" in message
    assert name in message or name == "max_pool3d_with_indices"


@pytest.mark.parametrize("option", ["max_rank", "io_rank"])
def test_lower_ranks_are_refused(option: str) -> None:
    with pytest.raises(InputError, match="3 cannot be had: pictures have rank 4"):
        lrcompile.compile(nn.Linear(3, 3), (torch.randn(2, 3),), **{option: 3})


def test_a_pass_that_breaks_the_contract_is_named() -> None:
    traced = to_rank(trace(seeded(Factored), clip()), 4, 4, 1e-5)
    graph = traced.graph.copy()
    node = next(node for node in graph.nodes if node.op == "call_module")
    with graph.gm.graph.inserting_after(node), graph.fake_mode:
        high = graph.gm.graph.call_function(torch.ops.aten.unsqueeze.default, (node, 0))
        high.meta.update(val=node.meta["val"].unsqueeze(0), provenance="some-pass(here)")
    with pytest.raises(VerificationError, match=r"made by some-pass\(here\), has rank 5, but at most 4"):
        check_rank(graph, traced)


CODE = """
from tests.test_max_rank import clip, seeded, Factored

def build():
    return seeded(Factored), clip()
"""


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "user_video.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    words = ("user_video:build", "--target", "x86-ort", "--size", "70%")
    ranked = ("--max-rank", "4", "--io-rank", "4")
    assert command([*words, *ranked, "--out", "a.onnx", "--plan-out", "plan.json"]) == 0, capsys.readouterr().err
    assert command(["user_video:build", "--plan", "plan.json", "--out", "b.onnx", "--plan-out", "again.json"]) == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert Path("plan.json").read_bytes() == Path("again.json").read_bytes()
    inside, ends = ranks(Path("a.onnx"))
    assert max(inside, *ends) <= 4
    capsys.readouterr()
    assert command(["user_video:build", "--plan", "plan.json", "--max-rank", "8", "--out", "c.onnx"]) == 2
    assert "the plan was made with --max-rank 4, got --max-rank 8" in capsys.readouterr().err
    assert command([*words, "--max-rank", "3", "--out", "c.onnx"]) == 2
    assert not Path("c.onnx").exists()
    sys.modules.pop("user_video", None)
