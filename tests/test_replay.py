"""Plans applied again: to the types and sizes that they were made for, and what has no meaning beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrcompile.cli import run

WIDTH = 256


class Cast(nn.Module):
    """Takes half precision, and computes in single."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.to(torch.float32)).relu())


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def archived(dtype: torch.dtype, batch: int, *, is_open: bool) -> None:
    x = torch.randn(batch, WIDTH, dtype=dtype)
    shapes = ({0: torch.export.Dim.AUTO},) if is_open else None
    torch.export.save(torch.export.export(Cast().eval(), (x,), dynamic_shapes=shapes), "net.pt2")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert run(list(words)) == 2
    return capsys.readouterr().err


def test_an_archive_gets_the_types_of_its_inputs_in_a_replay_too() -> None:
    archived(torch.float16, 4, is_open=False)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "plan.json", "--out", "a.onnx"]) == 0
    assert run(["net.pt2", "--plan", "plan.json", "--out", "b.onnx"]) == 0
    assert run(["net.pt2", "--plan", "plan.json", "--dtype", "fp32", "--out", "c.onnx"]) == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes() == Path("c.onnx").read_bytes()


def test_a_replay_takes_the_batch_of_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 4, is_open=True)
    np.savez("calib.npz", x=torch.randn(64, WIDTH).numpy())
    words = ["--target", "rpi5", "--calib", "calib.npz"]
    assert run(["net.pt2", *words, "--size", "0.6", "--batch", "8", "--plan-out", "p.json", "--out", "a.onnx"]) == 0
    words = ["--plan", "p.json", "--calib", "calib.npz"]
    assert run(["net.pt2", *words, "--out", "b.onnx", "--report-json", "r.json"]) == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert json.loads(Path("r.json").read_text())["settings"]["batch"] == 8
    assert "--calib and --batch as then" in refused(capsys, "net.pt2", *words, "--batch", "16")


@pytest.mark.parametrize(
    "words",
    [
        ("--max-error", "0"), ("--confidence", "0"), ("--target", "v100"), ("--option", "low-rank-linear.ranks=4"),
        ("--passes", "low-rank-linear"), ("--skip", "up"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_has_no_meaning_beside_a_plan(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 4, is_open=True)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "p.json"]) == 0
    assert words[0] in refused(capsys, "net.pt2", "--plan", "p.json", *words)
    assert run(["net.pt2", "--plan", "p.json", "--target", "rpi5"]) == 0


def damaged(plan: dict[str, Any], how: str) -> dict[str, Any]:
    first, *rest = plan["sites"]
    changed = {"unknown": {**first, "colour": "red"}, "missing": {"site": first["site"]}}[how]
    return {**plan, "sites": [changed, *rest]}


@pytest.mark.parametrize("how", ["unknown", "missing"])
def test_sites_of_a_plan_that_are_damaged(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 4, is_open=True)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "p.json"]) == 0
    Path("bad.json").write_text(json.dumps(damaged(json.loads(Path("p.json").read_text()), how)))
    assert "is damaged" in refused(capsys, "net.pt2", "--plan", "bad.json", "--out", "out.onnx")
    assert "is damaged" in refused(capsys, "explain", "bad.json")
    assert "is damaged" in refused(capsys, "explain", "bad.json", "up")
    assert not Path("out.onnx").exists()


def test_a_recovery_of_a_plan_within_a_measure(capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 8, is_open=True)
    np.savez("calib.npz", x=torch.randn(128, WIDTH).numpy())
    words = ["--target", "rpi5", "--calib", "calib.npz", "--measure", "top1"]
    assert run(["net.pt2", *words, "--size", "0.6", "--plan-out", "p.json"]) == 0
    words = ["--plan", "p.json", "--calib", "calib.npz", "--measure", "top1", "--max-error", "0.99", "--recover", "4"]
    assert run(["net.pt2", *words, "--report-json", "r.json"]) == 0
    report = json.loads(Path("r.json").read_text())
    assert report["error"]["budget"] == 0.99
    assert report["error"]["batches_judged"] == report["recovery"]["kept_out"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--plan-out", "r.json", "--report-json", "r.json"], "--plan-out"),
        (["--report", "r.html", "--report-json", "r.html"], "--report"),
        (["--plan-out", "./net.pt2"], "the model"),
        (["--out", "m.onnx", "--plan-out", "m.onnx"], "--out"),
        (["--calib", "calib.npz", "--report-json", "calib.npz"], "--calib"),
    ],
)
def test_outputs_are_files_of_their_own(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    archived(torch.float32, 4, is_open=True)
    np.savez("calib.npz", x=torch.randn(64, WIDTH).numpy())
    kept = {path: path.read_bytes() for path in Path().iterdir()}
    assert f"it is the file of {says}" in refused(capsys, "net.pt2", "--target", "rpi5", *words)
    assert {path: path.read_bytes() for path in Path().iterdir()} == kept


def test_a_plan_may_be_written_where_it_was_read() -> None:
    archived(torch.float32, 4, is_open=True)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "p.json"]) == 0
    before = Path("p.json").read_bytes()
    assert run(["net.pt2", "--plan", "p.json", "--plan-out", "p.json"]) == 0
    assert Path("p.json").read_bytes() == before


@pytest.mark.parametrize("change", [{"batch": "8"}, {"batch": 0}, {"sites": [{"op": "Linear"}]}])
def test_plans_that_were_edited_by_hand(capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    archived(torch.float32, 4, is_open=True)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "p.json"]) == 0
    Path("p.json").write_text(json.dumps(json.loads(Path("p.json").read_text()) | change))
    for words in (["net.pt2", "--plan", "p.json"], ["explain", "p.json"]):
        assert "is a damaged plan" in refused(capsys, *words)


def test_a_measure_beside_a_plan_is_that_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 4, is_open=True)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "p.json"]) == 0
    words = ["net.pt2", "--plan", "p.json", "--measure", "kl", "--max-error", "0.1", "--recover", "4"]
    assert "made with --measure error, got --measure kl" in refused(capsys, *words)


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 4, is_open=True)
    Path("run[v2]").mkdir()
    assert run(["net.pt2", "--target", "rpi5", "--plan-out", "run[v2]/p.json"]) == 0
    assert "run[v2]/p.json" in capsys.readouterr().out


def test_a_replay_makes_the_inputs_of_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    archived(torch.float32, 4, is_open=True)
    words = ["net.pt2", "--input", "x=float32[4,256]", "--report-json"]
    assert run([*words, "a.json", "--target", "rpi5", "--size", "0.6", "--seed", "3", "--plan-out", "p.json"]) == 0
    assert run([*words, "b.json", "--plan", "p.json"]) == 0
    one, other = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert one["settings"]["seed"] == other["settings"]["seed"] == 3
    assert one["error"]["measured"] == other["error"]["measured"]
    said = refused(capsys, *words, "c.json", "--plan", "p.json", "--seed", "4")
    assert "made with --seed 3, got --seed 4" in said


def test_a_plan_of_a_replay_says_what_that_did() -> None:
    archived(torch.float32, 4, is_open=True)
    assert run(["net.pt2", "--target", "rpi5", "--size", "0.6", "--plan-out", "p.json"]) == 0
    plan = json.loads(Path("p.json").read_text())
    int8 = {"written": "int8", "left_float": [], "weight_bits": {}}
    Path("p.json").write_text(json.dumps(plan | {"recovery": {"steps": 3}, "int8": int8}))
    assert run(["net.pt2", "--plan", "p.json", "--batch", "8", "--opset", "21", "--plan-out", "q.json"]) == 0
    assert json.loads(Path("q.json").read_text()) == plan | {"batch": 8, "opset": 21}


def test_the_measure_of_a_plan_is_that_of_what_a_recovery_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it is said again or not; and said again without a limit it asks for none."""
    archived(torch.float32, 8, is_open=True)
    np.savez("calib.npz", x=torch.randn(128, WIDTH).numpy())
    words = ["net.pt2", "--calib", "calib.npz"]
    assert run([*words, "--target", "rpi5", "--measure", "kl", "--size", "0.6", "--plan-out", "p.json"]) == 0
    words += ["--plan", "p.json"]
    assert run([*words, "--measure", "kl"]) == 0
    words += ["--recover", "1", "--max-error", "9", "--quantize", "int8", "--out", "out.onnx", "--report-json"]
    assert run([*words, "a.json"]) == 0
    assert run([*words, "b.json", "--measure", "kl"]) == 0
    for name in ("a.json", "b.json"):
        report = json.loads(Path(name).read_text())
        assert report["error"]["budget"] == 9
        until = report["recovery"]["settings"]["until"]
        assert until == pytest.approx(4.5)  # half of the divergence is left to the quantisation
