"""Passes after one another on three models: what they do together must be what the model did.

Weights are such that lossy passes have rewrites without error, so that in double precision nothing may change.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from lrcompile_passes import PASSES
from torch import Tensor, fx

from lrcompile.devices.profile import load_device
from lrcompile.graph.graph import Graph
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import Context, Pass, Stage, apply
from tests.passes import common
from tests.passes.pair_models import MODELS, inputs, make

ALL: dict[str, Pass] = {
    p.name: replace(p, through="drop") if p.name == "merge-pointwise" else p for p in PASSES  # type: ignore[call-arg]
}  # fmt: skip
CONTEXT = Context(load_device("rpi5"), "fp64")
BATCHES = (2, 3)
NO_ERROR = 1e-6  # predicted, which is the root of a difference of squares
MOST_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Step:
    """A graph after some passes, the modules and nodes that they made, and whether all of it is exact."""

    graph: Graph
    rewrites: tuple[Rewrite, ...] = ()
    made: frozenset[str] = frozenset()
    exact: bool = True


@cache
def expected(name: str, batch: int) -> Tensor:
    with torch.no_grad():
        return make(name)(*inputs(name, batch))


@cache
def after(name: str, *passes: str) -> Step:
    """A model after passes, checked after each."""
    if not passes:
        return Step(common.exported(make(name), *inputs(name, BATCHES[0])))
    before, transform = after(name, *passes[:-1]), ALL[passes[-1]]
    result = before
    for _ in range(MOST_ROUNDS if transform.stage is Stage.CANONICALIZE else 1):
        chosen = list(choices(result.graph, transform, turn=sum(map(len, passes))))
        if not chosen:
            break
        result = done(result, transform, chosen)
    if result is not before:
        check(name, result)
    return result


def done(before: Step, transform: Pass, rewrites: list[Rewrite]) -> Step:
    """The graph with rewrites; a trial on one without values must come to the same."""
    graph, trial = before.graph.copy(), before.graph.copy()
    on_trial = CONTEXT.on_trial(graph.fake_mode)
    for rewrite in rewrites:
        apply(graph, transform, rewrite, CONTEXT)
        apply(trial, transform, rewrite, on_trial)
    assert common.text(trial) == common.text(graph)
    assert common.layers(trial) == common.layers(graph)
    assert common.sizes(trial) == common.sizes(graph)
    names = {node.name for node in before.graph.nodes}
    modules = {path: site.module for path, site in before.graph.sites().items()}
    made = {node.name for node in graph.nodes if node.name not in names}
    made |= {path for path, site in graph.sites().items() if modules.get(path) is not site.module}
    exact = before.exact and all(rewrite.exact for rewrite in rewrites)
    return Step(graph, (*before.rewrites, *rewrites), before.made | made, exact)


def proposed(graph: Graph, transform: Pass) -> list[Rewrite]:
    """The rewrites without an error."""
    found = common.rewrites(graph, transform, CONTEXT)
    return [rewrite for rewrite in found if rewrite.exact or error(graph, rewrite) < NO_ERROR]


def error(graph: Graph, rewrite: Rewrite) -> float:
    """That of the weights: what an activation that is dropped does is only guessed by the pass."""
    if rewrite.pass_name != "merge-pointwise":
        return rewrite.error
    ranks: Any = (rewrite.params["rank_out"], rewrite.params["rank_in"])
    return CONTEXT.tucker(graph.site(rewrite.site[0])).tail(*ranks)


def choices(graph: Graph, transform: Pass, turn: int) -> Iterator[Rewrite]:
    """All that a canonical pass proposes; of another at most one rewrite a site, its kinds taken in turn.

    One site in three is left as it is, so that a later pass meets both.
    """
    if transform.stage is Stage.CANONICALIZE:
        yield from proposed(graph, transform)
        return
    kinds: dict[str, dict[str, Rewrite]] = {}
    for rewrite in proposed(graph, transform):
        words = " ".join(value for value in rewrite.params.values() if isinstance(value, str))
        kinds.setdefault(rewrite.site[0], {}).setdefault(f"{words} {len(rewrite.site)}", rewrite)
    taken: set[str] = set()
    for i, of_site in enumerate(kinds.values(), turn):
        rewrite = list(of_site.values())[i % len(of_site)]
        if taken.isdisjoint(rewrite.site) and (len(kinds) < 3 or i % 3 != 2):
            taken.update(rewrite.site)
            yield rewrite


def check(name: str, step: Step) -> None:
    """The outputs at two batch sizes, and the shape and type of every value."""
    step.graph.gm.graph.lint()
    for batch in BATCHES:
        interpreter = fx.Interpreter(step.graph.gm, garbage_collect_values=False)
        with torch.no_grad():
            (got,) = interpreter.run(*inputs(name, batch), enable_io_processing=False)
        limit = 1e-10 if step.exact else 1e-8
        assert common.relative(got, expected(name, batch)) <= limit, list(map(str, step.rewrites))
        if batch == BATCHES[0]:
            real = {node: value for node, value in interpreter.env.items() if node.op != "output"}
            assert {n: kind(v) for n, v in real.items()} == {n: kind(n.meta["val"]) for n in real}


def kind(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [kind(item) for item in value]
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


AGAIN: dict[str, str] = {
    "fold-batch-norm": "low-rank-linear low-rank-conv factorize-conv3d branch-tucker merge-pointwise compose-linear",
    "fold-affine": "fold-batch-norm fold-layer-norm low-rank-linear group-heads merge-siblings",
    "fold-layer-norm": "fold-affine low-rank-linear group-heads merge-siblings",
    "low-rank-linear": "fold-batch-norm fold-affine fold-layer-norm group-heads merge-siblings compose-linear",
    "low-rank-conv": "fold-batch-norm fold-affine factorize-conv3d merge-pointwise merge-siblings compose-linear",
    "factorize-conv3d": "low-rank-conv",
    "branch-tucker": "fold-batch-norm fold-affine factorize-conv3d compose-linear",
    "merge-pointwise": "fold-batch-norm factorize-conv3d compose-linear",
    "low-rank-embedding": "compose-linear",
    "group-heads": "fold-affine fold-layer-norm low-rank-linear merge-siblings",
    "merge-siblings": "fold-layer-norm low-rank-conv factorize-conv3d group-heads",
    "compose-linear": "fold-batch-norm low-rank-linear low-rank-conv factorize-conv3d",
}
"""Passes that rewrite again what a pass made."""


@pytest.mark.parametrize("first", ALL)
def test_every_pass_after_every_other(first: str) -> None:
    both, again = set(), set()
    for name, second in itertools.product(MODELS, ALL):
        one, two = after(name, first), after(name, first, second)
        if one.rewrites and two is not one:
            both.add(second)
            new = two.rewrites[len(one.rewrites) :]
            again |= {second} if any(not one.made.isdisjoint(rewrite.site) for rewrite in new) else set()
    assert both >= set(ALL) - {first}
    assert again >= set(AGAIN.get(first, "").split())


CHAINS = [
    ("image", "fold-batch-norm fold-affine low-rank-conv compose-linear merge-siblings"),
    ("image", "fold-batch-norm merge-pointwise low-rank-conv compose-linear"),
    ("image", "fold-batch-norm compose-linear low-rank-linear compose-linear"),
    ("image", "branch-tucker compose-linear fold-batch-norm"),
    ("image", "low-rank-conv merge-siblings low-rank-conv compose-linear"),
    ("text", "fold-affine fold-layer-norm group-heads merge-siblings"),
    ("text", "fold-affine fold-layer-norm low-rank-linear merge-siblings"),
    ("text", "fold-layer-norm merge-siblings group-heads"),
    ("text", "low-rank-embedding compose-linear"),
    ("video", "fold-batch-norm factorize-conv3d low-rank-conv compose-linear"),
    ("video", "merge-pointwise factorize-conv3d branch-tucker"),
    ("video", "merge-siblings factorize-conv3d low-rank-conv"),
    ("video", "low-rank-conv factorize-conv3d fold-layout"),
]


@pytest.mark.parametrize(("name", "passes"), CHAINS)
def test_each_pass_of_a_chain_rewrites_what_the_others_made(name: str, passes: str) -> None:
    chain = passes.split()
    for i in range(2, len(chain) + 1):
        before, result = after(name, *chain[: i - 1]), after(name, *chain[:i])
        assert any(not before.made.isdisjoint(r.site) for r in result.rewrites[len(before.rewrites) :]), chain[i - 1]


def walk(name: str, seed: int) -> Step:
    """A model after rewrites drawn at random, one at a time, from passes drawn at random."""
    draw = random.Random(seed)
    step = after(name)
    for _ in range(draw.randint(10, 25)):
        transform = ALL[draw.choice(list(ALL))]
        found = proposed(step.graph, transform)
        if transform.name == "fold-affine":  # proposes chains, of which each step needs the one before it
            found = list({(r.site[0], r.params["layer"]): r for r in reversed(found)}.values())
        if found:
            step = done(step, transform, [draw.choice(found)])
            check(name, step)
    return step


@pytest.mark.parametrize("name", MODELS)
def test_rewrites_in_any_order(name: str) -> None:
    assert {r.pass_name for seed in range(3) for r in walk(name, seed).rewrites} >= {
        "fold-batch-norm",
        "merge-siblings",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_rewrites_in_any_order(name: str) -> None:
    done_by = {r.pass_name for seed in range(3, 60) for r in walk(name, seed).rewrites}
    assert len(done_by) >= 10
