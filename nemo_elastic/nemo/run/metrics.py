"""Scalars every `train.log_every_steps` steps, to `logs/metrics.csv` and to Lightning's loggers, on the first rank.

Between two rows losses are averaged (per budget, weighted by tokens; seconds are summed into tokens per second), so
that a budget whose turn did not come on the logged step is there nevertheless. The running sums are part of the
callback's state: a resumed run writes the rows that the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from nemo_elastic.config.sections import RunConfig
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.nemo.run.step_record import BUDGET_FIELDS, scalar_names, scalars
from nemo_elastic.processes.runlog import MetricsFile
from nemo_elastic.space.choices import choice_shapes

AVERAGED = tuple(key for key in BUDGET_FIELDS if key != "tokens")


class Metrics:
    """Collects step records and writes rows.

    Args:
        folder: of `metrics.csv`.
        columns: names of all scalars.
        every: steps per row.
        total_steps: the last step is always a row.
    """

    def __init__(self, folder: Path, columns: Sequence[str], *, every: int, total_steps: int) -> None:
        self.file = MetricsFile(folder / "metrics.csv", ("step", "phase", *columns))
        self.every, self.total_steps = every, total_steps
        self.sums: dict[str, dict[str, float]] = {}
        self.seconds = 0.0

    def start(self, step: int) -> None:
        """Drop what an interrupted run wrote beyond the checkpoint that it goes on from (0: everything)."""
        self.file.rewind(step)

    def is_due(self, step: int) -> bool:
        """Whether a row is written after `step` steps."""
        return step % self.every == 0 or step == self.total_steps

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a step's record, on every rank."""
        self.seconds += record["seconds"]
        for name, row in record["budgets"].items():
            sums = self.sums.setdefault(name, dict.fromkeys((*AVERAGED, "tokens"), 0.0))
            sums["tokens"] += row["tokens"]
            for key in AVERAGED:
                sums[key] += row[key] * row["tokens"]

    def row(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The scalars of a due step, averaged since the last row; begins anew."""
        means = {
            name: {key: s[key] / s["tokens"] for key in AVERAGED} | {"tokens": s["tokens"]}
            for name, s in self.sums.items()
        }
        speed = sum(s["tokens"] for s in self.sums.values()) / max(self.seconds, 1e-9)
        found = scalars(dict(record) | {"budgets": means, "tokens_per_second": speed})
        self.sums, self.seconds = {}, 0.0
        return found

    def write(self, step: int, values: Mapping[str, float], loggers: Sequence[Logger], phase: str = "") -> None:
        """A row of the file, and the same to every logger. First rank only."""
        self.file.write({"step": step, "phase": phase, **values})
        for logger in loggers:
            logger.log_metrics(dict(values), step=step)

    def state_dict(self) -> dict[str, Any]:
        """The running sums."""
        return {"sums": {n: dict(s) for n, s in self.sums.items()}, "seconds": self.seconds}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's sums."""
        self.sums = {n: dict(s) for n, s in values["sums"].items()}
        self.seconds = values["seconds"]


def metrics_of(run: RunConfig, planner: Planner, out: Path) -> Metrics:
    """The scalars' file, with a column for everything that this family can log."""
    shapes, full = list(choice_shapes(planner.family.space)), planner.family.space.full_subnet()
    columns = scalar_names(dict.fromkeys(run.elastic.budgets, full), dict.fromkeys(planner.learned, shapes))
    return Metrics(out / "logs", columns, every=run.train.log_every_steps, total_steps=planner.timeline.total)
