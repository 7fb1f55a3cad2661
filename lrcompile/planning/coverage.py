"""Whether calibration data say enough of what a layer reads: with fewer rows than features, a fit can be too good."""

from __future__ import annotations

import math
from collections.abc import Container

from torch import nn

from lrcompile.graph.graph import ALL_CONVS, Graph, feature_axis, shape
from lrcompile.planning.moments import Window


def short_of_rows(graph: Graph, paths: Container[str], times: float) -> dict[str, tuple[int, int]]:
    """(rows, features) of those linear and convolution layers that calibration data have fewer rows for, by path.

    `times` is how many times the samples of the example inputs the data have. What a layer is fitted to are the
    positions of its input, or the patches that its window sees of it.
    """
    found = {}
    for site in graph.modules_of(nn.Linear, *ALL_CONVS):
        if site.path not in paths:
            continue
        window = Window.of(site.module)
        if window is None:
            features = shape(site.input)[feature_axis(site.module)]
            read = [shape(node.args[0]) for node in site.nodes]  # type: ignore[arg-type]
            rows = sum(math.prod(sizes) // features for sizes in read)
        else:
            features = shape(site.input)[1] * window.taps
            rows = sum(math.prod(shape(node)) // shape(node)[1] for node in site.nodes)
        if rows * times < features:
            found[site.path] = int(rows * times), features
    return found
