"""What cost is worth at a budget, by estimated damage: where the price of a learned router starts.

    price = (D((1 - s) target) - D((1 + s) target)) / 2 s        D(c): the least damage of all that cost at most c

In units of damage per relative cost. Damage counts the whole net as 1, so that the price is of the size of a loss that
counts it as about a nat; steering corrects the rest. No torch here.
"""

from math import inf

from ..cost.budget import BudgetCost
from ..space.choices import choice_shapes, smallest_selection
from .candidates import SummedDamage
from .damage import Damage
from .knapsack import Band, Knapsack, Rest, fit

STEP = 0.1  # s; choices are coarse, so that less may lie between two of them


def shadow_price(cost: BudgetCost, damage: Damage) -> float:
    """Damage that a relative cost of 1 saves near the budget; 0 where the space leaves nothing to trade.

    Below the smallest subnet there is nothing: the lower end is at least its cost, the upper at most the parent's.
    """
    if not choice_shapes(cost.space):
        return 0.0
    smallest = cost.tables.cost(smallest_selection(cost.space))
    low, high = max((1 - STEP) * cost.target, smallest), min((1 + STEP) * cost.target, cost.parent)
    if low >= high:
        return 0.0
    knapsack = Knapsack(cost, SummedDamage(damage))
    rests = sorted(knapsack.rests(), key=lambda rest: rest.bound)
    saved = _least(rests, low, cost.target) - _least(rests, high, cost.target)
    return max(0.0, saved) * cost.target / (high - low)


def _least(rests: list[Rest], highest: float, target: float) -> float:
    """The least damage at a cost up to `highest`."""
    least = inf
    for rest in rests:
        if rest.bound >= least:
            break
        found = fit(rest, Band(0.0, highest * (1 + 1e-9), target, price=0.0), least)
        least = least if found is None else min(least, found[0])
    return least
