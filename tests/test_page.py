"""The report as a page: well-formed, complete, on one scale, and harmless whatever the names in it."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from lrcompile.report.report import Decision, Report
from tests.test_terminal import SITES

VOID = {"meta", "br", "input", "wbr"}
KEPT = Decision("mid", "Linear 8→8", "kept", None, {}, None, 0.125, 0.125, None, "nothing is faster")


def report_of(*sites: Decision, before: float = 1.0, after: float = 0.75, **more: Any) -> Report:
    """A report with these sites."""
    model = dict.fromkeys(
        [f"{kind}_{when}" for kind in ("params", "weight_bytes", "flops", "ops") for when in ("before", "after")], 1e6
    )
    latency = {"before": before, "after": after, "speedup": 4 / 3, "kind": "analytic", "sigma": 0.01}
    error = {"metric": "relative output error", "basis": "8 samples", "budget": 0.02, "measured": 0.0123}
    return Report("v100", model, latency, error, sites, {"onnx_vs_torch": 1e-7}, {"trace": 1.0}, **more)


class Page(HTMLParser):
    """What a browser would see: the elements in order, their text, and whether each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def widths(self) -> list[tuple[str, float]]:
        """(class, per cent) of everything that has a width, in order."""
        found = [given for tag, given in self.elements if tag == "i"]
        return [(str(given["class"]), float(str(given["style"])[len("width: ") : -1])) for given in found]


def test_all_that_the_screen_says_is_on_the_page() -> None:
    page = Page(report_of(SITES[0], KEPT, SITES[1], notes=("weights only",)).to_html("net.pt2 on v100"))
    expected = (
        "net.pt2 on v100", "1.33× as fast", "predicted, analytic", "0.0123", "of 0.02 allowed", "1 of 3",
        "encoder.layer.0", "low-rank-linear rank=64", "0.97", "2.00× faster here", "1 considered",
        "low-rank-linear(encoder.layer.0; rank=64)", "low-rank-linear: too small", "nothing is faster",
        "8 samples, budget 0.02", "ONNX Runtime against the rewritten model: 1.0e-07 relative", "weights only",
    )  # fmt: skip
    for words in expected:
        assert words in page.text


def test_time_is_drawn_on_one_scale() -> None:
    widths = Page(report_of(SITES[0], KEPT, SITES[1]).to_html()).widths()
    before = [("rewritten", 50.0), ("kept", 12.5), ("rest", 37.5)]
    after = [("rewritten", 25.0), ("kept", 12.5), ("rest", 37.5)]
    rows = [("was", 100.0), ("rewritten", 50.0), ("was", 25.0)]  # of the longest layer
    assert widths == [*before, *after, *rows]


def test_layers_that_take_more_than_the_model_measured_whole_set_the_scale() -> None:
    widths = Page(report_of(SITES[0], KEPT, before=0.5, after=0.3).to_html()).widths()
    assert widths[:4] == [("rewritten", 80.0), ("kept", 20.0), ("rewritten", 40.0), ("kept", 20.0)]


@pytest.mark.parametrize("sites", [(), (replace(KEPT, latency_ms_before=0.0, latency_ms_after=0.0),)])
def test_a_model_that_takes_no_time(sites: tuple[Decision, ...]) -> None:
    page = Page(report_of(*sites, before=0.0, after=0.0).to_html())
    assert f"0 of {len(sites)}" in page.text
    assert all(width == 0 for _, width in page.widths())


def test_names_are_text_and_nothing_is_loaded_or_run() -> None:
    evil = '"><script src="https://example.org/a.js">{{ 7 * 7 }}'
    written = report_of(replace(SITES[0], site=evil, reason=evil), notes=(evil,)).to_html(evil)
    page = Page(written)
    assert page.text.count(evil) == 5  # the title twice, the site, why, and the note
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    assert not any(name.startswith("on") or name in ("src", "href") for _, given in page.elements for name in given)
    assert "49" not in page.text
    assert "url(" not in written
    assert "@import" not in written
