"""A wide search: every shape near a budget whose estimated damage is close to the least, not greedy search's one.

    pool        shapes with -shortfall <= cost / target - 1 <= tolerance and damage <= spread x least damage
    candidates  of the pool, those that no other one contains; of these at most `count`, as unlike as can be

With the sizes of the whole net fixed (hidden size, depth), what is left adds up over rows (`knapsack.py`): where one
size goes for all layers of a kind all of it is enumerated, so that the least damage is exact. Where layers differ there
is one shape per combination of the fixed sizes, the best that a price of cost and swaps of two rows find. A shape that
another one within the budget contains can only be worse when both are trained. No torch here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf

from ..cost.budget import BudgetCost
from ..space.choices import Selection, choice_shapes, full_selection, is_row_per_layer, subnet_of
from ..space.dims import DEPTH
from ..space.subnet import Subnet
from .damage import Damage
from .knapsack import EXHAUSTIVE_ROWS, Band, Knapsack, Rest, fit
from .search import raise_if_impossible

POOL = 512  # shapes that are compared one by one, those of least damage


@dataclass(frozen=True)
class Candidate:
    """A shape that a search proposes. `error`: cost / target - 1. `damage`: estimated, 0 the parent."""

    subnet: Subnet
    error: float
    damage: float


def candidates(
    cost: BudgetCost,
    damage: Damage,
    *,
    count: int,
    spread: float = 1.6,
    tolerance: float = 0.01,
    shortfall: float | None = None,
) -> list[Candidate]:
    """At most `count` shapes for a budget, the least damage first; there is always one.

    Args:
        spread: damage over the least that is still close.
        tolerance: relative overshoot that is accepted.
        shortfall: relative distance below the budget that is accepted; None: `tolerance`. Where nothing is within, the
            nearest below.

    Raises:
        ProblemsError: no subnet of the space is small enough.
    """
    raise_if_impossible(cost, tolerance)
    if not choice_shapes(cost.space):
        return [_candidate(cost, damage, full_selection(cost.space))]
    low = tolerance if shortfall is None else shortfall
    band = Band((1 - low) * cost.target, (1 + tolerance) * cost.target, cost.target)
    pool = _pool(Knapsack(cost, _Damages(damage)), band, spread)
    kept = [s for s in pool if not any(_contains(other, s) for other in pool if other is not s)]
    return [_candidate(cost, damage, s) for s in _unlike(kept, count, cost)]


def _candidate(cost: BudgetCost, damage: Damage, selection: Selection) -> Candidate:
    return Candidate(subnet_of(cost.space, selection), cost.error(cost.tables.cost(selection)), damage.of(selection))


def _pool(knapsack: Knapsack, band: Band, spread: float) -> list[Selection]:
    """By damage. A fixed combination whose bound is beyond the spread has nothing to give, nor have those behind it."""
    found: list[tuple[float, Selection]] = []
    least, below = inf, (inf, None)
    for rest in sorted(knapsack.rests(), key=lambda rest: rest.bound):
        if rest.bound > spread * least:
            break
        for score, loss, picked in _of_rest(rest, band, spread * least):
            if score != loss:  # outside the band
                below = min(below, (score, knapsack.selection(rest, picked)), key=lambda pair: pair[0])
                continue
            found.append((loss, knapsack.selection(rest, picked)))
            least = min(least, loss)
    if not found:
        return [below[1]]
    close = [pair for pair in found if pair[0] <= spread * least + 1e-12]
    return [selection for _, selection in nsmallest(POOL, close, key=lambda pair: pair[0])]


def _of_rest(rest: Rest, band: Band, limit: float) -> list[tuple[float, float, Sequence[int]]]:
    """(score, damage, choice per row) of what these fixed sizes have to offer."""
    if rest.count > EXHAUSTIVE_ROWS:
        best = fit(rest, band)
        return [] if best is None else [(best[0], rest.of(best[1])[0], best[1])]
    offers = ((band.score(loss, cost), loss, picked) for loss, cost, picked in rest.all() if cost <= band.highest)
    return [offer for offer in offers if offer[1] <= limit]


class _Damages:
    """`Damage` as a loss that adds up over rows."""

    def __init__(self, damage: Damage) -> None:
        self.damage, self.space = damage, damage.space
        self.rows = {name: row for name, row in damage.rows.items()}

    def of_fixed(self, fixed: Mapping[str, int]) -> float:
        """Layers that are gone, and those that no row is left for."""
        kept, found = self.damage.kept[fixed.get(DEPTH, 0)], 0.0
        for layer, worth in enumerate(self.damage.worth):
            if layer not in kept:
                found += worth
            elif all(name in fixed for name in self.damage.cuts[layer]):
                found += worth * (1 - self._share(layer, fixed))
        return found

    def of_row(
        self, fixed: Mapping[str, int], names: Sequence[str], row: int, picks: Sequence[Sequence[int]]
    ) -> list[float]:
        """Of the layers that this row cuts and that are still there."""
        per_layer = is_row_per_layer(self.space, names[0])
        layers = [layer for layer, r in self.rows[names[0]].items() if layer in self.damage.kept[fixed.get(DEPTH, 0)]]
        layers = [layer for layer in layers if not per_layer or self.rows[names[0]][layer] == row]
        return [
            sum(self.damage.worth[layer] * (1 - self._share(layer, {**fixed, **dict(zip(names, pick, strict=True))}))
                for layer in layers)
            for pick in picks
        ]  # fmt: skip

    def _share(self, layer: int, chosen: Mapping[str, int]) -> float:
        share = 1.0
        for name in self.damage.cuts[layer]:
            share *= self.damage.shares[name][layer][chosen[name]]
        return share


def _contains(larger: Selection, smaller: Selection) -> bool:
    """Whether every size of `smaller` is one of `larger`'s or less: choices descend, and units are prefixes."""
    return larger != smaller and all(
        i <= j for name in larger for i, j in zip(larger[name], smaller[name], strict=True)
    )


def _unlike(pool: Sequence[Selection], count: int, cost: BudgetCost) -> list[Selection]:
    """The least damage, and of the others the first `count - 1` that are as far apart as so many can be."""
    if len(pool) <= count:
        return list(pool)
    apart = sorted({round(_distance(a, b, cost), 6) for i, a in enumerate(pool) for b in pool[:i]}, reverse=True)
    for least in apart:
        chosen: list[Selection] = []
        for selection in pool:
            if all(_distance(selection, other, cost) >= least - 1e-9 for other in chosen):
                chosen.append(selection)
        if len(chosen) >= count:
            return chosen[:count]
    return list(pool[:count])


def _distance(a: Selection, b: Selection, cost: BudgetCost) -> float:
    """Sum over dims of the mean difference of their sizes, as ratios of the parent's."""
    total = 0.0
    for name in a:
        dim = cost.space.dims[name]
        pairs = list(zip(a[name], b[name], strict=True))
        total += sum(abs(dim.choices[i] - dim.choices[j]) for i, j in pairs) / (dim.full * len(pairs))
    return total
