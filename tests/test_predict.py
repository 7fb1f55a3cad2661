"""Predictions for tables of shapes, and what a bad table meets; how near they come: test_validate_profiles.py."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.predict import describe_rows, predict_csv, predict_rows
from lrcompile.devices.profile import load_device
from lrcompile.errors import DeviceError, InputError
from lrcompile.graph.op import gemm_op

V100 = load_device("v100")
GEMM_TABLE = "op,m,n,k,ta,tb\ngemm,1760,16,1760,N,N\ngemm,35,8457,2560,T,N\n"


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_a_row_is_an_operation() -> None:
    ((predicted_ms, sigma_ms),) = predict_rows(rows_of("op,m,n,k\ngemm,512,256,1024\n"), V100, "fp16")
    cost = AnalyticCostModel(V100).cost(gemm_op(512, 256, 1024, "fp16"))
    assert (predicted_ms, sigma_ms) == pytest.approx((cost.latency_s * 1e3, cost.sigma_s * 1e3))


def test_layouts_and_the_names_of_columns() -> None:
    """NeuSight calls the inner extent n; a product that streams a weight along k is slower where a side is short."""
    (gemm, linear) = (rows_of(f"op,m,n,k\n{row}\n") for row in ("gemm,4096,512,1024", "linear,4096,1024,512"))
    assert predict_rows(gemm, V100) == predict_rows(linear, V100)
    times = [
        predict_rows(rows_of(f"op,m,n,k,ta,tb\ngemm,7680,16,2560,{t}\n"), V100)[0][0] for t in ("T,N", "N,N", "N,T")
    ]
    assert times[0] > 1.4 * times[1] == 1.4 * times[2]
    assert predict_rows(rows_of("op,m,n,k\ngemm,7680,16,2560\n"), V100)[0][0] == times[0]


def test_dtype_is_the_argument_then_the_column_then_the_default() -> None:
    table = "op,dtype,m,n,k\ngemm,fp32,4096,4096,4096\n"
    ((argument, _),) = predict_rows(rows_of(table), V100, "fp16")
    ((column, _),) = predict_rows(rows_of(table), V100)
    ((default, _),) = predict_rows(rows_of("op,m,n,k\ngemm,4096,4096,4096\n"), V100)
    assert argument == default < column / 4


def test_forms_of_columns_agree() -> None:
    deepbench = "op,n,c,h,w,k,r,s,pad_h,pad_w,stride_h,stride_w\nconv2d_fwd,8,64,56,56,128,3,3,1,1,2,2\n"
    neusight = "op,n,c,h,w,k,r,s,pad,stride\nconv2d_fwd,8,64,56,56,128,3,3,1,2\n"
    bare = "n,c,h,w,k,r,s,pad,stride\n8,64,56,56,128,3,3,1,2\n"
    assert len({predict_rows(rows_of(table), V100, "fp16")[0] for table in (deepbench, neusight, bare)}) == 1
    plain, padded = "n,c,h,w,k,r,s\n1,8,9,9,8,3,3\n", "n,c,h,w,k,r,s,pad,stride\n1,8,9,9,8,3,3,0,1\n"
    assert predict_rows(rows_of(plain), V100) == predict_rows(rows_of(padded), V100)
    named, unnamed = "op,b,m,n,k\nlinear,1,64,64,64\n", "m,n,k\n64,64,64\n"
    assert predict_rows(rows_of(named), V100) == predict_rows(rows_of(unnamed), V100)


def test_other_operations() -> None:
    memory = rows_of("op,rows,cols\nadd,4096,4096\nrelu,4096,4096\nln,4096,4096\nsoftmax,4096,4096\n")
    (add, _), (relu, _), (norm, _), (softmax, _) = predict_rows(memory, V100, "fp32")
    assert add > relu == norm == softmax > 2 * 4 * 4096 * 4096 / 775e9 * 1e3
    described = describe_rows(memory, "fp32")
    assert [op.function for op in described] == ["binary", "copy", "layer_norm", "layer_norm"]
    assert {op.row for op in described} == {4096}
    steps = rows_of("op,hidden,batch,timesteps\nlstm_fwd,512,16,25\ngru_fwd,512,16,25\n")
    (lstm, _), (gru, _) = predict_rows(steps, V100, "fp32")
    assert lstm > gru > 25 * 8e-3


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("op,m,n\ngemm,1,2\n", "row 1: missing column k"),
        ("op,x\ngemm,1\n", "row 1: missing column m, n, k"),
        ("x,y\n1,2\n", "row 1: missing column op"),
        (
            "op,m,n,k\ngemm,1,2,3\ngemm,1,2,three\n",
            "row 2: column k: expected a whole number of at least 1, got 'three'",
        ),
        ("op,m,n,k\ngemm,1,2,\n", "row 1: column k: .* got ''"),
        ("op,m,n,k\ngemm,1,2,nan\n", "row 1: column k"),
        ("op,m,n,k\ngemm,inf,2,3\n", "row 1: column m"),
        ("op,m,n,k\ngemm,1,-2,3\n", "row 1: column n"),
        ("op,m,n,k\ngemm,1,2.5,3\n", "row 1: column n"),
        ("op,m,n,k,b\nbmm,1,2,3,0\n", "row 1: column b"),
        ("op,m,n,k,ta\ngemm,1,2,3,X\n", "row 1: column ta: expected N or T, got 'X'"),
        ("op,m,n,k\nfft,1,2,3\n", "row 1: column op: expected one of gemm, .* got 'fft'"),
        ("op,dtype,m,n,k\ngemm,,1,2,3\ngemm,tf32,1,2,3\n,fp16,1,2,3\n", "row 3: column op: .* got ''"),
        ("op,n,c,h,w,k,r,s,pad_h\nconv2d_fwd,1,1,8,8,1,3,3,1\n", "row 1: missing column pad_w"),
        ("op,n,c,h,w,k,r,s,stride\nconv2d_fwd,1,1,8,8,1,3,3,0\n", "row 1: column stride"),
        ("op,n,c,h,w,k,r,s,pad\nconv2d_fwd,1,1,8,8,1,3,3,-1\n", "row 1: column pad"),
        ("op,n,c,h,w,k,r,s\nconv2d_fwd,1,1,2,2,1,3,3\n", "row 1: kernel 3x3 does not fit"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, table: str, problem: str) -> None:
    source = tmp_path / "in.csv"
    source.write_text(table)
    with pytest.raises(InputError, match=problem):
        predict_csv(source, tmp_path / "out.csv", V100)
    assert os.listdir(tmp_path) == ["in.csv"]


def test_unknown_dtype_names_the_row() -> None:
    with pytest.raises(DeviceError, match=r"row 1: .*unknown data type 'pseudo_fp16'"):
        predict_rows(rows_of("op,dtype,m,n,k\ngemm,pseudo_fp16,1,2,3\n"), V100)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"op,m,n,k\n", "no rows"),
        (b"op,m,m,k\ngemm,1,2,3\n", "names a column twice"),
        (b"op,m,n,k\ngemm,1,2\n", "row 1 of .*: expected 4 values"),
        (b"op,m,n,k\ngemm,1,2,3\ngemm,1,2,3,4\n", "row 2 of .*: expected 4 values"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "is not a CSV table"),
        (b'op,m\n"gemm,1\n', "is not a CSV table"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, problem: str) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        predict_csv(source, tmp_path / "out.csv", V100)
    assert os.listdir(tmp_path) == ["in.csv"]


def test_unreadable_and_unwritable(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text(GEMM_TABLE)
    with pytest.raises(InputError, match=r"cannot read .*nothing\.csv: No such file"):
        predict_csv(tmp_path / "nothing.csv", tmp_path / "out.csv", V100)
    with pytest.raises(InputError, match="cannot read"):
        predict_csv(tmp_path, tmp_path / "out.csv", V100)
    with pytest.raises(InputError, match=r"cannot write .*: there is no folder .*no; make it with mkdir -p"):
        predict_csv(tmp_path / "nothing.csv", tmp_path / "no" / "out.csv", V100)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="it is a folder; give the name of a file"):
        predict_csv(source, tmp_path / "folder", V100)
    assert sorted(os.listdir(tmp_path)) == ["folder", "in.csv"]


def test_the_table_is_copied_and_two_columns_follow(tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    note = 'op,note,m,n,k\ngemm,"a, b",64,64,64\ngemm,ü,128,64,64\n'
    source.write_text("\ufeff" + note, encoding="utf-8")
    assert predict_csv(source, target, V100, "fp16") == 2
    rows = rows_of(target.read_text(encoding="utf-8"))
    assert list(rows[0]) == ["op", "note", "m", "n", "k", "predicted_ms", "sigma"]
    assert [row["note"] for row in rows] == ["a, b", "ü"]
    for row, (predicted_ms, sigma_ms) in zip(rows, predict_rows(rows, V100, "fp16"), strict=True):
        assert float(row["predicted_ms"]) == pytest.approx(predicted_ms, rel=1e-5)
        assert float(row["sigma"]) == pytest.approx(sigma_ms, rel=1e-5)
    first = target.read_bytes()
    predict_csv(target, target, V100, "fp16")  # in place, columns renewed
    assert target.read_bytes() == first


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(GEMM_TABLE)
    target.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(InputError, match="no space left on the file system"):
        predict_csv(source, target, V100)
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "out.csv"]
