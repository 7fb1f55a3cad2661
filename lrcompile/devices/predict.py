"""Predicted latencies for tables of shapes: the cost model laid open, so that it can be scored against measurements."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lrcompile.devices.analytic import AnalyticCostModel, Direction, conv_latency_s
from lrcompile.devices.device import Device
from lrcompile.errors import DeviceError, InputError
from lrcompile.graph.op import DTYPE_BYTES, ConvShape, Function, Layout, OpDesc, RecurrentShape, conv_op, gemm_op
from lrcompile.writing import check_file, write_text

_GEMM_OPS = ("gemm", "linear", "bmm")
_CONV_OPS: dict[str, Direction] = {"conv2d_fwd": "forward", "conv2d_bwd_data": "data", "conv2d_bwd_weight": "weight"}
_MEMORY_OPS: dict[str, tuple[int, Function]] = {  # arrays read and written, what is computed
    "add": (3, "binary"), "mul": (3, "binary"), "relu": (2, "copy"), "gelu": (2, "gelu"),
    "softmax": (2, "layer_norm"), "ln": (2, "layer_norm"),
}  # fmt: skip
_RECURRENT_OPS = {"lstm_fwd": 4, "gru_fwd": 3, "vanilla_fwd": 1}  # gates
_COLUMNS = {"gemm": ("m", "n", "k"), "conv2d_fwd": ("n", "c", "h", "w", "k", "r", "s")}
_LAYOUTS: dict[str, Layout] = {"TN": "TN", "NN": "NN", "NT": "NT", "TT": "NT"}
_RESULTS = ("predicted_ms", "sigma")


def predict_rows(
    rows: Iterable[Mapping[str, str]], device: Device, dtype: str | None = None
) -> list[tuple[float, float]]:
    """(predicted latency, one standard deviation) of each row, both in ms.

    A row says its operation in `op` (a table without that column holds GEMMs or forward convolutions, by its other
    columns) and its sizes in the columns of DeepBench or NeuSight tables:

    - gemm: m, n, k, of [m×k]·[k×n]; optional b (batch) and ta, tb (N or T, layouts as in the BLAS interface; without
      them T and N, as of a linear layer)
    - linear, bmm: m, n, k, of [m×n]·[n×k], as NeuSight names them; optional b
    - conv2d_fwd, conv2d_bwd_data, conv2d_bwd_weight: n, c, h, w, k, r, s; optional pad or pad_h and pad_w (else 0),
      stride or stride_h and stride_w (else 1)
    - add, mul, relu, gelu, softmax, ln: rows, cols
    - lstm_fwd, gru_fwd, vanilla_fwd: hidden, batch, timesteps

    `dtype` holds for all rows; without it the row's `dtype` column, else the device's default. Rows count from 1.
    InputError names row and column of what cannot be used, DeviceError a type that the device does not know.
    """
    model = AnalyticCostModel(device)
    return [_predict(_Row(number, row), model, dtype) for number, row in enumerate(rows, start=1)]


def predict_csv(path_in: str | Path, path_out: str | Path, device: Device, dtype: str | None = None) -> int:
    """Copy a table with `predicted_ms` and `sigma` (ms) appended; how many rows it holds.

    The output appears whole or not at all. InputError when the table cannot be read, used or written.
    """
    check_file(path_out)
    columns, rows = _read(Path(path_in))
    results = predict_rows(rows, device, dtype)
    for row, (predicted_ms, sigma_ms) in zip(rows, results, strict=True):
        row.update(predicted_ms=f"{predicted_ms:.6g}", sigma=f"{sigma_ms:.6g}")
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *(name for name in _RESULTS if name not in columns)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path_out, text.getvalue())
    return len(rows)


class _Row:
    """One row of a table, with the number that messages call it by."""

    def __init__(self, number: int, values: Mapping[str, str]) -> None:
        self.number = number
        self.values = values

    def text(self, column: str) -> str:
        return (self.values.get(column) or "").strip()

    def whole(self, column: str, least: int = 1) -> int:
        text = self.text(column)
        try:
            value = float(text)
            whole = int(value)
        except (ValueError, OverflowError):
            whole = value = least - 1
        if whole != value or whole < least:
            raise self.error(f"column {column}: expected a whole number of at least {least}, got {text!r}")
        return whole

    def pair(self, column: str, otherwise: int) -> tuple[int, int]:
        """`column`_h and `column`_w, or `column` for both, or `otherwise` where the table has neither."""
        one = column if column in self.values else None
        names = [one or f"{column}_h", one or f"{column}_w"]
        if not one and not any(name in self.values for name in names):
            return otherwise, otherwise
        self.require(*names)
        return self.whole(names[0], least=otherwise), self.whole(names[1], least=otherwise)

    def require(self, *columns: str) -> None:
        missing = [column for column in columns if column not in self.values]
        if missing:
            raise self.error(f"missing column {', '.join(missing)}; there are {', '.join(map(str, self.values))}")

    def op(self) -> str:
        if "op" in self.values:
            return self.text("op")
        for op, columns in reversed(_COLUMNS.items()):
            if all(column in self.values for column in columns):
                return op
        self.require("op")
        return ""

    def error(self, problem: str) -> InputError:
        return InputError(f"row {self.number}: {problem}")


def _predict(row: _Row, model: AnalyticCostModel, dtype: str | None) -> tuple[float, float]:
    name = dtype or row.text("dtype") or model.device.default_dtype
    try:
        model.device.compute_dtype(name)
    except DeviceError as error:
        raise DeviceError(f"row {row.number}: {error}") from error
    op, direction = _described(row, name)
    if direction != "forward":
        assert op.conv is not None
        latency_s = conv_latency_s(model.device, op.conv, name, direction)
        return latency_s * 1e3, latency_s * 1e3 * model.device.sigma_relative["conv"]
    cost = model.cost(op)
    return cost.latency_s * 1e3, cost.sigma_s * 1e3


def describe_rows(rows: Sequence[Mapping[str, str]], dtype: str) -> list[OpDesc]:
    """The operations of rows as `predict_rows` takes them, gradients as their forward passes; InputError likewise."""
    return [_described(_Row(number, row), dtype)[0] for number, row in enumerate(rows, start=1)]


def _described(row: _Row, dtype: str) -> tuple[OpDesc, Direction]:
    op = row.op()
    if op in _CONV_OPS:
        return conv_op(_conv(row), dtype), _CONV_OPS[op]
    for names, describe in ((_GEMM_OPS, _gemm), (_MEMORY_OPS, _memory), (_RECURRENT_OPS, _recurrent)):
        if op in names:
            return describe(row, op, dtype), "forward"
    known = (*_GEMM_OPS, *_CONV_OPS, *_MEMORY_OPS, *_RECURRENT_OPS)
    raise row.error(f"column op: expected one of {', '.join(known)}, got {op!r}")


def _gemm(row: _Row, op: str, dtype: str) -> OpDesc:
    row.require("m", "n", "k")
    given = {}
    for column, otherwise in (("ta", "T"), ("tb", "N")):
        given[column] = row.text(column).upper() or otherwise
        if given[column] not in ("N", "T"):
            raise row.error(f"column {column}: expected N or T, got {row.text(column)!r}")
    batch = row.whole("b") if row.text("b") else 1
    m, n, k = (row.whole(column) for column in ("m", "n", "k"))
    if op == "gemm":
        return gemm_op(m, n, k, dtype, batch=batch, layout=_LAYOUTS[given["ta"] + given["tb"]])
    return gemm_op(m, k, n, dtype, batch=batch, weight=op != "bmm", layout="NN" if op == "bmm" else "TN")


def _conv(row: _Row) -> ConvShape:
    row.require(*_COLUMNS["conv2d_fwd"])
    size = (row.whole("h"), row.whole("w"))
    kernel = (row.whole("r"), row.whole("s"))
    padding, stride = row.pair("pad", 0), row.pair("stride", 1)
    axes = zip(size, kernel, padding, stride, strict=True)
    out = tuple((extent + 2 * pad - taps) // step + 1 for extent, taps, pad, step in axes)
    if min(out) < 1:
        raise row.error(f"kernel {kernel[0]}x{kernel[1]} does not fit the padded input, output would be {out}")
    return ConvShape(
        batch=row.whole("n"),
        channels_in=row.whole("c"),
        channels_out=row.whole("k"),
        size_in=size,
        size_out=out,
        kernel=kernel,
        stride=stride,
        padding=((padding[0], padding[0]), (padding[1], padding[1])),
        dilation=(1, 1),
    )


def _memory(row: _Row, op: str, dtype: str) -> OpDesc:
    row.require("rows", "cols")
    columns = row.whole("cols")
    elements = row.whole("rows") * columns
    arrays, function = _MEMORY_OPS[op]
    traffic = arrays * elements * DTYPE_BYTES[dtype]
    return OpDesc("elementwise", dtype, elements, 0, traffic, function=function, row=columns)


def _recurrent(row: _Row, op: str, dtype: str) -> OpDesc:
    row.require("hidden", "batch", "timesteps")
    hidden, batch, steps = row.whole("hidden"), row.whole("batch"), row.whole("timesteps")
    gates = _RECURRENT_OPS[op]
    shape = RecurrentShape(batch, steps, hidden, hidden, layers=1, directions=1, gates=gates)
    element = DTYPE_BYTES[dtype]
    weights = 2 * gates * hidden * hidden
    activation_bytes = 2 * batch * steps * hidden * element
    flops = 2.0 * weights * batch * steps
    return OpDesc("recurrent", dtype, flops, weights * element, activation_bytes, recurrent=shape)


def _read(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
            columns = reader.fieldnames
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV table: {error}") from error
    if not columns:
        raise InputError(f"{path} is empty: expected a CSV table with a header")
    if not rows:
        raise InputError(f"{path} has a header but no rows")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} names a column twice: {', '.join(columns)}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise InputError(f"row {number} of {path}: expected {len(columns)} values as in the header")
    return columns, rows
