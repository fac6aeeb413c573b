"""A wide search: every shape near a budget whose estimated damage is close to the least, not greedy search's one.

    pool        shapes with cost <= (1 + tolerance) target and damage <= least + max((spread - 1) least, 0.02);
                what lies more than the tolerance below the target only where it loses less than all that meet it
    candidates  of the pool, those that no other one contains; of these at most `count`, as unlike as can be

With the sizes of the whole net fixed (hidden size, depth), what is left adds up over rows (`knapsack.py`): up to 4,000
combinations of it are enumerated, so that the least damage is exact. Of more, as where layers differ, there are one or
two shapes per combination of the fixed sizes, the best that a price of cost and swaps of two rows find. A shape that
another one within the budget contains can only be worse when both are trained. No torch here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from ..cost.budget import BudgetCost
from ..space.choices import (
    Selection,
    choice_shapes,
    full_selection,
    is_row_per_layer,
    kept_by_depth,
    layers_of_dim,
    subnet_of,
)
from ..space.dims import DEPTH
from ..space.subnet import Subnet
from .damage import Damage
from .knapsack import EXHAUSTIVE_ROWS, Band, Knapsack, Rest, fit
from .search import raise_if_impossible

SLACK = 0.02  # of damage: a fiftieth of what all layers are worth is too little to tell shapes apart by
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
) -> list[Candidate]:
    """At most `count` shapes for a budget, the least damage first; there is always one.

    Args:
        spread: damage over the least that is still close.
        tolerance: relative distance from the budget, to both sides, that meets it.

    Raises:
        ProblemsError: no subnet of the space is small enough.
    """
    raise_if_impossible(cost, tolerance)
    if not choice_shapes(cost.space):
        return [_candidate(cost, damage, full_selection(cost.space))]
    pool = _pool(Knapsack(cost, SummedDamage(damage)), cost, tolerance, spread)
    kept = [s for s in pool if not any(_contains(other, s) for other in pool if other is not s)]
    return [_candidate(cost, damage, s) for s in _unlike(kept, count, cost)]


def reach(least: float, spread: float) -> float:
    """The damage up to which a shape is close to the least."""
    return inf if least == inf else least + max((spread - 1) * least, SLACK)


def _candidate(cost: BudgetCost, damage: Damage, selection: Selection) -> Candidate:
    return Candidate(subnet_of(cost.space, selection), cost.error(cost.tables.cost(selection)), damage.of(selection))


def _pool(knapsack: Knapsack, cost: BudgetCost, tolerance: float, spread: float) -> list[Selection]:
    """By damage. A fixed combination whose bound is beyond the spread has nothing to give, nor have those behind it."""
    lowest, highest = (1 - tolerance) * cost.target, (1 + tolerance) * cost.target
    offers: list[_Offer] = []
    least = inf
    for rest in sorted(knapsack.rests(), key=lambda rest: rest.bound):
        if rest.bound > reach(least, spread):
            break
        new = [o for o in _offers(rest, lowest, highest, cost.target) if o.damage <= reach(least, spread)]
        offers += new
        least = min([least, *(o.damage for o in new)])
    meets = min((o.damage for o in offers if o.cost >= lowest), default=inf)
    close = [o for o in offers if o.damage <= reach(least, spread) + 1e-12 and (o.cost >= lowest or o.damage < meets)]
    found: dict[tuple, Selection] = {}  # rows of layers that are gone make many of one
    for offer in sorted(close, key=lambda o: o.damage):
        selection = _settled(knapsack, offer)
        found.setdefault(tuple(selection.values()), selection)
        if len(found) == POOL:
            break
    return list(found.values())


def _settled(knapsack: Knapsack, offer: "_Offer") -> Selection:
    """The smallest choice in layers that are gone, where any would do."""
    picked, space, found = knapsack.selection(offer.rest, offer.picked), knapsack.space, {}
    kept = kept_by_depth(space)[offer.rest.fixed.get(DEPTH, 0)]
    for name, row in picked.items():
        layers, smallest = layers_of_dim(space, name), len(space.dims[name].choices) - 1
        alike = not is_row_per_layer(space, name)
        found[name] = tuple(i if alike or layers[r] in kept else smallest for r, i in enumerate(row))
    return found


@dataclass(frozen=True)
class _Offer:
    damage: float
    cost: float
    rest: Rest
    picked: Sequence[int]


def _offers(rest: Rest, lowest: float, highest: float, target: float) -> Iterator[_Offer]:
    """What these fixed sizes have within the budget; of many, the best near it and the best below."""
    if rest.count <= EXHAUSTIVE_ROWS:
        yield from (_Offer(loss, cost, rest, picked) for loss, cost, picked in rest.all() if cost <= highest)
        return
    found = [fit(rest, Band(lowest, highest, target, price)) for price in (0.0, 1000.0)]
    for picked in {tuple(best[1]) for best in found if best is not None}:
        yield _Offer(*rest.of(picked), rest, picked)


class SummedDamage:
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
