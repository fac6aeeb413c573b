"""The race of a run: every candidate of every budget, what it lost in each round, where it stopped; and fallbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .budget_rows import BudgetRow, kept_sizes
from .run_folder import RunFolder

PINNED, RACING = "pinned", "races"


@dataclass(frozen=True)
class Racer:
    """One candidate. `losses`: held-out, on the windows that choose, per round; None where it was out."""

    budget: str
    number: int
    sizes: Mapping[str, str]
    parameters: int | None
    damage: float
    losses: tuple[float | None, ...]
    end: str


def round_steps(run: RunFolder) -> tuple[int, ...]:
    """Steps behind which candidates were compared, the first before the first step."""
    return tuple(record["step"] for record in run.race)


def fallbacks(run: RunFolder) -> list[tuple[str, Mapping[str, float], str]]:
    """Budget, losses of the router's choice and of the search's shape, and which of them is pinned."""
    record = run.fallback[-1] if run.fallback else {"losses": {}, "fallen_back": []}
    pinned = {name: "search" if name in record["fallen_back"] else "learned" for name in record["losses"]}
    return [(name, losses, pinned[name]) for name, losses in record["losses"].items()]


def racers(run: RunFolder) -> list[Racer]:
    """Candidates by budget, who stayed longest first."""
    first = next((record for record in run.race if "candidates" in record), None)
    if first is None:
        return []
    found = []
    for budget, candidates in first["candidates"].items():
        rows = [_racer(run, budget, number, c) for number, c in enumerate(candidates)]
        found += sorted(rows, key=lambda racer: (-sum(loss is not None for loss in racer.losses), *_last(racer.losses)))
    return found


def _racer(run: RunFolder, budget: str, number: int, candidate: Mapping[str, Any]) -> Racer:
    subnet, rounds = run.subnet(candidate["subnet"]), [record["budgets"].get(budget) for record in run.race]
    losses = tuple(None if r is None else r["losses"].get(str(number)) for r in rounds)
    left = [r["left"] for r in rounds if r is not None]
    alone = not left or len(left[-1]) == 1
    still = not left or number in left[-1]
    out = next((record["step"] for record in run.race
                if budget in record["budgets"] and number not in record["budgets"][budget]["left"]), None)  # fmt: skip
    return Racer(
        budget,
        number,
        kept_sizes(BudgetRow(name=budget, subnet=candidate["subnet"])),
        run.parameters(subnet) if subnet else None,
        candidate["damage"],
        losses,
        (PINNED if alone else RACING) if still else f"out at step {out}" if out else "out before step 1",
    )


def _last(losses: Sequence[float | None]) -> tuple[float, ...]:
    return next(((loss,) for loss in reversed(losses) if loss is not None), (0.0,))
