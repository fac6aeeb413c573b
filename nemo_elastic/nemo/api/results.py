"""What the functions of `api` return. Losses are nats per token, memory is bytes, sizes count units.

What a verb prints as JSON stands whole in `values`, where a result has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_elastic.checkpoint.comparison import ChildCheck
from nemo_elastic.cost.latency import LatencyTable
from nemo_elastic.importance.store import Importance
from nemo_elastic.problems import Problem, did_you_mean


@dataclass(frozen=True)
class PlannedBudget:
    """A budget and the subnet that answers it.

    Attributes:
        origin: `parent`, `forced`, `frozen`, `proposed`, `trained`, `between A and B`, or how it was searched.
        error: of its cost, relative to the budget: 0.01 is 1 % above it.
        parameters, active_parameters, percent_of_parent: of the child; active ones are those that one token meets.
        memory_bytes: under the plan's serving conditions: weights, caches and all.
        subnet: its sizes by dim, and the layers of the parent that it keeps.
        latency_ms: by a measured table; None without one.
        heldout_loss: of `score=True`, before any training.
    """

    name: str
    origin: str
    error: float
    parameters: int
    active_parameters: int
    percent_of_parent: float
    memory_bytes: int
    subnet: Mapping[str, Any]
    latency_ms: float | None = None
    heldout_loss: float | None = None

    @staticmethod
    def of(row: Mapping[str, Any]) -> PlannedBudget:
        """From a row of `plan --json`."""
        plain = ("name", "origin", "error", "parameters", "active_parameters", "percent_of_parent", "subnet")
        optional = {name: row.get(name) for name in ("latency_ms", "heldout_loss")}
        return PlannedBudget(**{n: row[n] for n in plain}, memory_bytes=row["memory_bytes"]["total"], **optional)


@dataclass(frozen=True)
class Plan:
    """What every budget will be.

    Attributes:
        parent_parameters: of the parent.
        problems: why it cannot be run; a plan with problems is returned, not raised.
        gpu_hours: of the training, estimated; None where no training is planned.
    """

    name: str
    parent_parameters: int
    budgets: tuple[PlannedBudget, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    gpu_hours: float | None
    values: Mapping[str, Any] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether it has no problems."""
        return not self.problems

    def budget(self, name: str) -> PlannedBudget:
        """The budget of that name.

        Raises:
            KeyError: naming the nearest.
        """
        found = {b.name: b for b in self.budgets}
        if name not in found:
            raise KeyError(f"{name!r} is not in this plan{did_you_mean(name, found)}")
        return found[name]

    @staticmethod
    def of(values: Mapping[str, Any]) -> Plan:
        """From `plan --json`."""
        return Plan(
            name=values["name"],
            parent_parameters=values["parent"]["parameters"],
            budgets=tuple(map(PlannedBudget.of, values["budgets"])),
            notes=tuple(values["notes"]),
            problems=tuple(Problem(p["key"], p["message"]) for p in values["problems"]),
            gpu_hours=(values.get("training") or {}).get("gpu_hours"),
            values=values,
        )


@dataclass(frozen=True)
class TextSource:
    """A source of text. `whole`: it was read to its end; else documents and tokens are those seen so far.

    Attributes:
        kind: `corpus`, `text`, `conversations` or `tokenized`.
        share: of the samples that training reads.
        heldout_tokens: those of `tokens` that are held out.
    """

    path: str
    kind: str
    share: float
    documents: int
    tokens: int
    heldout_tokens: int
    whole: bool


@dataclass(frozen=True)
class TextSample:
    """A training sample as stretches of (text, whether it carries loss)."""

    number: int
    spans: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class TextPreview:
    """What training will read."""

    sources: tuple[TextSource, ...]
    samples: tuple[TextSample, ...]
    notes: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)

    @staticmethod
    def of(values: Mapping[str, Any]) -> TextPreview:
        """From `data --json`."""
        names = TextSource.__dataclass_fields__
        return TextPreview(
            sources=tuple(TextSource(**{name: row[name] for name in names}) for row in values["sources"]),
            samples=tuple(
                TextSample(row["sample"], tuple((span["text"], span["loss"]) for span in row["spans"]))
                for row in values["samples"]
            ),
            notes=tuple(values["notes"]),
            values=values,
        )


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
        report: the page; None on other ranks than the first.
    """

    out: Path
    nested: Path
    verified: bool
    parameters: Mapping[str, int]
    heldout_before: Mapping[str, float]
    heldout_losses: Mapping[str, float]
    report: Path | None
    values: Mapping[str, Any] = field(repr=False)
