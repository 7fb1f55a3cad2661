"""torch.export archives: read back, of any batch size, with the same bytes in every process."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import panel
import pytest
import torch
from torch import nn

from lrcompile.emit.pt2 import load_pt2, save_pt2, to_pt2
from lrcompile.frontend.load import load
from lrcompile.frontend.trace import Traced, resized, run, trace
from lrcompile.graph.verify import relative_error


def bert() -> Traced:
    model, args, kwargs = panel.bert()
    return trace(model, args, {name: value[:1] for name, value in kwargs.items()})


def write(traced: Traced, path: Path) -> None:
    program, kept = to_pt2(traced.graph.gm, traced.args, traced.kwargs, traced.open_axes)
    assert kept == traced.open_axes
    assert traced.dynamic_batch
    save_pt2(program, path)


def test_an_archive_is_a_model_to_compile(tmp_path: Path) -> None:
    traced = bert()
    path = tmp_path / "out.pt2"
    write(traced, path)
    assert b"SequenceClassifierOutput" not in path.read_bytes()
    source = load(str(path))
    assert source.kwargs is not None
    assert [(name, value.tolist()) for name, value in source.kwargs.items()] == [
        (name, value.tolist()) for name, value in traced.kwargs.items()
    ]
    again = trace(source.program, source.args or (), source.kwargs)
    assert again.dynamic_batch
    assert again.output_names == ("logits",)
    assert list(again.graph.sites()) == list(traced.graph.sites())
    module = load_pt2(path)
    for size in (1, 2, 5):
        inputs = {name: resized(value, size) for name, value in traced.kwargs.items()}
        outputs = module(**inputs)
        assert type(outputs) is dict
        assert relative_error(run(traced.graph.gm, list(inputs.values())), list(outputs.values())) < 1e-6


WRITE = """
import sys
from pathlib import Path
from test_emit_pt2 import tied, write
write(tied(), Path(sys.argv[1]))
"""


def tied() -> Traced:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(96, 48), nn.Linear(48, 96, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(48, 48), nn.ReLU(), head).eval()
    return trace(model, (torch.zeros(2, 5, dtype=torch.int64),))


def test_bytes_are_the_same_in_every_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    path = ":".join(str(root / name) for name in (".", "passes", "tests"))
    environment = {"PYTHONPATH": path, "PYTHONHASHSEED": "5", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    there, here = tmp_path / "there.pt2", tmp_path / "here.pt2"
    subprocess.run([sys.executable, "-c", WRITE, there], cwd=tmp_path, env=environment, check=True)
    write(tied(), here)
    assert there.read_bytes() == here.read_bytes()
    with zipfile.ZipFile(here) as archive:
        text = archive.read("archive/models/model.json").decode()
    for trace_of_machine in (str(root), "site-packages", ".py", "stack_trace", "graph_id"):
        assert trace_of_machine not in text
    assert capfd.readouterr() == ("", "")


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "out.pt2"
    write(tied(), path)
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/weights/weight_" in entry.filename]
    assert sorted(sizes) == [4 * 48, 4 * 48 * 48, 4 * 96 * 48]
