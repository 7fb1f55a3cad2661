"""Model files to read, and archives to change, for the tests of reading them."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrcompile.errors import InputError
from lrcompile.frontend.load import load

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("scale", torch.ones(2))
    def forward(self, x):
        return self.fc(x).relu()

class Wide(Net):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.extra = nn.Linear(2, 2)

net = Net()
def with_args(): return Net(), torch.ones(2, 3)
def with_kwargs(): return Net(), (), {"x": torch.ones(2, 3)}
def by_name(): return Net(), {"x": torch.ones(2, 3)}
def bad_kwargs(): return Net(), (), 3
def number(): return 3
def nothing(): return None
def raises(): raise KeyError("depth")
def leaves(): raise SystemExit(3)
def needs(depth): return Net()
def lazy(): return nn.LazyLinear(3)
constant = 3
class Space:
    @staticmethod
    def build(): return Net()
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).relu()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a module of factories that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factories.py").write_text(MODELS)
    yield tmp_path
    sys.modules.pop("factories", None)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch.export archive (dynamic batch) and a TorchScript archive of Net."""
    made = tmp_path_factory.mktemp("archives")
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        torch.export.save(program, made / "exported.pt2")
        torch.jit.trace(net, (torch.ones(2, 3),)).save(str(made / "script.pt"))
    return made


def edited(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive with its members (by name below the top folder) changed."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].split("/")[0]
        members = {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
    return target


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(str(source), **options)
    return str(caught.value)


def in_program(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes], Path], None]:
    def apply(members: dict[str, bytes], marker: Path) -> None:
        program = json.loads(members["models/model.json"])
        change(program)
        members["models/model.json"] = json.dumps(program).replace("MARKER", str(marker)).encode()

    return apply


def graph(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["graph"]
