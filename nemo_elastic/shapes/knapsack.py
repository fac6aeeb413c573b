"""Selections within a band of cost, by least loss, where losses add up over rows once a few dims are fixed.

    minimise   fixed(g) + sum over rows r of loss_r(choice_r | g)
    subject to lowest <= cost(g, choices) <= highest

Depth, and dims with one value for the whole net, rule many layers at once: g, which is enumerated, the least bound
first. What remains are independent rows with a loss and a cost per choice (a multiple-choice knapsack): tried
exhaustively when small, else by a Lagrange multiplier and single moves and pairs. The router's repair and the search by
damage are this with other losses. No torch here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, prod
from typing import Protocol

from ..cost.budget import BudgetCost
from ..space.choices import Selection, choice_shapes, is_row_per_layer
from ..space.dims import DEPTH, PER_LAYER_DIMS, WIDTH_DIMS

GLOBAL_DIMS = (DEPTH, *(name for name in WIDTH_DIMS if name not in PER_LAYER_DIMS))
EXHAUSTIVE_ROWS = 4_000
Fixed = Mapping[str, int]


class Losses(Protocol):
    """What a selection loses: a part by the fixed dims alone, and a part per row."""

    def of_fixed(self, fixed: Fixed) -> float:
        """Of the fixed dims, and of all that no row decides."""

    def of_row(self, fixed: Fixed, names: Sequence[str], row: int, picks: Sequence[Sequence[int]]) -> list[float]:
        """Per pick of `names`, what row `row` (0 where all layers are alike) adds."""


@dataclass(frozen=True)
class Row:
    """One free row: the dims of a kind that it sets together, in one layer or in all, and per choice loss and cost."""

    names: tuple[str, ...]
    picks: Sequence[tuple[int, ...]]
    losses: Sequence[float]
    costs: Sequence[float]


@dataclass(frozen=True)
class Rest:
    """What is left once some dims are fixed: their loss and cost, and the rows."""

    fixed: Fixed
    loss: float
    cost: float
    rows: Sequence[Row]

    @property
    def bound(self) -> float:
        """No selection with these fixed dims loses less."""
        return self.loss + sum(min(row.losses) for row in self.rows)

    @property
    def cheapest(self) -> float:
        """No selection with these fixed dims costs less."""
        return self.cost + sum(min(row.costs) for row in self.rows)

    @property
    def count(self) -> int:
        """Selections with these fixed dims."""
        return prod(len(row.costs) for row in self.rows)

    def all(self) -> Iterator[tuple[float, float, tuple[int, ...]]]:
        """(loss, cost, choice per row) of every one."""
        for picked in product(*(range(len(row.costs)) for row in self.rows)):
            loss, cost = self.loss, self.cost
            for row, i in zip(self.rows, picked, strict=True):
                loss, cost = loss + row.losses[i], cost + row.costs[i]
            yield loss, cost, picked

    def of(self, picked: Sequence[int]) -> tuple[float, float]:
        """(loss, cost) of a choice per row."""
        pairs = list(zip(self.rows, picked, strict=True))
        return self.loss + sum(r.losses[i] for r, i in pairs), self.cost + sum(r.costs[i] for r, i in pairs)


class Knapsack:
    """The choices of one budget's space under one kind of loss."""

    def __init__(self, cost: BudgetCost, losses: Losses) -> None:
        self.cost, self.tables, self.space, self.losses = cost, cost.tables, cost.space, losses
        self.shapes = choice_shapes(cost.space)
        self.fixed_dims = [n for n in GLOBAL_DIMS if n in self.shapes] + self._beside_rows()

    def rests(self) -> Iterator[Rest]:
        """Per combination of the fixed dims, by their own loss."""
        combos = product(*(range(self.shapes[n][1]) for n in self.fixed_dims))
        fixed = [dict(zip(self.fixed_dims, combo, strict=True)) for combo in combos]
        losses = [self.losses.of_fixed(f) for f in fixed]
        for i in sorted(range(len(fixed)), key=lambda i: (losses[i], i)):
            yield self._rest(fixed[i], losses[i])

    def _rest(self, fixed: Fixed, loss: float) -> Rest:
        base, rows = self.tables.outer[fixed.get("hidden_size", 0)], []
        for kind, kept in self.tables.rows_kept[fixed.get(DEPTH, 0)].items():
            table = self.tables.kinds[kind]
            free = tuple(n for n in table.dims if n in self.shapes and n not in fixed)
            if not free:
                base += len(kept) * table.at(tuple(fixed.get(n, 0) for n in table.dims))
                continue
            picks = list(product(*(range(self.shapes[name][1]) for name in free)))
            costs = []
            for pick in picks:
                chosen = {**fixed, **dict(zip(free, pick, strict=True))}
                costs.append(table.at(tuple(chosen.get(n, 0) for n in table.dims)))
            if is_row_per_layer(self.space, free[0]):
                gone = [0.0] * len(costs)
                for r in range(self.shapes[free[0]][0]):
                    own = self.losses.of_row(fixed, free, r, picks)
                    rows.append(Row(free, picks, own, costs if r in kept else gone))
            else:
                own = self.losses.of_row(fixed, free, 0, picks)
                rows.append(Row(free, picks, own, [c * len(kept) for c in costs]))
        return Rest(fixed, loss, base, rows)

    def _beside_rows(self) -> list[str]:
        """Dims with one value for all layers of a kind that another dim cuts layer by layer: enumerated, too."""
        found = []
        for table in self.tables.kinds.values():
            own = [n for n in table.dims if n in self.shapes and n not in GLOBAL_DIMS]
            if any(is_row_per_layer(self.space, n) for n in own):
                found += [n for n in own if not is_row_per_layer(self.space, n)]
        return found

    def selection(self, rest: Rest, picked: Sequence[int]) -> Selection:
        """What a choice per row means."""
        found: dict[str, list[int]] = {n: [i] for n, i in rest.fixed.items()}
        for row, i in zip(rest.rows, picked, strict=True):
            for name, chosen in zip(row.names, row.picks[i], strict=True):
                found.setdefault(name, []).append(chosen)
        return {name: tuple(found[name]) for name in self.shapes}


@dataclass(frozen=True)
class Band:
    """Costs from `lowest` to `highest`. What lies below counts as worse than all within, by `price` a target.

    `price` 0: whatever fits will do.
    """

    lowest: float
    highest: float
    target: float
    price: float = 1000.0

    OUT_OF_BAND = 1e4  # more than losses ever are: within the band wins wherever there is something

    def score(self, loss: float, cost: float) -> float:
        """Loss of a choice; infinite when it is too large."""
        if cost > self.highest:
            return inf
        short = max(0.0, self.lowest - cost) / self.target
        return loss + (self.OUT_OF_BAND + self.price * short if short and self.price else 0.0)


def fit(rest: Rest, band: Band, limit: float = inf) -> tuple[float, list[int]] | None:
    """The best (score, choice per row) below `limit`; None when there is none. Exact where there are few."""
    if rest.cheapest > band.highest:
        return None
    return _exhaustive(rest, band, limit) if rest.count <= EXHAUSTIVE_ROWS else _lagrange(rest, band)


def _exhaustive(rest: Rest, band: Band, limit: float) -> tuple[float, list[int]] | None:
    best = None
    for loss, cost, picked in rest.all():
        if loss < limit and (score := band.score(loss, cost)) < limit:
            limit, best = score, (score, list(picked))
    return best


def _lagrange(rest: Rest, band: Band) -> tuple[float, list[int]] | None:
    """Bisect the price of cost until it fits, then improve by single moves and pairs of moves."""

    def at(multiplier: float) -> list[int]:
        return [
            min(range(len(r.costs)), key=lambda i, r=r: (r.losses[i] + multiplier * r.costs[i], r.costs[i]))
            for r in rest.rows
        ]

    def fits(multiplier: float) -> bool:
        return rest.of(at(multiplier))[1] <= band.highest

    low, high = 0.0, 1.0 / band.target
    while not fits(high):
        low, high = high, high * 4
        if high * band.target > 1e18:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _improve(rest, band, at(high))


def _improve(rest: Rest, band: Band, picked: list[int]) -> tuple[float, list[int]]:
    loss, cost = rest.of(picked)
    score = band.score(loss, cost)
    while True:
        moves = [
            (r, i, row.losses[i] - row.losses[picked[r]], row.costs[i] - row.costs[picked[r]])
            for r, row in enumerate(rest.rows)
            for i in range(len(row.costs))
            if i != picked[r]
        ]
        # cost moves that win nothing on their own pair up with ones that do
        options = [(band.score(loss + dl, cost + dc), ((r, i),), dl, dc) for r, i, dl, dc in moves]
        gains = sorted(moves, key=lambda m: m[2])[:24]
        pays = sorted(moves, key=lambda m: m[3])[:24] + sorted(moves, key=lambda m: abs(m[3]))[:24]
        for a in gains:
            for b in pays:
                if a[0] != b[0]:
                    dl, dc = a[2] + b[2], a[3] + b[3]
                    options.append((band.score(loss + dl, cost + dc), (a[:2], b[:2]), dl, dc))
        best = min(options, key=lambda o: o[0])
        if best[0] >= score - 1e-12:
            return score, picked
        score, loss, cost = best[0], loss + best[2], cost + best[3]
        for r, i in best[1]:
            picked[r] = i
