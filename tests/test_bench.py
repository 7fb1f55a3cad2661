"""The paired benchmark: its statistics on a fake clock, its inputs, and what it says of bad ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.cli import run
from lrcompile.devices import bench
from lrcompile.devices.bench import MIN_BLOCKS, OPENINGS, compare_outputs, interleave, median_interval, paired, waited_s
from lrcompile.errors import InputError

Shape = Sequence[int | str | None]


def model(
    scale: float = 1.0, shape: Shape = ("batch", 4), *, name: str = "x", elem_type: int = TensorProto.FLOAT
) -> bytes:
    """x · scale, as bytes."""
    factor = numpy_helper.from_array(np.array(scale, helper.tensor_dtype_to_np_dtype(elem_type)), "factor")
    graph = helper.make_graph(
        [helper.make_node("Mul", [name, "factor"], ["y"])],
        "scaled",
        [helper.make_tensor_value_info(name, elem_type, shape)],
        [helper.make_tensor_value_info("y", elem_type, shape)],
        [factor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


class Machine:
    """A clock that moves only while a fake run takes its time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def run(self, name: str, latency_s: Callable[[], float]) -> Callable[[], None]:
        def once() -> None:
            self.order.append(name)
            self.now_s += latency_s()

        return once


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_blocks_run_a_b_b_a_after_a_warm_up() -> None:
    machine = Machine()
    blocks = interleave(machine.run("a", lambda: 0.02), machine.run("b", lambda: 0.01), 0.0, machine.clock, silent)
    groups = "".join(machine.order).removeprefix("aabb")
    assert groups == "abba" * MIN_BLOCKS
    assert blocks.ratios == pytest.approx([0.5] * MIN_BLOCKS)
    assert (len(blocks.runs_a_s), len(blocks.runs_b_s)) == (2 * MIN_BLOCKS, 2 * MIN_BLOCKS)


def test_short_runs_share_a_block_and_the_time_is_kept() -> None:
    machine = Machine()
    interleave(machine.run("a", lambda: 1.1e-3), machine.run("b", lambda: 1.1e-3), 2.0, machine.clock, silent)
    assert "".join(machine.order)[-20:] == "a" * 5 + "b" * 10 + "a" * 5
    assert 2.0 <= machine.now_s < 2.4


def test_steady_drift_cancels() -> None:
    machine = Machine()
    slower = itertools.count()
    blocks = interleave(
        machine.run("a", lambda: 0.02 + 1e-4 * next(slower)),
        machine.run("b", lambda: 0.02 + 1e-4 * next(slower)),
        2.0,
        machine.clock,
        silent,
    )
    assert blocks.ratios == pytest.approx([1.0] * len(blocks.ratios), abs=1e-4)
    assert max(blocks.runs_a_s) > 1.3 * min(blocks.runs_a_s)


def test_progress_ends_at_the_total() -> None:
    machine, seen = Machine(), []
    interleave(
        machine.run("a", lambda: 0.1),
        machine.run("b", lambda: 0.1),
        4.0,
        machine.clock,
        lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert seen[-1] == ("bench", 100, 100)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize(
    ("count", "ranks"), [(3, (0, 2)), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (20, (5, 14)), (100, (39, 60))]
)
def test_the_interval_is_that_of_the_sign_test(count: int, ranks: tuple[int, int]) -> None:
    values = [float(i) for i in range(count)]
    assert median_interval(values[::-1]) == ((count - 1) / 2, *ranks)


def test_a_model_against_itself() -> None:
    machine = Machine()
    result = paired(model(), model(), seconds=0.0, clock=_ticking(machine))
    assert result.ratio == pytest.approx(1.0)
    assert not result.noisy
    assert result.verdict == "no difference"
    assert (result.output_difference, result.outputs, result.blocks) == (0.0, "1 compared", OPENINGS * MIN_BLOCKS)
    document = json.loads(json.dumps(result.to_json()))
    assert document["kind"] == "measured"
    assert document["ratio_low"] <= document["ratio"] <= document["ratio_high"]


def test_models_are_opened_anew_in_turn_first_and_second(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = bench._open

    def recorded(source: Any, threads: int | None, called: str) -> Any:
        opened.append("a" if source == first else "b")
        return original(source, threads, called)

    monkeypatch.setattr(bench, "_open", recorded)
    first, second, seen = model(1.0), model(2.0), []
    result = paired(
        first, second, seconds=0.0, openings=3, clock=_ticking(Machine()), progress=lambda *step: seen.append(step)
    )
    assert "".join(opened) == "abbaab"
    assert (result.openings, result.output_difference) == (3, 1.0)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("bench", 100, 100)


def test_a_wide_interval_is_called_noisy() -> None:
    latencies = itertools.cycle([0.02, 0.05, 0.03, 0.09, 0.02])
    machine = Machine()
    machine.now_s = 1.0

    def clock() -> float:
        machine.now_s += next(latencies)
        return machine.now_s

    result = paired(model(), model(), seconds=3.0, clock=clock)
    assert result.noisy
    assert result.verdict == "too noisy: repeat"


def _ticking(machine: Machine) -> Callable[[], float]:
    def clock() -> float:
        machine.now_s += 0.02
        return machine.now_s

    return clock


def quick(a: Any, b: Any, **options: Any) -> Any:
    return paired(a, b, seconds=0.0, clock=_ticking(Machine()), **options)


def test_output_differences_are_relative() -> None:
    assert quick(model(1.0), model(1.5)).output_difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([np.ones(2)], [np.ones(2), np.ones(2)], "not compared: 1 and 2 outputs"),
        ([np.ones(2)], [np.ones(3)], r"not compared: output 0 has shapes (2,) and (3,)"),
        ([np.ones(2)], [np.array([1.0, np.nan])], "not compared: output 0 is not finite in one of them"),
    ],
)
def test_outputs_that_cannot_be_compared(a: list[np.ndarray], b: list[np.ndarray], expected: str) -> None:
    assert compare_outputs(a, b) == (None, expected)


def test_outputs_that_are_equally_infinite_are_equal() -> None:
    value = np.array([-np.inf, np.nan, 1.0])
    assert compare_outputs([value], [value]) == (0.0, "1 compared")
    assert compare_outputs([np.zeros(2)], [np.array([0.0, 3.0])]) == (3.0, "1 compared")


def test_given_inputs_and_batch_are_used() -> None:
    x = np.full((3, 4), 2.0, np.float32)
    assert quick(model(), model(), inputs={"x": x}).output_difference == 0.0
    assert quick(model(), model(), batch=5).batch == 5
    assert quick(model(), model(shape=(7, 4))).output_difference == 0.0  # a size that one model fixes


@pytest.mark.parametrize("elem_type", [TensorProto.INT64, TensorProto.DOUBLE, TensorProto.INT32])
def test_other_types_of_input(elem_type: int) -> None:
    assert quick(model(2, elem_type=elem_type), model(2, elem_type=elem_type)).output_difference == 0.0


@pytest.mark.parametrize(
    ("a", "b", "options", "expected"),
    [
        (model(), model(name="z"), {}, "only the first model has the input 'x'"),
        (model(), model(elem_type=TensorProto.DOUBLE), {}, "input 'x' differs between the models"),
        (model(shape=(1, 4)), model(shape=(1, 5)), {}, "input 'x' differs between the models"),
        (model(), model(), {"inputs": {"w": 1}}, "no input 'w'; their inputs are x"),
        (model(), model(), {"inputs": {"x": np.ones((2, 5), np.float32)}}, r"is float32\[2, 5\], but the models take"),
        (model(), model(), {"inputs": {"x": np.ones((2, 4))}}, r"is float64\[2, 4\], but the models take float32"),
        (model(shape=(2, "length")), model(), {}, None),
        (
            model(shape=(2, "length")),
            model(shape=(2, "length")),
            {},
            r"axis 1 of input 'x' has no fixed size \(length\)",
        ),
        (model(shape=(2, None)), model(shape=(2, None)), {}, "axis 1 of input 'x' has no fixed size"),
        (model(shape=(2, 4)), model(shape=(2, 4)), {"batch": 3}, "the models fix the first axis at 2"),
        (b"not a model", model(), {}, "cannot open the first model as an ONNX model"),
        (model(), b"", {}, "cannot open the second model as an ONNX model"),
    ],
)
def test_wrong_inputs_are_named(a: bytes, b: bytes, options: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        quick(a, b, **options)
        return
    with pytest.raises(InputError, match=expected) as caught:
        quick(a, b, **options)
    assert "\n" not in str(caught.value)


def test_files_are_opened_and_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(onnx.load_from_string(model()), good)
    bad.write_bytes(b"\x00\x01 nonsense")
    assert quick(good, str(good)).output_difference == 0.0
    with pytest.raises(InputError, match=r"missing\.onnx is not a file"):
        quick(good, tmp_path / "missing.onnx")
    with pytest.raises(InputError, match=r"cannot open .*bad\.onnx as an ONNX model"):
        quick(bad, good)


def test_the_command_takes_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.onnx").write_bytes(model(shape=("batch", "length")))
    words = ["bench", str(tmp_path / "a.onnx"), str(tmp_path / "a.onnx"), "--seconds", "0.1"]
    assert run(words) == 2
    assert "give the input, such as --input x=float32[…]" in " ".join(capsys.readouterr().err.split())
    assert run([*words, "--input", "x=float32[2,3]"]) == 0
    assert run([*words, "--input", "z=float32[2,3]"]) == 2
    assert "the models have no input 'z'; their inputs are x" in " ".join(capsys.readouterr().err.split())
    assert run([*words, "--input", "x=bfloat16[2,3]"]) == 0  # in single precision
    for wrong in ("float64[2,3]", "float32[2]"):
        assert run([*words, "--input", f"x={wrong}"]) == 2
        assert "but the models take float32" in " ".join(capsys.readouterr().err.split())


def test_a_model_that_fails_on_its_inputs_is_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([2, 2]), "shape")],
    )
    broken = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    with pytest.raises(InputError, match="the first model does not run on these inputs"):
        quick(broken, broken)


def test_waiting_time_only_grows() -> None:
    assert 0 <= waited_s() <= waited_s()
