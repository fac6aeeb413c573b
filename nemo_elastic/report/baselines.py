"""Points to compare a family with, from `baselines.json` in the run folder: written by whoever trained them.

    {"format": 1, "points": [{"kind": "scratch", "budget": "small", "parameters": 1273916, "heldout_loss": 3.31,
                              "memory_bytes": 6853240, "tokens": 327680, "note": "same steps, random start"}]}

`kind` is `zero_shot` (a cut without training), `distilled_alone` (one child, trained by itself) or `scratch`;
`memory_bytes`, `tokens` and `note` may lack. `heldout_loss` must be on the run's own held-out text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..problems import Problem

FILE, FORMAT = "baselines.json", 1
KINDS = {"zero_shot": "zero-shot", "distilled_alone": "distilled alone", "scratch": "from scratch"}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One model that is not of the family. `heldout_loss` in nats per token."""

    kind: str
    budget: str
    parameters: int
    heldout_loss: float
    memory_bytes: float | None = None
    tokens: int | None = None
    note: str = ""

    @property
    def words(self) -> str:
        """For a reader: `small from scratch`."""
        return f"{self.budget} {KINDS[self.kind]}"


def read_baselines(folder: Path) -> tuple[tuple[Baseline, ...], list[Problem]]:
    """The points of a run folder and what is wrong with the file; nothing at all when there is none."""
    try:
        found = read_json(folder / FILE)
    except FileNotFoundError:
        return (), []
    except (OSError, ValueError) as error:
        return (), [Problem(FILE, f"cannot be read ({error}); its points are left out")]
    if not isinstance(found, Mapping) or found.get("format") != FORMAT or not isinstance(found.get("points"), list):
        return (), [Problem(FILE, f"must be a mapping of format ({FORMAT}) and points; its points are left out")]
    points, problems = [], []
    for i, value in enumerate(found["points"]):
        try:
            points.append(_point(value))
        except (TypeError, ValueError) as error:
            problems.append(Problem(f"{FILE}: points.{i}", f"{error}; it is left out"))
    return tuple(points), problems


def _point(value: Any) -> Baseline:
    point = Baseline(**value)
    if point.kind not in KINDS:
        raise ValueError(f"kind {point.kind!r} must be one of {', '.join(KINDS)}")
    for name in ("parameters", "heldout_loss"):
        number = getattr(point, name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{name} {number!r} must be a number above 0")
    return point
