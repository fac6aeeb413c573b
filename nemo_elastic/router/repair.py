"""From the router's argmax to a subnet that meets the budget in exact integers, at the least loss of probability.

    minimise   sum over rows of (log pi_argmax - log pi_chosen) + shortfall price
    subject to cost(chosen) <= (1 + tolerance) target

Log-probabilities add up over rows: a knapsack (`shapes/knapsack.py`). All dims take part, because repairing by one
alone can be infeasible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from torch import Tensor

from ..cost.budget import BudgetCost
from ..shapes.knapsack import Band, Knapsack, fit
from ..shapes.search import raise_if_impossible
from ..space.choices import Selection
from .selection import argmax_selection

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
    shortfall: float | None = None,
    repair: bool = True,
    shortfall_price: float = 1000.0,
) -> Chosen:
    """The argmax when it fits, else its cheapest repair.

    Args:
        probabilities: noise-free, `[rows, choices]` per dim.
        tolerance: relative overshoot that is still accepted.
        shortfall: also repair a choice that stays below the target by more than this; None: none does.
        repair: False returns the argmax with its error whatever it costs.
        shortfall_price: log-probability that a relative shortfall of 1 is worth where nothing lies within the
            band; 0: any shortfall will do.

    Raises:
        ProblemsError: the space has nothing small enough.
    """
    argmax = argmax_selection(probabilities)
    found = cost.tables.cost(argmax)
    error = cost.error(found)
    if not repair or (error <= tolerance and (shortfall is None or error >= -shortfall)):
        return Chosen(argmax, found, error, error, 0.0)
    raise_if_impossible(cost, tolerance)
    lowest, highest = (1 - (tolerance if shortfall is None else shortfall)) * cost.target, (1 + tolerance) * cost.target
    losses = _losses(probabilities)
    best = _repaired(Knapsack(cost, _Lost(losses)), Band(lowest, highest, cost.target, shortfall_price))
    final = cost.tables.cost(best)
    lost = sum(losses[n][r][i] for n, row in best.items() for r, i in enumerate(row))
    return Chosen(best, final, cost.error(final), error, lost)


def _repaired(knapsack: Knapsack, band: Band) -> Selection:
    best_score, best = inf, None
    for rest in knapsack.rests():
        if rest.loss >= best_score:
            break
        picked = fit(rest, band, best_score)
        if picked is not None and picked[0] < best_score:
            best_score, best = picked[0], knapsack.selection(rest, picked[1])
    assert best is not None, "raise_if_impossible has seen a selection that fits"
    return best


@dataclass(frozen=True)
class _Lost:
    """Log-probability that a choice gives away, `[rows][choices]` per dim."""

    losses: Mapping[str, list[list[float]]]

    def of_fixed(self, fixed: Mapping[str, int]) -> float:
        return sum(self.losses[n][0][i] for n, i in fixed.items())

    def of_row(
        self, fixed: Mapping[str, int], names: Sequence[str], row: int, picks: Sequence[Sequence[int]]
    ) -> list[float]:
        return [sum(self.losses[n][row][i] for n, i in zip(names, pick, strict=True)) for pick in picks]


def _losses(probabilities: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    found = {}
    for name, p in probabilities.items():
        logs = p.detach().double().clamp_min(1e-300).log().clamp_min(SMALLEST_LOG * 4)
        found[name] = (logs.max(dim=-1, keepdim=True).values - logs).tolist()
    return found
