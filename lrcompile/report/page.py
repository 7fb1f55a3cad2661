"""The report as a page for a browser: one file, which loads nothing and runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.errors import InputError
from lrcompile.report.summary import choice, figure, kind_of, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Template

    from lrcompile.report.report import Decision, Report

SUFFIXES = (".html", ".htm")


def check_page(path: Path) -> None:
    """Raises InputError where a page cannot be of this name: before anything is compiled."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"cannot write --report {path}: it is a page for a browser, whose name ends in .html; got "
            f"{path.suffix or 'no ending'!r}; --report-json writes the figures as JSON"
        )


@dataclass(frozen=True)
class Part:
    """A stretch of a strip of time: a layer's, or with no layer what is left of the model; `share` is of the strip."""

    site: Decision | None
    latency_ms: float
    share: float


def html_page(report: Report, title: str) -> str:
    """The page: the figures, where the time goes before and after, and each site with all that was considered."""
    lines: list[tuple[str, list[str]]] = []
    for about, text in summary(report):
        if about and (not lines or lines[-1][0] != about):
            lines.append((about, []))
        lines[-1][1].append(text)
    before, after = _strips(report)
    return _template().render(
        report=report, title=title, lines=lines, before=before, after=after, kind=kind_of(report.latency_ms),
        longest=max((site.latency_ms_before or 0.0 for site in report.sites), default=0.0),
        choice=choice, figure=figure, drops=any(site.drop is not None for site in report.sites),
    )  # fmt: skip


def _strips(report: Report) -> tuple[Sequence[Part], Sequence[Part]]:
    """Where the time goes before and after, on one scale.

    Layers are priced with what is fused into them, and a model measured as a whole may take less than their sum: the
    scale is then that sum's.
    """
    totals = report.latency_ms["before"], report.latency_ms["after"]
    sides = (
        [(site, site.latency_ms_before) for site in report.sites if site.latency_ms_before],
        [(site, site.latency_ms_after) for site in report.sites if site.latency_ms_after],
    )
    sums = [sum(latency for _, latency in side) for side in sides]
    scale = max(*totals, *sums) or 1.0
    strips = []
    for side, total, known in zip(sides, totals, sums, strict=True):
        parts = [Part(site, latency, latency / scale) for site, latency in side]
        rest = total - known
        strips.append([*parts, *([Part(None, rest, rest / scale)] if rest > 0 else [])])
    return strips[0], strips[1]


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("lrcompile", "report"), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return pages.get_template("page.html")
