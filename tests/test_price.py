"""Pricing by trial: how much of the graph is tried, and what follows what."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from lrcompile_passes import PASSES, GroupHeads, LowRankLinear, MergeSiblings
from torch import Tensor, fx, nn

from lrcompile.devices.analytic import AnalyticCostModel
from lrcompile.devices.cost import Cost
from lrcompile.devices.profile import load_device
from lrcompile.frontend.trace import trace
from lrcompile.graph.op import OpDesc
from lrcompile.passes import Context
from lrcompile.planning.price import SIBLINGS, price
from tests import panel

V100 = load_device("v100")


class Readers(nn.Module):
    """Layers of several widths that read one value."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256 + 8 * i) for i in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.relu(layer(x)) for layer in self.layers)


@dataclass
class Counting:
    """A cost model that counts the nodes of the graphs that it compares."""

    model: AnalyticCostModel = field(default_factory=lambda: AnalyticCostModel(V100))
    kind: str = "analytic"
    nodes: int = 0

    def cost(self, op: OpDesc) -> Cost:
        return self.model.cost(op)

    def compare(self, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Cost, Cost]:
        self.nodes += len(before.graph.nodes)
        return self.model.compare(before, after)


def test_pricing_grows_with_the_number_of_layers_that_read_one_value() -> None:
    passes, nodes = (LowRankLinear(), *(p for p in PASSES if p.stage is MergeSiblings.stage)), []
    for count in (12, 24):
        model = Counting()
        price(trace(Readers(count).eval(), (torch.randn(64, 256),)).graph, passes, Context(V100), model)
        nodes.append(model.nodes)
    assert nodes[1] < 2.6 * nodes[0]


def test_a_split_is_tried_with_its_nearest_siblings() -> None:
    graph = trace(Readers(12).eval(), (torch.randn(64, 256),)).graph
    found = price(graph, (LowRankLinear(), MergeSiblings()), Context(V100), AnalyticCostModel(V100)).candidates
    merges = {
        candidate.rewrites[1].site
        for candidate in found
        if len(candidate.rewrites) == 2 and candidate.rewrites[0].site == ("layers.6",)
    }
    around = range(6 - SIBLINGS, 7 + SIBLINGS)
    assert merges == {tuple("layers.6.0" if i == 6 else f"layers.{i}" for i in around)}


def test_layers_whose_heads_were_grouped_are_merged() -> None:
    model, args, kwargs = panel.PANEL["bert"]()
    graph = trace(model.eval(), args, kwargs).graph
    found = price(graph, (GroupHeads(), MergeSiblings()), Context(V100), AnalyticCostModel(V100)).candidates
    pairs = [c for c in found if [r.pass_name for r in c.rewrites] == ["group-heads", "merge-siblings"]]
    alone = {str(c.rewrites[0]): c for c in found if len(c.rewrites) == 1}
    assert any("attention.output.dense" not in str(pair.rewrites[0]) for pair in pairs)
    assert all(pair.gain.latency_s > alone[str(pair.rewrites[0])].gain.latency_s for pair in pairs)
