"""The default: one 0/1 program over the whole model, in a closed loop with the measured error."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.planning.budget import Budget
from lrcompile.planning.search import Choice, Problem, search
from lrcompile.planning.strategies.strategy import Strategy


@dataclass(frozen=True)
class Milp(Strategy):
    """max Σ gain·x  s.t.  Σ error²·x ≤ limit², at most one candidate on a node; also joint and merged ones."""

    name = "milp"

    def search(self, problem: Problem, budget: Budget) -> Choice:
        """The best choice within the budget; see `lrcompile.planning.search`."""
        return search(problem, budget)
