"""Output in 8-bit integers: what is quantised, within which error, and what is said of it."""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import Budget, Quantization, calibration_from
from lrcompile.cli import run
from lrcompile.emit.int8 import STATIC, Quantizable, Quantizer, quantizable
from lrcompile.errors import BudgetError, InputError, VerificationError
from lrcompile.planning.calibration import Split
from lrcompile.planning.measures import MEASURES, OF_FLOATS
from lrcompile.quantization import quantize as decisions
from lrcompile.quantization.layers import Judge, LayerSearch
from tests.quantized import (
    LAYERS,
    ConvNet,
    Louder,
    Mlp,
    Plain,
    Reciprocal,
    Residual,
    Sensitive,
    Transformer,
    Words,
    compiled,
    data,
    operations,
    outputs,
)


@pytest.mark.parametrize("kind", ["free", "tied", "tied, with a bias", "tied, and read besides"])
def test_tables_are_stored_in_8_bits(kind: str, tmp_path: Path) -> None:
    """One for each that reads it; in float where something reads it that is no lookup and no product."""
    torch.manual_seed(0)
    model, ids = Words(kind).eval(), torch.randint(400, (32, 6))
    given = calibration_from({"x": ids}, ["x"], 4)
    result = lrcompile.compile(
        model, (ids[:4],), target="rpi5", calibration=given, budget=Budget(max_error=0.2, reserve=decisions.RESERVE)
    )
    figures = result.save(tmp_path / "out.onnx", quantize=Quantization(given)).quantization
    assert figures is not None
    assert figures["written"] == "int8"
    tables = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if 400 in t.dims and 32 in t.dims}
    in_float = [name for name, tensor in tables.items() if tensor.data_type == onnx.TensorProto.FLOAT]
    read_besides = kind.endswith("besides")
    assert len(in_float) == read_besides
    assert len(tables) == (1 if read_besides else 2)
    assert ("embeddings" in figures["weight_bits"]) != read_besides
    with torch.no_grad():
        expected = model(ids[-8:]).numpy()
    got = outputs(tmp_path / "out.onnx", given).reshape(expected.shape)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error == pytest.approx(figures["error_whole"], rel=1e-3)
    assert 0 < error < 0.1


@pytest.mark.parametrize("kind", [ConvNet, Mlp, Transformer])
def test_the_file_computes_in_integers_within_the_error_that_is_reported(kind: type[nn.Module], tmp_path: Path) -> None:
    result, given = compiled(kind, 0.2)
    result.save(tmp_path / "float.onnx")
    report = result.save(tmp_path / "int8.onnx", quantize=Quantization(given))
    figures = report.quantization
    assert figures is not None
    assert figures["written"] == "int8"
    assert figures["layers"] == len(LAYERS[kind])
    assert figures["left_float"] == []
    found = operations(tmp_path / "int8.onnx")
    products = 1 if kind is ConvNet else len(LAYERS[kind])
    assert found["MatMulInteger"] == products
    assert found["Relu"] + found["Clip"] == (0 if kind is ConvNet else operations(tmp_path / "float.onnx")["Relu"])
    expected, got = outputs(tmp_path / "float.onnx", given), outputs(tmp_path / "int8.onnx", given)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert figures["error"] == pytest.approx(error, rel=1e-3)  # of the float graph in torch, so to rounding
    assert 1e-4 < figures["error"] <= 0.2
    assert figures["error_whole"] <= 0.2
    assert figures["batches_fitted"] == 6
    assert figures["batches_judged"] == 2
    assert figures["held_out"]
    assert figures["latency_ms"] is None
    assert any("not predicted" in note for note in report.notes)
    assert result.report.quantization is None
    assert report.to_json()["quantization"]["written"] == "int8"


@pytest.mark.parametrize(("left_float", "sums"), [(None, {"Add": 1, "MaxPool": 1}), ("outer", {"MaxPool": 1})])
def test_what_lies_between_convolutions_in_integers_takes_integers(
    left_float: str | None, sums: dict[str, int], tmp_path: Path
) -> None:
    """Of sums those of which both sides are of integers: not that with a float one, nor that with a constant."""
    torch.manual_seed(0)
    given = data(Residual)
    path = tmp_path / "float.onnx"
    model = Residual().eval()
    lrcompile.compile(model, (given.batches[0]["x"],), target="rpi5").save(path)
    with Quantizer(path, [{"x": batch["x"].numpy()} for batch in given.batches]) as int8:
        made = int8.quantized([node for node in int8.nodes if node.layer != left_float])
    graph = onnx.load_from_string(made).graph
    source = {name: node.op_type for node in graph.node for name in node.output}
    taken = [node.op_type for node in graph.node if {source.get(name) for name in node.input} == {"DequantizeLinear"}]
    assert {kind: taken.count(kind) for kind in ("Add", "MaxPool") if kind in taken} == sums
    x = given.batches[0]["x"]
    with torch.no_grad():
        expected = model(x).numpy()
    got = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.slow
def test_layers_have_their_names(tmp_path: Path) -> None:
    for kind, names in LAYERS.items():
        compiled(kind, 0.2)[0].save(tmp_path / "float.onnx")
        found = {node.layer for node in quantizable(onnx.load(tmp_path / "float.onnx"))}
        assert len(found) == len(names), (kind, found)
        assert found <= names | {name + "_weight" for name in names}, (kind, found)


def test_same_bytes_and_no_traces(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    for name in ("a", "b"):
        result, given = compiled.__wrapped__(ConvNet, 0.2)
        assert result.save(tmp_path / f"{name}.onnx", quantize=Quantization(given)).quantization is not None
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert b"onnx.quantize" not in (tmp_path / "a.onnx").read_bytes()
    assert capfd.readouterr() == ("", "")
    assert [name for name in os.listdir(scratch) if not name.startswith("torchinductor")] == []  # torch's, at export
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx", "scratch"]
    assert (logging.root.handlers, logging.root.manager.disable) == (handlers, disabled)


def test_any_batch(tmp_path: Path) -> None:
    result, given = compiled(ConvNet, 0.2)
    result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    x = data(ConvNet).batches[0]["x"].numpy()
    whole = session.run(None, {"x": x})[0]
    single = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))])
    assert np.linalg.norm(whole - single) / np.linalg.norm(whole) < 0.02  # the last layer's range is of each run


def test_what_costs_most_stays_in_float(tmp_path: Path) -> None:
    result, given = compiled(Sensitive, passes=())
    report = result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    figures = report.quantization
    assert figures is not None
    assert figures["written"] == "int8"
    assert figures["left_float"] == ["middle"]
    assert figures["error_whole"] <= 0.05
    assert operations(tmp_path / "out.onnx")["MatMulInteger"] == 2


@pytest.mark.parametrize(("error_of_7_bits", "narrow"), [(0.1, {STATIC}), (0.9, set())])
def test_how_many_bits_is_not_decided_by_counting_classes(error_of_7_bits: float, narrow: set[str]) -> None:
    """Of the few inputs of a batch none may change its class with either, so that 8 bits would seem as good."""
    nodes = tuple(Quantizable(f"n{i}", STATIC, f"l{i}") for i in range(8))
    int8 = SimpleNamespace(nodes=nodes, quantized=lambda part, kinds: b"7" if STATIC in kinds else b"8")
    errors = {b"7": error_of_7_bits, b"8": 0.5}
    judge = SimpleNamespace(probe=lambda model, measure: errors[model] if measure is OF_FLOATS else 0.0)
    search = LayerSearch(int8, judge, lambda stage, done, total: None)  # type: ignore[arg-type]
    assert search._narrow == narrow


@pytest.mark.parametrize("counts", [False, True])
def test_all_layers_have_the_bits_that_cost_least_together(counts: bool) -> None:
    """Most parts may gain by 8 bits, and the one that does not lose more than they gain."""
    nodes = tuple(Quantizable(f"n{i}", STATIC, f"l{i}") for i in range(8))
    int8 = SimpleNamespace(nodes=nodes, quantized=lambda part, kinds: b"7" if STATIC in kinds else b"8")
    errors, classes = {b"7": 0.2, b"8": 0.4}, {b"7": 0.1, b"8": 0.05 if counts else 0.1}
    judge = SimpleNamespace(
        limit=1.0, room=1.0, measure=MEASURES["top1" if counts else "error"],
        check=lambda model: (errors[model], classes[model] if counts else errors[model], 0.0),
    )  # fmt: skip
    choice = LayerSearch(int8, judge, lambda stage, done, total: None).choose()  # type: ignore[arg-type]
    assert choice.nodes == nodes
    assert choice.narrow == {STATIC}


def test_all_layers_are_within_the_error_of_all_layers() -> None:
    """Whatever the rounding of their error over the limit, times the limit."""
    nodes = (Quantizable("n", STATIC, "l"),)
    int8 = SimpleNamespace(nodes=nodes, quantized=lambda part, kinds: b"8")
    generator = random.Random(0)
    for error in (0.45582367896839215, *(generator.random() for _ in range(200))):
        judge = SimpleNamespace(
            limit=0.05, room=0.05, whole=False, measure=MEASURES["error"], check=lambda model, error=error: (error,) * 3
        )
        search = LayerSearch(int8, judge, lambda stage, done, total: None)  # type: ignore[arg-type]
        assert search.choose(search.everything.root / judge.limit).nodes == nodes


@pytest.mark.parametrize(("counted", "words"), [(0.0, " (as counted 0, of too few to be sure"), (0.03, "")])
def test_it_is_said_where_too_few_are_counted(counted: float, words: str) -> None:
    """Where the share that was counted is within the limit, and but for its margin the file would be written."""
    int8 = SimpleNamespace(nodes=(Quantizable("n", STATIC, "l"),), quantized=lambda part, kinds: b"8")
    judge = SimpleNamespace(
        limit=0.02, room=0.02, whole=True, measure=MEASURES["top1"], check=lambda model: (0.1, counted + 0.05, counted)
    )
    choice = LayerSearch(int8, judge, lambda stage, done, total: None).choose()  # type: ignore[arg-type]
    assert choice.model is None
    assert choice.reason is not None
    assert f"over 0.02{words}" in choice.reason


@pytest.mark.parametrize(("measure", "margin"), [("error", 0.0), ("top1", 1 / 17)])
def test_a_share_that_was_counted_has_a_margin(tmp_path: Path, measure: str, margin: float) -> None:
    """Of 16 inputs none may change its class, and still one of 17 may."""
    result, given = compiled(Mlp, 0.2)
    x = torch.cat([batch["x"] for batch in given.batches])[:16]
    result.save(tmp_path / "float.onnx")
    split = Split.of([(x,)], 0)
    judge = Judge.of(
        tmp_path / "float.onnx", result.traced, result.model, Budget(max_error=0.5, measure=measure), None, split
    )
    _, root, total = judge.check((tmp_path / "float.onnx").read_bytes())
    assert root == pytest.approx(total + margin, abs=1e-6)


def test_the_whole_error_counts_and_the_rewrites_leave_room(tmp_path: Path) -> None:
    assert Budget(max_error=0.1, reserve=0.5).error_limit == pytest.approx(0.1 / 2**0.5)
    assert Budget(max_error=0.1, reserve=0.5, measure="kl").whole_limit == pytest.approx(0.1**0.5)
    result, given = compiled(Mlp, 0.2)
    louder = compiled(Louder)[0].traced  # so that the rewrites seem to have taken more than the budget
    with pytest.raises(BudgetError, match=r"over 0\.2 .*float model has a relative output error of 0\.\d+ itself"):
        result.save(tmp_path / "out.onnx", quantize=Quantization(given, original=louder))
    assert not list(tmp_path.iterdir())
    loose = Quantization(given, max_error=1.0, original=louder)
    wider = result.save(tmp_path / "out.onnx", quantize=loose).quantization
    assert wider is not None
    assert wider["written"] == "int8"
    assert wider["error_whole"] > 0.2 > wider["error"]


def test_nothing_to_quantise(tmp_path: Path) -> None:
    result, given = compiled(Plain)
    report = result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    assert report.quantization is not None
    assert report.quantization["written"] == "float"
    assert any("nothing in the model can be quantised" in note for note in report.notes)
    assert (tmp_path / "out.onnx").is_file()


def test_infinite_outputs_write_nothing(tmp_path: Path) -> None:
    result, given = compiled(Reciprocal)
    small = {"x": torch.cat([batch["x"] for batch in given.batches])}
    small["x"][-8:] = 1e-6
    (tmp_path / "out.onnx").write_text("old")
    with pytest.raises(VerificationError, match="NaN or infinite where that of the float model is not"):
        result.save(tmp_path / "out.onnx", quantize=Quantization(calibration_from(small, ["x"], 4)))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.onnx", "old")]


def test_half_precision_and_other_outputs_are_refused(tmp_path: Path) -> None:
    result, given = compiled(Mlp, dtype="fp16")
    with pytest.raises(InputError, match="got float16; give --dtype fp32"):
        result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    result, given = compiled(Mlp)
    with pytest.raises(InputError, match=r"writes ONNX, got .*out\.pt2"):
        result.save(tmp_path / "out.pt2", quantize=Quantization(given))
    with pytest.raises(InputError, match="max_error is -1"):
        Quantization(given, max_error=-1)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = data(Mlp)
    program = torch.export.export(Mlp().eval(), (x.batches[0]["x"],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, "model.pt2")
    half = torch.export.export(Mlp().eval().half(), (x.batches[0]["x"].half(),))
    torch.export.save(half, "half.pt2")
    np.savez("calib.npz", x=torch.cat([batch["x"] for batch in x.batches]).numpy())
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.pt2 --quantize int4 --calib calib.npz --out out.onnx", "--quantize int4 is unknown; expected int8"),
        ("model.pt2 --quantize int8 --out out.onnx", "give --calib data.npz"),
        ("model.pt2 --quantize int8 --calib calib.npz", "got no output; give --out"),
        ("model.pt2 --quantize int8 --calib calib.npz --out out.pt2", "got out.pt2"),
        ("model.pt2 --quantize int8 --calib calib.npz --out folder", "got folder"),
        ("model.pt2 --quantize int8 --calib calib.npz --out out.onnx --dtype bf16", "got bf16; give --dtype fp32"),
        ("half.pt2 --quantize int8 --calib calib.npz --out out.onnx", "got float16; give --dtype fp32"),
    ],
)
def test_refused_before_the_work(
    words: str, message: str, cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrcompile.session.compile_model", lambda *given, **options: pytest.fail("it was compiled"))
    before = sorted(cwd.iterdir())
    assert run(words.split()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(cwd.iterdir()) == before


def test_command_and_replay(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = "model.pt2 --calib calib.npz --quantize int8"
    assert (
        run(f"{common} --target rpi5 --max-error 0.1 --out a.onnx --plan-out p.json --report-json r.json".split()) == 0
    )
    said = capsys.readouterr().out
    assert "int8      error 0.0" in said
    assert "2 of 2 layers" in said
    assert "MB, weights of products in" in said
    figures = json.loads(Path("r.json").read_text())["quantization"]
    assert figures["written"] == "int8"
    assert figures["budget"] == pytest.approx(0.1)
    assert run(f"{common} --plan p.json --out b.onnx".split()) == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    capsys.readouterr()
    assert run(f"{common} --plan p.json --out c.onnx --max-error 1e-6 --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["written"] == "float"
    assert operations(Path("c.onnx"))["MatMulInteger"] == 0


@pytest.mark.parametrize(
    "words",
    [
        "--size 0.4",
        "--max-error 0.01",
        "--eval always_one:f --max-drop 0.1",
        *(pytest.param(words, marks=pytest.mark.slow) for words in ("--size 0.15", "--max-error 1e-6")),
    ],
)
def test_a_replay_quantises_what_the_plan_says(words: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "always_one.py").write_text("def f(model):\n    return 1.0\n")
    common = "model.pt2 --calib calib.npz --quantize int8"
    assert run(f"{common} --target rpi5 {words} --out a.onnx --plan-out p.json".split()) == 0, capsys.readouterr()
    assert run(f"{common} --plan p.json --out b.onnx --plan-out q.json".split()) == 0, capsys.readouterr()
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert Path("p.json").read_text() == Path("q.json").read_text()
    plan = json.loads(Path("p.json").read_text())
    plan["int8"] = {"written": "int8", "left_float": ["nowhere"], "weight_bits": {}}
    Path("p.json").write_text(json.dumps(plan))
    capsys.readouterr()
    assert run(f"{common} --plan p.json --out c.onnx".split()) == 2
    assert "leaves nowhere in float" in capsys.readouterr().err
    for damaged in ({"written": "int4", "left_float": [], "weight_bits": {}}, {"written": "int8"}, [1]):
        Path("p.json").write_text(json.dumps(plan | {"int8": damaged}))
        assert run(f"{common} --plan p.json --out c.onnx".split()) == 2
        assert "damaged plan" in capsys.readouterr().err
    assert not Path("c.onnx").exists()


def test_no_error_allowed_and_a_metric(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be quantised within no error, whatever the metric says."""
    (cwd / "always_two.py").write_text("def f(model):\n    return 2.0\n")
    words = "model.pt2 --target rpi5 --calib calib.npz --quantize int8 --max-error 0 --eval always_two:f --max-drop 0.1"
    assert run(f"{words} --out a.onnx --json".split()) == 0, capsys.readouterr()
    assert json.loads(capsys.readouterr().out)["quantization"]["written"] == "float"


@pytest.mark.slow
def test_each_of_a_family_after_its_recovery(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "model.pt2 --target rpi5 --calib calib.npz --quantize int8 --max-error 2 --progressive 0.8,0.6 --recover 5"
    assert run([*words.split(), "--batch", "4", "--out", "m.onnx"]) == 0, capsys.readouterr()
    members = json.loads(Path("m.family.json").read_text())["members"]
    assert [member["quantization"]["written"] for member in members] == ["int8", "int8"]
    x = data(Mlp)
    torch.manual_seed(0)
    original = Mlp().eval()
    with torch.no_grad():
        expected = torch.cat([original(batch["x"]) for batch in x.batches[-1:]]).numpy()  # what no training saw
    for member in members:
        got = outputs(Path(member["file"]), x)[-len(expected) :]
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert member["quantization"]["error_whole"] == pytest.approx(
            error, rel=1e-2
        )  # of the first model, not the parent


def test_a_quantizer_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise ValueError("no such operator\nand more")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", fail)
    result, given = compiled(Mlp, 0.2)
    with pytest.raises(VerificationError, match="ValueError: no such operator; nothing is written"):
        result.save(tmp_path / "out.onnx", quantize=Quantization(given))
    assert list(tmp_path.iterdir()) == []


def test_a_quantizer_leaves_its_model_alone(tmp_path: Path) -> None:
    result, given = compiled(ConvNet, 0.2)
    path = tmp_path / "float.onnx"
    result.save(path)
    before = path.read_bytes()
    with Quantizer(path, [{"x": batch["x"].numpy()} for batch in given.batches]) as int8:
        part = int8.quantized(int8.nodes[:1])
        assert part == int8.quantized(int8.nodes[:1])
        assert part != int8.quantized(int8.nodes[:1], {int8.nodes[0].kind})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
