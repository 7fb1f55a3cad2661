"""Models that are unusual to write: frames in the batch, norms of equal sizes, tables of integers, hostile names."""

from __future__ import annotations

import ast
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcompile
from lrcompile import Budget
from lrcompile.cli import run
from lrcompile.emit.folder import _in_a_docstring, load_folder
from lrcompile.emit.pt2 import load_pt2
from lrcompile.errors import InputError
from lrcompile.writing import write_text

EXACT = Budget(max_error=0.0)
FRAMES = 4


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def compiled(model: nn.Module, *x: Tensor, **options: Any) -> lrcompile.Result:
    return lrcompile.compile(model.eval(), x, target="rpi5", budget=EXACT, **options)


class Shifted(nn.Module):
    """Frames are part of the batch, which therefore is a multiple of their number (temporal shift)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().view(-1, FRAMES, 8, *x.shape[2:])
        y = torch.cat([y[:, 1:], y[:, :1]], 1).reshape(-1, 8, *x.shape[2:])
        return self.head(y.mean((2, 3))).view(-1, FRAMES, 5).mean(1)


@pytest.mark.parametrize("options", [{}, {"max_rank": 4}], ids=["any rank", "rank 4"])
def test_frames_in_the_batch(options: dict[str, Any]) -> None:
    model = Shifted()
    result = compiled(model, torch.randn(2 * FRAMES, 3, 6, 6), **options)
    for path in ("out.onnx", "out.pt2", "out/"):
        assert result.save(path).verification["torch_vs_original"] is not None
    other = torch.randn(3 * FRAMES, 3, 6, 6)
    session = ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": other.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(other).numpy(), rtol=1e-4, atol=1e-5)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool3d(self.conv(x), 1).squeeze())


def test_a_squeeze_of_all_axes_in_rank_4() -> None:
    model, x = Squeezed(), torch.randn(2, 3, 4, 6, 6)
    torch.testing.assert_close(compiled(model, x, max_rank=4).model(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"squeezes its batch away .* give another --batch"):
        compiled(model, x[:1], max_rank=4)


def test_layer_norms_of_equal_sizes() -> None:
    model = nn.Sequential(nn.LayerNorm((8, 8)), nn.LayerNorm((8, 8), elementwise_affine=False), nn.LayerNorm(8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 8, 8)
    compiled(model, x).save("out/")
    torch.testing.assert_close(load_folder(Path("out"))(x), model(x))


class Deep(nn.Module):
    """A list of equal layers under a long name, which takes more than a line."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise_convolutions_of_blocks = nn.ModuleList(
            nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False) for _ in range(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.depthwise_convolutions_of_blocks:
            x = layer(x).relu()
        return x


def test_a_long_line_of_equal_layers() -> None:
    model, x = Deep(), torch.randn(1, 64, 5, 5)
    compiled(model, x).save("out/")
    torch.testing.assert_close(load_folder(Path("out"))(x), model(x))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(0, 9, (10, 4)))
        self.positions = nn.Embedding.from_pretrained(torch.randn(10, 4), freeze=True)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.embedding(x, self.table).float() + self.positions(x))  # type: ignore[arg-type]


def test_what_is_not_trained_stays_so() -> None:
    model, x = Frozen(), torch.randint(0, 10, (2, 3))
    compiled(model, x).save("out/")
    loaded = load_folder(Path("out"))
    torch.testing.assert_close(loaded(x), model(x))
    trained = {name.rpartition(".")[0] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"layer"}


@pytest.mark.parametrize("text", ['""";import os;os.system("touch ran");"""', '\\"', "\\", "plain", 'ends with "'])
def test_a_text_does_not_end_the_docstring_that_tells_of_it(text: str) -> None:
    (statement,) = ast.parse(f'"""Inputs:\n\n{_in_a_docstring(text)}\n"""').body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert repr(text) in statement.value.value


@pytest.mark.parametrize("opset", [18, 21])
def test_opsets_that_have_no_convolutions_of_bfloat16(opset: int) -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match="give --opset 22 or a later one"):  # before the work, and what it would write
        compiled(model, x, dtype="bf16", opset=opset)
    compiled(model, x, dtype="bf16", opset=22).save("out.onnx")


def test_an_io_rank_that_folds_nothing_takes_calibration_data() -> None:
    model, x = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), torch.randn(8, 3, 4, 6, 6)
    given = lrcompile.calibration_from({"input": torch.randn(32, 3, 4, 6, 6)}, ["input"], 8)
    for io_rank in (4, 5):
        assert compiled(model, x, io_rank=io_rank, calibration=given).plan.io_rank == io_rank


def test_a_report_to_a_pipe_and_to_a_device() -> None:
    torch.export.save(torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)), "net.pt2")
    assert run(["net.pt2", "--target", "rpi5", "--report-json", "/dev/null"]) == 0
    read, write = os.pipe()
    found: list[str] = []

    def listen() -> None:
        with os.fdopen(read) as file:
            found.append(file.read())

    listener = threading.Thread(target=listen)
    listener.start()
    write_text(f"/proc/self/fd/{write}", json.dumps({"a": 1}))
    os.close(write)
    listener.join(10)
    assert json.loads(found[0]) == {"a": 1}


# ------------------------------------------------------------------------------------------- batches that are divided


class Groups(nn.Module):
    """The mean of every four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(-1, 4, 16).mean(1)


class Halves(Groups):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).chunk(2)[0]


class Thirds(Groups):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).split(x.shape[0] // 3)[:2]


@pytest.mark.parametrize("samples", [4, 8])
@pytest.mark.parametrize("kind", ["module", "archive", "archive of multiples"])
def test_a_batch_of_multiples(kind: str, samples: int) -> None:
    model, x = Groups().eval(), torch.randn(samples, 16)
    given: Any = model
    if kind != "module":
        batch: Any = 4 * torch.export.Dim("groups") if kind == "archive of multiples" else torch.export.Dim.AUTO
        given = torch.export.export(model, (torch.randn(8, 16),), dynamic_shapes=({0: batch},))
    result = lrcompile.compile(given, (x,), target="rpi5", budget=EXACT)
    for path in ("out.onnx", "out.pt2", "out/"):
        result.save(path)
    session = ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    for count in (4, 8, 12):
        other = torch.randn(count, 16)
        with torch.no_grad():
            expected = model(other)
        (got,) = session.run(None, {"x": other.numpy()})
        for y in (torch.from_numpy(got), load_pt2(Path("out.pt2"))(other), load_folder(Path("out"))(other)):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "samples"), [(Halves(), 2), (Halves(), 6), (Thirds(), 6)])
def test_parts_of_an_open_batch(model: nn.Module, samples: int) -> None:
    result = compiled(model, torch.randn(samples, 16))
    assert result.traced.dynamic_batch
    result.save("out.onnx")
    session = ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn(9, 16)
    with torch.no_grad():
        expected = model(other)
    got = session.run(None, {"x": other.numpy()})
    for y, given in zip(expected if isinstance(expected, tuple) else [expected], got, strict=True):
        np.testing.assert_allclose(given, y.numpy(), rtol=1e-4, atol=1e-5)


class Pair(Groups):
    def forward(self, x: Tensor) -> Tensor:
        without, given = self.layer(x).chunk(2)  # as guidance without a classifier does
        return without + 7.5 * (given - without)


class Strided(Groups):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[::2]) + x[1::2]


@pytest.mark.parametrize("model", [Pair(), Strided()])
def test_halves_of_an_open_batch_that_are_added(model: nn.Module) -> None:
    result = compiled(model, torch.randn(4, 16))
    assert result.traced.dynamic_batch
    for path in ("out.onnx", "out.pt2", "out/"):
        result.save(path)
    session = ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn(10, 16)
    with torch.no_grad():
        expected = model(other)
    (got,) = session.run(None, {"x": other.numpy()})
    for y in (torch.from_numpy(got), load_pt2(Path("out.pt2"))(other), load_folder(Path("out"))(other)):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


class Modulated(nn.Module):
    """A filter of its own for each sample, as groups of one convolution (StyleGAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.weight = nn.Linear(8, 4), nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, z: Tensor) -> Tensor:
        groups = z.shape[0]
        weight = self.weight[None] * self.style(z)[:, None, :, None, None]
        x = torch.ones(groups, 4, 8, 8).reshape(1, groups * 4, 8, 8)
        return functional.conv2d(x, weight.reshape(groups * 6, 4, 3, 3), groups=groups).view(groups, 6, 6, 6)


def test_an_open_size_where_onnx_wants_a_number_is_fixed_with_a_note() -> None:
    z = torch.randn(3, 8)
    result = compiled(Modulated(), z)
    assert result.traced.dynamic_batch
    assert "the rewritten model fixes its batch size" in result.save("out.onnx").notes
    (got,) = ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"]).run(None, {"z": z.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, result.model(z).numpy(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ types, classes, words


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x).mean((2, 3))
        return self.head(y.float())


def test_a_convolution_in_bfloat16_under_autocast() -> None:
    model, x = Autocast(), torch.randn(2, 3, 8, 8)
    assert compiled(model, x).save("out.onnx").verification["onnx_vs_torch"] is not None
    with pytest.raises(InputError, match="give --opset 22 or a later one"):
        compiled(model, x, opset=18).save("out.onnx")


@pytest.mark.parametrize("end", ["input", "output"])
def test_onnx_of_complex_numbers_is_refused_in_words(end: str) -> None:
    class Net(Groups):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.real) if end == "input" else torch.fft.rfft(self.layer(x))

    x = torch.randn(4, 16, dtype=torch.complex64 if end == "input" else torch.float32)
    result = compiled(Net(), x)
    with pytest.raises(InputError, match=f"{end} .* is complex64, which no runtime of ONNX takes"):
        result.save("out.onnx")
    result.save("out.pt2")
    result.save("out/")


@dataclass
class Pair:
    first: Tensor
    second: Tensor


torch.export.register_dataclass(Pair)


class Paired(Groups):
    def forward(self, pair: Pair) -> Tensor:
        return self.layer(pair.first) + pair.second


def test_inputs_of_a_class_of_their_own() -> None:
    result = compiled(Paired(), Pair(torch.randn(4, 16), torch.randn(4, 16)))  # type: ignore[arg-type]
    assert result.traced.dynamic_batch
    assert not any("batch stays fixed" in note for note in result.report.notes)
    result.save("out.onnx")
    result.save("out/")
    with pytest.raises(InputError, match=r"cannot keep the model in an archive.*write ONNX or a folder"):
        result.save("out.pt2")
    assert not Path("out.pt2").exists()


class Worded(Groups):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.layer(x), "kind": "text"}


def test_a_text_among_the_outputs() -> None:
    result = compiled(Worded(), torch.randn(4, 16))
    result.save("out/")
    assert load_folder(Path("out"))(torch.randn(3, 16))["kind"] == "text"
    with pytest.raises(InputError, match="cannot keep the model in an archive"):
        result.save("out.pt2")


class Clashing(Groups):
    """What a part of `x` would be called is the name of another input, and one is called as Python's own `float`."""

    def forward(self, x: list[Tensor], x_0: Tensor, float: Tensor) -> Tensor:
        return self.layer(x[0] - 2 * x[1]) * 3 + x_0.masked_fill(float > 0, -torch.inf)


def test_names_that_clash_in_a_folder() -> None:
    model, x = Clashing(), [torch.randn(4, 16) for _ in range(4)]
    compiled(model, x[:2], *x[2:]).save("out/")  # type: ignore[arg-type]
    torch.testing.assert_close(load_folder(Path("out"))(x[:2], *x[2:]), model(x[:2], *x[2:]))
    assert Path("out/weights.safetensors").stat().st_mode == Path("out/model.py").stat().st_mode


@torch.library.custom_op("lrcompile_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


twice.register_fake(torch.empty_like)


class Foreign(Groups):
    def forward(self, x: Tensor) -> Tensor:
        return twice(self.layer(x))


def test_a_folder_calls_nothing_but_torch() -> None:
    result = compiled(Foreign(), torch.randn(4, 16))
    with pytest.raises(InputError, match=r"cannot write lrcompile_tests\.twice.* another library defines it"):
        result.save("out/")
    result.save("out.pt2")
