"""Example inputs and calibration data: what is read, and what is refused in words."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrcompile import cli
from lrcompile.errors import InputError
from lrcompile.frontend.calibration_data import CalibrationData, calibration_from, load_calibration, load_labels
from lrcompile.frontend.inputs import (
    InputSpec,
    bind_inputs,
    call_inputs,
    cast_floats,
    example_inputs,
    flat_names,
    input_names,
    parse_float_dtype,
    parse_input,
    parse_inputs,
    with_batch,
)

LOADERS = """
import itertools, torch
import beside
def batches(): return [{"x": torch.ones(3, 2)}, {"x": torch.zeros(1, 2)}]
def endless(): return ((torch.full((2, 2), float(i)),) for i in itertools.count())
def loader(): return torch.utils.data.DataLoader(torch.arange(12.0).reshape(6, 2), batch_size=4)
def labelled(): return [(torch.ones(2, 2), torch.ones(2))]
def fails():
    yield torch.ones(2, 2)
    raise OSError("disk gone")
def breaks(): raise ValueError("no data")
def number(): return 3
def words(): return ["a", "b"]
ready = [torch.ones(2, 2)]
"""


class Attend(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        out = ids.float() * mask
        return out if scale is None else out * scale


class Variadic(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return sum(args)  # type: ignore[return-value]


class Nested(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor], table: dict[str, Tensor], power: int = 2) -> Tensor:
        return pair[0] + pair[1] * table["w"] ** power


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loaders.py").write_text(LOADERS)
    (tmp_path / "beside.py").touch()
    yield tmp_path
    for name in ("loaders", "beside"):
        sys.modules.pop(name, None)


# --------------------------------------------------------------------------------------------------------- --input


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x=float32[1,3,224,224]", InputSpec("x", torch.float32, (1, 3, 224, 224))),
        (" x = fp16 [ 8, 4 ] ", InputSpec("x", torch.float16, (8, 4))),
        ("x=bf16[8]", InputSpec("x", torch.bfloat16, (8,))),
        ("input_ids=int64[2,128]", InputSpec("input_ids", torch.int64, (2, 128))),
        ("n=int64[]", InputSpec("n", torch.int64, ())),
        ("m=bool[2]", InputSpec("m", torch.bool, (2,))),
        ("image=uint8[2,3]", InputSpec("image", torch.uint8, (2, 3))),
    ],
)
def test_parse_input(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "cannot be read"),
        ("x", "cannot be read"),
        ("float32[1]", "cannot be read"),
        ("=float32[1]", "cannot be read"),
        ("x=float32", "cannot be read"),
        ("x=float32[1", "cannot be read"),
        ("x=float32[[1]]", "cannot be read"),
        ("1x=float32[1]", "cannot be read"),
        ("x=float32[-1,3]", "not positive"),
        ("x=float32[0]", "not positive"),
        ("x=float32[1,,3]", "not positive"),
        ("x=float32[N,3]", "not positive"),
        ("x=float32[1.5]", "not positive"),
        ("x=float32[²]", "not positive"),
        ("x=flaot32[1]", "did you mean float32?"),
        ("x=q[1]", "expected one of float16"),
        ("x=float32[100000,100000,100000]", "more than 16 GiB"),
        (f"x=float32[{'9' * 5000}]", "not positive"),
    ],
)
def test_bad_input(text: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_input(text)
    assert part in str(caught.value)
    if part in ("cannot be read", "not positive"):
        assert "x=float32[1,3,224,224]" in str(caught.value)


def test_duplicate_inputs() -> None:
    assert [spec.name for spec in parse_inputs(["x=fp32[1]", "y=fp32[1]"])] == ["x", "y"]
    with pytest.raises(InputError, match="x is given 2 times"):
        parse_inputs(["x=fp32[1]", "x=fp32[2]"])


def test_float_dtype() -> None:
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    assert [parse_float_dtype(t) for t in ("fp32", "fp16", "bf16")] == kinds
    assert [parse_float_dtype(t) for t in kinds] == kinds
    with pytest.raises(InputError, match="did you mean fp16"):
        parse_float_dtype("fp1")
    with pytest.raises(InputError, match="int8"):
        parse_float_dtype("int8")


def test_example_inputs() -> None:
    specs = parse_inputs(
        [
            "x=fp16[64,8]",
            "ids=int64[64,8]",
            "attention_mask=int64[64]",
            "token_type_ids=int64[64]",
            "b=bool[4]",
            "n=int8[]",
        ]
    )
    made = example_inputs(specs, seed=3)
    again = example_inputs(specs, seed=3)
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert not torch.equal(made["x"], example_inputs(specs, seed=4)["x"])
    assert [(name, t.dtype, tuple(t.shape)) for name, t in made.items()] == [(s.name, s.dtype, s.shape) for s in specs]
    assert 0.8 < float(made["x"].float().std()) < 1.2
    assert 0 <= int(made["ids"].min()) <= int(made["ids"].max()) < 100
    assert set(made["token_type_ids"].tolist()) == {0, 1}
    assert made["attention_mask"].all()
    assert made["b"].all()
    assert int(example_inputs(specs, 3, int_high=5)["ids"].max()) == 4


# --------------------------------------------------------------------------------------------------------- binding


def test_bind_inputs() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    assert list(bind_inputs(["x", "y"], {"y": y, "x": x})) == ["x", "y"]
    assert list(bind_inputs(["x"], {"y": y, "x": x}, optional=["z", "y"])) == ["x", "y"]
    with pytest.raises(InputError, match="no input named 'pixel_value'; did you mean 'pixel_values'"):
        bind_inputs(["pixel_values"], {"pixel_value": x})
    with pytest.raises(InputError, match="no input named 'q'; the model takes ids, mask"):
        bind_inputs(["ids", "mask"], {"q": x})
    with pytest.raises(InputError, match=r"no value for the input mask \(got ids\)"):
        bind_inputs(["ids", "mask"], {"ids": x})


def test_call_inputs_of_a_module() -> None:
    ids, mask = torch.ones(2, 3), torch.ones(2, 3)
    assert input_names(Attend()) == ("ids", "mask", "scale", "shift")
    args, kwargs = call_inputs(Attend(), {"mask": mask, "ids": ids})
    assert (args, list(kwargs)) == ((), ["ids", "mask"])
    Attend()(*args, **kwargs)
    with pytest.raises(InputError, match=r"the model takes ids, mask \(optional: scale, shift\)"):
        call_inputs(Attend(), {"ids": ids})
    args, kwargs = call_inputs(Variadic(), {"a": ids, "b": mask})
    assert (len(args), kwargs) == (2, {})


def test_call_inputs_of_torchscript() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        script = torch.jit.script(Attend())
    given = {"scale": torch.ones(1), "ids": torch.ones(2), "mask": torch.zeros(2)}
    args, kwargs = call_inputs(script, given)
    assert [tuple(a.shape) for a in args] == [(2,), (2,), (1,)]
    assert float(args[0][0]) == 1
    assert kwargs == {}
    with pytest.raises(InputError, match="without gaps"):
        call_inputs(script, {"ids": torch.ones(2), "mask": torch.ones(2), "shift": torch.ones(1)})


def test_call_inputs_of_an_exported_program() -> None:
    pair, table = (torch.ones(2), torch.ones(2)), {"w": torch.full((2,), 3.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Nested(), (pair,), {"table": table, "power": 2})
        names = input_names(program)
        assert names == ("pair_0", "pair_1", "table_w")
        args, kwargs = call_inputs(program, dict(zip(names, (*pair, table["w"]), strict=True)))
        assert torch.equal(program.module()(*args, **kwargs), Nested()(pair, table))
    with pytest.raises(InputError, match="did you mean 'table_w'"):
        call_inputs(program, {"table": pair[0]})


def test_with_batch() -> None:
    x, positions, n = torch.arange(6).reshape(3, 2), torch.arange(4).reshape(1, 4), torch.tensor(7)
    (args, kwargs) = with_batch(((x, positions), {"y": [x], "n": n, "flag": True}), 5)
    assert args[0][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert args[1] is positions
    assert kwargs["n"] is n
    assert kwargs["flag"] is True
    assert kwargs["y"][0].shape == (5, 2)
    assert with_batch({"x": x}, 1)["x"].tolist() == [[0, 1]]
    for tree, batch in (({"x": x}, 0), ({"n": n}, 2), ({}, 2), ({"x": x[:0]}, 2)):
        with pytest.raises(InputError, match="--batch"):
            with_batch(tree, batch)


class Containers(nn.Module):
    def forward(self, x: Tensor, parts: Any, *rest: Tensor, **named: Any) -> Tensor:
        return x


def test_cast_and_names() -> None:
    args, kwargs = (torch.ones(1), [torch.ones(2), None]), {"d": {"k": torch.ones(3)}, "n": torch.ones(4).int(), "s": 3}
    cast_args, cast_kwargs = cast_floats((args, kwargs), torch.float16)
    assert cast_args[0].dtype == torch.float16
    assert cast_kwargs["n"].dtype == torch.int32
    assert args[0].dtype == torch.float32
    assert flat_names(Containers(), args, kwargs) == ("x", "parts_0", "d_k", "n")
    x = torch.ones(1)
    assert flat_names(Containers(), (x, x), {"y": x}) == ("x", "parts", "y")
    many = (x, {"a-B": [x, None]}, x, x)
    assert flat_names(Containers(), many, {}) == ("x", "parts_a_b_0", "rest_0", "rest_1")
    with pytest.raises(InputError, match="does not take these inputs"):
        flat_names(nn.Linear(1, 1), (x, x), {})


# ---------------------------------------------------------------------------------------------------- calibration


def saved(kind: str, arrays: dict[str, Tensor], path: str) -> None:
    if kind == "npz":
        np.savez("tmp.npz", **{name: t.numpy() for name, t in arrays.items()})
        os.rename("tmp.npz", path)
    elif kind == "safetensors":
        save_file(arrays, path)
    elif kind == "list":
        torch.save([{name: t[i : i + 3] for name, t in arrays.items()} for i in range(0, 10, 3)], path)
    elif kind == "tuple":
        torch.save(tuple(arrays.values()), path)
    elif kind == "tuples":
        torch.save([tuple(t[i : i + 5] for t in arrays.values()) for i in (0, 5)], path)
    else:
        torch.save(arrays, path, _use_new_zipfile_serialization=kind != "legacy")


@pytest.mark.parametrize("kind", ["npz", "safetensors", "dict", "legacy", "list", "tuple", "tuples"])
def test_calibration_files_agree(folder: Path, kind: str) -> None:
    arrays = {"x": torch.arange(40.0).reshape(10, 4), "ids": torch.arange(10)}
    saved(kind, arrays, "data")
    data = load_calibration("data", ["x", "ids"], 4)
    assert load_calibration(Path("data"), ["x", "ids"], 4).digest == data.digest
    assert (len(data.batches), data.samples, data.source) == (2, 8, "data")
    assert all(list(batch) == ["x", "ids"] for batch in data.batches)
    assert torch.equal(data.batches[1]["x"], arrays["x"][4:8])
    digest = hashlib.sha256()
    for start in (0, 4):
        digest.update(b"x (4, 4) float32\n" + arrays["x"][start : start + 4].numpy().tobytes())
        digest.update(b"ids (4,) int64\n" + arrays["ids"][start : start + 4].numpy().tobytes())
    assert data.digest == digest.hexdigest()


def test_a_single_array_for_one_input(folder: Path) -> None:
    x = torch.ones(4, 2)
    torch.save(x, "a.pt")
    np.save("a.npy", x.numpy())
    torch.save([x[:2], x[2:]], "list.pt")
    digests = {load_calibration(name, ["x"], 2).digest for name in ("a.pt", "a.npy", "list.pt")}
    assert digests == {calibration_from(x, ["x"], 2).digest}
    with pytest.raises(InputError, match=r"1 unnamed arrays, but the model takes 2 inputs \(x, y\)"):
        load_calibration("a.pt", ["x", "y"], 2)


def test_loaders(folder: Path) -> None:
    path = list(sys.path)
    assert load_calibration("loaders:batches", ["x"], 2).samples == 4
    endless = load_calibration("loaders:endless", ["x"], 2, max_batches=3)
    assert [float(batch["x"][0, 0]) for batch in endless.batches] == [0, 1, 2]
    assert load_calibration("loaders:endless", ["x"], 2).samples == 128
    assert load_calibration("loaders:loader", ["x"], 3).samples == 6
    assert load_calibration("loaders:ready", ["x"], 1).samples == 2
    assert sys.path == path


def test_loaders_without_an_end_stop_where_memory_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = calibration_from({"x": torch.ones(4, 2)}, ["x"], 2)
    assert not one.cut
    piece = sum(t.numel() * t.element_size() for t in load_calibration("loaders:endless", ["x"], 2).batches[0].values())
    share = import_module("lrcompile.frontend.calibration_data").SHARE_OF_MEMORY
    monkeypatch.setattr("lrcompile.frontend.calibration_data.available_bytes", lambda: 10.5 * piece / share)
    endless = load_calibration("loaders:endless", ["x"], 2, max_batches=None)
    assert endless.cut
    assert len(endless.batches) == 11
    assert not load_calibration("loaders:endless", ["x"], 2, max_batches=10).cut
    assert not calibration_from([torch.ones(4, 2)] * 100, ["x"], 2, max_batches=None).cut  # they are there already


@pytest.mark.parametrize(
    ("loader", "part"),
    [
        ("labelled", "2 unnamed arrays, but the model takes 1 inputs (x)"),
        ("fails", "raised OSError while it gave batches: disk gone"),
        ("breaks", "raised ValueError: no data"),
        ("number", "holds a int"),
        ("words", "gives a str as a batch"),
        ("batch", "did you mean 'batches'?"),
    ],
)
def test_bad_loader(folder: Path, loader: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        load_calibration(f"loaders:{loader}", ["x"], 1)
    assert part in str(caught.value)


def test_python_data_of_varying_shapes() -> None:
    pieces = [torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 6)]
    data = calibration_from(iter(pieces), ["x"], 2)
    assert [tuple(batch["x"].shape) for batch in data.batches] == [(2, 4), (2, 4), (2, 6), (2, 6)]
    big_endian = np.arange(4, dtype=">f8").reshape(2, 2)
    assert calibration_from({"x": big_endian}, ["x"], 2).batches[0]["x"].tolist() == [[0, 1], [2, 3]]
    half = calibration_from({"x": torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)}, ["x"], 1)
    assert not half.batches[0]["x"].requires_grad


NAN = torch.ones(6, 2)
NAN[4, 1] = torch.nan


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"x": torch.ones(2, 2), "pixel_valuez": torch.ones(2)}, "did you mean 'pixel_values'?"),
        ({"x": torch.ones(2, 2)}, "lacks the input pixel_values; expected x, pixel_values, got x"),
        ({"x": torch.ones(2), "pixel_values": torch.ones(3)}, "different numbers of samples (x 2, pixel_values 3)"),
        ({"x": torch.ones(0, 2), "pixel_values": torch.ones(0)}, "holds no samples"),
        ([], "holds no samples"),
        ({"x": torch.ones(1, 2), "pixel_values": torch.ones(1)}, "1 samples, fewer than one batch of 2"),
        (
            {"x": torch.ones(6), "pixel_values": NAN},
            "pixel_values holds NaN or infinity in 1 of 6 samples, first in sample 4",
        ),
        ([(torch.ones(2), torch.ones(2)), (torch.ones(6), NAN)], "first in sample 6"),
        ({"x": torch.tensor(1.0), "pixel_values": torch.ones(2)}, "x is a single number"),
        ({"x": [1, 2], "pixel_values": torch.ones(2)}, "x is a list; expected a tensor"),
        ({"x": np.array(["a", "b"]), "pixel_values": torch.ones(2)}, "x is an array of <U1"),
        ({"x": np.array([None, 1]), "pixel_values": torch.ones(2)}, "x is an array of object"),
        ({3: torch.ones(2)}, "holds 3, which is not an input"),
        ("text", "holds a str"),
        (None, "holds a NoneType"),
    ],
)
def test_bad_data(data: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        calibration_from(data, ["x", "pixel_values"], 2, "here")
    assert part in str(caught.value)
    assert "here" in str(caught.value)


def test_bad_batch() -> None:
    for batch in (0, -3, 2.0, 0.5):
        with pytest.raises(InputError, match=f"--batch {batch} is no count of samples; expected a whole number"):
            calibration_from(torch.ones(2), ["x"], batch)  # type: ignore[arg-type]


def test_hostile_calibration_files_do_not_run(folder: Path) -> None:
    marker = folder / "marker"
    hostile = {"x": Payload(marker)}
    torch.save(hostile, "zip.pt")
    torch.save(hostile, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps(hostile))
    np.savez("object.npz", x=np.array([Payload(marker)], dtype=object))
    np.save("object.npy", np.array([Payload(marker)], dtype=object))
    for name in ("zip.pt", "legacy.pt", "plain.pt", "object.npz", "object.npy"):
        with pytest.raises(InputError, match="runs code from the file") as caught:
            load_calibration(name, ["x"], 1)
        assert "--trust-pickle" not in str(caught.value)
    assert not marker.exists()


def test_bad_calibration_files(folder: Path) -> None:
    np.savez("full.npz", x=np.ones((4, 400)))
    content = Path("full.npz").read_bytes()
    cases = {
        "cut.npz": (content[: len(content) // 2], "truncated or damaged"),
        "flipped.npz": (content.replace(b"\xf0?", b"\xf1?", 1), "Bad CRC-32"),
        "cut.npy": (b"\x93NUMPY\x01\x00v", "cannot be read"),
        "image.npz": (b"\x89PNG" + bytes(90), "a PNG image"),
        "empty.pt": (b"", "is empty"),
    }
    for name, (bad, part) in cases.items():
        Path(name).write_bytes(bad)
        with pytest.raises(InputError) as caught:
            load_calibration(name, ["x"], 1)
        assert part in str(caught.value)
    with pytest.raises(InputError, match=r"did you mean full\.npz"):
        load_calibration("ful.npz", ["x"], 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.jit.script(nn.Linear(2, 2)).save("model.pt")
    with pytest.raises(InputError, match="holds a model, not calibration data"):
        load_calibration("model.pt", ["x"], 1)


def test_check_against_the_model() -> None:
    data = calibration_from({"x": np.ones((4, 3)), "ids": np.ones(4, dtype=np.int32)}, ["x", "ids"], 2)
    example = {"x": torch.ones(1, 3), "ids": torch.ones(1, dtype=torch.int64)}
    matched = data.check_against(example)
    assert isinstance(matched, CalibrationData)
    assert [t.dtype for t in matched.batches[0].values()] == [torch.float32, torch.int64]
    assert (matched.digest, matched.samples) == (data.digest, 4)
    with pytest.raises(InputError, match="x is float64, but the model takes int64"):
        data.check_against(example | {"x": torch.ones(1, 3, dtype=torch.int64)})
    with pytest.raises(InputError, match=r"a sample of x has shape \(3,\), but the model takes \(4,\)"):
        data.check_against(example | {"x": torch.ones(1, 4)})
    with pytest.raises(InputError, match="lacks the input mask"):
        data.check_against(example | {"mask": torch.ones(1)})


def test_an_input_with_the_name_of_a_python_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.Sequential` calls its input "input", which is `input_1` in the code of a graph."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(16, 32)
    program = torch.export.export(nn.Sequential(nn.Linear(32, 8)).eval(), (x[:4],))
    torch.export.save(program, "model.pt2")
    assert input_names(program) == ("input",)
    np.savez("calib.npz", input=x.numpy())
    words = "model.pt2 --target rpi5 --calib calib.npz --batch 4 --out model.onnx"
    assert cli.run(words.split()) == 0
    assert [port.name for port in onnx.load("model.onnx").graph.input] == ["input"]


def test_inputs_that_are_all_optional_are_taken_by_place(folder: Path) -> None:
    ids, mask = torch.arange(8), torch.ones(8)
    named = {"ids": ids, "mask": mask}
    for given in ((ids, mask), [(ids, mask)], named):
        data = calibration_from(given, [], 4, optional=["ids", "mask", "types"])
        assert [list(batch) for batch in data.batches] == [["ids", "mask"]] * 2
    assert list(calibration_from([ids, ids], [], 8, optional=["ids", "mask"]).batches[0]) == ["ids", "mask"]
    assert len(calibration_from(iter([ids, ids]), [], 4, optional=["ids", "mask"]).batches) == 4


def test_pieces_of_which_none_fills_a_batch(folder: Path) -> None:
    pieces = [torch.ones(4, 2 + i // 2) for i in range(8)]
    with pytest.raises(InputError, match=r"32 samples, 8 of them at most with one shape.*--batch 8"):
        calibration_from(pieces, ["x"], 16)


def test_pointers_of_git_lfs_are_recognised(folder: Path) -> None:
    Path("calib.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    for read in (lambda: load_calibration("calib.npz", ["x"], 4), lambda: load_labels("calib.npz")):
        with pytest.raises(InputError, match="git lfs pull"):
            read()


@pytest.mark.parametrize("value", [3, None, 0.5])
def test_labels_that_are_no_array(folder: Path, value: object) -> None:
    torch.save(value, "l.pt")
    with pytest.raises(InputError, match=f"holds a {type(value).__name__}; expected a .npy"):
        load_labels("l.pt")
