"""What is printed says the same on a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lrcompile.devices.cost import Cost
from lrcompile.report.report import Decision, latency_figures
from lrcompile.report.terminal import print_decisions, print_family, print_front, print_site

SITES = (
    Decision(
        "encoder.layer.0", "Linear 384→1536", "rewritten", "low-rank-linear", {"rank": 64}, 0.0125, 0.5, 0.25, 0.97,
        "2.00× faster here",
        ({
            "rewrites": ["low-rank-linear(encoder.layer.0; rank=64)"], "error": 0.0125, "effect": 0.00625,
            "latency_ms_before": 0.5, "latency_ms_after": 0.25, "sigma_ms": 0.03, "p_faster": 0.97, "bytes_saved": 2e6,
        },), 0.00625,
    ),
    Decision("head", "Linear 384→2", "refused", None, {}, None, None, None, None, "low-rank-linear: too small"),
)  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_nothing_is_left_out_for_want_of_columns(width: int) -> None:
    decisions, site = (io.StringIO() for _ in range(2))
    print_decisions(Console(file=decisions, width=width), SITES)
    print_site(Console(file=site, width=width), SITES[0])
    for shown, expected in (
        (
            decisions,
            ["encoder.layer.0", "head", "384→1536", "rank=64", "0.0125", "0.00625", "0.2500", "0.97", "2.00×", "small"],
        ),
        (site, ["encoder.layer.0", "rank=64)", "0.00625", "0.5000", "0.2500", "0.0300", "2.000"]),
    ):
        text = "".join(shown.getvalue().split())
        assert all(word in text for word in expected), shown.getvalue()


FRONT = {
    "points": [
        {
            "point": 1, "latency_ms": {"before": 2.0, "after": 1.25, "sigma": 0.03, "kind": "analytic"},
            "speedup": 1.6, "weight_bytes": 3.5e6, "error": 0.0475, "rewrites": 17, "plan": "plans/1.json", "notes": [],
        }
    ],
    "error": {"metric": "relative output error", "basis": "8 samples"}, "settings": {"strategy": "milp"},
    "target": "v100", "notes": [],
}  # fmt: skip
FAMILY = {
    "members": [
        {
            "size": 0.8, "parent": 1.0, "weight_bytes": 3.5e6, "operations": 17, "quantization": None, "notes": [],
            "latency_ms": {"after": 1.25, "kind": "analytic"}, "recovery": {"error": [0.0475, 0.0321]},
            "file": "folder/small-0.8.onnx",
        }
    ],
    "notes": [], "manifest": "small.family.json",
}  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_fronts_and_families_are_whole_on_few_columns(width: int) -> None:
    front, family = (io.StringIO() for _ in range(2))
    print_front(Console(file=front, width=width), FRONT, 1)
    print_family(Console(file=family, width=width), FAMILY)
    for shown, expected in (
        (front, ["weightsMB", "1.25", "0.03", "1.60×", "3.50", "0.0475", "17", "plans/1.json"]),
        (family, ["weightsMB", "0.8", "3.50", "17", "1.25analytic", "0.0475", "0.0321", "folder/small-0.8.onnx"]),
    ):
        assert max(map(len, shown.getvalue().splitlines())) <= width
        text = "".join(shown.getvalue().split())
        assert all(word in text for word in expected), shown.getvalue()


def test_what_takes_no_time_is_as_fast_as_before() -> None:
    assert latency_figures("analytic", Cost(), Cost(), 0.0)["speedup"] == 1.0
