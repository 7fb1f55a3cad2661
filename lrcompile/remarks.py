"""What the user of a compile should know besides its figures: the notes of a report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from lrcompile.devices.fusion import describe_all
from lrcompile.frontend.export import batch_size
from lrcompile.graph.verify import is_float
from lrcompile.planning.budget import Budget
from lrcompile.planning.coverage import short_of_rows
from lrcompile.planning.measures import OF_FLOATS
from lrcompile.planning.search import Choice

if TYPE_CHECKING:
    from lrcompile.confirm import Measured
    from lrcompile.prepared import Prepared


def remarks(p: Prepared, budget: Budget, choice: Choice, measured: Measured | None) -> list[str]:
    """What the user should know besides the figures."""
    found = []
    if choice.relaxed:
        found.append("the size asked for needed rewrites that do not make the target faster; see the table")
    if p.metric and p.metric.noise:
        found.append(f"two evaluations of the original differ by {p.metric.noise:.2g}, and so much more may be lost")
    if p.metric and (worst := sum(value.number == -math.inf for value in p.metric.known.values())):
        found.append(f"the metric of {worst} rewritten models was not finite, which counts as the worst there is")
    if choice.untouched:
        found.append(f"{choice.untouched}: the model is as it was")
        return found
    if measured and budget.int8:
        found.append(
            "the latency is that with all that can be in 8-bit integers, on the example; the file's own is below"
            if measured.int8
            else "8-bit integers do not make this model faster here: the latency is that of the float model"
        )
    if measured and measured.remark:
        found.append(measured.remark)
    if measured and measured.overruled:
        found.append(measured.overruled)
    elif not choice.candidates:
        made = "only exact fusions were made" if p.canonical else "the model is as it was"
        asked = budget.error_limit is None and budget.max_drop is None
        found.append(
            f"what was asked for holds without rewrites: {made}"
            if asked
            else f"no rewrite gains anything on {p.target.name} within the budget: {made}"
        )
    found += [*p.target.remarks(), *_of_the_host(p, choice)]
    found += _of_whole_numbers(p, budget, choice)
    found += _of_few_positions(p, budget)
    if not p.calibration:
        found.append("no calibration data: decompositions see the weights only, errors are on the example inputs")
    elif not p.held_out:
        found.append(
            "fewer than 4 calibration batches: factors are fitted to what their error is measured on, and errors on "
            "unseen data may be larger; give more data, or a smaller --batch"
        )
    return [*found, *_of_few_rows(p)]


def _of_the_host(p: Prepared, choice: Choice) -> list[str]:
    """That calls from eager PyTorch take longer than the device does, where that was measured: a floor of their own."""
    target = p.target
    if not target.device.host_s:
        return []
    latency_s = target.whole(target.costs(choice.graph.gm)).latency_s
    ops = describe_all(choice.graph.gm, frozenset(), target.device.lacks).values()
    calls = sum(op.kind != "view" for op in ops)
    floor_s = calls * target.device.host_s
    if floor_s <= latency_s:
        return []
    return [
        f"called one by one from eager PyTorch, its {calls} operations take the host {floor_s * 1e3:.2g} ms, more than "
        f"the {latency_s * 1e3:.2g} ms on {target.name}: there the host decides, and rewrites gain nothing; run the "
        "ONNX file, CUDA graphs or torch.compile"
    ]


def _of_few_rows(p: Prepared) -> list[str]:
    """That the errors which the table shows of layers read too small, where data have fewer rows than features."""
    if not p.calibration:
        return []
    lossy = {path for candidate in p.pricing.candidates if not candidate.exact for path in candidate.sites}
    batches = len(p.calibration.batches)
    example = batch_size(p.traced.flat)
    samples = p.calibration.samples / batches * (batches - p.held_out)
    short = short_of_rows(p.graph, lossy, samples / example if example else batches - p.held_out)
    if not short:
        return []
    worst = min(short, key=lambda path: short[path][0] / short[path][1])
    rows, features = short[worst]
    return [
        f"{len(short)} of the {len(lossy)} layers that splits were considered for read fewer rows of calibration data "
        f"than they have features ({worst}: {rows} rows, {features} features): their own errors in the table, taken on "
        f"those rows, read too small; the model's error is measured. Give more data"
    ]


def _of_few_positions(p: Prepared, budget: Budget) -> list[str]:
    """That too few outputs are counted for the share that was asked for: only exact rewrites are sure of it."""
    least = p.evaluator.measured_in(budget.measure_in_use).margin(0.0)
    if not least or budget.max_error is None or budget.max_error == 0 or least <= budget.max_error:
        return []
    return [
        f"of as few outputs as were counted, a share of {budget.max_error:g} cannot be told from {least:.2g}, so that "
        "no rewrite but exact ones was made: give more calibration data, or allow more"
    ]


def _of_whole_numbers(p: Prepared, budget: Budget, choice: Choice) -> list[str]:
    """What an error without a limit does not say of outputs such as classes."""
    tensors = [y for y in p.evaluator.reference[0] if isinstance(y, Tensor)]
    if budget.measure_in_use is not OF_FLOATS or all(map(is_float, tensors)):
        return []
    if not any(map(is_float, tensors)):
        return ["all outputs are whole numbers: their error is the share of them that differ from the original's"]
    if math.isfinite(p.evaluator.error(choice.graph)):
        return []
    return ["outputs that are whole numbers differ from the original's; the error is that of the others"]
