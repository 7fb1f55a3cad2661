"""The error of a predicted saving: similar operations are mispredicted alike, which cancels between two sides."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lrcompile.devices.cost import Cost
from lrcompile.devices.device import Device
from lrcompile.devices.features import family, located, sizes
from lrcompile.graph.op import OpDesc

SHARED, REACH = 0.6, 4.0
"""The correlation of errors of operations of a kind that are almost the same, and the distance by which it falls to
1/e of that, in factors of two of their sizes (between those of the tables: `tools/validate_profiles.py`)."""

Priced = tuple[OpDesc, Cost]


def difference_sigma_s(device: Device, before: Sequence[Priced], after: Sequence[Priced]) -> float:
    """Standard deviation in s of the difference between the sums of two lists of operations.

    Operations of one kind and type have errors that are alike where their sizes are; those of a calibrated family have
    the covariance of its Gaussian process. Others are independent.
    """
    groups: dict[tuple[str | None, str, str], list[tuple[OpDesc, float, float]]] = defaultdict(list)
    for sign, side in ((1.0, before), (-1.0, after)):
        for op, cost in side:
            name = family(op)  # 1-D and transposed convolutions have none, and nothing in common with those that do
            key = (name, "" if name else op.kind, op.dtype)
            groups[key].append((op, sign * cost.latency_s, sign * cost.sigma_s))
    return math.sqrt(sum(_variance(device, name, group) for (name, _, _), group in groups.items()))


def _variance(device: Device, name: str | None, group: Sequence[tuple[OpDesc, float, float]]) -> float:
    """Of the sum of signed latencies; an operation that stands on both sides cancels out."""
    signed: dict[OpDesc, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for labelled, latency_s, sigma_s in group:
        op = replace(labelled, label="")
        if op.gemm is not None or op.conv is not None:
            op = replace(op, weight_bytes=0.0)  # with a bias or without: the same kernel
        signed[op] = (signed[op][0] + latency_s, signed[op][1] + sigma_s)
    ops = [op for op, (latency_s, _) in signed.items() if latency_s]
    if not ops:
        return 0.0
    residuals = device.residuals.get(name) if name else None
    points = [] if residuals is None else [located(op, device, residuals) for op in ops]
    known = [point for point in points if point is not None]
    if residuals is not None and len(known) == len(ops):
        latencies = np.array([signed[op][0] for op in ops])
        covariance = residuals.joint(known)[1] + residuals.noise**2 * np.eye(len(ops))
        return float(latencies @ covariance @ latencies)
    sigmas = np.array([signed[op][1] for op in ops])
    at = np.array([sizes(op) for op in ops])
    away = np.linalg.norm(at[:, None] - at[None], axis=-1)
    correlation = SHARED * np.exp(-away / REACH)
    np.fill_diagonal(correlation, 1.0)
    return float(sigmas @ correlation @ sigmas)
