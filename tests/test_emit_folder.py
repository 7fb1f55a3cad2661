"""Folders of plain PyTorch: they need torch alone, compute the same, and keep names, ties and structure."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import panel
import pytest
import safetensors.torch
import torch
from torch import nn

from lrcompile.emit.folder import load_folder, write_folder
from lrcompile.frontend.trace import Traced, resized, run, trace
from lrcompile.graph.rewrite import set_module
from lrcompile.graph.verify import relative_error
from lrcompile.nn.linear import TransposedLinear

RUN = """
import importlib.util, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lrcompile", "transformers", "safetensors", "onnx", "onnxruntime", "monai"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import torch

errors = {}
for folder in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("model", folder + "/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load()
    worst = 0.0
    for args, kwargs, expected in torch.load(folder + ".pt"):
        with torch.no_grad():
            outputs = model(*args, **kwargs)
        got = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
        worst = max([worst, *(float((a - b).norm() / a.norm()) for a, b in zip(expected, got, strict=True))])
    errors[folder] = worst
print(json.dumps(errors))
"""


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, (last, _) = self.lstm(x)
        return {"all": self.gru(hidden)[0], "last": last.transpose(0, 1)}


def recurrent() -> panel.Example:
    return panel.randomise(Recurrent()), (torch.randn(2, 7, 4),), {}


def test_models_run_where_there_is_only_torch(tmp_path: Path) -> None:
    for make in (panel.mobilenet_v2, panel.bert, panel.gpt2, panel.transformer_encoder, recurrent):
        name = make.__name__
        model, args, kwargs = make()
        traced = trace(model, args, kwargs)
        write_folder(tmp_path / name, traced.graph.gm, traced)
        cases = []
        for size in (panel.BATCH, 3):
            some = [resized(value, size) for value in args]
            named = {key: resized(value, size) for key, value in kwargs.items()}
            cases.append((some, named, run(traced.graph.gm, [*some, *named.values()])))
        torch.save(cases, tmp_path / f"{name}.pt")
        stored = load_folder(tmp_path / name).state_dict()
        assert stored.keys() >= model.state_dict().keys()
        assert max(map(len, (tmp_path / name / "model.py").read_text().splitlines())) <= 130
    folders = sorted(str(path) for path in tmp_path.iterdir() if path.is_dir())
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", RUN, *folders], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    errors = json.loads(ran.stdout)
    assert len(errors) == 5
    assert all(error < 1e-6 for error in errors.values()), errors


def written(tmp_path: Path, model: nn.Module, args: tuple[Any, ...], **kwargs: Any) -> tuple[Traced, nn.Module, str]:
    traced = trace(panel.randomise(model), args, kwargs)
    write_folder(tmp_path / "out", traced.graph.gm, traced)
    return traced, load_folder(tmp_path / "out"), (tmp_path / "out" / "model.py").read_text()


def check(traced: Traced, loaded: nn.Module, outputs: list[Any] | tuple[Any, ...]) -> None:
    assert relative_error(run(traced.graph.gm, traced.flat), outputs) < 1e-6


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.offset = torch.arange(8.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.again(self.first(self.embedding(tokens)))
        return self.head(x * self.scale + self.shift + self.offset)


def test_what_is_shared_stays_shared_and_is_stored_once(tmp_path: Path) -> None:
    model = Tied()
    traced, loaded, _ = written(tmp_path, model, (torch.randint(0, 11, (2, 5)),))
    check(traced, loaded, [loaded(*traced.args)])
    assert loaded.head.weight is loaded.embedding.weight
    assert isinstance(loaded.head.weight, nn.Parameter)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    stored = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    assert [tuple(t.shape) for t in stored.values()].count((11, 8)) == 1
    assert [tuple(t.shape) for t in stored.values()].count((8, 8)) == 1
    loaded.train()
    loaded(*traced.args).sum().backward()
    assert loaded.first.weight.grad is not None


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Structured(nn.Module):
    def forward(self, pair: list[torch.Tensor], x: torch.Tensor, extra: dict[str, torch.Tensor]) -> Any:
        y = pair[0] + pair[1] * x
        ordered = collections.OrderedDict(b=y, a=[extra["k"] - 1, None])
        return ordered, Point(y * 2, x), (y.shape[0] * 3,)


def test_structure_of_inputs_and_outputs(tmp_path: Path) -> None:
    a, b, c, d = torch.randn(4, 2, 3)
    traced, loaded, text = written(tmp_path, Structured(), ([a, b], c), extra={"k": d})
    assert "def forward(self, pair, x, extra):" in text
    ordered, point, size = loaded([a, b], c, extra={"k": d})
    assert type(ordered) is dict
    assert list(ordered) == ["b", "a"]
    assert type(ordered["a"]) is list
    assert ordered["a"][1] is None
    assert type(point) is tuple
    assert size == (6,)
    check(traced, loaded, [ordered["b"], *ordered["a"], *point, *size])


def test_names_that_are_no_identifiers(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.ModuleDict({"my layer": nn.Linear(6, 2)})["my layer"]),
    )
    traced, loaded, text = written(tmp_path, model, (torch.randn(2, 4),))
    check(traced, loaded, [loaded(*traced.args)])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert "class Model(nn.ModuleDict):" in text
    assert 'self["2"] = nn.ModuleDict({"0": nn.Linear(6, 6), "2": nn.Linear(6, 2)})' in text


class Listed(nn.Module):
    """Parameters in a list and a dictionary, one of them in both."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.mix = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
        self.named = nn.ParameterDict({"a-b": torch.randn(8), "tied": self.mix[1]})
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x) * self.mix[0] + self.mix[1] + self.named["a-b"] * self.named["tied"]
        return nn.functional.linear(y, self.weights[0]) + self.weights[0].sum(0)


def test_parameters_that_have_no_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(2, 8)
    traced, loaded, _ = written(tmp_path, model, (x,))
    check(traced, loaded, [loaded(x)])
    torch.testing.assert_close(loaded(x), model(x))


def test_rewritten_layers_read_well(tmp_path: Path) -> None:
    traced = trace(
        nn.Sequential(collections.OrderedDict(fc=nn.Linear(64, 64), out=nn.Linear(64, 3))), (torch.randn(2, 64),)
    )
    gm = traced.graph.copy().gm
    chain = nn.Sequential(nn.Linear(64, 8, bias=False), TransposedLinear(8, 64))
    set_module(gm, "fc", chain)
    for node in gm.graph.nodes:
        if node.target == "fc":
            node.target = "fc.0"
            with gm.graph.inserting_after(node):
                node.replace_all_uses_with(last := gm.graph.call_module("fc.1", (node,)))
            last.args, last.meta = (node,), dict(node.meta)
            break
    gm.recompile()
    write_folder(tmp_path / "out", gm, traced)
    text = (tmp_path / "out" / "model.py").read_text()
    assert "self.fc = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64))" in text
    assert "x = self.fc[0](input)\n        x = self.fc[1](x)\n" in text.replace("input_1", "input")
    loaded = load_folder(tmp_path / "out")
    assert relative_error(run(gm, traced.flat), [loaded(*traced.args)]) < 1e-6


class Scaled(nn.Linear):
    """Stands for a module of a plug-in."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.factor = nn.Parameter(torch.rand(4))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.factor


def test_modules_that_torch_does_not_have_are_taken_apart(tmp_path: Path) -> None:
    traced = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    gm = traced.graph.copy().gm
    set_module(gm, "0", Scaled())
    write_folder(tmp_path / "out", gm, traced)
    loaded = load_folder(tmp_path / "out")
    assert relative_error(run(gm, traced.flat), [loaded(*traced.args)]) < 1e-6
    assert "0.weight" in loaded.state_dict()


class Various(nn.Module):
    """Operations whose spelling is easily wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, affine=False, eps=1e-3)
        self.plain = nn.LayerNorm((4, 6, 6), elementwise_affine=False)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.same = nn.Conv2d(4, 4, (3, 1), padding="same", padding_mode="zeros", bias=False)

    def forward(self, x: torch.Tensor, x1: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.same(self.up(self.plain(self.norm(x))))
        y = torch.nn.functional.max_pool2d(y, 2) - torch.nn.functional.avg_pool2d(y, 2, 2, count_include_pad=False)
        y = torch.add(y, x1, alpha=2).clamp(min=-1.5) + (-1.0 - y) ** 2 - y.abs().rsqrt().nan_to_num(posinf=1.0)
        z = y[:, 1:3, ::2, -1].softmax(-1).masked_fill(y[:, :2, ::2, 0] > 0, float("-inf"))
        values, places = y.flatten(1).topk(3, dim=-1)
        parts = y.split([1, 3], 1)
        steps = torch.arange(y.shape[0] * 2, dtype=torch.float16).reshape(-1, 2).to(y.dtype)
        return z, values, places, parts[1].amax((2, 3)), steps, y[places[:, 0] % y.shape[0]].half()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_operations(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Various().to(dtype)
    inputs = (torch.randn(2, 4, 6, 6).to(dtype), torch.randn(2, 4, 6, 6).to(dtype))
    traced, loaded, text = written(tmp_path, model, inputs)
    assert "dtype=torch.float16, device=device" in text
    for size in (2, 5) if traced.dynamic_batch else (2,):
        some = [resized(value, size) for value in inputs]
        assert relative_error(run(traced.graph.gm, some), loaded(*some)) < 1e-6
    assert {t.dtype for t in loaded.parameters()} == {dtype}


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    traced = trace(panel.randomise(Tied()), (torch.randint(0, 11, (2, 5)),))
    for name in ("a", "b"):
        write_folder(tmp_path / name, traced.graph.gm, traced)
    for file in ("model.py", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
