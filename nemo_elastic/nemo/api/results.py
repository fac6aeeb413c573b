"""What the functions of `api` return that run something. Losses are nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_elastic.checkpoint.comparison import ChildCheck
from nemo_elastic.cost.latency import LatencyTable
from nemo_elastic.importance.store import Importance
from nemo_elastic.problems import Problem


@dataclass(frozen=True)
class Ranked:
    """What `rank` measured.

    Attributes:
        folder: `OUT/importance`.
        depth_ranking: layers, the most important first.
        removed: layers that go first, in that order.
        seconds: that it took.
        importance: all scores.
    """

    folder: Path
    depth_ranking: tuple[int, ...]
    removed: tuple[int, ...]
    seconds: float
    importance: Importance = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """What `train` leaves.

    Attributes:
        nested: the nested checkpoint's folder.
        heldout_losses: by budget, at the end.
        tokens: that each budget was trained on.
    """

    nested: Path
    heldout_losses: dict[str, float]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Profiled:
    """The measured table, and the file that `report.latency_table` names."""

    file: Path
    table: LatencyTable = field(repr=False)


@dataclass(frozen=True)
class Extracted:
    """Folders by budget; with `nested=True` one folder that holds all of them."""

    format: str
    folders: Mapping[str, Path]


@dataclass(frozen=True)
class Pair:
    """Two budgets, and whether each unit and layer of the smaller one is in the larger one."""

    smaller: str
    larger: str
    nested: bool


@dataclass(frozen=True)
class Verified:
    """What `verify` found. False as a condition where a child differs.

    Attributes:
        checks: by child.
        kernels: what computed the two sides.
        pairs: every two budgets of the family.
        files_hashed: files of the nested checkpoint whose SHA-256 is the manifest's.
    """

    checks: tuple[ChildCheck, ...]
    kernels: str
    pairs: tuple[Pair, ...]
    files_hashed: int

    @property
    def ok(self) -> bool:
        """Whether every child is its nested subnet."""
        return all(check.ok for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Report:
    """The page, the files beside it, and what the run does not have yet."""

    page: Path
    files: tuple[str, ...]
    missing: tuple[Problem, ...]


@dataclass(frozen=True)
class Quickstart:
    """What `quickstart` leaves: a run folder with a nested checkpoint, children, and a report.

    Attributes:
        verified: every child is its nested subnet.
        parameters, heldout_before, heldout_losses: by budget; before: cut from the sorted parent, untrained.
        report: the page.
    """

    out: Path
    nested: Path
    verified: bool
    parameters: Mapping[str, int]
    heldout_before: Mapping[str, float]
    heldout_losses: Mapping[str, float]
    report: Path | None
    values: Mapping[str, Any] = field(repr=False)
