"""A race: every budget has a few candidate shapes, which take turns; held-out loss halves them until one is left.

    before the first step              out: who loses more than `spread` times the least (held-out, over the parent's)
    turn t of a budget runs candidate  standing[t mod n]          n still in the race
    after each round                   n <- ceil(n / 2), the last round leaves 1; turns begin anew

A turn is a micro-batch that the budget is drawn for, so that candidates have been trained alike when they are compared
(one that was just trained looks better than it is). Turns are counted over all replicas: what a micro-batch runs is a
function of the configuration and of what is kept in a checkpoint. Who is left in the end is pinned, as if it had been
given. No torch here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ..problems import Problem, raise_if_any
from ..shapes.candidates import Candidate
from ..space.subnet import Subnet

SLACK = 0.005  # nats: what the loss of few windows does not tell apart
Losses = Mapping[str, Mapping[int, float]]  # budget -> candidate -> held-out loss


@dataclass(frozen=True)
class Standing:
    """Numbers of a budget's candidates that are still in, the best first."""

    numbers: tuple[int, ...]
    turns: int = 0  # taken since the round began


class Race:
    """Who is in the race for each budget.

    Args:
        candidates: per budget, the least damage first, which leads until there is a loss.
        rounds: steps behind which a round ends, ascending.
    """

    def __init__(self, candidates: Mapping[str, Sequence[Candidate]], rounds: Sequence[int]) -> None:
        self.candidates, self.rounds = {name: tuple(row) for name, row in candidates.items()}, tuple(rounds)
        self.standings = {name: Standing(tuple(range(len(row)))) for name, row in self.candidates.items()}

    def leader(self, budget: str) -> Subnet:
        """The best so far."""
        return self.subnet(budget, self.standings[budget].numbers[0])

    def subnet(self, budget: str, number: int) -> Subnet:
        """Of one candidate."""
        return self.candidates[budget][number].subnet

    def turns(self, draws: Sequence[Mapping[str, float]]) -> list[dict[str, int]]:
        """Whose turn it is: per draw of a step, budget -> number of the candidate."""
        taken = {name: standing.turns for name, standing in self.standings.items()}
        found: list[dict[str, int]] = []
        for draw in draws:
            row = {}
            for name in draw:
                if name in taken:
                    numbers = self.standings[name].numbers
                    row[name] = numbers[taken[name] % len(numbers)]
                    taken[name] += 1
            found.append(row)
        return found

    def end_step(self, draws: Sequence[Mapping[str, float]]) -> None:
        """Count the turns of a step."""
        for name, standing in self.standings.items():
            taken = sum(name in draw for draw in draws)
            self.standings[name] = Standing(standing.numbers, standing.turns + taken)

    def is_due(self, done: int) -> bool:
        """Whether candidates are compared after `done` steps."""
        return done in self.rounds and any(len(s.numbers) > 1 for s in self.standings.values())

    def contenders(self) -> dict[str, dict[int, Subnet]]:
        """Who is to be compared: budgets with more than one left."""
        return {
            name: {number: self.subnet(name, number) for number in standing.numbers}
            for name, standing in self.standings.items()
            if len(standing.numbers) > 1
        }

    def begin(self, parent: float | None, losses: Losses, spread: float) -> dict[str, Any]:
        """Before the first step: who is far behind does not start, and would only have disturbed the others.

        Args:
            parent: loss of the parent on the same text; None where nobody is compared.
            spread: loss over the parent's, over the least such, up to which a candidate races.

        Returns:
            as `end_round`, of round 0.
        """
        budgets = {}
        for name, row in losses.items():
            order = sorted(row, key=lambda n, row=row: (row[n], n))
            gap = max(0.0, row[order[0]] - parent)
            limit = max(spread * gap, gap + SLACK) if self.rounds else -inf  # without rounds nothing else decides
            kept = [n for n in order if n == order[0] or row[n] - parent <= limit]
            budgets[name] = {"losses": {str(n): row[n] for n in order}, "left": kept, "turns": 0}
            self.standings[name] = Standing(tuple(kept))
        return {"step": 0, "round": 0, "parent": parent, "budgets": budgets}

    def end_round(self, done: int, losses: Losses) -> dict[str, Any]:
        """Keep the better half by loss, in the last round the best; ties go to the smaller damage.

        Returns:
            the round as plain values, for the log.
        """
        number, budgets = self.rounds.index(done) + 1, {}
        for name, row in losses.items():
            before = self.standings[name]
            order = sorted(before.numbers, key=lambda n, row=row: (row[n], n))
            left = 1 if number == len(self.rounds) else max(1, -(-len(before.numbers) // 2))
            budgets[name] = {"losses": {str(n): row[n] for n in order}, "left": order[:left], "turns": before.turns}
            self.standings[name] = Standing(tuple(order[:left]))
        for name in self.standings.keys() - losses.keys():
            self.standings[name] = Standing(self.standings[name].numbers)
        return {"step": done, "round": number, "budgets": budgets}

    def described(self) -> dict[str, list[dict[str, Any]]]:
        """The candidates as plain values."""
        return {
            name: [{"subnet": c.subnet.to_dict(), "error": c.error, "damage": c.damage} for c in row]
            for name, row in self.candidates.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: plain values."""
        standings = {name: {"numbers": list(s.numbers), "turns": s.turns} for name, s in self.standings.items()}
        return {"candidates": self.described(), "standings": standings}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take up where a checkpoint left off.

        Raises:
            ProblemsError: it raced with other candidates.
        """
        ours = {name: [row["subnet"] for row in rows] for name, rows in self.described().items()}
        theirs = {name: [row["subnet"] for row in rows] for name, rows in values["candidates"].items()}
        words = "has other candidates than the run began its race with; it is searched by OUT/importance, "
        words += "router.tolerance and report.*: set them back, or start anew in another --out"
        raise_if_any(Problem(f"elastic.budgets.{n}", words) for n in ours if ours[n] != theirs.get(n))
        self.standings = {n: Standing(tuple(s["numbers"]), s["turns"]) for n, s in values["standings"].items()}
