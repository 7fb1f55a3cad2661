"""Computes a 3-D convolution by 2-D ones: the same function in rival forms, and in two factors of lower rank.

Written for devices whose libraries are tuned for images, or have no five-axis tensors at all. The forms are those of
"3D convolution with 4D/3D tensors" (arXiv 2407.16514), known to us from summaries: what stands here is our reading.
Of the exact forms, "exact-sum" adds a 2-D convolution for each tap in time, "exact-chan" puts the frames that a
window sees side by side as channels, "exact-shift" makes the maps of all taps at once and adds them shifted in time.
"2plus1" and "1plus2" are the SVD of the kernel between space and time, with frames or positions first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import fx, nn

from lrcompile.graph.graph import Graph, Site, owners, shape
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.passes import Context, Pass, Stage
from lrcompile.planning.decompose import Spectrum
from lrcompile_passes.frames import (
    Taps,
    Writer,
    frame_conv,
    looks_at_one_position,
    source,
    spatial_options,
    time_options,
)
from lrcompile_passes.layers import cannot_decompose, conv

Modules = list[nn.Module]
Write = Callable[[Writer, list[str], Any], None]


@dataclass(frozen=True)
class FactorizeConv3d(Pass):
    """Conv3d(W)x → Σ_t Conv2d(W_t)x_t, or Conv2d(V) ; Conv1d(U) with W ≈ U·V.

    `parallel` adds "add" and "cat": a spatial and a temporal convolution side by side, added, or joined by a 1×1
    convolution. Of the kernel they keep its central frame and central column, which is their least-squares fit, so
    the model needs training afterwards. Both start as the same function; "cat" has more to learn with.
    """

    stage = Stage.FACTORIZE
    parallel: bool = False

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite | Refusal]:
        """Every form that fits the site; the factors at every rank that saves both weights and multiply-adds."""
        owner_map = owners(graph)
        for site in graph.modules_of(nn.Conv3d, nn.ConvTranspose3d):
            reason = _cannot_fold(graph, site) or cannot_decompose(graph, site, owner_map)
            if reason:
                yield site.refuse(reason)
                continue
            yield from (site.rewrite(exact=True, form=form) for form in _exact_forms(site.module))
            yield from _factors(site, context)
            if self.parallel and _is_centered(site.module):
                yield from (site.rewrite(form=form, error=partial(_outside_cross, site)) for form in ("add", "cat"))

    def remark(self, rewrite: Rewrite) -> str:
        """That the parallel branches leave out most of a kernel."""
        return "needs training: most of the kernel is left out" if rewrite.params["form"] in ("add", "cat") else ""

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        """Puts the 2-D layers under the site's path, and the nodes of the form in the place of each call."""
        site = rewriter.site()
        make, write = _FORMS[rewrite.params["form"]]  # type: ignore[index]
        paths = rewriter.put_modules(site, make(site, rewriter.context, rewrite.params))
        for node in site.nodes:
            write(Writer(rewriter, node), paths, site.module)


def _cannot_fold(graph: Graph, site: Site) -> str | None:
    module: Any = site.module
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode}"
    if any(len(shape(source(node))) != 5 for node in site.nodes):
        return "input has no batch axis"
    if isinstance(module, nn.ConvTranspose3d):
        taps, stride, dilation = module.kernel_size[0], module.stride[0], module.dilation[0]
        if len({tap * dilation % stride for tap in range(taps)}) < stride:
            return f"taps in time are sparser than the stride of {stride}: some frames are bias alone"
    for node in site.nodes:
        sizes = source(node).meta.get("sizes") or node.meta.get("sizes")
        known = [sizes] if sizes else [n.meta["sizes"] for n in graph.nodes if "sizes" in n.meta]
        for axes in known:
            if not all(size.isdigit() for size in axes[1:]):
                return f"sizes other than the batch are open: {'×'.join(axes)}"
    return None


def _exact_forms(module: Any) -> Iterator[str]:
    if looks_at_one_position(module) and not isinstance(module, nn.ConvTranspose3d):
        yield "columns"
    yield from ("exact-sum", "exact-chan", "exact-shift") if module.kernel_size[0] > 1 else ("frames",)


def _factors(site: Site, context: Context) -> Iterator[Rewrite]:
    """The two orders of the factors of a kernel that has both a spatial and a temporal extent."""
    module: Any = site.module
    taps, cells = module.kernel_size[0], prod(module.kernel_size[1:])
    if isinstance(module, nn.ConvTranspose3d) or module.groups > 1 or taps == 1 or cells == 1:
        return
    into, out = module.in_channels, module.out_channels
    frames, *area = shape(site.input)[2:]
    frames_after, *area_after = shape(site.nodes[0])[2:]
    weights, after = into * out * taps * cells, frames_after * prod(area_after)
    work = {
        "2plus1": (into * cells + out * taps, into * cells * frames * prod(area_after) + out * taps * after),
        "1plus2": (into * taps + out * cells, into * taps * frames_after * prod(area) + out * cells * after),
    }
    for form, (held, done) in work.items():
        for rank in context.ranks(below=ceil(min(weights / held, weights * after / done))):
            yield site.rewrite(form=form, rank=rank, error=partial(_split_error, site, context, form, rank))


def _split_error(site: Site, context: Context, form: str, rank: int) -> float:
    return _split(site, context, form).tail(rank)


def _split(site: Site, context: Context, form: str) -> Spectrum:
    """The SVD of the kernel as [(S, time) × (C, space)] for "2plus1", as [(S, space) × (C, time)] for "1plus2"."""
    return context.separable(site, (1, 2) if form == "2plus1" else (0,))


def _is_centered(module: Any) -> bool:
    """Whether a kernel has a central frame and a central position, which lies on the output's."""
    taps, *cells = module.kernel_size
    if isinstance(module, nn.ConvTranspose3d) or module.groups > 1 or taps == 1 or prod(cells) == 1:
        return False
    spans = [dilation * (size - 1) for dilation, size in zip(module.dilation[1:], cells, strict=True)]
    named = {"same": spans, "valid": [0, 0]}
    doubled = named[module.padding] if isinstance(module.padding, str) else [2 * p for p in module.padding[1:]]
    return all(size % 2 for size in cells) and spans == doubled


def _outside_cross(site: Site) -> float:
    """What the central frame and the central column leave of a kernel, relative to it."""
    weight: Any = site.module.weight
    outside = weight.detach().double().clone()
    _, _, taps, high, wide = weight.shape
    outside[:, :, taps // 2] = 0
    outside[:, :, :, high // 2, wide // 2] = 0
    return float(outside.norm() / weight.detach().double().norm().clamp_min(1e-300))


def _parallel_layers(site: Site, context: Context, params: Mapping[str, Any]) -> Modules:
    """A spatial and a temporal layer, and for "cat" one that adds their maps; the cell of both is in the spatial."""
    module: Any = site.module
    weight, bias = context.constant(module.weight), module.bias
    out, _, taps, high, wide = weight.shape
    middle, column = taps // 2, weight[:, :, :, high // 2, wide // 2]
    rest = [column[:, :, :middle], torch.zeros_like(column[:, :, :1]), column[:, :, middle + 1 :]]
    temporal = conv(module, torch.cat(rest, 2).unsqueeze(3), **time_options(module))
    spatial = weight[:, :, middle].contiguous()
    if params["form"] == "add":
        return [conv(module, spatial, bias, **spatial_options(module)), temporal]
    one = torch.eye(out, dtype=weight.dtype, device=weight.device)
    both = torch.cat([one, one], 1)[:, :, None, None]
    return [conv(module, spatial, **spatial_options(module)), temporal, conv(module, both, bias)]


def _column_layer(site: Site, context: Context, params: Mapping[str, Any]) -> Modules:
    """A kernel without extent in space, on [B × C × T × HW]."""
    module: Any = site.module
    weight = context.constant(module.weight).flatten(3)
    return [conv(module, weight, module.bias, groups=module.groups, **time_options(module))]


def _tap_layers(site: Site, context: Context, params: Mapping[str, Any]) -> Modules:
    """A layer a tap; the first of each phase has the bias."""
    module: Any = site.module
    weight, first = context.constant(module.weight), _first_taps(site)
    return [frame_conv(module, weight[:, :, j], module.bias if j in first else None) for j in range(weight.shape[2])]


def _channel_layers(site: Site, context: Context, params: Mapping[str, Any]) -> Modules:
    """A layer a phase, its input channels [groups × taps × C/groups]."""
    module: Any = site.module
    weight, layers = context.constant(module.weight), []
    for phase in Taps.of(module, site.nodes[0]).phases:
        kernel = weight[:, :, [tap for tap, _ in phase]]
        if isinstance(module, nn.ConvTranspose3d):
            kernel = kernel.unflatten(0, (module.groups, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 2)
        else:
            kernel = kernel.transpose(1, 2).flatten(1, 2)
        layers.append(frame_conv(module, kernel, module.bias))
    return list(layers)


def _map_layer(site: Site, context: Context, params: Mapping[str, Any]) -> Modules:
    """One layer, its output channels [groups × taps × S/groups]; each output frame sums one map with a bias."""
    module: Any = site.module
    weight, first = context.constant(module.weight), _first_taps(site)
    taps, bias = weight.shape[2], None
    if isinstance(module, nn.ConvTranspose3d):
        kernel = weight.transpose(1, 2).flatten(1, 2)
    else:
        kernel = weight.unflatten(0, (module.groups, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 2)
    if module.bias is not None:
        own = context.constant(module.bias).unflatten(0, (module.groups, 1, -1))
        bias = torch.cat([own if tap in first else torch.zeros_like(own) for tap in range(taps)], 1).flatten()
    return [frame_conv(module, kernel, bias)]


def _first_taps(site: Site) -> set[int]:
    return {phase[0][0] for phase in Taps.of(site.module, site.nodes[0]).phases}


def _factor_layers(site: Site, context: Context, params: Mapping[str, Any]) -> Modules:
    """The two factors in the order in which they run; the second has the bias."""
    module: Any = site.module
    taps, *cells = module.kernel_size
    spatial_first = params["form"] == "2plus1"
    up, down = _split(site, context, params["form"]).factors(params["rank"])
    onto = (taps, 1) if spatial_first else cells
    first = down.unflatten(1, (module.in_channels, *(cells if spatial_first else (taps, 1))))
    last = up.unflatten(0, (module.out_channels, -1)).transpose(1, 2).unflatten(2, onto).contiguous()
    options = [spatial_options(module), time_options(module)]
    return [
        conv(module, first, **options[0 if spatial_first else 1]),
        conv(module, last, module.bias, **options[1 if spatial_first else 0]),
    ]


def _write_columns(w: Writer, paths: list[str], module: Any) -> None:
    w.finish(w.call(paths[0], w.flat(source(w.before))))


def _write_sum(w: Writer, paths: list[str], module: Any) -> None:
    taps, frames = _padded(w, module)
    phases = []
    for phase in taps.phases:
        maps = [w.call(paths[tap], _images(w, w.take(frames, 1, first, taps.count, taps.step))) for tap, first in phase]
        phases.append(w.clips(w.add(maps), taps.count))
    _write_phases(w, taps, phases)


def _write_channels(w: Writer, paths: list[str], module: Any) -> None:
    taps, frames = _padded(w, module)
    axis = 2
    if module.groups > 1:  # the frames of a window go side by side within each group
        _, count, channels, area = shape(frames)
        frames, axis = w.reshape(w.copy(frames), count, module.groups, channels // module.groups * area), 3
    phases = []
    for path, phase in zip(paths, taps.phases, strict=True):
        reads = [w.take(frames, 1, first, taps.count, taps.step) for _, first in phase]
        window = w.cat(reads, axis) if len(reads) > 1 else w.copy(reads[0])
        images = w.reshape(window, len(phase) * module.in_channels, *shape(source(w.before))[3:])
        phases.append(w.clips(w.call(path, images), taps.count))
    _write_phases(w, taps, phases)


def _write_shift(w: Writer, paths: list[str], module: Any) -> None:
    taps, frames = _padded(w, module)
    maps = w.call(paths[0], _images(w, frames))
    _, _, *area = shape(maps)
    count, channels = sum(map(len, taps.phases)), module.out_channels
    by_group = w.reshape(maps, shape(frames)[1], module.groups, count * channels // module.groups * prod(area))
    by_tap = w.split(by_group, 3, count)
    phases = []
    for phase in taps.phases:
        total = w.add([w.take(by_tap[tap], 1, first, taps.count, taps.step) for tap, first in phase])
        phases.append(w.reshape(total, taps.count, channels, prod(area)))
    _write_phases(w, taps, phases)


def _write_space_first(w: Writer, paths: list[str], module: Any) -> None:
    """The first factor has no bias: zeros that pad its output in time are what frames of zeros would give."""
    frames = w.turn(w.flat(source(w.before)))
    middle = w.clips(w.call(paths[0], _images(w, frames)), shape(frames)[1])
    w.finish(w.call(paths[1], w.copy(w.turn(middle))))


def _write_time_first(w: Writer, paths: list[str], module: Any) -> None:
    frames = w.turn(w.call(paths[0], w.flat(source(w.before))))
    after = w.clips(w.call(paths[1], _images(w, frames)), shape(frames)[1])
    w.finish(w.copy(w.turn(after)))


def _write_parallel(w: Writer, paths: list[str], module: Any) -> None:
    taps, frames = _padded(w, module)
    _, first = taps.phases[0][module.kernel_size[0] // 2]
    images = _images(w, w.take(frames, 1, first, taps.count, taps.step))
    space = w.copy(w.turn(w.clips(w.call(paths[0], images), taps.count)))
    under = source(w.before)
    for axis in (3, 4):  # the positions under the middle of each window
        under = w.take(under, axis, 0, shape(w.before)[axis], module.stride[axis - 2])
    time = w.call(paths[1], w.flat(under))
    w.finish(w.add([space, time]) if len(paths) == 2 else w.call(paths[2], w.cat([space, time], 1)))


def _padded(w: Writer, module: Any) -> tuple[Taps, fx.Node]:
    """What the taps read, and the frames with zeros at both ends, [B × T × C × HW]."""
    taps = Taps.of(module, w.before)
    return taps, w.turn(w.pad_frames(w.flat(source(w.before)), taps.before, taps.after))


def _images(w: Writer, frames: fx.Node) -> fx.Node:
    """[B × T × C × HW] → [BT × C × H × W], of the size that the call reads."""
    return w.reshape(w.copy(frames), shape(frames)[2], *shape(source(w.before))[3:])


def _write_phases(w: Writer, taps: Taps, phases: list[fx.Node]) -> None:
    """Puts the phases' outputs [B × T/phases × S × HW] one after the other, frame by frame."""
    frames = w.cat(phases, 2)
    if len(phases) > 1:
        _, count, channels, area = shape(phases[0])
        frames = w.reshape(frames, count * len(phases), channels, area)
    w.finish(w.copy(w.turn(w.take(frames, 1, 0, shape(w.before)[2]))))


_FORMS: Mapping[str, tuple[Callable[..., Modules], Write]] = {
    "frames": (_tap_layers, _write_sum),
    "columns": (_column_layer, _write_columns),
    "exact-sum": (_tap_layers, _write_sum),
    "exact-chan": (_channel_layers, _write_channels),
    "exact-shift": (_map_layer, _write_shift),
    "2plus1": (_factor_layers, _write_space_first),
    "1plus2": (_factor_layers, _write_time_first),
    "add": (_parallel_layers, _write_parallel),
    "cat": (_parallel_layers, _write_parallel),
}
