"""What `plan` and `data` return. Memory is bytes, sizes count units; `values` is what the verb prints as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
