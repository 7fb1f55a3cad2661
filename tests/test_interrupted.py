"""A compile that was killed, at whatever moment, is done again to the same bytes, and goes on where it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted import MOMENTS

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("interrupted")
    x = np.random.default_rng(0).standard_normal((128, 256), dtype=np.float32)
    np.savez(folder / "calib.npz", x=x)
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "passes", TESTS)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "interrupted.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_compile_is_done_again_to_the_same_bytes(runs: tuple[Path, dict[str, Any]], moment: str) -> None:
    folder, found = runs
    assert found["whole"]["status"] == 0
    assert found["whole"]["made"] >= 2
    assert found[moment]["killed"], "the run was over before that moment"
    assert found[moment]["status"] == 0
    for name in ("plan.json", "out.onnx"):
        expected = (folder / "whole" / name).read_bytes()
        assert (folder / moment.replace(" ", "-") / name).read_bytes() == expected, name


@pytest.mark.slow
def test_what_was_decomposed_is_not_decomposed_again(runs: tuple[Path, dict[str, Any]]) -> None:
    made = {moment: figures["made"] for moment, figures in runs[1].items()}
    whole = made["whole"]
    assert made["calibrate 1"] == whole
    assert made["decomposed 1"] == whole - 1
    assert made["recover 3"] == made["emit 0"] == 0
