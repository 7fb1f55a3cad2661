"""The report as a person reads it at the end of a compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # they import torch, which takes seconds
    from lrcompile.devices.bench import BenchResult
    from lrcompile.report.report import Decision, Report

NARROW = 100  # columns below which a table of sites has no room for their names and for why


def print_report(console: Console, report: Report) -> None:
    """Prints the decision table, the totals and the notes."""
    print_decisions(console, report.sites)
    model, latency, error = report.model, report.latency_ms, report.error
    kind = latency["kind"] if latency["kind"] == "measured" else f"predicted, {latency['kind']}"
    console.print(
        f"latency   {latency['before']:.4g} → {latency['after']:.4g} ms on {report.target} "
        f"({latency['speedup']:.2f}×, ± {latency['sigma']:.2g} ms; {kind})"
    )
    console.print(
        f"weights   {model['weight_bytes_before'] / 1e6:.2f} → {model['weight_bytes_after'] / 1e6:.2f} MB, "
        f"operations {model['ops_before']} → {model['ops_after']}, "
        f"{model['flops_before'] / 1e9:.3f} → {model['flops_after'] / 1e9:.3f} GFLOP"
    )
    limit = f", budget {error['budget']:g}" if error["budget"] is not None else ""
    console.print(f"error     {error['measured']:.3g} {error['metric']} (measured; {error['basis']}{limit})")
    if report.recovery:
        trained = report.recovery
        console.print(
            f"recovery  error {trained['error'][0]:.3g} → {trained['error'][1]:.3g} in {trained['steps']} steps, "
            f"{trained['seconds'] / 60:.1f} min, {trained['epochs']:.2g} epochs of {trained['samples']} samples "
            f"(measured on {trained['judged_by']} samples kept out)"
        )
    if report.metric is not None:
        console.print(metric_line(report.metric))
    onnx = report.verification.get("onnx_vs_torch")
    if onnx is not None:
        console.print(f"verified  ONNX Runtime against the rewritten model: {onnx:.1e} relative")
    if report.quantization is not None:
        for line in quantization_lines(report.quantization):
            console.print(line)
    for note in report.notes:
        console.print(f"note      {note}")


def quantization_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """What was quantised, and what that cost and gained; nothing where no layer was."""
    if figures["error"] is None:
        return
    left, size = figures["layers"] - len(figures["left_float"]), figures["bytes"]
    judged = f"{figures['batches_judged']} batches{' held out' if figures['held_out'] else ''}"
    judged += f", budget {figures['budget']:g}" if figures["budget"] is not None else ""
    yield (
        f"int8      error {figures['error']:.3g} against the float model, {figures['error_whole']:.3g} "
        f"{figures['metric']} against the original (measured; {judged})"
    )
    bits = ", ".join(f"weights of {kind} in {count} bits" for kind, count in figures["weight_bits"].items())
    yield (
        f"          {left} of {figures['layers']} layers, {size[0] / 1e6:.2f} → {size[1] / 1e6:.2f} MB, {bits}; "
        f"{'written' if figures['written'] == 'int8' else 'not written'}"
    )
    latency = figures["latency_ms"]
    if latency is not None:
        (a, a_low, a_high), (b, b_low, b_high) = latency["of_float"], latency["of_original"]
        yield (
            f"          {latency['int8']:.4g} ms: {a:.3f}× the time of the float model ({a_low:.3f}–{a_high:.3f}), "
            f"{b:.3f}× that of the original ({b_low:.3f}–{b_high:.3f}; measured)"
        )


def metric_line(metric: Mapping[str, Any]) -> str:
    """The user's metric before and after, and how far it was allowed to fall."""
    noise = f" + {metric['noise']:.2g} noise" if metric["noise"] else ""
    return (
        f"metric    {metric['before']:.6g} → {metric['after']:.6g} of {metric['name']} (drop "
        f"{metric['before'] - metric['after']:.3g}, allowed {metric['max_drop']:g}{noise}; "
        f"{metric['evaluations']} evaluations of at most {metric['most_evaluations']})"
    )


def print_decisions(console: Console, sites: Sequence[Decision]) -> None:
    """Prints what was decided for each site, at which rank, error and latency, and why not: a row, or two lines."""
    if console.width >= NARROW:
        console.print(_decision_table(sites))
        return
    for row in sites:
        figures = (
            _ms(row.latency_ms_before, row.latency_ms_after), _figure(row.error, "error {:.3g}"),
            _figure(row.p_faster, "P(faster) {:.2f}"), row.reason,
        )  # fmt: skip
        console.print(f"{row.site}  {row.op}: {_choice(row)}", style="bold" if row.decision == "rewritten" else "dim")
        console.print("  " + ", ".join(filter(None, figures)))


def _decision_table(sites: Sequence[Decision]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("site", "layer", "choice"):
        table.add_column(name, overflow="fold")
    for name in ("error", "before ms", "after ms", "P(faster)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in sites:
        table.add_row(
            row.site, row.op, _choice(row), _figure(row.error), _figure(row.latency_ms_before, "{:.4f}"),
            _figure(row.latency_ms_after, "{:.4f}"), _figure(row.p_faster, "{:.2f}"), row.reason,
            style=None if row.decision == "rewritten" else "dim",
        )  # fmt: skip
    return table


def print_site(console: Console, site: Decision) -> None:
    """Prints everything that was considered for one site."""
    console.print(Text.assemble((site.site, "bold"), f"  {site.op}: {_choice(site)}"))
    console.print(f"why       {site.reason}")
    if site.alternatives and console.width >= NARROW:
        console.print(_alternatives_table(site))
        return
    for item in site.alternatives:
        figures = (
            _ms(item["latency_ms_before"], item["latency_ms_after"]) + f" ± {item['sigma_ms']:.4f}",
            _figure(item["error"], "error {:.3g}"), f"P(faster) {item['p_faster']:.2f}",
            f"{item['bytes_saved'] / 1e6:.3f} MB saved",
        )  # fmt: skip
        console.print("; ".join(item["rewrites"]))
        console.print("  " + ", ".join(filter(None, figures)))


def _alternatives_table(site: Decision) -> Table:
    table = Table(
        box=None, header_style="bold", pad_edge=False, title="considered, fastest first", title_justify="left"
    )
    table.add_column("rewrites", overflow="fold")
    for name in ("error", "before ms", "after ms", "± ms", "P(faster)", "MB saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in site.alternatives:
        table.add_row(
            "; ".join(item["rewrites"]), _figure(item["error"]), _figure(item["latency_ms_before"], "{:.4f}"),
            _figure(item["latency_ms_after"], "{:.4f}"), _figure(item["sigma_ms"], "{:.4f}"),
            _figure(item["p_faster"], "{:.2f}"), _figure(item["bytes_saved"] / 1e6, "{:.3f}"),
        )  # fmt: skip
    return table


def print_front(console: Console, figures: Mapping[str, Any], asked: int) -> None:
    """Prints the points of a front, slowest first, and the notes."""
    points = figures["points"]
    kind = points[0]["latency_ms"]["kind"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    names = ("point", f"latency ms ({kind})", "± ms", "speed-up", "weights MB", "error", "rewrites")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for point in points:
        latency = point["latency_ms"]
        table.add_row(
            str(point["point"]), f"{latency['after']:.4g}", f"{latency['sigma']:.2g}", f"{point['speedup']:.2f}×",
            f"{point['weight_bytes'] / 1e6:.2f}", f"{point['error']:.3g}", str(point["rewrites"]), point["plan"] or "",
        )  # fmt: skip
    console.print(table)
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
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("size", "of", "weights MB", "operations", "latency ms", "error before", "recovered"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("file", overflow="fold")
    for member in family["members"]:
        recovery, latency = member["recovery"], member["latency_ms"]
        errors = ("", f"{member['error']['measured']:.3g}") if recovery is None else map(_figure, recovery["error"])
        written = f" ({member['quantization']['written']})" if member["quantization"] else ""
        table.add_row(
            f"{member['size']:g}", f"{member['parent']:g}", f"{member['weight_bytes'] / 1e6:.2f}",
            str(member["operations"]), f"{latency['after']:.4g} {latency['kind']}", *errors, member["file"] + written,
        )  # fmt: skip
    console.print(table)
    first, *others = (member["notes"] for member in family["members"])
    shared = [note for note in first if all(note in notes for notes in others)]
    for member in family["members"]:
        for note in member["notes"]:
            if note not in shared:
                console.print(f"size {member['size']:<4g} {note}")
    for note in (*family["notes"], *shared):
        console.print(f"note      {note}")
    console.print(f"wrote     {family['manifest']} and what it names")


def simple_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table of text."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _choice(site: Decision) -> str:
    return site.decision if site.pass_name is None else f"{site.pass_name} {_options(site.params)}".strip()


def _ms(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.4f} → {after:.4f} ms"


def _options(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in params.items())


def _figure(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def print_bench(console: Console, first: object, second: object, result: BenchResult) -> None:
    """Prints the result of a paired measurement."""
    rows = [
        (str(first), f"{result.median_a_s * 1e3:.3f}", f"{result.min_a_s * 1e3:.3f}"),
        (str(second), f"{result.median_b_s * 1e3:.3f}", f"{result.min_b_s * 1e3:.3f}"),
    ]
    console.print(simple_table(("model", "median ms", "least ms"), rows))
    console.print(
        f"the second takes {result.ratio:.3f}× the time of the first "
        f"(95 % interval {result.ratio_low:.3f}–{result.ratio_high:.3f}, {result.blocks} paired blocks "
        f"in {result.openings} openings; measured)"
    )
    if result.noisy:
        console.print("note      the machine was too noisy for a verdict: repeat with a larger --seconds")
