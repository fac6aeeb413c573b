"""Greedy search: from the parent, again and again the one smaller choice that loses least damage per cost saved.

Locally optimal only: at the end single steps are given back and swapped while that lowers the damage within the budget.
No torch here.
"""

from collections.abc import Iterator
from math import inf

from ..cost.budget import BudgetCost
from ..space.choices import Selection, choice_shapes, full_selection
from .damage import Damage
from .search import raise_if_impossible


def greedy_selection(cost: BudgetCost, damage: Damage, *, tolerance: float = 0.01) -> Selection:
    """Shrink the parent step by step until it fits, then give back what still fits, at last one step for another.

    A measured latency may have steps that save nothing: where all are such, the one that loses least is taken.

    Raises:
        ProblemsError: no subnet of the space is small enough.
    """
    raise_if_impossible(cost, tolerance)
    price, now = cost.tables.cost, full_selection(cost.space)
    limit = cost.target * (1 + tolerance)
    while (at := price(now)) > limit:
        before = damage.of(now)
        smaller = [(damage.of(after) - before, at - price(after), after) for after in _moves(cost, now, 1)]
        assert smaller, "raise_if_impossible has seen that the smallest fits"
        saving = [(lost / saved, after) for lost, saved, after in smaller if saved > 0]
        now = min(saving or [(lost, after) for lost, _, after in smaller], key=lambda m: m[0])[1]
    while True:
        larger = list(_moves(cost, now, -1))
        better = _less_damage(damage, now, [after for after in larger if price(after) <= limit])
        if better is None:
            swaps = [s for after in larger for s in _moves(cost, after, 1) if s != now and price(s) <= limit]
            better = _less_damage(damage, now, swaps)
        if better is None:
            return now
        now = better


def _less_damage(damage: Damage, now: Selection, candidates: list[Selection]) -> Selection | None:
    """The best of `candidates`, when it loses less than `now`."""
    scored = [(damage.of(c), i) for i, c in enumerate(candidates)]
    best = min(scored, default=(inf, 0))
    return candidates[best[1]] if best[0] < damage.of(now) - 1e-12 else None


def _moves(cost: BudgetCost, selection: Selection, step: int) -> Iterator[Selection]:
    """Every selection one choice smaller (`step` 1) or larger (-1) in one row."""
    for name, (_, choices) in choice_shapes(cost.space).items():
        for r, i in enumerate(selection[name]):
            if 0 <= i + step < choices:
                row = (*selection[name][:r], i + step, *selection[name][r + 1 :])
                yield {**selection, name: row}
