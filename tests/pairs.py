"""The original and the rewritten model of a compile, side by side as a recovery sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrcompile import Graph, Result
from lrcompile.recovery.lineage import Lineage
from lrcompile.recovery.pair import Pair, pair


def pair_of(result: Result, probe: Sequence[Any], *, attention: bool = False) -> Pair:
    """The pair of a compile, made on flat inputs."""
    rewritten, lineage = Graph(result.model, result.traced.graph.fake_mode), Lineage.of(result.traced.graph)
    return pair(lineage.original, rewritten, probe, lineage.substitutes(rewritten), attention=attention)
