"""From the router's argmax to a subnet that meets the budget in exact integers, at the least loss of probability.

    minimise   sum over rows of (log pi_argmax - log pi_chosen) + shortfall price
    subject to cost(chosen) <= (1 + tolerance) target

Depth and the dims with one value per net rule many layers at once and are enumerated, cheapest loss first, until the
loss of these alone exceeds the best answer; what remains are independent rows with a loss and a cost per choice (a
multiple-choice knapsack): tried exhaustively when small, else by a Lagrange multiplier and single moves. All dims
take part, because repairing by one alone can be infeasible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, prod

from torch import Tensor

from ..cost.budget import BudgetCost, CostTables
from ..shapes.search import raise_if_impossible
from ..space.choices import Selection, choice_shapes, is_row_per_layer
from ..space.dims import DEPTH, PER_LAYER_DIMS, WIDTH_DIMS
from .selection import argmax_selection

GLOBAL_DIMS = (DEPTH, *(name for name in WIDTH_DIMS if name not in PER_LAYER_DIMS))
EXHAUSTIVE_ROWS = 4_000
OUT_OF_BAND = 1e4  # more than probabilities ever cost: within the tolerance of the target wins wherever it exists
SMALLEST_LOG = -80.0


@dataclass(frozen=True)
class Chosen:
    """A selection that meets its budget. Errors are `cost / target - 1`."""

    selection: Selection
    cost: float
    error: float
    argmax_error: float
    lost_log_probability: float

    @property
    def is_repaired(self) -> bool:
        """True when the argmax was not good enough."""
        return self.lost_log_probability > 0

    def note(self, tolerance: float) -> str | None:
        """What a user should know about it, or None."""
        if self.is_repaired:
            short = "; elastic.dims has nothing nearer" if self.error < -tolerance else ""
            words = f"the router's choice missed the budget by {self.argmax_error:+.1%}; repaired to {self.error:+.1%}"
            return words + short
        if self.error < -tolerance:
            return f"the router's choice is {-self.error:.1%} below the budget"
        return None


def choose(
    probabilities: Mapping[str, Tensor],
    cost: BudgetCost,
    *,
    tolerance: float,
    fill: bool = False,
    repair: bool = True,
    shortfall_price: float = 1000.0,
) -> Chosen:
    """The argmax when it fits, else its cheapest repair.

    Args:
        probabilities: noise-free, `[rows, choices]` per dim.
        tolerance: relative overshoot that is still accepted.
        fill: also repair a choice that stays below the target by more than `tolerance`.
        repair: False returns the argmax with its error whatever it costs.
        shortfall_price: log-probability that a relative shortfall of 1 is worth where nothing lies within the
            tolerance; 0: any shortfall will do.

    Raises:
        ProblemsError: the space has nothing small enough.
    """
    argmax = argmax_selection(probabilities)
    found = cost.tables.cost(argmax)
    error = cost.error(found)
    if not repair or (error <= tolerance and not (fill and error < -tolerance)):
        return Chosen(argmax, found, error, error, 0.0)
    raise_if_impossible(cost, tolerance)
    losses = _losses(probabilities)
    best = _Repair(cost, losses, tolerance, shortfall_price).run()
    final = cost.tables.cost(best)
    lost = sum(losses[n][r][i] for n, row in best.items() for r, i in enumerate(row))
    return Chosen(best, final, cost.error(final), error, lost)


def _losses(probabilities: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    found = {}
    for name, p in probabilities.items():
        logs = p.detach().double().clamp_min(1e-300).log().clamp_min(SMALLEST_LOG * 4)
        found[name] = (logs.max(dim=-1, keepdim=True).values - logs).tolist()
    return found


@dataclass(frozen=True)
class _Row:
    """One free row: the dims of a kind that it sets together, in one layer or in all, and per choice loss and cost."""

    names: tuple[str, ...]
    picks: Sequence[tuple[int, ...]]
    losses: Sequence[float]
    costs: Sequence[float]


class _Repair:
    def __init__(
        self, cost: BudgetCost, losses: Mapping[str, list[list[float]]], tolerance: float, price: float
    ) -> None:
        self.tables: CostTables = cost.tables
        self.target, self.losses, self.price = cost.target, losses, price
        self.highest, self.lowest = cost.target * (1 + tolerance), cost.target * (1 - tolerance)
        self.shapes = choice_shapes(cost.space)
        self.space = cost.space

    def run(self) -> Selection:
        names = [n for n in GLOBAL_DIMS if n in self.shapes] + self._beside_rows()
        combos = sorted(
            (sum(self.losses[n][0][i] for n, i in zip(names, combo, strict=True)), combo)
            for combo in product(*(range(self.shapes[n][1]) for n in names))
        )
        best_score, best = inf, None
        for loss, combo in combos:
            if loss >= best_score:
                break
            fixed = dict(zip(names, combo, strict=True))
            base, rows = self._rows(fixed)
            picked = self._fit(base, rows, best_score - loss)
            if picked is not None and loss + picked[0] < best_score:
                best_score = loss + picked[0]
                best = {n: (i,) for n, i in fixed.items()} | self._selection(rows, picked[1])
        assert best is not None, "raise_if_impossible has seen a selection that fits"
        return {name: best[name] for name in self.shapes}

    def _rows(self, fixed: Mapping[str, int]) -> tuple[float, list[_Row]]:
        """Cost that is fixed once the global dims are, and the free rows with their costs."""
        base = self.tables.outer[fixed.get("hidden_size", 0)]
        rows = []
        for kind, kept in self.tables.rows_kept[fixed.get(DEPTH, 0)].items():
            table = self.tables.kinds[kind]
            free = tuple(n for n in table.dims if n in self.shapes and n not in fixed)
            if not free:
                base += len(kept) * table.at(tuple(fixed.get(n, 0) for n in table.dims))
                continue
            picks = list(product(*(range(self.shapes[name][1]) for name in free)))
            costs = []
            for pick in picks:
                chosen = fixed | dict(zip(free, pick, strict=True))
                costs.append(table.at(tuple(chosen.get(n, 0) for n in table.dims)))
            if is_row_per_layer(self.space, free[0]):
                gone = [0.0] * len(costs)
                for r in range(self.shapes[free[0]][0]):
                    rows.append(_Row(free, picks, self._joint(free, picks, r), costs if r in kept else gone))
            else:
                rows.append(_Row(free, picks, self._joint(free, picks, 0), [c * len(kept) for c in costs]))
        return base, rows

    def _beside_rows(self) -> list[str]:
        """Dims with one value for all layers of a kind that another dim cuts layer by layer: enumerated, too."""
        found = []
        for table in self.tables.kinds.values():
            own = [n for n in table.dims if n in self.shapes and n not in GLOBAL_DIMS]
            if any(is_row_per_layer(self.space, n) for n in own):
                found += [n for n in own if not is_row_per_layer(self.space, n)]
        return found

    def _joint(self, names: tuple[str, ...], picks: Sequence[tuple[int, ...]], row: int) -> list[float]:
        return [sum(self.losses[n][row][i] for n, i in zip(names, pick, strict=True)) for pick in picks]

    def _selection(self, rows: Sequence[_Row], picked: Sequence[int]) -> dict[str, tuple[int, ...]]:
        found: dict[str, list[int]] = {}
        for row, i in zip(rows, picked, strict=True):
            for name, chosen in zip(row.names, row.picks[i], strict=True):
                found.setdefault(name, []).append(chosen)
        return {name: tuple(indices) for name, indices in found.items()}

    def _score(self, loss: float, cost: float) -> float:
        """Loss of a choice of rows; infinite when too large."""
        if cost > self.highest:
            return inf
        short = max(0.0, self.lowest - cost) / self.target
        return loss + (OUT_OF_BAND + self.price * short if short and self.price else 0.0)

    def _fit(self, base: float, rows: Sequence[_Row], limit: float) -> tuple[float, list[int]] | None:
        """The best (score, choice per row) below `limit`, or None."""
        if base + sum(min(r.costs) for r in rows) > self.highest:
            return None
        if prod(len(r.costs) for r in rows) <= EXHAUSTIVE_ROWS:
            return self._exhaustive(base, rows, limit)
        return self._lagrange(base, rows)

    def _exhaustive(self, base: float, rows: Sequence[_Row], limit: float) -> tuple[float, list[int]] | None:
        best = None
        for picked in product(*(range(len(r.costs)) for r in rows)):
            loss = sum(r.losses[i] for r, i in zip(rows, picked, strict=True))
            if loss >= limit:
                continue
            score = self._score(loss, base + sum(r.costs[i] for r, i in zip(rows, picked, strict=True)))
            if score < limit:
                limit, best = score, (score, list(picked))
        return best

    def _lagrange(self, base: float, rows: Sequence[_Row]) -> tuple[float, list[int]] | None:
        """Bisect the price of cost until it fits, then improve by single moves and pairs of moves."""

        def at(multiplier: float) -> tuple[list[int], float]:
            picked = [
                min(range(len(r.costs)), key=lambda i, r=r: (r.losses[i] + multiplier * r.costs[i], r.costs[i]))
                for r in rows
            ]
            return picked, base + sum(r.costs[i] for r, i in zip(rows, picked, strict=True))

        low, high = 0.0, 1.0 / self.target
        while at(high)[1] > self.highest:
            low, high = high, high * 4
            if high * self.target > 1e18:
                return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[1] > self.highest else (low, middle)
        return self._improve(base, rows, at(high)[0])

    def _improve(self, base: float, rows: Sequence[_Row], picked: list[int]) -> tuple[float, list[int]]:
        loss = sum(r.losses[i] for r, i in zip(rows, picked, strict=True))
        cost = base + sum(r.costs[i] for r, i in zip(rows, picked, strict=True))
        score = self._score(loss, cost)
        while True:
            moves = [
                (r, i, row.losses[i] - row.losses[picked[r]], row.costs[i] - row.costs[picked[r]])
                for r, row in enumerate(rows)
                for i in range(len(row.costs))
                if i != picked[r]
            ]
            # cost moves that win nothing on their own pair up with ones that do
            options = [(self._score(loss + dl, cost + dc), ((r, i),), dl, dc) for r, i, dl, dc in moves]
            gains = sorted(moves, key=lambda m: m[2])[:24]
            pays = sorted(moves, key=lambda m: m[3])[:24] + sorted(moves, key=lambda m: abs(m[3]))[:24]
            for a in gains:
                for b in pays:
                    if a[0] != b[0]:
                        dl, dc = a[2] + b[2], a[3] + b[3]
                        options.append((self._score(loss + dl, cost + dc), (a[:2], b[:2]), dl, dc))
            best = min(options, key=lambda o: o[0])
            if best[0] >= score - 1e-12:
                return score, picked
            score, loss, cost = best[0], loss + best[2], cost + best[3]
            for r, i in best[1]:
                picked[r] = i
