"""Calibration data as inputs of a traced model, which may have been lowered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lrcompile.errors import InputError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.frontend.export import batch_size
from lrcompile.frontend.trace import Traced
from lrcompile.lower.rank4 import folded_io


def model_batches(traced: Traced, calibration: CalibrationData | None) -> list[tuple[Any, ...]]:
    """Flat inputs to run the graph on: the calibration batches, or the example inputs alone."""
    if calibration is None:
        return [traced.flat]
    if traced.output_shapes:  # set where inputs and outputs are folded
        batches = tuple({name: folded_io(value) for name, value in batch.items()} for batch in calibration.batches)
        calibration = replace(calibration, batches=batches)
    named = list(zip(traced.input_names, traced.flat, strict=True))
    example = {name: value for name, value in named if isinstance(value, Tensor)}
    checked = calibration.check_against(example)
    size = batch_size(traced.flat)
    if not traced.dynamic_batch and checked.batches and size is not None:
        got = next(iter(checked.batches[0].values())).shape[0]
        if got != size:
            raise InputError(
                f"the model takes batches of {size} only, the calibration data come in {got}; give --batch {size}"
            )
    return [tuple(batch.get(name, value) for name, value in named) for batch in checked.batches]
