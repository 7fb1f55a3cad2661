"""What happened in a compile, as data: the figures, the decision for each site, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from lrcompile.devices.cost import Cost
from lrcompile.devices.fusion import describe_all
from lrcompile.errors import PlanError
from lrcompile.frontend.calibration_data import CalibrationData
from lrcompile.frontend.trace import Traced
from lrcompile.graph.graph import ALL_CONVS, Graph, Site, parameter_count, weight_bytes
from lrcompile.graph.rewrite import Rewrite
from lrcompile.planning.budget import Budget
from lrcompile.planning.plan import finite
from lrcompile.planning.price import Candidate, Pricing
from lrcompile.report.page import html_page

SCHEMA = 1


@dataclass(frozen=True)
class Decision:
    """One site of the model: what was decided, with which figures, and why.

    `decision` is "rewritten", "kept" or "refused". `error` is that of the layer's own output; `effect` is what the
    rewrite alone does to the model's, in the measure of the budget: of what was kept, the rewrite of least error that
    might have been made. `drop` is how far the user's metric falls with that rewrite alone, None where it was not
    evaluated. Latencies are those of everything that the rewrite takes up, in milliseconds; for a site
    rewritten together with others they stand at the first of them.
    """

    site: str
    op: str
    decision: str
    pass_name: str | None
    params: Mapping[str, Any]
    error: float | None
    latency_ms_before: float | None
    latency_ms_after: float | None
    p_faster: float | None
    reason: str
    alternatives: Sequence[Mapping[str, Any]] = ()
    effect: float | None = None
    drop: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; the pass stands under "pass"."""
        data = asdict(self)
        return {("pass" if key == "pass_name" else key): finite(value) for key, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decision:
        """The decision that `to_json` wrote.

        Raises:
            PlanError: it did not.
        """
        try:
            return cls(**{("pass_name" if key == "pass" else key): value for key, value in data.items()})
        except TypeError as error:
            raise PlanError(f"the plan's site {data.get('site')!r} is damaged ({error}); make a new plan") from error


@dataclass(frozen=True)
class Report:
    """The result of a compile in figures. Latencies are milliseconds; `kind` is "analytic" or "measured".

    `metric` is the user's own before and after, with the drop allowed; None where none was given. `quantization` is
    what `Result.save` did and measured where it was asked for int8.
    """

    target: str
    model: Mapping[str, float]
    latency_ms: Mapping[str, Any]
    error: Mapping[str, Any]
    sites: Sequence[Decision]
    verification: Mapping[str, float | None]
    timings_s: Mapping[str, float]
    notes: Sequence[str] = ()
    rewrites: Sequence[Rewrite] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] | None = None
    metric: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return finite(
            {
                "schema": SCHEMA,
                "target": self.target,
                "settings": dict(self.settings),
                "model": dict(self.model),
                "latency_ms": dict(self.latency_ms),
                "error": dict(self.error),
                "metric": None if self.metric is None else dict(self.metric),
                "sites": [decision.to_json() for decision in self.sites],
                "rewrites": [rewrite.to_json() for rewrite in self.rewrites],
                "verification": dict(self.verification),
                "recovery": None if self.recovery is None else dict(self.recovery),
                "quantization": None if self.quantization is None else dict(self.quantization),
                "timings_s": dict(self.timings_s),
                "notes": list(self.notes),
            }
        )

    def to_html(self, title: str = "lrcompile") -> str:
        """The report as a page for a browser, under a title: a whole file, which loads nothing and runs nothing."""
        return html_page(self, title)


def decide(
    graph: Graph,
    pricing: Pricing,
    chosen: Sequence[Candidate],
    told: Mapping[str, Candidate],
    budget: Budget,
    skipped: Sequence[str] = (),
    canonical: Sequence[Rewrite] = (),
    overruled: Mapping[str, str] | None = None,
    remark: Callable[[Rewrite], str] = lambda rewrite: "",
    effect: Callable[[Candidate], float | None] = lambda candidate: None,
    drops: Mapping[str, float] | None = None,
) -> list[Decision]:
    """The decision for every linear, convolution and embedding layer, in graph order.

    `told` is what `told_of` gives. `canonical` are the exact rewrites made before anything was priced; `overruled` are
    the sites whose rewrite was set aside by a measurement of the whole model, with the reason. `remark` says what a
    pass has to say of a rewrite, `effect` gives the root of what one alone does to the model's outputs, where it is
    known; `drops` is how far the user's metric falls at each site with what is told of.
    """
    by_site = _by_site(pricing)
    refusals: dict[str, list[str]] = defaultdict(list)
    for refusal in pricing.refusals:
        refusals[refusal.site].append(f"{refusal.pass_name}: {refusal.reason}")
    cleaned: dict[str, list[str]] = defaultdict(list)
    for rewrite in canonical:
        for path in rewrite.site:
            cleaned[path].append(rewrite.pass_name)
    taken = {path: candidate for candidate in chosen for path in candidate.sites}
    decisions = []

    def felt(candidate: Candidate) -> float | None:
        root = effect(candidate)
        return None if root is None else budget.measure_in_use.value(root)

    for path, site in _listed(graph, taken).items():
        candidates = by_site[path]
        label = operation_label(site.module)
        cost = pricing.node_costs.get(site.nodes[0].name)
        if path in taken:
            decisions.append(_rewritten(path, label, taken[path], _alternatives(candidates, budget, felt), remark))
        elif path in skipped:
            decisions.append(_kept(path, label, "kept", cost, "skipped by --skip", ()))
        elif candidates:
            reason = (overruled or {}).get(path) or _why_kept(candidates, budget)
            decisions.append(_kept(path, label, "kept", cost, reason, _alternatives(candidates, budget, felt)))
        else:
            reason = "; ".join(refusals[path]) or "no pass proposes anything here"
            decisions.append(_kept(path, label, "refused" if refusals[path] else "kept", cost, reason, ()))
        if path in told:
            decisions[-1] = replace(decisions[-1], effect=felt(told[path]), drop=(drops or {}).get(path))
    return [_with_canonical(decision, cleaned[decision.site]) for decision in decisions]


def told_of(
    graph: Graph, pricing: Pricing, chosen: Sequence[Candidate], budget: Budget, skipped: Sequence[str] = ()
) -> dict[str, Candidate]:
    """For each site the rewrite whose effect on the model is told.

    That is the one made, or of what was kept the one of least error that might have been.
    """
    taken = {path: candidate for candidate in chosen for path in candidate.sites}
    by_site = _by_site(pricing)
    found = {
        path: taken.get(path) or _least(by_site[path], budget)
        for path in _listed(graph, taken)
        if path in taken or path not in skipped
    }
    return {path: candidate for path, candidate in found.items() if candidate is not None}


def _listed(graph: Graph, taken: Collection[str]) -> dict[str, Site]:
    """The sites that a report lists, in graph order: layers, and what else was rewritten."""
    layers = (nn.Linear, nn.Embedding, *ALL_CONVS)
    return {path: site for path, site in graph.sites().items() if isinstance(site.module, layers) or path in taken}


def _by_site(pricing: Pricing) -> defaultdict[str, list[Candidate]]:
    found: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in pricing.candidates:
        for path in candidate.sites:
            found[path].append(candidate)
    return found


def _with_canonical(decision: Decision, passes: Sequence[str]) -> Decision:
    """The decision with the exact rewrites that the site had before."""
    if not passes:
        return decision
    names = "+".join(dict.fromkeys([*passes, *([decision.pass_name] if decision.pass_name else [])]))
    reason = decision.reason if decision.decision == "rewritten" else f"exact; beyond that: {decision.reason}"
    return replace(decision, decision="rewritten", pass_name=names, error=decision.error or 0.0, reason=reason)


def latency_figures(kind: str, before: Cost, after: Cost, sigma_s: float | None = None) -> dict[str, Any]:
    """The report's latency entry, in milliseconds; `sigma` is the standard deviation of the saving.

    `sigma_s` is that of a prediction, in s; otherwise both sides were measured on their own.
    """
    return {
        "before": before.latency_s * 1e3,
        "after": after.latency_s * 1e3,
        "speedup": before.latency_s / max(after.latency_s, 1e-12) if before.latency_s else 1.0,
        "kind": kind,
        "sigma": (abs((before - after).sigma_s) if sigma_s is None else sigma_s) * 1e3,
    }


def model_figures(traced: Traced, after: Graph) -> dict[str, float]:
    """Parameters, arithmetic (a multiply-add is two) and operations of the model before and after.

    `ops` counts the operations that a device carries out: neither views nor constants.
    """
    before = traced.graph
    return {
        "params_before": parameter_count(before.gm),
        "params_after": parameter_count(after.gm),
        "weight_bytes_before": weight_bytes(before.gm),
        "weight_bytes_after": weight_bytes(after.gm),
        "flops_before": sum(op.flops for op in describe_all(before.gm).values()),
        "flops_after": sum(op.flops for op in describe_all(after.gm).values()),
        "ops_before": operation_count(before),
        "ops_after": operation_count(after),
    }


def operation_count(graph: Graph) -> int:
    """How many operations of a graph a device carries out."""
    return sum(op.kind != "view" for op in describe_all(graph.gm).values())


def error_figures(
    budget: Budget, calibration: CalibrationData | None, measured: float, held_out: int = 0
) -> dict[str, Any]:
    """The report's error entry: what is measured, on what, the limit and the result; `measured` is the root of that.

    Of the calibration batches, the last `held_out` were measured on and the others fitted to; with 0, all were both.
    """
    measure = budget.measure_in_use
    basis = "weights only; example inputs"
    batches = {"batches_fitted": 0, "batches_judged": 1}
    if calibration is not None:
        count = len(calibration.batches)
        batches = {"batches_fitted": count - held_out, "batches_judged": held_out or count}
        basis = f"calibration data, {calibration.samples} samples"
        if held_out:
            size = calibration.samples // count
            basis += f": {held_out * size} held out to measure on, {(count - held_out) * size} fitted to"
    return {
        "metric": measure.label,
        "basis": basis,
        **batches,
        "budget": budget.whole_limit if budget.max_error is None else budget.max_error,
        "measured": measure.value(measured),
    }


def _rewritten(
    path: str,
    label: str,
    candidate: Candidate,
    alternatives: Sequence[Mapping[str, Any]],
    remark: Callable[[Rewrite], str],
) -> Decision:
    names = "+".join(dict.fromkeys(rewrite.pass_name for rewrite in candidate.rewrites))
    params = dict(candidate.rewrites[0].params) if len(candidate.rewrites) == 1 else _joined_params(candidate)
    first = candidate.sites[0] == path
    ratio, slower = _over(candidate.before, candidate.after), _over(candidate.after, candidate.before)
    reason = f"{ratio:.2f}× faster here" if ratio >= 1 else f"{slower:.2f}× slower here, for the size asked for"
    reason = "; ".join([reason, *filter(None, map(remark, candidate.rewrites))])
    return Decision(
        site=path,
        op=label,
        decision="rewritten",
        pass_name=names,
        params=params,
        error=candidate.error,
        latency_ms_before=candidate.before.latency_s * 1e3 if first else None,
        latency_ms_after=candidate.after.latency_s * 1e3 if first else None,
        p_faster=candidate.p_faster,
        reason=reason if first else f"together with {candidate.sites[0]}",
        alternatives=alternatives,
    )


def _joined_params(candidate: Candidate) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for rewrite in candidate.rewrites:
        joined.update(rewrite.params)
    return joined


def _kept(
    path: str, label: str, decision: str, cost: Cost | None, reason: str, alternatives: Sequence[Mapping[str, Any]]
) -> Decision:
    latency = cost.latency_s * 1e3 if cost is not None else None
    return Decision(path, label, decision, None, {}, None, latency, latency, None, reason, alternatives)


def _over(one: Cost, other: Cost) -> float:
    """How many times another's latency one's is; a plugin may work on what a device does for nothing."""
    return one.latency_s / max(other.latency_s, 1e-12)


def _is_sure(candidate: Candidate, budget: Budget) -> bool:
    return candidate.p_faster >= budget.confidence and candidate.gain.latency_s > 0


def _least(candidates: Sequence[Candidate], budget: Budget) -> Candidate | None:
    """The candidate of least error of those that are surely faster, None where there are none or none was asked for."""
    sure = [c for c in candidates if _is_sure(c, budget) and not budget.exact_only]
    return min(sure, key=lambda c: c.error, default=None)


def _why_kept(candidates: Sequence[Candidate], budget: Budget) -> str:
    best = max(candidates, key=lambda c: c.gain.latency_s)
    name = best.rewrites[-1]
    text = f"{name.pass_name}({', '.join(f'{k}={v}' for k, v in name.params.items())})"
    ratio = _over(best.before, best.after)
    if best.gain.latency_s <= 0:
        return f"nothing is faster: at best {_over(best.after, best.before):.2f}× the time, {text}"
    sure = [c for c in candidates if _is_sure(c, budget)]
    if not sure:
        return f"not sure enough: {text} {ratio:.2f}× faster with P = {best.p_faster:.2f} < {budget.confidence:.2f}"
    if budget.exact_only and not any(c.exact for c in sure):
        return f"{text} would be {ratio:.2f}× faster, but only exact rewrites were allowed"
    least = min(sure, key=lambda c: c.error)
    if least.exact:
        return f"up to {ratio:.2f}× faster, but not beside what was chosen"
    why = "outside the error budget" if budget.error_limit is not None else "not needed, or better spent elsewhere"
    if budget.max_drop is not None:
        why = "more than the metric allows" if budget.max_error is None else "more than the limits allow"
    return f"up to {ratio:.2f}× faster, but the layer's error is {least.error:.2g} or more: {why}"


def _alternatives(
    candidates: Sequence[Candidate], budget: Budget, felt: Callable[[Candidate], float | None], most: int = 12
) -> list[dict[str, Any]]:
    """The strongest rivals of a site, fastest first, for `explain`; errors of those that may be chosen."""
    ranked = sorted(candidates, key=lambda c: -c.gain.latency_s)[:most]
    may_be = {id(c) for c in ranked if c.exact or (_is_sure(c, budget) and not budget.exact_only)}
    return [
        {
            "rewrites": [str(rewrite) for rewrite in c.rewrites],
            "error": c.error if id(c) in may_be else None,
            "effect": felt(c) if id(c) in may_be else None,
            "latency_ms_before": c.before.latency_s * 1e3,
            "latency_ms_after": c.after.latency_s * 1e3,
            "sigma_ms": c.gain.sigma_s * 1e3,
            "p_faster": c.p_faster,
            "bytes_saved": c.bytes_saved,
        }
        for c in ranked
    ]


def operation_label(module: nn.Module) -> str:
    """A layer in a few characters: Linear 384→1536, Conv2d 64→128 3×3 s2."""
    match module:
        case nn.Linear():
            return f"Linear {module.in_features}→{module.out_features}"
        case nn.Embedding():
            return f"Embedding {module.num_embeddings}×{module.embedding_dim}"
    if isinstance(module, ALL_CONVS):
        kernel = "×".join(map(str, module.kernel_size))
        stride = f" s{module.stride[0]}" if set(module.stride) != {1} else ""
        groups = f" g{module.groups}" if module.groups > 1 else ""
        return f"{type(module).__name__} {module.in_channels}→{module.out_channels} {kernel}{stride}{groups}"
    return type(module).__name__
