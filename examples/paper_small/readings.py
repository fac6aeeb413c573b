"""What the runs' files say: losses and solved problems by run, seed and budget, and how they are summed up."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import BASES, PARENTS, RUNS, parent_of

Result = Mapping[str, Any]
NONE = "–"  # what a table shows where there is nothing yet


@dataclass(frozen=True)
class Results:
    """The files of the runs on one parent by (name, seed), and the parent's score."""

    runs: Mapping[tuple[str, int], Result]
    parent: Mapping[str, Any]
    explored: Mapping[tuple[str, int], Result] = field(default_factory=dict)  # by budget and seed, of `exploring.py`
    between: Mapping[int, Result] = field(default_factory=dict)  # by seed, of `between.py`

    @classmethod
    def read(cls, folder: Path) -> dict[int, Results]:
        """All `NAME-SEED.json` of a folder, for each parent that has its `parent-NUMBER.json` there.

        Raises:
            ValueError: a run is a quick one, or of another parent.
        """
        parents, runs = {}, {}
        for path in sorted(folder.glob("*-*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            if path.name.startswith("parent-"):
                parents[found["seed"]] = found
                continue
            runs[found["name"], found["seed"]] = found
            if found["quick"]:
                raise ValueError(f"{path}: a quick run shows nothing; remove it")
        for (name, seed), run in runs.items():
            known = parents.get(parent_of(seed), {}).get("sha256")
            if BASES[RUNS[name].base].trained and known != run.get("parent_sha256", known):
                raise ValueError(f"{folder}/{name}-{seed}.json is of another parent than {parent_of(seed)} there")
        explored = {(one["budget"], one["seed"]): one for one in _files(folder / "exploring")}
        between = {one["seed"]: one for one in _files(folder / "between")}
        for one in (*explored.values(), *between.values()):
            if one["parent_sha256"] != parents.get(parent_of(one["seed"]), {}).get("sha256"):
                raise ValueError(f"{folder}: what was found with seed {one['seed']} is of another parent than is there")
        return {
            number: cls(
                {key: run for key, run in runs.items() if key[1] in PARENTS[number].seeds},
                parent["score"],
                {key: one for key, one in explored.items() if key[1] in PARENTS[number].seeds},
                {seed: one for seed, one in between.items() if seed in PARENTS[number].seeds},
            )
            for number, parent in parents.items()
        }

    def seeds(self, *names: str) -> list[int]:
        """Seeds that all of these runs have."""
        sets = [{seed for name, seed in self.runs if name == wanted} for wanted in names]
        return sorted(set.intersection(*sets)) if sets else []

    def loss(self, name: str, seed: int, budget: str) -> float:
        """Held-out loss at the end, of the big set of windows."""
        return self.runs[name, seed]["score"][budget]["heldout_loss"]

    def losses(self, name: str, budget: str, seeds: Iterable[int]) -> list[float]:
        """Of several seeds."""
        return [self.loss(name, seed, budget) for seed in seeds]

    def same_losses(self, name: str, other: str) -> float | None:
        """Largest difference between the validations of two runs that should be one and the same; None: not both."""
        both = self.seeds(name, other)
        pairs = [zip(self.runs[name, s]["curve"], self.runs[other, s]["curve"], strict=True) for s in both]
        return max(
            (abs(a["losses"][b] - c["losses"][b]) for pair in pairs for a, c in pair for b in a["losses"]), default=None
        )

    def solved(self, name: str, seed: int, budget: str) -> float:
        """Share of problems solved."""
        return self.runs[name, seed]["score"][budget]["solved"]


def _files(folder: Path) -> list[Result]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and, of several values, their standard deviation."""
    if not values:
        return NONE
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def relative(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean and standard deviation of ours / theirs - 1, pair by pair; says where there is one pair only."""
    found = spread([a / b - 1 for a, b in zip(ours, theirs, strict=True)], "+.2%")
    return f"{found} (1 seed)" if len(ours) == 1 else found


def finished_to(runs: Sequence[tuple[float, float]], target: float) -> float | None:
    """Tokens that a run would need to end at this loss, from (tokens, last loss) of two runs that ended.

    On the line through them, loss over the logarithm of tokens; None: the longer one did not get there. The loss in
    the middle of a run is no such reading: its learning rate has not come down yet.
    """
    (short, high), (long, low) = sorted(runs)
    if target < low:
        return None
    if high <= low:  # more tokens did not help
        return short
    return short * (long / short) ** ((high - target) / (high - low))


def spent_to(curve: Sequence[Mapping[str, Any]], budget: str, target: float, what: str = "tokens") -> float | None:
    """Tokens of that budget (or CPU seconds of the run) after which its loss first is `target`; None: never.

    Between two validations it is read on a line.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        spent, loss = point["cpu"] if what == "cpu" else point["tokens"][budget], point["losses"][budget]
        if loss <= target:
            if before is None or before[1] == loss:
                return float(spent)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (spent - before[0])
        before = (spent, loss)
    return None


def ratio(found: Sequence[float], limits: Sequence[float], form: str = ".1f") -> str:
    """Ratios over seeds; `limits` are of seeds that never got there: their ratio is more than that."""
    if not limits:
        return spread(found, form) + (" (1 seed)" if len(found) == 1 else "")
    return f"more than {format(min([*found, *limits]), form)}"
