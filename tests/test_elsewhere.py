"""Operations are measured in other processes, one after the other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lrcompile.devices.elsewhere import Elsewhere
from lrcompile.devices.measure import LocalCostModel
from lrcompile.devices.networks import networks
from lrcompile.devices.pace import Paced
from lrcompile.errors import DeviceError
from lrcompile.graph.op import gemm_op

OP = gemm_op(64, 64, 64, "fp32")


def pid_of(elsewhere: Elsewhere) -> int:
    assert elsewhere._process is not None
    return elsewhere._process.pid


def test_processes_are_replaced_and_what_they_measure_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit")  # the folder that a process starts in is not looked through
    monkeypatch.chdir(tmp_path)
    now, folders = [0.0], [tmp_path / "visit0", tmp_path / "visit1"]
    with Elsewhere(folders, 60.0, lambda: now[0]) as elsewhere:
        first = elsewhere.cost(OP, 1)
        assert isinstance(first, Paced)
        assert 1e-7 < first.latency_s < 1e-2
        started = pid_of(elsewhere)
        now[0] = 59.0
        assert elsewhere.cost(OP, 1) == first
        assert pid_of(elsewhere) == started
        now[0] = 61.0
        assert elsewhere.cost(OP, 1) == first
        ends = pid_of(elsewhere)
        assert ends != started
    with pytest.raises(ProcessLookupError):
        os.kill(ends, 0)
    here = LocalCostModel(folders[1])
    assert here.cost(OP) == first
    assert (here.measured, here.reused) == (0, 1)
    assert not folders[0].exists()


def test_without_folders_nothing_is_remembered_and_a_process_that_ends_is_replaced() -> None:
    with Elsewhere() as elsewhere:
        assert elsewhere.cost(OP).latency_s != elsewhere.cost(OP).latency_s
        with pytest.raises(DeviceError, match=r"^it cannot be measured here: operation gemm in int8 has no ONNX form"):
            elsewhere.cost(gemm_op(64, 64, 64, "int8"))
        assert 0 < elsewhere.network(next(networks(0))).latency_s < 1.0
        os.kill(pid_of(elsewhere), signal.SIGINT)  # is for the one that asks
        assert elsewhere.cost(OP).latency_s > 0
        os.kill(pid_of(elsewhere), signal.SIGKILL)
        with pytest.raises(DeviceError, match=r"^the process that measures it ended: is there enough memory\?$"):
            elsewhere.cost(OP)
        assert elsewhere.cost(OP).latency_s > 0
