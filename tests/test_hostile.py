"""Hostile files: each is refused in words, and none runs code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import files
import pytest
import torch
from files import edited, graph, in_program, refusal

from lrcompile.errors import InputError
from lrcompile.frontend.load import load
from lrcompile.frontend.trace import trace

folder, archives = files.folder, files.archives


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    payload = {"fc.weight": torch.ones(4, 3), "x": Payload(marker)}
    made = {f"pickle {n}": pickle.dumps(Payload(marker), protocol=n) for n in range(6)}
    for name, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(payload, buffer, _use_new_zipfile_serialization=new)
        made[name] = buffer.getvalue()
    return made


@pytest.mark.parametrize("form", ["zip", "legacy", *(f"pickle {n}" for n in range(6))])
def test_hostile_pickle_does_not_run(folder: Path, form: str) -> None:
    marker = folder / "marker"
    Path("model.pt").write_bytes(hostile_pickles(marker)[form])
    for arch in (None, "factories:Net"):
        text = refusal("model.pt", arch=arch)
        assert "runs code" in text
        assert "mkdir" in text
    assert not marker.exists()
    if form != "pickle 0":  # the payload is live: this is what --trust-pickle means
        refusal("model.pt", trust_pickle=True)
        assert marker.exists()


def test_hostile_pickle_in_torchscript_does_not_run(folder: Path, archives: Path) -> None:
    marker = folder / "marker"
    for member in ("data.pkl", "constants.pkl", "traced_inputs.pkl"):
        hostile = pickle.dumps(Payload(marker), protocol=2)
        edited(archives / "script.pt", folder / "m.pt", lambda m, k=member, v=hostile: m.update({k: v}))
        if member == "traced_inputs.pkl":  # not read
            load("m.pt")
        else:
            assert "TorchScript archive that cannot be read" in refusal("m.pt")
        assert not marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        'torch.save(x, "marker")',
        'ops.aten.save(x, "marker")',
        'torch . save(x, "marker")',
        'getattr(torch, "save")(x, "marker")',
        "hidden = torch",
        "hidden = ops.aten",
        'ops.image.write_file("marker", x)',
        '_0 = torch.from_file("marker", True, 8)',
    ],
)
def test_torchscript_that_reaches_files(folder: Path, archives: Path, line: str) -> None:
    def insert(members: dict[str, bytes]) -> None:
        name = next(n for n in members if n.endswith(".py") and b"relu" in members[n])
        source = members[name].decode()
        members[name] = source.replace("    return ", f"    {line}\n    return ", 1).encode()

    edited(archives / "script.pt", folder / "m.pt", insert)
    assert "can reach files" in refusal("m.pt")
    assert not (folder / "marker").exists()


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def payload_config(kind: str, name: str) -> Callable[[dict[str, bytes], Path], None]:
    """A weight or constant that is stored as a pickle."""

    def apply(members: dict[str, bytes], marker: Path) -> None:
        config_name = f"data/{kind}/model_{kind}_config.json"
        config = json.loads(members[config_name])
        config["config"]["fc.bias"] = {"path_name": name, "is_param": True, "use_pickle": True, "tensor_meta": None}
        members[config_name] = json.dumps(config).encode()
        opaque = name.startswith("opaque")
        members[f"data/{kind}/{name}"] = pickle.dumps(Payload(marker)) if opaque else torch_bytes(Payload(marker))

    return apply


def expression(program: dict[str, Any]) -> None:
    size = graph(program)["tensor_values"]["x"]["sizes"][0]
    size["as_expr"]["expr_str"] = "__import__('os').mkdir('MARKER')"


def expression_inside_call(program: dict[str, Any]) -> None:
    size = graph(program)["tensor_values"]["x"]["sizes"][0]
    size["as_expr"]["expr_str"] = 'Max(\'__import__("os").mkdir("MARKER")\', 1)'


def target(text: str) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        node = graph(program)["nodes"][-1]
        node["target"] = text
        node["inputs"] = [{"name": "", "arg": {"as_string": "mkdir MARKER"}, "kind": 1}]

    return change


def operator_argument(program: dict[str, Any]) -> None:
    graph(program)["nodes"][-1]["inputs"].append({"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1})


def renamed(program: dict[str, Any]) -> None:
    text = json.dumps(program).replace('"name": "x"', "\"name\": \"x=__import__('os').mkdir('MARKER')\"")
    program.update(json.loads(text))


def tree(spec: object) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, spec])

    return change


LEAF = {"type": None, "context": None, "children_spec": []}
ENUM = json.dumps({"__enum__": True, "fqn": "evil:Evil", "name": "a"})
FACTORY = {"default_factory_module": "evil", "default_factory_name": "Evil", "dict_context": ["a"]}
QUOTED_KEY = json.dumps(['a"); import os; ("'])

# name: (change, whether torch's own reader runs it on opening, part of the refusal)
HOSTILE_EXPORTED: dict[str, tuple[Callable[[dict[str, bytes], Path], None], bool, str]] = {
    "sample inputs": (
        lambda members, marker: members.update({"data/sample_inputs/model.pt": torch_bytes(Payload(marker))}),
        True,
        "data/sample_inputs/model.pt",
    ),
    "legacy weights": (
        lambda members, marker: members.update({"data/weights/model.pt": torch_bytes(Payload(marker))}),
        False,
        "data/weights/model.pt",
    ),
    "legacy constants": (
        lambda members, marker: members.update({"data/constants/model.pt": torch_bytes(Payload(marker))}),
        True,
        "data/constants/model.pt",
    ),
    "pickled weight": (payload_config("weights", "weight_9"), True, "pickled object (weight_9)"),
    "pickled constant": (payload_config("constants", "tensor_9"), True, "pickled object (tensor_9)"),
    "opaque constant": (payload_config("constants", "opaque_obj_9"), True, "pickled object (opaque_obj_9)"),
    "script object": (payload_config("constants", "custom_obj_9"), False, "pickled object (custom_obj_9)"),
    "expression": (in_program(expression), True, "as a size"),
    "expression in a call": (in_program(expression_inside_call), True, "as a size"),
    "any function": (in_program(target("torch.os.system")), False, "torch.os.system"),
    "load_library": (in_program(target("torch.ops.load_library")), False, "torch.ops.load_library"),
    "attrgetter": (in_program(target("_operator.attrgetter")), False, "_operator.attrgetter"),
    "math loader": (in_program(target("math.__loader__.load_module")), False, "math.__loader__"),
    "operator of files": (in_program(target("torch.ops.aten.from_file.default")), False, "aten.from_file"),
    "function as argument": (in_program(operator_argument), False, "torch.os.system"),
    "name as source": (in_program(renamed), False, "as a name"),
    "tree of enum": (
        in_program(tree({"type": "builtins.list", "context": ENUM, "children_spec": [LEAF]})),
        True,
        "name Python objects",
    ),
    "tree of defaultdict": (
        in_program(tree({"type": "collections.defaultdict", "context": FACTORY, "children_spec": [LEAF]})),
        True,
        "name Python objects",
    ),
    "tree with a quoted key": (
        in_program(tree({"type": "builtins.dict", "context": QUOTED_KEY, "children_spec": [LEAF]})),
        False,
        "as a name",
    ),
    "compiled library": (
        lambda members, marker: members.update({"data/aotinductor/model/model.so": b"\x7fELF"}),
        False,
        "compiled code",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_EXPORTED)
def test_hostile_exported_archive_does_not_run(
    folder: Path, archives: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = folder / "marker"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(folder)
    change, live, part = HOSTILE_EXPORTED[case]
    edited(archives / "exported.pt2", folder / "m.pt2", lambda members: change(members, marker))
    text = refusal("m.pt2")
    assert part in text
    assert "could run code" in text
    assert not marker.exists()
    if live:  # the check is needed: torch's reader falls for it
        with contextlib.suppress(InputError):
            load("m.pt2", trust_pickle=True)
        assert marker.exists()
    sys.modules.pop("evil", None)


def test_guards_in_an_exported_archive_do_not_run(folder: Path, archives: Path) -> None:
    marker = folder / "marker"

    def change(program: dict[str, Any]) -> None:
        program["guards_code"] = ["__import__('os').mkdir('MARKER') is None"]

    edited(archives / "exported.pt2", folder / "m.pt2", lambda members: in_program(change)(members, marker))
    source = load("m.pt2")
    source.program.module()(torch.ones(2, 3))  # type: ignore[union-attr]
    assert not marker.exists()


# ------------------------------------------------------------------------------------- names that end up in source text


BREAKS_OUT = """k,a" + str(getattr(__import__('os'), 'mkdir')('m')) + "b,torch.nn.modules.X"""


def test_paths_of_modules_in_an_archive_do_not_run(folder: Path, archives: Path) -> None:
    """FX prints the path of a layer without parameters into its code, quoted but not escaped."""

    def change(program: dict[str, Any]) -> None:
        nodes = graph(program)["nodes"]
        dropout = json.loads(json.dumps(nodes[-1]))
        assert dropout["target"] == "torch.ops.aten.relu.default"
        dropout["target"] = "torch.ops.aten.dropout.default"
        dropout["inputs"] = [
            {**dropout["inputs"][0], "name": "input"},
            {"name": "p", "arg": {"as_float": 0.1}, "kind": 1},
            {"name": "train", "arg": {"as_bool": False}, "kind": 1},
        ]
        dropout["metadata"]["nn_module_stack"] = BREAKS_OUT
        nodes[-1] = dropout

    edited(archives / "exported.pt2", folder / "m.pt2", lambda members: in_program(change)(members, folder))
    source = load("m.pt2")
    traced = trace(source.program, (torch.ones(2, 3),))
    traced.graph.gm(torch.ones(2, 3))
    assert not (folder / "m").exists()
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["fc", "dropout"]


def test_records_that_differ_in_case_alone(folder: Path, archives: Path) -> None:
    """The reader finds a record whatever the case of its name, so presence has to be asked of the reader."""
    marker = folder / "marker"
    hostile = torch_bytes(Payload(marker))

    def renamed_samples(members: dict[str, bytes]) -> None:
        members.pop("data/sample_inputs/model.pt", None)
        members["data/sample_inputs/MODEL.pt"] = hostile

    edited(archives / "exported.pt2", folder / "m.pt2", renamed_samples)
    assert "data/sample_inputs/model.pt" in refusal("m.pt2")
    edited(archives / "script.pt", folder / "m.pt", lambda m: m.update({k.upper(): v for k, v in m.items()}))
    assert "differ in case alone" in refusal("m.pt")
    assert not marker.exists()


class Named(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer(name, torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.buffers())


@pytest.mark.parametrize("name", ['w" + str(print(1)) + "', "w'x", "w x"])
def test_attributes_of_torchscript_that_are_no_names(folder: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Named(name), (torch.ones(2, 3),)).save("m.pt")
    assert "declares an attribute" in refusal("m.pt")


@pytest.mark.parametrize("line", ['torch.autograd.save(x, "marker")', 'ops.aten.autograd.save(x, "marker")'])
@pytest.mark.parametrize("suffix", [".py", ".PY"])
def test_torchscript_that_reaches_files_by_a_longer_path(folder: Path, archives: Path, line: str, suffix: str) -> None:
    def insert(members: dict[str, bytes]) -> None:
        name = next(n for n in members if n.endswith(".py") and b"relu" in members[n])
        source = members.pop(name).decode().replace("    return ", f"    {line}\n    return ", 1)
        members[name.removesuffix(".py") + suffix] = source.encode()

    edited(archives / "script.pt", folder / "m.pt", insert)
    assert "can reach files" in refusal("m.pt")
    assert not (folder / "marker").exists()


class Worded(torch.nn.Module):
    def forward(self, x: dict[str, Any]) -> torch.Tensor:
        return x["a"] * 2 if x["how"] != "no" else x["a"]


def test_texts_of_inputs_are_no_source(folder: Path) -> None:
    """torch's guards put what inputs hold into source text."""
    words = {"a": torch.ones(2, 3), "how": 'say "yes"'}
    traced = trace(Worded(), (words,))
    assert torch.equal(traced.graph.gm(words), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("name", ["exported.pt2", "script.pt"])
def test_archives_that_unpack_to_far_more_than_they_hold(
    folder: Path, archives: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrcompile.frontend.archives.MOST_UNPACKED", 1 << 20)
    with zipfile.ZipFile(archives / name) as source, zipfile.ZipFile("m.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member))
        target.writestr(f"{source.namelist()[0].split('/')[0]}/code/more.py", bytes(64 << 20))
    assert Path("m.pt").stat().st_size < 1 << 20
    assert "unpacks to 64 MB" in refusal("m.pt")
