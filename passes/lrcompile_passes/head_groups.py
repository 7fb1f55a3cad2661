"""Which heads of an attention share a projection, and what a shared projection starts from.

The forms are those of GQKVA (arXiv 2311.03426), which covers multi-query and grouped-query attention. The paper
trains from scratch and publishes no rule for a checkpoint: mean pooling is the practice of grouped-query attention
(arXiv 2305.13245), the order by similarity is our reading.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lrcompile.passes import Context
from lrcompile_passes.attention import ROLES, Attention, Projection, Role

Form = Literal["GQA", "GKVA", "GQKVA"]
INITS = ("mean", "first", "similar")
DIGITS = 9  # of distances that count: the order of heads must not hang on rounding


@dataclass(frozen=True)
class Grouping:
    """`queries` groups of query heads and `keys` groups of key and value heads.

    GQA: query heads share keys and values; with one group, MQA. GKVA: heads of keys and values share queries; with
    one group, MKVA. GQKVA: each of the queries·keys pairs is one head; head o reads queries o//keys, keys o mod keys.
    """

    form: Form
    queries: int
    keys: int

    @property
    def has_choice(self) -> bool:
        """Whether it matters which heads are together: not if all of them are."""
        return self.form == "GQKVA" or (self.keys if self.form == "GQA" else self.queries) > 1

    def groups(self, role: Role) -> int:
        """The number of heads that the projection computes afterwards."""
        return self.queries if role == "query" else self.keys

    def changes(self, role: Role) -> bool:
        """Whether the projection becomes narrower."""
        return self.form == "GQKVA" or (self.form == "GKVA") == (role == "query")

    def split(self, heads: Tensor, role: Role) -> tuple[Tensor, int]:
        """(heads as [rows × columns × …], the axis along which they share) for heads [n × …] of a projection."""
        if self.form == "GQKVA":
            return heads.unflatten(0, (self.queries, self.keys)), 1 if role == "query" else 0
        return heads.unflatten(0, (self.groups(role), -1)), 1


def groupings(attention: Attention) -> list[Grouping]:
    """Every grouping of an attention: of one with a projection for each head all forms, of a grouped one coarser ones.

    GQKVA is proposed for proper grids only: with one row or column it is MQA or MKVA.
    """
    heads, queries, keys = attention.heads, attention.query.heads, attention.key.heads
    found = [Grouping("GQA", queries, groups) for groups in _divisors(keys)] if queries == heads else []
    if keys == heads:
        found += [Grouping("GKVA", groups, keys) for groups in _divisors(queries)]
    if queries == keys == heads:
        found += [Grouping("GQKVA", groups, heads // groups) for groups in _divisors(heads) if groups > 1]
    return found


def unusual(attention: Attention) -> str | None:
    """Why the heads of an attention cannot be grouped, or None: they must share in runs of equal length."""
    for role, part in zip(ROLES, (attention.query, attention.key, attention.value), strict=True):
        run = attention.heads // part.heads
        if part.reads != tuple(o // run for o in range(attention.heads)):
            return f"heads share {role} projections in an unusual order"
    if attention.key.heads != attention.value.heads:
        return "keys and values are grouped differently"
    if attention.query.heads < attention.heads and attention.key.heads < attention.heads:
        return "queries and keys are grouped already"
    return None if groupings(attention) else "its keys and values are one group already"


def shared(part: Projection, heads: Tensor, grouping: Grouping, role: Role, init: str, order: Sequence[int]) -> Tensor:
    """The projection afterwards [groups × …] from heads [n × …], weights or biases, that `part` computes.

    `order` are the old heads of the attention in their new order.
    """
    heads = _ordered(part, heads, order)
    if not grouping.changes(role):
        return heads
    grid, axis = grouping.split(heads, role)
    if init == "first":
        return grid.select(axis, 0)
    wide = grid.double() if heads.dtype == torch.float64 else grid.float()
    return wide.mean(axis).to(heads.dtype)


def error(attention: Attention, grouping: Grouping, init: str, context: Context) -> float:
    """‖ΔW X‖/‖W X‖ over the weights of q, k and v together, X being the calibration inputs, or as white noise."""
    products = [inner(part, role, context) for role, part in zip(ROLES, attention.parts, strict=True)]
    order = similar_order(attention, grouping, context) if init == "similar" else range(attention.heads)
    lost = sum(
        _lost(_ordered(part, _ordered(part, product, order).T, order), grouping, role, init)
        for role, part, product in zip(ROLES, attention.parts, products, strict=True)
        if grouping.changes(role)
    )
    total = sum(float(product.trace()) for product in products)
    return math.sqrt(max(0.0, lost) / total) if total > 0 else 0.0


def inner(part: Projection, role: Role, context: Context) -> Tensor:
    """Inner products [heads × heads] of the outputs of a projection's heads, in float64.

    A bias counts like the weight of one more input feature, as large as the others are on average.
    """
    return context.once(part.site, f"heads of {role}", lambda: _inner(part, context))


def _inner(part: Projection, context: Context) -> Tensor:
    module: Any = part.site.module
    weight = module.weight.detach()[part.rows.flatten()].double()
    gram = context.input_gram(part.site)
    weighted = weight if gram is None else weight @ gram
    products = weighted.unflatten(0, part.rows.shape).flatten(1) @ weight.unflatten(0, part.rows.shape).flatten(1).T
    if module.bias is not None:
        bias = module.bias.detach()[part.rows].double()
        products = products + bias @ bias.T * (1.0 if gram is None else float(gram.trace()) / len(gram))
    return (products + products.T) / 2


def _lost(products: Tensor, grouping: Grouping, role: Role, init: str) -> float:
    """The squared error of sharing, from inner products of the heads."""
    grid, axis = grouping.split(torch.arange(len(products)), role)
    lost = 0.0
    for members in grid.unbind(1 - axis):
        block = products[members][:, members]
        norms = block.diagonal()
        if init == "first":
            lost += float((norms + norms[0] - 2 * block[0]).sum())
        else:
            lost += float(norms.sum() - block.sum() / len(members))
    return lost


def similar_order(attention: Attention, grouping: Grouping, context: Context) -> list[int]:
    """The old heads in an order that puts similar ones into one group, unless they are better as they are."""
    queries = _distances(inner(attention.query, "query", context))
    keys = _distances(inner(attention.key, "key", context)) + _distances(inner(attention.value, "value", context))
    if grouping.form == "GQKVA":
        return _similar_grid(queries, keys, grouping)
    part, distances = (attention.query, queries) if grouping.form == "GKVA" else (attention.key, keys)
    groups = grouping.queries if grouping.form == "GKVA" else grouping.keys
    size = part.heads // groups
    found = list(itertools.chain(*_clusters(distances, size)))

    def cost(order: Sequence[int]) -> float:
        return float(sum(distances[np.ix_(run, run)].sum() for run in np.array(order).reshape(groups, size)))

    best = min((list(range(part.heads)), found), key=cost)
    run = attention.heads // part.heads
    return [head * run + i for head in best for i in range(run)]


def _similar_grid(queries: np.ndarray, keys: np.ndarray, grouping: Grouping) -> list[int]:
    """Heads row by row: rows of similar queries, and within them columns of similar keys and values."""
    rows = [list(row) for row in _clusters(queries, grouping.keys)]
    columns: list[list[int]] = [[head] for head in rows[0]]
    for row in rows[1:]:
        far = [[keys[head, column].sum() for column in columns] for head in row]
        for head, column in zip(*linear_sum_assignment(far), strict=True):
            columns[column].append(row[head])
    found = [column[i] for i in range(grouping.queries) for column in columns]

    def cost(order: Sequence[int]) -> float:
        grid = np.array(order).reshape(grouping.queries, grouping.keys)
        return sum(queries[np.ix_(row, row)].sum() for row in grid) / grouping.keys + (
            sum(keys[np.ix_(column, column)].sum() for column in grid.T) / grouping.queries
        )

    return min((list(range(len(queries))), found), key=cost)


def _clusters(distances: np.ndarray, size: int) -> list[tuple[int, ...]]:
    """Groups of `size`, each grown from the nearest two that are left; the lowest numbers first where it is a tie."""
    left = list(range(len(distances)))
    found = []
    while left:
        pairs = ((float(distances[a, b]), a, b) for a, b in itertools.combinations(left, 2))
        group = [left[0]] if size == 1 else list(min(pairs)[1:])
        while len(group) < size:
            rest = [head for head in left if head not in group]
            group.append(min(rest, key=lambda head: (distances[head, group].sum(), head)))
        found.append(tuple(sorted(group)))
        left = [head for head in left if head not in group]
    return sorted(found)


def _distances(products: Tensor) -> np.ndarray:
    """Squared distances [heads × heads], rounded relative to the largest norm."""
    norms = products.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * products).clamp(min=0.0)
    unit = float(norms.max()) or 1.0
    return np.asarray((squared / unit).numpy().round(DIGITS) * unit)


def _ordered(part: Projection, heads: Tensor, order: Sequence[int]) -> Tensor:
    """A projection's heads [n × …] as the attention's heads in their new order read them."""
    reads = list(dict.fromkeys(part.reads[o] for o in order))
    if reads == list(range(len(reads))):
        return heads
    return heads.index_select(0, torch.tensor(reads, device=heads.device))


def _divisors(count: int) -> list[int]:
    return [d for d in range(1, count) if count % d == 0]
