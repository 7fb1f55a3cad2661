"""Models from files and factories; above all, bad and hostile files: each is refused in words, and none runs code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lrcompile.errors import InputError
from lrcompile.frontend.load import check_finite, load

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


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


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


# ---------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("factory", ["Net", "net", "Space.build", "with_args", "with_kwargs", "by_name"])
def test_factory(folder: Path, factory: str) -> None:
    path = list(sys.path)
    source = load(f"factories:{factory}")
    assert (source.kind, source.name) == ("module", f"factories:{factory}")
    assert not source.program.training
    assert sys.path == path
    if "_" in factory:
        tensors = [*(source.args or ()), *(source.kwargs or {}).values()]
        assert [t.shape for t in tensors] == [(2, 3)]
    else:
        assert source.args is None
        assert source.kwargs is None


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict(folder: Path, wrapper: str | None, prefix: str, legacy: bool) -> None:
    net = Net()
    state: Any = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save(
        {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}} if wrapper else state,
        "model.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    source = load("model.pt", arch="factories:Net")
    assert (source.kind, source.name) == ("module", "model.pt")
    assert torch.equal(source.program.fc.weight, net.fc.weight)  # type: ignore[union-attr]
    assert not source.program.training


def test_safetensors_under_any_name(folder: Path) -> None:
    net = Net()
    save_file(net.state_dict(), "model.pt")
    source = load("model.pt", arch="factories:with_args")
    assert torch.equal(source.program.fc.weight, net.fc.weight)  # type: ignore[union-attr]
    assert source.args is not None
    assert source.args[0].shape == (2, 3)


def test_exported_under_any_name(folder: Path, archives: Path) -> None:
    Path("model.pt").write_bytes((archives / "exported.pt2").read_bytes())
    source = load("model.pt")
    assert (source.kind, source.name, source.kwargs) == ("exported", "model.pt", {})
    assert source.args is not None
    assert source.program.module()(torch.ones(5, 3)).shape == (5, 4)  # type: ignore[union-attr]


def test_torchscript_under_any_name(folder: Path, archives: Path) -> None:
    Path("model.safetensors").write_bytes((archives / "script.pt").read_bytes())
    source = load("model.safetensors")
    assert source.kind == "torchscript"
    assert isinstance(source.program, torch.jit.ScriptModule)
    assert not source.program.training


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_pickled_module_only_when_trusted(folder: Path, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    import factories  # type: ignore[import-not-found]

    if save == "pickle":
        Path("model.pt").write_bytes(pickle.dumps(factories.Net()))
    else:
        torch.save(factories.Net(), "model.pt", _use_new_zipfile_serialization=save == "zip")
    text = refusal("model.pt")
    for part in ("factories.Net", "runs code", "--trust-pickle", "torch.export.save", "--arch"):
        assert part in text
    assert load("model.pt", trust_pickle=True).kind == "module"
    assert "not needed" in refusal("model.pt", trust_pickle=True, arch="factories:Net")


# -------------------------------------------------------------------------------------------------- hostile files


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


def in_program(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes], Path], None]:
    def apply(members: dict[str, bytes], marker: Path) -> None:
        program = json.loads(members["models/model.json"])
        change(program)
        members["models/model.json"] = json.dumps(program).replace("MARKER", str(marker)).encode()

    return apply


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


def graph(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["graph"]


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


# ------------------------------------------------------------------------------------------------------ bad files


def test_missing_file_suggests_a_near_name(folder: Path) -> None:
    Path("resnet18.pt").touch()
    assert "did you mean resnet18.pt?" in refusal("resnet81.pt")
    assert "pkg.mod:factory" in refusal("elsewhere/model.pt")
    assert "there is no file" in refusal("x" * 5000)
    assert "there is no file" in refusal("a\0b")


def test_not_a_readable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a directory" in refusal(folder)
    Path("empty.pt").touch()
    assert "is empty" in refusal("empty.pt")
    os.mkfifo("pipe")
    assert "not a regular file" in refusal("pipe")
    Path("closed.pt").write_bytes(b"x")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal("closed.pt")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG image"),
        (b"hello, this is text\nmore", "text ('hello, this is text')"),
        (b"\xde\xad\xbe\xef" * 9, "de ad be ef"),
        (b"\x08\x08\x12\x07pytorch\x1a\x05", "ONNX"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n\n", "text"),
        (b"\x00", "unknown kind"),
    ],
)
def test_not_a_model(folder: Path, content: bytes, part: str) -> None:
    Path("model.pt").write_bytes(content)
    text = refusal("model.pt")
    assert part in text
    assert "is not a model" in text


@pytest.mark.parametrize("name", ["exported.pt2", "script.pt"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
def test_truncated_archive(folder: Path, archives: Path, name: str, keep: float) -> None:
    content = (archives / name).read_bytes()
    Path("model.pt").write_bytes(content[: int(len(content) * keep)])
    assert "truncated or damaged" in refusal("model.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_truncated_state_dict(folder: Path, legacy: bool, keep: float) -> None:
    buffer = io.BytesIO()
    torch.save(Net().state_dict(), buffer, _use_new_zipfile_serialization=not legacy)
    Path("model.pt").write_bytes(buffer.getvalue()[: int(buffer.tell() * keep)])
    text = refusal("model.pt", arch="factories:Net")
    assert "truncated" in text
    assert "copy or save it again" in text


def test_truncated_safetensors(folder: Path) -> None:
    save_file(Net().state_dict(), "full")
    Path("model.safetensors").write_bytes(Path("full").read_bytes()[:-8])
    assert "safetensors file that cannot be read" in refusal("model.safetensors", arch="factories:Net")


def test_zip_archives_of_other_kinds(folder: Path, archives: Path) -> None:
    with zipfile.ZipFile("data.npz", "w") as archive:
        archive.writestr("a.npy", b"x")
    assert "without a model (it holds a.npy)" in refusal("data.npz")
    edited(archives / "script.pt", folder / "other.pt", lambda m: [m.pop(k) for k in ("constants.pkl", "data.pkl")])
    assert "without a model" in refusal("other.pt")
    with zipfile.ZipFile("old.pt2", "w") as archive:
        archive.writestr("version", b"8.2")
        archive.writestr("serialized_exported_program.json", b"{}")
    assert "torch 2.7 or older" in refusal("old.pt2")


def test_damaged_exported_archives(folder: Path, archives: Path) -> None:
    def unknown(program: dict[str, Any]) -> None:
        graph(program)["nodes"][0]["target"] = "torch.ops.nowhere.nothing.default"

    changes: dict[str, Callable[[dict[str, bytes]], object]] = {
        "no model": lambda m: m.pop("models/model.json"),
        "models/other.json": lambda m: m.update({"models/other.json": b"{}"}),
        "JSONDecodeError": lambda m: m.update({"models/model.json": b"{"}),
        "cannot be read": lambda m: m.update({"models/model.json": b"{}"}),
        "archive version": lambda m: m.update({"archive_version": b"99"}),
        "is not registered": lambda m: in_program(unknown)(m, Path("none")),
        "weight_0": lambda m: m.pop("data/weights/weight_0"),
    }
    for part, change in changes.items():
        edited(archives / "exported.pt2", folder / "m.pt2", change)  # type: ignore[arg-type]
        assert part in refusal("m.pt2")


def test_checkpoints_that_are_no_state_dict(folder: Path) -> None:
    contents = {
        "holds a dict without a state dict (its keys: epoch, optimizer)": {"epoch": 1, "optimizer": {"lr": 0.1}},
        "holds a dict without a state dict": {},
        "holds a list, not a model": [torch.ones(2)],
        "holds a Tensor, not a model": torch.ones(2),
    }
    for part, content in contents.items():
        torch.save(content, "model.pt")
        assert part in refusal("model.pt", arch="factories:Net")


def test_state_dict_needs_an_architecture(folder: Path) -> None:
    torch.save(Net().state_dict(), "model.pt")
    text = refusal("model.pt")
    assert "3 tensors: scale, fc.weight, fc.bias" in text
    assert "--arch pkg.mod:factory" in text


def test_state_dict_that_does_not_fit(folder: Path) -> None:
    torch.save(Net().state_dict() | {f"head.{i}": torch.ones(1) for i in range(5)}, "model.pt")
    text = refusal("model.pt", arch="factories:Wide")
    assert "2 missing: extra.weight, extra.bias" in text
    assert "5 unexpected: head.0, head.1, head.2, … 2 more" in text
    assert "2 of another shape: fc.weight (4, 3) for (5, 3), fc.bias (4,) for (5,)" in text


def test_arch_where_it_has_no_meaning(folder: Path, archives: Path) -> None:
    for name in ("exported.pt2", "script.pt"):
        assert "is not needed" in refusal(archives / name, arch="factories:Net")
    assert "itself a factory" in refusal("factories:Net", arch="factories:Net")


# ------------------------------------------------------------------------------------------------------ factories


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("factorys:Net", "did you mean 'factories'?"),
        ("nowhere_at_all:Net", "there is no module 'nowhere_at_all'"),
        ("torch.nn.modulez:Linear", "did you mean 'torch.nn.modules'?"),
        ("factories:Nett", "did you mean 'Net'?"),
        ("factories:Space.builds", "did you mean 'build'?"),
        ("factories:raises", "raised KeyError: 'depth'"),
        ("factories:leaves", "raised SystemExit: 3"),
        ("factories:needs", "missing 1 required positional argument: 'depth'"),
        ("factories:number", "returned an int; expected an nn.Module"),
        ("factories:nothing", "returned None; expected an nn.Module"),
        ("factories:bad_kwargs", "as third value"),
        ("factories:constant", "is a int; expected something callable"),
        ("factories:lazy", "not initialised"),
        ("broken:Net", "raised ZeroDivisionError"),
        ("needy:Net", "needs the module 'absent_dependency'"),
        ("syntax:Net", "raised SyntaxError"),
    ],
)
def test_bad_factory(folder: Path, text: str, part: str) -> None:
    Path("broken.py").write_text("1 / 0")
    Path("needy.py").write_text("import absent_dependency")
    Path("syntax.py").write_text("def (")
    assert part in refusal(text)


def test_bad_arch_text(folder: Path) -> None:
    torch.save(Net().state_dict(), "model.pt")
    assert "not of the form pkg.mod:attribute" in refusal("model.pt", arch="factories.Net")


# --------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    net = Net().eval()
    net.fc.weight.data[1, 1:] = value
    torch.save(net.state_dict(), "model.pt")
    assert "model.pt: fc.weight holds 2 of 12 values" in refusal("model.pt", arch="factories:Net")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, (torch.ones(2, 3),), check_trace=False).save("script.pt")
        torch.export.save(torch.export.export(net, (torch.ones(2, 3),)), "exported.pt2")
    assert "fc.weight holds 2 of 12 values" in refusal("script.pt")
    assert "fc.weight holds 2 of 12 values" in refusal("exported.pt2")


def test_masks_may_hold_negative_infinity(folder: Path) -> None:
    state = Net().state_dict()
    state["scale"][0] = -torch.inf
    torch.save(state, "model.pt")
    load("model.pt", arch="factories:Net")
    state["scale"][0] = torch.inf
    torch.save(state, "model.pt")
    assert "scale holds 1 of 2 values" in refusal("model.pt", arch="factories:Net")


def test_check_finite() -> None:
    fine = [torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(2).to(torch.float8_e4m3fn)]
    fine += [torch.empty(0), torch.arange(3), torch.ones(2, dtype=torch.complex64), torch.eye(3).to_sparse()]
    check_finite((str(i), tensor) for i, tensor in enumerate(fine))
    for bad in (torch.tensor([1, float("nan")]).to(torch.float8_e5m2), torch.full((2,), torch.nan).half()):
        with pytest.raises(InputError, match="w holds"):
            check_finite([("w", bad)])
    with pytest.raises(InputError, match="meta device"):
        check_finite([("w", torch.ones(2, device="meta"))])
