"""The figures of a compile in words, one line each with what it is about: the screen and the page say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from lrcompile.report.report import Decision, Report

Line = tuple[str, str]
"""(what it is about, or "" for more about the same; the figures)."""


def summary(report: Report) -> Iterator[Line]:
    """All of a report but its sites."""
    model, latency, error = report.model, report.latency_ms, report.error
    yield (
        "latency",
        f"{latency['before']:.4g} → {latency['after']:.4g} ms on {report.target} "
        f"({latency['speedup']:.2f}×, ± {latency['sigma']:.2g} ms; {kind_of(latency)})",
    )
    yield (
        "weights",
        f"{model['weight_bytes_before'] / 1e6:.2f} → {model['weight_bytes_after'] / 1e6:.2f} MB, "
        f"operations {model['ops_before']} → {model['ops_after']}, "
        f"{model['flops_before'] / 1e9:.3f} → {model['flops_after'] / 1e9:.3f} GFLOP",
    )
    limit = f", budget {error['budget']:g}" if error["budget"] is not None else ""
    yield "error", f"{error['measured']:.3g} {error['metric']} (measured; {error['basis']}{limit})"
    if report.recovery:
        trained = report.recovery
        yield (
            "recovery",
            f"error {trained['error'][0]:.3g} → {trained['error'][1]:.3g} in {trained['steps']} steps, "
            f"{trained['seconds'] / 60:.1f} min, {trained['epochs']:.2g} epochs of {trained['samples']} samples "
            f"(measured on {trained['judged_by']} samples kept out)",
        )
    if report.metric is not None:
        yield _metric(report.metric)
    onnx = report.verification.get("onnx_vs_torch")
    if onnx is not None:
        yield "verified", f"ONNX Runtime against the rewritten model: {onnx:.1e} relative"
    if report.quantization is not None:
        yield from _quantization(report.quantization)
    for note in report.notes:
        yield "note", note


def kind_of(latency: Mapping[str, Any]) -> str:
    """Where a latency is from: "measured", or what predicted it."""
    return "measured" if latency["kind"] == "measured" else f"predicted, {latency['kind']}"


def _metric(metric: Mapping[str, Any]) -> Line:
    """The user's metric before and after, and how far it was allowed to fall."""
    samples = metric.get("samples", 1)  # plans of earlier versions do not say
    error = f" ± {metric['standard_error']:.2g} of {samples} samples" if samples > 1 else ""
    noise = f" + {metric['noise']:.2g} noise" if metric["noise"] else ""
    return (
        "metric",
        f"{metric['before']:.6g} → {metric['after']:.6g} of {metric['name']} (drop "
        f"{metric['before'] - metric['after']:.3g}{error}, allowed {metric['max_drop']:g}{noise}; "
        f"{metric['evaluations']} evaluations of at most {metric['most_evaluations']})",
    )


def _quantization(figures: Mapping[str, Any]) -> Iterator[Line]:
    """What was quantised, and what that cost and gained; nothing where no layer was."""
    if figures["error"] is None:
        return
    left, size = figures["layers"] - len(figures["left_float"]), figures["bytes"]
    judged = f"{figures['batches_judged']} batches{' held out' if figures['held_out'] else ''}"
    judged += f", budget {figures['budget']:g}" if figures["budget"] is not None else ""
    yield (
        "int8",
        f"error {figures['error']:.3g} against the float model, {figures['error_whole']:.3g} "
        f"{figures['metric']} against the original (measured; {judged})",
    )
    bits = ", ".join(f"weights of {kind} in {count} bits" for kind, count in figures["weight_bits"].items())
    yield (
        "",
        f"{left} of {figures['layers']} layers, {size[0] / 1e6:.2f} → {size[1] / 1e6:.2f} MB, {bits}; "
        f"{'written' if figures['written'] == 'int8' else 'not written'}",
    )
    latency = figures["latency_ms"]
    if latency is not None:
        (a, a_low, a_high), (b, b_low, b_high) = latency["of_float"], latency["of_original"]
        yield (
            "",
            f"{latency['int8']:.4g} ms: {a:.3f}× the time of the float model ({a_low:.3f}–{a_high:.3f}), "
            f"{b:.3f}× that of the original ({b_low:.3f}–{b_high:.3f}; measured)",
        )


def choice(site: Decision) -> str:
    """What was decided for a site: the passes with their options, or "kept" or "refused"."""
    options = ", ".join(f"{key}={value}" for key, value in site.params.items())
    return site.decision if site.pass_name is None else f"{site.pass_name} {options}".strip()


def figure(value: float | None, form: str = "{:.3g}") -> str:
    """A figure in a form; nothing where there is none."""
    return "" if value is None else form.format(value)
