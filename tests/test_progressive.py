"""Families: each member is made of the last, and recovered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import Interpreter

import lrcompile
from lrcompile import Budget, CalibrationData, Graph, Recovery, calibration_from
from lrcompile.cli import run
from lrcompile.errors import BudgetError, InputError
from lrcompile.planning.decompose import spectrum
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.train import _Training
from lrcompile.report.terminal import print_family
from tests.panel import randomise
from tools.bench_planner import macs_target

WIDTH = 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def data(seed: int = 1) -> CalibrationData:
    x = torch.randn(640, WIDTH, generator=torch.Generator().manual_seed(seed))
    return calibration_from({"x": x}, ["x"], 8)


def family(sizes: tuple[float, ...], **settings: Any) -> list[lrcompile.Member]:
    recovery = Recovery(**{"steps": 60, "rate": 1e-3} | settings)
    return lrcompile.progressive(
        net(), (torch.randn(8, WIDTH),), sizes=sizes, recovery=recovery, data=data(), target="rpi5"
    )


def test_each_is_smaller_and_learns_from_the_original() -> None:
    members = family((0.7, 0.5, 0.35))
    assert [member.parent for member in members] == [1.0, 0.7, 0.5]
    counts = [member.result.report.model["weight_bytes_after"] for member in members]
    whole = sum(parameter.numel() * 4 for parameter in net().parameters())
    for member, count in zip(members, counts, strict=True):
        assert count <= member.size * whole
    assert counts == sorted(counts, reverse=True)
    assert members[1].result.report.model["ops_after"] == members[2].result.report.model["ops_after"]
    x = torch.cat([batch["x"] for batch in data(seed=2).batches])
    with torch.no_grad():
        expected = net()(x)
        for member in members:
            figures = member.result.report.recovery
            assert figures is not None
            assert figures["error"][1] < figures["error"][0]
            error = float((member.result.model(x) - expected).norm() / expected.norm())
            assert error == pytest.approx(figures["error"][1], rel=0.2)


def test_the_one_that_loses_most_trains_longest() -> None:
    """The length of so many trainings is shared in proportion to what each size costs at once, squared."""
    lost = []
    for size in (0.7, 0.5):
        at_once = lrcompile.compile(net(), (torch.randn(8, WIDTH),), target="rpi5", budget=Budget(size=size))
        lost.append(at_once.report.error["measured"] ** 2)
    for given, what, low in (({"steps": 50}, "steps", 0), ({"steps": None, "minutes": 0.01}, "minutes", 1e-3)):
        trained = [member.result.report.recovery for member in family((0.7, 0.5), **given)]
        lengths = [figures["settings"][what] for figures in trained if figures is not None]
        whole = 2 * (given[what] or 0)
        assert sum(lengths) == pytest.approx(whole)
        assert low < lengths[0] < lengths[1]
        assert lengths[0] == pytest.approx(whole * lost[0] / sum(lost), rel=0.05, abs=0.5)


@pytest.mark.parametrize("steps", [0, 1])
def test_next_to_no_training(steps: int) -> None:
    trained = [member.result.report.recovery for member in family((0.7, 0.5), steps=steps)]
    assert sum(figures["settings"]["steps"] for figures in trained if figures is not None) == 2 * steps


def test_without_training_a_split_of_a_split_is_a_split() -> None:
    """Progressive without recovery is one-shot: the SVD of a product of factors is that of what they were cut from."""
    weight = torch.randn(40, 30, dtype=torch.float64)
    gram = (x := torch.randn(100, 30, dtype=torch.float64)).T @ x
    for inputs in (None, gram):
        up, down = spectrum(weight, inputs).factors(20)
        again, below = spectrum(up @ down, inputs).factors(10)
        once, under = spectrum(weight, inputs).factors(10)
        assert torch.allclose(again @ below, once @ under, atol=1e-6)


@pytest.mark.parametrize("open_axes", [(0, 1), (0,), (1,), ()])
def test_all_members_have_the_open_sizes_of_the_archive(open_axes: tuple[int, ...]) -> None:
    dims = dict.fromkeys(open_axes, torch.export.Dim.AUTO)
    x = torch.randn(8, 7, WIDTH)
    program = torch.export.export(net(), (x,), dynamic_shapes=(dims or None,))
    learned = calibration_from({"x": torch.randn(64, 7, WIDTH)}, ["x"], 8)
    made = lrcompile.progressive(
        program, (x,), sizes=(0.7, 0.5), recovery=Recovery(steps=2, rate=1e-3), data=learned, target="rpi5"
    )  # fmt: skip
    assert [member.result.traced.open_axes for member in made] == [(open_axes,)] * 2


@pytest.mark.parametrize("sizes", [(), (0.5, 0.7), (0.5, 0.5), (1.2,), (0.0,)])
def test_bad_sizes(sizes: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected falling shares"):
        family(sizes)


def test_what_cannot_be_reached_is_said_of_the_member_before() -> None:
    with pytest.raises(BudgetError, match=r"^size 0.001, where the original is the member of size 0.7: a size of "):
        family((0.7, 0.001), steps=0)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(8, WIDTH)
    torch.export.save(torch.export.export(net(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), "net.pt2")
    np.savez("calib.npz", x=torch.cat([batch["x"] for batch in data().batches]).numpy())
    common = ["net.pt2", "--target", "rpi5", "--calib", "calib.npz"]
    code = run([*common, "--progressive", "0.7,0.5", "--recover", "40", "--out", "small.onnx"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "small.family.json" in shown.out
    manifest = json.loads(Path("small.family.json").read_text())
    assert [member["file"] for member in manifest["members"]] == ["small-0.7.onnx", "small-0.5.onnx"]
    assert [member["parent"] for member in manifest["members"]] == [1.0, 0.7]
    assert shown.out.count("the weights were recovered") == 1
    for member in manifest["members"]:
        assert any("the weights were recovered" in note for note in member["notes"])
        assert Path(member["file"]).exists()
        assert member["verification"]["onnx_vs_torch"] < 1e-4
    for words, says in (
        (["--progressive", "0.7,0.5", "--out", "x.onnx"], "give --out, and --recover STEPS"),
        (["--progressive", "0.5,0.7", "--out", "x.onnx", "--recover", "5"], "expected falling shares"),
        (["--progressive", "0.5", "--out", "x.onnx", "--recover", "5", "--size", "0.5"], "leave out --size"),
        (["--progressive", "0.5,0.4999999", "--out", "x.onnx", "--recover", "5"], "it is the file of a size of 0.5;"),
        (["--progressive", "half", "--out", "x.onnx", "--recover", "5"], "got 'half'; expected falling shares"),
        (["--progressive", "0.5", "--out", "./", "--recover", "5"], "cannot write ./: --progressive writes a file"),
        (["--progressive", "0.5", "--out", "..", "--recover", "5"], "give a name, such as --out small.onnx"),
    ):
        assert run([*common, *words]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("x*"))


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(net(), (torch.randn(8, WIDTH),)), "net.pt2")
    np.savez("calib.npz", x=torch.cat([batch["x"] for batch in data().batches]).numpy())
    words = "net.pt2 --target rpi5 --calib calib.npz --progressive 0.7,0.5 --recover 2"
    for out, stem in (("small", "small"), ("a.b/", "a.b")):
        assert run([*words.split(), "--out", out]) == 0, capsys.readouterr()
        manifest = json.loads(Path(f"{stem}.family.json").read_text())
        assert [member["file"] for member in manifest["members"]] == [f"{stem}-0.7", f"{stem}-0.5"]
        assert all((tmp_path / member["file"] / "model.py").is_file() for member in manifest["members"])


def test_what_was_trained_is_not_trained_again_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped while the second member is written; started again, no step is made, and nothing is left in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.export.save(torch.export.export(net(), (torch.randn(8, WIDTH),)), "net.pt2")
    np.savez("calib.npz", x=torch.cat([batch["x"] for batch in data().batches]).numpy())
    words = "net.pt2 --target rpi5 --calib calib.npz --progressive 0.7,0.5 --recover 20"
    assert run([*words.split(), "--out", "whole.onnx"]) == 0, capsys.readouterr()
    assert not list(tmp_path.glob("cache/lrcompile/recover/*"))
    save, saved = lrcompile.Result.save, list[str]()

    def stopped(result: lrcompile.Result, path: Any, **options: Any) -> Any:
        if saved:
            raise KeyboardInterrupt
        saved.append(str(path))
        return save(result, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lrcompile.Result, "save", stopped)
        assert run([*words.split(), "--out", "again.onnx"]) == 130
    assert sorted(path.name for path in tmp_path.glob("again*")) == ["again-0.7.onnx", "again.family.json"]
    manifest = json.loads(Path("again.family.json").read_text())  # of what is there
    assert manifest["sizes"] == [0.7, 0.5]
    assert [member["file"] for member in manifest["members"]] == ["again-0.7.onnx"]
    monkeypatch.setattr(_Training, "_step", lambda *given: pytest.fail("it trains again"))
    assert run([*words.split(), "--out", "again.onnx"]) == 0, capsys.readouterr()
    for size in ("0.7", "0.5"):
        assert Path(f"whole-{size}.onnx").read_bytes() == Path(f"again-{size}.onnx").read_bytes()
    assert not list(tmp_path.glob("cache/lrcompile/recover/*"))


def test_limits_are_against_the_original() -> None:
    """Each member loses less against the one before than against the original, and is faster by less."""
    common: dict[str, Any] = {"data": data(), "target": macs_target(), "recovery": Recovery(steps=60, rate=1e-3)}
    plain = lrcompile.progressive(net(), (torch.randn(8, WIDTH),), sizes=(0.7, 0.5), **common)
    errors = [member.result.report.error["measured"] for member in plain]
    assert errors[0] < errors[1]
    first, second = (member.speedup for member in plain)
    assert 1 < first < second
    assert second == pytest.approx(first * plain[1].result.report.latency_ms["speedup"])
    latency = plain[1].to_json()["latency_ms"]
    assert latency["before"] / latency["after"] == pytest.approx(second) == pytest.approx(latency["speedup"])
    within = Budget(max_error=(errors[0] + errors[1]) / 2)
    with pytest.raises(BudgetError, match="after recovery the error is"):
        lrcompile.progressive(net(), (torch.randn(8, WIDTH),), sizes=(0.7, 0.5), budget=within, **common)
    faster = Budget(speedup=second * 0.97)
    members = lrcompile.progressive(net(), (torch.randn(8, WIDTH),), sizes=(0.5, 0.48), budget=faster, **common)
    assert all(member.speedup >= second * 0.96 for member in members)
    with pytest.raises(InputError, match="no limit on the user's metric"):
        lrcompile.progressive(net(), (torch.randn(8, WIDTH),), sizes=(0.5,), budget=Budget(max_drop=0.1), **common)


def test_labels_are_learned() -> None:
    labels: Tensor = net()(torch.cat([batch["x"] for batch in data().batches])).argmax(-1)
    recovery = Recovery(steps=30, rate=1e-3, teacher=0.0)
    (member,) = lrcompile.progressive(
        net(), (torch.randn(8, WIDTH),), sizes=(0.6,), recovery=recovery, data=data(), labels=labels,
        calibration=data(), target="rpi5",
    )  # fmt: skip
    assert member.result.report.recovery is not None
    assert member.result.report.recovery["loss"][1] < member.result.report.recovery["loss"][0]


class Normed(nn.Module):
    """A convolution and its batch norm, whose values are far apart, and layers that read what a layer norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.last, self.up, self.head = nn.LayerNorm(24), nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.head(self.up(self.last(x)))


def test_values_inside_are_followed_over_compiles() -> None:
    """By the path of a module, but never to another value: a folded norm's, or an input without its affine."""
    torch.manual_seed(0)
    x = (torch.randn(8, 4, 6, 6),)
    first = lrcompile.compile(randomise(Normed()).eval(), x, target="rpi5", budget=Budget(size=0.8))
    rewritten = Graph(first.model, first.traced.graph.fake_mode)
    second = lrcompile.compile(first.model, x, target="rpi5", budget=Budget(size=0.7))
    lineage = Lineage.of(first.traced.graph).traced_anew(rewritten, second.traced.graph)
    assert not lineage.direct
    last = Graph(second.model, second.traced.graph.fake_mode)
    found, values = lineage.counterparts(last), {}
    assert {"norm", "head"} <= {original.name for original in found.values()}
    assert not {"conv", "last"} & {original.name for original in found.values()}
    for graph in (first.traced.graph, last):
        interpreter = Interpreter(graph.gm, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(*x)
        values |= {(graph, node.name): value for node, value in interpreter.env.items()}
    for name, original in found.items():
        expected = values[first.traced.graph, original.name]
        assert float((values[last, name] - expected).norm() / expected.norm()) < 0.9
    assert set(lineage.substitutes(last)) <= set(found)


def test_later_members_learn_values_inside_and_are_fitted_anew() -> None:
    figures = [member.result.report.recovery for member in family((0.7, 0.5), steps=0, rate=None)]
    assert figures[0] is not None
    assert figures[1] is not None
    assert figures[1]["values_inside"] > figures[0]["values_inside"] > 0
    assert figures[1]["refitted"]


def member_of(size: float, notes: list[str]) -> dict[str, Any]:
    latency, int8 = {"after": 1.0, "kind": "analytic"}, {"written": "int8"}
    return {
        "size": size, "parent": 1.0, "weight_bytes": 1e6, "operations": 3, "latency_ms": latency, "recovery": None,
        "error": {"measured": 0.1}, "file": f"m-{size}.onnx", "quantization": int8, "notes": notes,
    }  # fmt: skip


def test_what_holds_for_all_members_is_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    made = [member_of(0.7, ["of all", "of one"]), member_of(0.5, ["of all"])]
    print_family(Console(width=160), {"members": made, "notes": ["of plugins"], "manifest": "m.family.json"})
    text = capsys.readouterr().out
    assert "m-0.7.onnx (int8)" in text
    assert "size 0.7  of one" in text
    assert [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("note")] == [
        "of plugins",
        "of all",
    ]


def test_a_measure_needs_no_limit_beside_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(net(), (torch.randn(8, WIDTH),)), "net.pt2")
    np.savez("calib.npz", x=torch.randn(64, WIDTH).numpy())

    def reached(*given: Any, budget: Budget, **options: Any) -> None:
        raise InputError(f"in {budget.measure}")

    monkeypatch.setattr("lrcompile.session.members", reached)
    words = "net.pt2 --calib calib.npz --progressive 0.7,0.5 --recover 5 --measure kl --out s.onnx"
    assert run(words.split()) == 2
    assert capsys.readouterr().err == "lrcompile: in kl\n"
