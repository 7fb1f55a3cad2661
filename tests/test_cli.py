"""The command line as a user meets it: files of every kind, errors in one sentence, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lrcompile.__main__ import main
from lrcompile.cli import run
from lrcompile.plugins import Discovered
from lrcompile.report.console import Screen
from lrcompile.report.progress import ProgressDisplay

ROOT = Path(__file__).parents[1]
MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(256, 1024)
        self.down = nn.Linear(1024, 256)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.up, self.down):
            rows, columns = layer.weight.shape
            left = torch.randn(rows, 16, generator=generator)
            right = torch.randn(16, columns, generator=generator)
            layer.weight.data = left @ right / columns**0.5
            layer.bias.data.zero_()

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def build():
    return Net().eval()

def build_with_inputs():
    return Net().eval(), (torch.randn(4096, 256, generator=torch.Generator().manual_seed(1)),)

def loader():
    yield {"x": torch.randn(4096, 256, generator=torch.Generator().manual_seed(2))}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the model in every form, all of them called *.pt, and the code that builds it."""
    path = tmp_path_factory.mktemp("user")
    (path / "user_net.py").write_text(MODULE)
    sys.path.insert(0, str(path))
    try:
        import user_net
    finally:
        sys.path.remove(str(path))
    model, (x,) = user_net.build_with_inputs()
    torch.export.save(
        torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), path / "export.pt2"
    )
    os.rename(path / "export.pt2", path / "model.pt")
    torch.save(model.state_dict(), path / "state.pt")
    torch.save(model, path / "pickled.pt")
    np.savez(path / "calib.npz", x=x.numpy()[:2048])
    return path


@pytest.fixture
def cwd(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that sees the user's files."""
    for item in folder.iterdir():
        if item.name != "__pycache__":
            (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line."""
    code = run(words)
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines(keepends=True) if " s left" not in line]  # progress of a slow machine
    return code, out, "".join(said)


def made(cwd: Path) -> set[str]:
    """What the command left in the folder."""
    return {p.name for p in cwd.iterdir() if not p.is_symlink()} - {"__pycache__"}


def test_main_form_writes_a_verified_model(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        capsys, "model.pt", "--target", "v100", "--out", "model_lr.onnx", "--report-json", "r.json",
        "--plan-out", "plan.json", "--report", "r.html",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "low-rank-linear" in out
    assert "predicted, analytic" in out
    assert made(cwd) == {"model_lr.onnx", "r.json", "r.html", "plan.json"}
    assert "<title>model.pt on v100</title>" in Path("r.html").read_text(encoding="utf-8")
    report = json.loads(Path("r.json").read_text())
    assert set(report) >= {"schema", "target", "model", "latency_ms", "error", "sites", "verification", "timings_s"}
    figures = {"params_before", "params_after", "flops_before", "flops_after", "ops_before", "ops_after"}
    assert set(report["model"]) >= figures
    assert set(report["latency_ms"]) == {"before", "after", "speedup", "kind", "sigma"}
    assert set(report["error"]) == {"metric", "basis", "batches_fitted", "batches_judged", "budget", "measured"}
    assert set(report["sites"][0]) >= {
        "site", "op", "decision", "pass", "params", "error", "latency_ms_before", "latency_ms_after", "p_faster",
        "reason",
    }  # fmt: skip
    assert report["verification"]["onnx_vs_torch"] <= 1e-4
    session = onnxruntime.InferenceSession("model_lr.onnx")
    assert session.run(None, {"x": np.ones((3, 256), np.float32)})[0].shape == (3, 256)


def test_the_opset_is_written_and_kept_by_a_plan(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("model.pt", "--target", "v100", "--opset", "23", "--out", "a.onnx", "--plan-out", "plan.json")
    assert call(capsys, *words)[0] == 0
    assert onnx.load("a.onnx").opset_import[0].version == 23
    assert call(capsys, "model.pt", "--plan", "plan.json", "--out", "b.onnx")[0] == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_plan_replays_byte_identically(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("model.pt", "--target", "v100", "--calib", "calib.npz", "--batch", "1024")
    assert call(capsys, *words, "--out", "a.onnx", "--plan-out", "plan.json")[0] == 0
    code, _, err = call(
        capsys, "model.pt", "--calib", "calib.npz", "--batch", "1024", "--plan", "plan.json", "--out", "b.onnx",
        "--plan-out", "again.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert Path("plan.json").read_bytes() == Path("again.json").read_bytes()
    code, out, _ = call(capsys, "explain", "plan.json")
    assert code == 0
    assert "down" in out
    code, out, _ = call(capsys, "explain", "plan.json", "up")
    assert "low-rank-linear" in out
    code, out, _ = call(capsys, "explain", "plan.json", "up", "--json")
    assert json.loads(out)["alternatives"]
    code, _, err = call(capsys, "explain", "plan.json", "upp")
    assert code == 2
    assert "did you mean up" in err


@pytest.mark.parametrize(
    "words",
    [
        ("state.pt", "--arch", "user_net:build", "--input", "x=float32[4096,256]"),
        ("user_net:build_with_inputs",),
        ("user_net:build", "--calib", "user_net:loader", "--batch", "1024"),
        ("pickled.pt", "--trust-pickle", "--calib", "calib.npz", "--batch", "512"),
    ],
)
def test_every_kind_of_source(cwd: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, err = call(capsys, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["model"]["params_before"] == 256 * 1024 * 2 + 1024 + 256
    assert not made(cwd)


def test_lists_and_predictions(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "devices", "--json")
    assert {d["name"] for d in json.loads(out)} >= {"v100", "t4", "ascend310", "rpi5", "x86-ort"}
    code, out, _ = call(capsys, "passes", "--json")
    assert "low-rank-linear" in {p["name"] for p in json.loads(out)["passes"]}
    Path("ops.csv").write_text("m,n,k,ta,tb\n1024,1024,1024,N,N\n")
    code, out, err = call(capsys, "predict", "ops.csv", "--target", "v100", "--dtype", "fp16", "--out", "p.csv")
    assert (code, err) == (0, "")
    assert Path("p.csv").read_text().splitlines()[0] == "m,n,k,ta,tb,predicted_ms,sigma"
    Path("ops.csv").write_text(
        "op,dtype,m,n,k\n" + "".join(f"gemm,{dtype},4096,4096,4096\n" for dtype in ("fp16", "fp32"))
    )
    assert call(capsys, "predict", "ops.csv", "--target", "v100", "--out", "p.csv")[0] == 0
    half, single = (float(line.split(",")[-2]) for line in Path("p.csv").read_text().splitlines()[1:])
    assert single > 4 * half


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def _write_bad_files(cwd: Path) -> None:
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello")
    Path("cut.pt").write_bytes(Path("model.pt").read_bytes()[:3000])
    Path("evil.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save({"w": _Evil()}, "evil_zip.pt")
    state = torch.load("state.pt", weights_only=True)
    torch.save({**state, "up.weight": torch.full((1024, 256), float("nan"))}, "nan.pt")
    torch.save({"up.weight": torch.zeros(3, 3), "other": torch.zeros(1)}, "misfit.pt")
    np.savez("nan.npz", x=np.full((8, 256), np.nan, np.float32))
    np.savez("names.npz", y=np.zeros((8, 256), np.float32))
    np.savez("shape.npz", x=np.zeros((8, 7), np.float32))
    Path("plan.json").write_text("{}")
    Path("deep.json").write_text("[" * 100_000)
    Path("report.json").write_text('{"schema": 1, "latency_ms": {}}')
    Path("huge.npz").write_bytes(_claims_terabytes())


def _claims_terabytes() -> bytes:
    """An .npz of a few bytes whose one array says that it has 10¹² samples of 256 numbers."""
    array, archive = BytesIO(), BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 256)})
    with ZipFile(archive, "w") as packed:
        packed.writestr("x.npy", array.getvalue())
    return archive.getvalue()


BAD: list[tuple[tuple[str, ...], int, str]] = [
    (("nothing.pt",), 2, "nothing.pt"),
    (("empty.pt",), 2, "empty"),
    (("text.pt",), 2, "not a model"),
    (("cut.pt",), 2, "cut.pt"),
    (("evil.pt",), 2, "--trust-pickle"),
    (("evil_zip.pt",), 2, "--trust-pickle"),
    (("pickled.pt",), 2, "--trust-pickle"),
    (("state.pt",), 2, "--arch"),
    (("misfit.pt", "--arch", "user_net:build"), 2, "up.weight"),
    (("nan.pt", "--arch", "user_net:build", "--input", "x=float32[8,256]"), 2, "up.weight"),
    (("user_net:biuld",), 2, "build"),
    (("state.pt", "--arch", "user_net:build"), 2, "--input"),
    (("user_net:build", "--input", "y=float32[8,256]"), 2, "x"),
    (("user_net:build", "--input", "x=float32[8,255]"), 2, "255"),
    (("user_net:build", "--input", "x=flaot32[8,256]"), 2, "float32"),
    (("user_net:build", "--input", "x=int64[8,256]"), 2, "does not run"),
    (("model.pt", "--calib", "nan.npz"), 2, "NaN"),
    (("model.pt", "--calib", "names.npz"), 2, "y"),
    (("model.pt", "--calib", "shape.npz", "--batch", "8"), 2, "7"),
    (("model.pt", "--target", "v10"), 2, "v100"),
    (("model.pt", "--passes", "low-rank-liner"), 2, "low-rank-linear"),
    (("model.pt", "--report", "r.json"), 2, "whose name ends in .html; got '.json'"),
    (("model.pt", "--opset", "17"), 2, "expected 18 to 23"),
    (("model.pt", "--passes", ""), 2, "unknown pass ''"),
    (("model.pt", "--passes=-low-rank-conv", "--option", "low-rank-conv.pairs=3"), 2, "-low-rank-conv leaves out"),
    (("model.pt", "--eval", "user_net:build", "--max-drop", "0.1", "--strategy", "beam"), 2, "or use milp"),
    (("model.pt", "--option", "low-rank-conv.pears=3"), 2, "did you mean 'pairs'"),
    (("model.pt", "--skip", "nope.*"), 2, "up"),
    (("model.pt", "--tagret", "v100"), 2, "--target"),
    (("model.pt", "--size", "huge"), 2, "--size"),
    (("model.pt", "--speedup", "0.5"), 2, "--speedup"),
    (("model.pt", "--max-latency", "soon"), 2, "--max-latency"),
    (("model.pt", "--max-error", "nan"), 2, "max_error"),
    (("model.pt", "--seed", str(2**64)), 2, "of 64 bits"),
    (("model.pt", "--dtype", "fp12"), 2, "fp32"),
    (("model.pt", "--batch", "0"), 2, "--batch"),
    (("model.pt", "--plan", "plan.json"), 2, "--plan-out"),
    (("model.pt", "--speedup", "500"), 1, "reachable range"),
    (("model.pt", "--max-latency", "1ns"), 2, "--max-latency"),
    (("model.pt", "--size", "0.0001"), 1, "reachable range"),
    (("model.pt", "--target", "local.toml"), 2, "local.toml"),
    (("model.pt", "--calib", "huge.npz"), 2, "huge.npz claims more than memory holds (Unable to allocate 931. TiB"),
    (
        ("model.pt", "--calib", "calib.npz", "--progressive", "0.5,", "--recover", "1"),
        2,
        "--progressive got '0.5,'",
    ),
    (("model.pt", "--calib", "calib.npz", "--progressive", "0.3,0.5", "--recover", "1"), 2, "expected falling shares"),
    (("model.pt", "--calib", "calib.npz", "--recover", "1", "--option", "recover.steps=9"), 2, "leave it out"),
    (("model.pt", "--plan", "deep.json"), 2, "deep.json is not JSON"),
    (("model.pt", "--plan", "report.json"), 2, "report.json is a report or a front, not a plan"),
    (
        ("model.pt", "--plan", "nan.npz"),
        2,
        "cannot read plan nan.npz: it is no text; expected a file",
    ),
    (("model.pt", "more.pt"), 2, "see: lrcompile compile --help"),
    (("nomod:x",), 2, "nomod:x: there is no module 'nomod'"),  # and no picture in the place of ":x:"
    (("tradeof", "model.pt"), 2, "there is no command or file tradeof; did you mean: lrcompile tradeoff"),
    (("explain", "missing.json"), 2, "missing.json"),
    (("explain",), 2, "Missing argument 'plan'; see: lrcompile explain --help"),
    (("tradeoff", "model.pt", "--option", "recover.steps=9"), 2, "a front has none; leave it out"),
    (("calibrate", "--minutes", "0", "--out", "p.toml"), 2, "--minutes 0 is no time to measure"),
    (("calibrate", "--minutes", "nan", "--out", "p.toml"), 2, "--minutes nan"),
    (("bench", "text.pt", "text.pt"), 2, "text.pt"),
    (("bench", "text.pt", "text.pt", "--batch", "-1"), 2, "batch"),
    (("bench", "text.pt", "text.pt", "--seconds", "nan"), 2, "seconds"),
    (("bench", "text.pt", "text.pt", "--seed", "-1"), 2, "seed"),
    (("predict", "text.pt", "--out", "p.csv"), 2, "text.pt"),
    ((), 2, ""),
]


@pytest.mark.parametrize(("words", "expected", "says"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_bad_usage_is_one_sentence_and_leaves_nothing(
    cwd: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: int, says: str
) -> None:
    _write_bad_files(cwd)
    Path("out.onnx").write_bytes(b"precious")
    before = made(cwd)
    compiling = bool(words) and words[0] not in ("explain", "bench", "predict", "tradeoff", "calibrate")
    code, _, err = call(capsys, *words, *(("--out", "out.onnx") if compiling else ()))
    assert code == expected
    assert "Traceback" not in err
    if words:
        assert err.startswith("lrcompile: ")
        assert says in err
        assert err.count("\n") == 1
    assert made(cwd) == before
    assert Path("out.onnx").read_bytes() == b"precious"


@pytest.mark.parametrize("out", ["m.pt2", "folder", "m.onnx/"])
def test_an_opset_is_of_onnx(cwd: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    code, _, err = call(capsys, "model.pt", "--opset", "23", "--out", out)
    assert code == 2
    assert f"--opset 23 is a version of ONNX, got --out {out}" in err
    assert not made(cwd)


@pytest.mark.parametrize("out", ["no/such/folder/m.onnx", "m.tflite", "calib.npz/m.onnx"])
def test_outputs_that_cannot_be_written_are_refused_first(
    cwd: Path, capsys: pytest.CaptureFixture[str], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrcompile.session.load", lambda *_, **__: pytest.fail("the model was read before"))
    code, _, err = call(capsys, "model.pt", "--out", out)
    assert code == 2
    assert err.startswith("lrcompile: cannot write")
    assert not made(cwd)


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("stage", "stopped"),
    [("trace", interrupt), ("price", interrupt), ("choose", interrupt), ("emit", interrupt), ("emit", terminate)],
)
def test_interrupt_leaves_nothing(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str,
    stopped: Callable[[], None],
) -> None:  # fmt: skip
    """Ctrl-C or SIGTERM in the middle of the work: one line, exit code 130, no output and no temporary file."""
    Path("out.onnx").write_bytes(b"precious")
    before = made(cwd)

    def interrupted(self: ProgressDisplay, at: str, done: int, total: int) -> None:
        if at == stage:
            stopped()

    monkeypatch.setattr(ProgressDisplay, "__call__", interrupted)
    monkeypatch.setattr(sys, "argv", ["lrcompile", "user_net:build_with_inputs", "--out", "out.onnx"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capsys.readouterr().err.strip() == "lrcompile: interrupted; what was not finished was not written"
    assert made(cwd) == before
    assert Path("out.onnx").read_bytes() == b"precious"


@pytest.mark.parametrize("words", [("model.pt", "--out", ""), ("tradeoff", "model.pt", "--plans", ".")])
def test_the_folder_that_one_is_in_is_not_replaced(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    model, here = str(cwd / "model.pt"), cwd / "empty"
    here.mkdir()
    monkeypatch.chdir(here)
    code, _, err = call(capsys, *(model if word == "model.pt" else word for word in words))
    assert code == 2
    assert "it is the folder that you are in; give a name" in err
    assert here.samefile(".")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_libraries_load(tmp_path: Path, number: signal.Signals) -> None:
    """As they may abort, in C++, where Python raises, the command ends before anything is raised."""
    text = f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    import json.tool\nfinally:\n    os.abort()\n"
    (tmp_path / "torch.py").write_text(text)
    command = [sys.executable, "-m", "lrcompile", "model.pt"]
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "passes")))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # tests that run in the background ignore Ctrl-C
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "lrcompile: interrupted; what was not finished was not written\n"


def test_model_with_a_state_dict_key_for_every_kept_layer(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of readable PyTorch comes out too, and runs with torch alone."""
    code, _, err = call(capsys, "user_net:build_with_inputs", "--target", "v100", "--out", "lr")
    assert (code, err) == (0, "")
    done = subprocess.run(
        [sys.executable, "-c", "import torch; from model import load; print(load()(torch.ones(2, 256)).shape)"],
        cwd=cwd / "lr", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "torch.Size([2, 256])" in done.stdout


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("devices >&-", 0, ""),
        ("devices --json | true", 0, ""),
        ("devices >/dev/full", 2, "cannot write standard output: No space left on device"),
        ("passes >ascii.txt", 0, ""),
        pytest.param("devices >&- 2>&-", 0, "", marks=pytest.mark.slow),
        pytest.param("devices | true", 0, "", marks=pytest.mark.slow),
        pytest.param("devices --json >/dev/full", 2, "standard output: No space left on", marks=pytest.mark.slow),
        pytest.param("devices >/dev/full 2>&1", 2, "", marks=pytest.mark.slow),
    ],
)
def test_output_that_nobody_reads_or_that_cannot_be_written(tmp_path: Path, command: str, code: int, says: str) -> None:
    """No traceback, and no exit code that says something of a budget."""
    left, pipe, right = command.partition(" | ")
    line = f"{sys.executable} -m lrcompile {left}"
    script = f"({line}; echo $? >code){pipe}{right}" if pipe else f"{line}; echo $? >code"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (tmp_path / "code").read_text().split() == [str(code)]
    assert done.stderr.count("\n") == bool(says)
    assert says in done.stderr


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    code = "from lrcompile.cli import run; import sys; run(['--help']); run(['devices']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_a_calibration_has_no_negative_seed(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "calibrate", "--out", "mine.toml", "--seed", "-1")
    assert code == 2
    assert "--seed" in err


def test_work_goes_on_where_nobody_reads_its_progress() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, ProgressDisplay(Screen(file=stream)) as display:
        display("one evaluation takes 1 s", 0, 0)
        display("another remark", 0, 0)


def test_a_plugin_that_is_left_out_is_said_before_the_work(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be why a budget cannot be met, and then there is no report to say so."""
    found = Discovered((), {}, ("plugin 'mine' is left out: SyntaxError",))
    monkeypatch.setattr("lrcompile.session.discover", lambda: found)
    code, _, err = call(capsys, "user_net:build_with_inputs", "--size", "0.5")
    assert code == 1
    assert err.startswith("plugin 'mine' is left out: SyntaxError\nlrcompile: a size of 0.5 ")
