from __future__ import annotations

import pytest
import torch
from lrcompile_passes import LowRankEmbedding
from torch import nn

from lrcompile.graph.graph import Graph
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context
from tests.passes import common

PASS = LowRankEmbedding()


class Net(nn.Module):
    def __init__(self, padding: int | None = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32, padding_idx=padding)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.words(index)


def skewed() -> torch.Tensor:
    index = torch.randint(1, 10, (50, 8))
    index[:, 0] = torch.arange(50) + 40
    return index


def test_golden() -> None:
    torch.manual_seed(0)
    model, index = Net().double(), torch.randint(0, 100, (4, 6))
    graph = common.exported(model, index)
    found = common.rewrites(graph, PASS)
    assert [r.params["rank"] for r in found] == [8, 16, 24]
    result = common.applied(graph, PASS, found[0])
    assert common.text(result) == (
        "index = placeholder index()\n"
        "words_0 = call_module words.0(index)\n"
        "words_1 = call_module words.1(words_0)\n"
        "output = output output((words_1,))"
    )
    assert common.layers(result) == {
        "words.0": "Embedding(100, 8, padding_idx=0)",
        "words.1": "Linear(in_features=8, out_features=32, bias=False)",
    }
    padding = common.outputs(result, torch.zeros(1, 1, dtype=torch.int64))[0]
    assert torch.count_nonzero(padding) == 0
    full = common.applied(graph, PASS, Rewrite(PASS.name, ("words",), {"rank": 32}))
    assert common.on_other_batch(full, model, (index,), (torch.arange(100).view(10, 10)[:, :6],)) < 1e-10


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(100, 32), (20, 32)])
def test_full_rank_is_the_identity(calibrated: bool, rows: int, width: int) -> None:
    torch.manual_seed(1)
    index = torch.randint(0, rows // 2, (4, 6))
    graph = common.drawn(nn.Sequential(nn.Embedding(rows, width)).double(), index)
    ctx = common.context(graph, (index,)) if calibrated else common.context()
    result = common.applied(graph, PASS, Rewrite(PASS.name, ("0",), {"rank": min(rows, width)}), ctx)
    assert common.difference(result, graph, torch.arange(rows)) < 1e-10


def test_counts_weigh_the_rows_that_are_used() -> None:
    torch.manual_seed(2)
    index = skewed()
    graph = common.drawn(Net().double(), index)
    exact_counts = LowRankEmbedding(smoothing=0.0)
    ctx = common.context(graph, (index,))
    plain = common.rewrites(graph, PASS)[0]
    for transform in (PASS, exact_counts):
        rewrite = common.rewrites(graph, transform, ctx)[0]
        measured = common.difference(common.applied(graph, transform, rewrite, ctx), graph, index)
        assert measured < common.difference(common.applied(graph, PASS, plain), graph, index)
    assert measured == pytest.approx(rewrite.error, rel=1e-6)


def test_without_counts_error_is_that_of_the_table() -> None:
    graph = common.drawn(Net(padding=None).double(), torch.arange(100))
    for rewrite in common.rewrites(graph, PASS):
        measured = common.difference(common.applied(graph, PASS, rewrite), graph, torch.arange(100))
        assert measured == pytest.approx(rewrite.error, rel=1e-8)


def counted(make: type[nn.Module]) -> tuple[torch.Tensor, Graph, Context, torch.Tensor]:
    """(indices, a graph on them, calibrated with them, how often each row of its words is looked up)."""
    torch.manual_seed(3)
    index = skewed()
    graph = common.drawn(make().double(), index)
    ctx = common.context(graph, (index,))
    counts = ctx.lookups(graph.site("words"))
    assert counts is not None
    return index, graph, ctx, counts


def test_module_called_twice_counts_both() -> None:
    class Twice(Net):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.words(index) + self.words(99 - index)

    index, graph, ctx, counts = counted(Twice)
    assert int(counts.sum()) == 2 * index.numel()
    result = common.applied(graph, PASS, common.rewrites(graph, PASS, ctx)[0], ctx)
    assert len(result.site("words.0").nodes) == 2


def test_called_twice_and_one_index_looked_up_in_a_longer_table_too() -> None:
    class Longer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.others = nn.Embedding(150, self.words.embedding_dim)

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.words(index) + self.words(99 - index) + self.others(index)

    index, graph, ctx, counts = counted(Longer)
    assert len(counts) == 100
    assert int(counts.sum()) == 2 * index.numel()
    common.applied(graph, PASS, common.rewrites(graph, PASS, ctx)[0], ctx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    graph = common.drawn(Net().to(dtype), torch.arange(100))
    result = common.applied(graph, PASS, Rewrite(PASS.name, ("words",), {"rank": 32}))
    assert common.difference(result, graph, torch.arange(100)) < 0.02
    assert common.outputs(result, torch.tensor([1]))[0].dtype == dtype


def test_refusals() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 100, bias=False)
            self.head.weight = self.words.weight

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(index))

    def reason(module: nn.Module) -> str:
        return next(iter(common.refusals(common.drawn(module, torch.arange(4)), PASS).values()))

    assert reason(Tied()) == "weight tied with head"
    small = "too small: no rank of the device's step saves weights of 9×7"
    assert reason(nn.Sequential(nn.Embedding(9, 7))) == small
    by_frequency = nn.Sequential(nn.Embedding(90, 70, scale_grad_by_freq=True))
    assert reason(by_frequency) == "gradients by frequency or sparse gradients would be lost"
    endless = nn.Sequential(nn.Embedding(90, 70))
    with torch.no_grad():
        endless[0].weight[3] = -torch.inf
    assert reason(endless) == "weight holds values that are not finite"
    bounded = nn.Sequential(nn.Embedding(90, 70))
    graph = common.drawn(bounded, torch.arange(4))
    graph.gm.get_submodule("0").max_norm = 1.0
    assert common.refusals(graph, PASS) == {"0": "max_norm changes the table while it is read"}
