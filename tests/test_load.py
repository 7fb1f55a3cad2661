"""Models from files and factories, and bad files: each is refused in words."""

from __future__ import annotations

import io
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
from files import Net, edited, graph, in_program, refusal
from safetensors.torch import save_file

from lrcompile.errors import InputError
from lrcompile.frontend.load import check_finite, load

folder, archives = files.folder, files.archives

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


class Wrapped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = Net()


def test_state_dicts_of_a_module_that_is_named_as_wrappers_are(folder: Path) -> None:
    for prefix in ("", "module.", "_orig_mod."):
        torch.save({f"{prefix}{name}": value for name, value in Wrapped().state_dict().items()}, "m.pt")
        source = load("m.pt", arch="test_load:Wrapped")
        assert isinstance(source.program, torch.nn.Module)
        assert "module.fc.weight" in source.program.state_dict()


def test_programs_of_factories_keep_their_inputs(folder: Path) -> None:
    (folder / "exports.py").write_text(
        "import torch\nfrom factories import Net\ndef build(): return torch.export.export(Net(), (torch.ones(2, 3),))\n"
    )
    source = load("exports:build")
    assert source.args is not None
    assert torch.equal(source.args[0], torch.ones(2, 3))
    sys.modules.pop("exports", None)


def test_a_path_that_may_not_be_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, **options: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    assert "cannot be read (Permission denied); check its permissions" in refusal("locked/model.pt2")


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_weights_of_other_numbers_are_no_values(folder: Path, kind: torch.dtype) -> None:
    """Quantised weights would be taken as they are, and imaginary parts be dropped."""
    state = Net().state_dict()
    torch.save({**state, "fc.weight": state["fc.weight"].to(kind)}, "w.pt")
    text = refusal("w.pt", arch="factories:Net")
    assert f"1 of other numbers: fc.weight {kind} for torch.float32" in text
    torch.save({name: tensor.half() for name, tensor in state.items()}, "w.pt")
    load("w.pt", arch="factories:Net")


def test_a_link_to_nothing(folder: Path) -> None:
    Path("model.pt").symlink_to("nothing")
    assert "did you mean" not in refusal("model.pt")


def test_a_damaged_pickle_gets_no_advice_to_run_it(folder: Path) -> None:
    torch.save(Net().state_dict(), "w.pt")
    edited(folder / "w.pt", folder / "d.pt", lambda members: members.update({"data.pkl": b"#" * 99}))
    text = refusal("d.pt", arch="factories:Net")
    assert "damaged or truncated" in text
    assert "weights_only" not in text
