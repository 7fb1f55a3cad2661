"""The report as a person reads it at the end of a compile."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrcompile.report.summary import choice, figure, summary

if TYPE_CHECKING:  # they import torch, which takes seconds
    from lrcompile.devices.bench import BenchResult
    from lrcompile.report.report import Decision, Report

NARROW = 100  # columns below which a table of sites has no room for their names and for why
LEAST_FOLDED = 12  # columns of a text that is folded


def print_report(console: Console, report: Report) -> None:
    """Prints the decision table, the totals and the notes."""
    print_decisions(console, report.sites)
    for about, figures in summary(report):
        console.print(f"{about:<9} {figures}")


def print_decisions(console: Console, sites: Sequence[Decision]) -> None:
    """Prints what was decided for each site, at which rank, error and latency, and why not: a row, or two lines."""
    if console.width >= NARROW:
        console.print(_decision_table(sites))
        return
    for row in sites:
        figures = (
            _ms(row.latency_ms_before, row.latency_ms_after), figure(row.error, "error {:.3g}"),
            figure(row.effect, "of the model alone {:.3g}"), figure(row.drop, "metric falls {:.3g}"),
            figure(row.p_faster, "P(faster) {:.2f}"), row.reason,
        )  # fmt: skip
        console.print(f"{row.site}  {row.op}: {choice(row)}", style="bold" if row.decision == "rewritten" else "dim")
        console.print("  " + ", ".join(filter(None, figures)))


def _decision_table(sites: Sequence[Decision]) -> Table:
    drops = any(row.drop is not None for row in sites)
    figures = ("error", "model's", *["metric falls"] * drops, "before ms", "after ms", "P(faster)")
    table = plain_table(("site", "layer", "choice", *figures, "why"), figures=figures)
    for row in sites:
        table.add_row(
            row.site, row.op, choice(row), figure(row.error), figure(row.effect), *[figure(row.drop)] * drops,
            figure(row.latency_ms_before, "{:.4f}"), figure(row.latency_ms_after, "{:.4f}"),
            figure(row.p_faster, "{:.2f}"), row.reason,
            style=None if row.decision == "rewritten" else "dim",
        )  # fmt: skip
    return table


def print_site(console: Console, site: Decision) -> None:
    """Prints everything that was considered for one site."""
    console.print(Text.assemble((site.site, "bold"), f"  {site.op}: {choice(site)}"))
    console.print(f"why       {site.reason}")
    if site.alternatives and console.width >= NARROW:
        console.print(_alternatives_table(site))
        return
    for item in site.alternatives:
        figures = (
            _ms(item["latency_ms_before"], item["latency_ms_after"]) + f" ± {item['sigma_ms']:.4f}",
            figure(item["error"], "error {:.3g}"), figure(item.get("effect"), "of the model alone {:.3g}"),
            f"P(faster) {item['p_faster']:.2f}",
            f"{item['bytes_saved'] / 1e6:.3f} MB saved",
        )  # fmt: skip
        console.print("; ".join(item["rewrites"]))
        console.print("  " + ", ".join(filter(None, figures)))


def _alternatives_table(site: Decision) -> Table:
    figures = ("error", "model's", "before ms", "after ms", "± ms", "P(faster)", "MB saved")
    table = plain_table(("rewrites", *figures), figures=figures)
    table.title, table.title_justify = "considered, fastest first", "left"
    for item in site.alternatives:
        table.add_row(
            "; ".join(item["rewrites"]), figure(item["error"]), figure(item.get("effect")),
            figure(item["latency_ms_before"], "{:.4f}"), figure(item["latency_ms_after"], "{:.4f}"),
            figure(item["sigma_ms"], "{:.4f}"), figure(item["p_faster"], "{:.2f}"),
            figure(item["bytes_saved"] / 1e6, "{:.3f}"),
        )  # fmt: skip
    return table


def print_front(console: Console, figures: Mapping[str, Any], asked: int) -> None:
    """Prints the points of a front, slowest first, and the notes."""
    points = figures["points"]
    kind = points[0]["latency_ms"]["kind"]
    names = ("point", f"latency ms ({kind})", "± ms", "speed-up", "weights MB", "error", "rewrites", "plan")
    rows = []
    for point in points:
        latency = point["latency_ms"]
        rows.append((
            str(point["point"]), f"{latency['after']:.4g}", f"{latency['sigma']:.2g}", f"{point['speedup']:.2f}×",
            f"{point['weight_bytes'] / 1e6:.2f}", f"{point['error']:.3g}", str(point["rewrites"]), point["plan"] or "",
        ))  # fmt: skip
    _print_figures(console, names, rows)
    error, strategy = figures["error"], figures["settings"]["strategy"]
    left = "" if len(points) == asked else "; the others are beaten by one of these, or not reached"
    console.print(f"error     {error['metric']} (measured; {error['basis']})")
    console.print(
        f"front     {len(points)} of {asked} points on {figures['target']} by {strategy}, "
        f"from {points[0]['latency_ms']['before']:.4g} ms{left}"
    )
    for point in points:
        for note in point["notes"]:
            console.print(f"point {point['point']:<3} {note}")
    for note in figures["notes"]:
        console.print(f"note      {note}")


def print_family(console: Console, family: Mapping[str, Any]) -> None:
    """Prints the members of a family, the largest first; what holds for all is noted once, at the end."""
    names = ("size", "of", "weights MB", "operations", "latency ms", "error before", "recovered", "file")
    rows = []
    for member in family["members"]:
        recovery, latency = member["recovery"], member["latency_ms"]
        errors = ("", f"{member['error']['measured']:.3g}") if recovery is None else map(figure, recovery["error"])
        written = f" ({member['quantization']['written']})" if member["quantization"] else ""
        rows.append((
            f"{member['size']:g}", f"{member['parent']:g}", f"{member['weight_bytes'] / 1e6:.2f}",
            str(member["operations"]), f"{latency['after']:.4g} {latency['kind']}", *errors, member["file"] + written,
        ))  # fmt: skip
    _print_figures(console, names, rows)
    first, *others = (member["notes"] for member in family["members"])
    shared = [note for note in first if all(note in notes for notes in others)]
    for member in family["members"]:
        for note in member["notes"]:
            if note not in shared:
                console.print(f"size {member['size']:<4g} {note}")
    for note in (*family["notes"], *shared):
        console.print(f"note      {note}")
    console.print(f"wrote     {family['manifest']} and what it names")


def _print_figures(console: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns of figures and a last one of text; where they have no room, each row in words."""
    widths = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    if sum(widths[:-1]) + min(widths[-1], LEAST_FOLDED) + 2 * len(widths[1:]) > console.width:
        for row in rows:
            console.print(", ".join(f"{name} {text}" for name, text in zip(names, row, strict=True) if text))
        return
    console.print(plain_table(names, rows, figures=names[:-1]))


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]] = (), *, figures: Collection[str] = ()) -> Table:
    """A table without lines: columns of `figures` stand to the right and whole, text is folded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        if name in figures:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _ms(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.4f} → {after:.4f} ms"


def print_bench(console: Console, first: object, second: object, result: BenchResult) -> None:
    """Prints the result of a paired measurement."""
    rows = [
        (str(first), f"{result.median_a_s * 1e3:.3f}", f"{result.min_a_s * 1e3:.3f}"),
        (str(second), f"{result.median_b_s * 1e3:.3f}", f"{result.min_b_s * 1e3:.3f}"),
    ]
    console.print(plain_table(("model", "median ms", "least ms"), rows))
    console.print(
        f"the second takes {result.ratio:.3f}× the time of the first "
        f"(95 % interval {result.ratio_low:.3f}–{result.ratio_high:.3f}, {result.blocks} paired blocks "
        f"in {result.openings} openings; measured)"
    )
    if result.noisy:
        console.print("note      the machine was too noisy for a verdict: repeat with a larger --seconds")
