"""Strategies of the choice as rivals: one interface, the same priced candidates, the same measured error as judge."""

from __future__ import annotations

from lrcompile.planning.budget import Budget
from lrcompile.planning.search import Choice, Problem
from lrcompile.planning.strategies.beam import Beam
from lrcompile.planning.strategies.energy import Energy
from lrcompile.planning.strategies.latency_step import LatencyStep
from lrcompile.planning.strategies.milp import Milp
from lrcompile.planning.strategies.strategy import Strategy
from lrcompile.planning.strategies.uniform import Uniform

STRATEGIES: tuple[Strategy, ...] = (Milp(), Beam(), LatencyStep(), Energy(), Uniform())


def strategy_of(budget: Budget) -> Strategy:
    """The strategy that a budget names or holds."""
    if not isinstance(budget.strategy, str):
        return budget.strategy
    return next(strategy for strategy in STRATEGIES if strategy.name == budget.strategy)


def search(problem: Problem, budget: Budget) -> Choice:
    """The choice of the budget's strategy within the budget, applied and measured.

    Raises:
        BudgetError: the strategy cannot meet the budget; the message holds the range that can be.
    """
    return strategy_of(budget).search(problem, budget)
