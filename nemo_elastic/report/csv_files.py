"""Every number of the report as CSV, at full precision: one file a table, a header line, empty where not known."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..space.architecture import KIND_NAMES
from ..space.subnet import layer_sizes
from .budget_rows import KEPT, BudgetRow
from .evaluations import rows as evaluation_rows
from .expert_figures import load_series, shares
from .layer_figures import layer_scores
from .planned import planned_budgets, planned_run
from .race_rounds import racers, round_steps
from .run_folder import RunFolder
from .source_losses import source_series
from .spending import parts
from .time_axis import Clock
from .training_curves import router_series


@dataclass(frozen=True)
class Sheet:
    """One CSV file."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[Any], ...]

    def write(self, folder: Path) -> Path:
        """Write `folder/name.csv`; lists inside a cell are joined by spaces."""
        path = folder / f"{self.name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows([_cell(value) for value in row] for row in self.rows)
        return path


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value


def sheets(run: RunFolder, rows: list[BudgetRow]) -> list[Sheet]:
    """Every sheet that has a row."""
    made = (_budgets(rows), _validation(run), _train(run), _router(run), _importance(run, rows), _children(run, rows))
    more = (_sources(run), _race(run), _expert_load(run), _evaluations(run), _timings(run), _planned(run, rows))
    return [sheet for sheet in (*made, *more) if sheet.rows]


def _budgets(rows: list[BudgetRow]) -> Sheet:
    names = (
        *("name", "target", *KEPT, "layers", "parameters", "active_parameters"),
        *("percent_of_parent", "memory_bytes"),
        *("heldout_before", "heldout_nested", "heldout_child", "verified", "max_abs_difference", "source"),
    )
    body = []
    for r in rows:
        sizes = [(r.subnet or {}).get(name) for name in KEPT]
        cost = (r.parameters, r.active_parameters, r.percent_of_parent, r.memory_bytes)
        losses = (r.before, r.nested, r.child, r.verified, r.max_abs_difference, r.source)
        body.append((r.name, r.target, *sizes, r.layers, *cost, *losses))
    return Sheet("budgets", names, tuple(body))


def _validation(run: RunFolder) -> Sheet:
    clock = Clock(run)
    body = [
        (r["step"], clock(r["step"]), name, r.get("tokens", {}).get(name), loss)
        for r in run.validation
        for name, loss in r.get("losses", {}).items()
    ]
    return Sheet("validation", ("step", "tokens", "budget", "tokens_of_budget", "heldout_loss"), tuple(body))


def _train(run: RunFolder) -> Sheet:
    clock, keys = Clock(run), ("kd", "ce", "hidden", "tokens", "budget_loss")
    shared = ("tau", "lr", "seconds", "flops")
    body = [
        (r["step"], clock(r["step"]), r.get("phase"), name, *(b.get(k) for k in keys), *(r.get(k) for k in shared))
        for r in run.train
        for name, b in r.get("budgets", {}).items()
    ]
    columns = ("step", "tokens", "phase", "budget", "kd", "ce", "hidden", "tokens_of_step", "budget_loss", *shared)
    return Sheet("train", columns, tuple(body))


def _router(run: RunFolder) -> Sheet:
    keys = ("argmax_error", "error", "price")
    body = [(step, name, *(entry.get(k) for k in keys)) for step, name, entry in router_series(run)]
    return Sheet("router", ("step", "budget", *keys), tuple(body))


def _expert_load(run: RunFolder) -> Sheet:
    body = [
        (step, name, layer, expert, tokens, share)
        for name, rows in load_series(run).items()
        for step, row in rows
        for layer, counts in row["tokens"].items()
        for expert, (tokens, share) in enumerate(zip(counts, shares(counts), strict=True))
        if tokens is not None
    ]
    return Sheet("expert_load", ("step", "budget", "layer", "expert", "tokens", "over_mean"), tuple(body))


def _importance(run: RunFolder, rows: list[BudgetRow]) -> Sheet:
    ranking = list(run.importance.get("depth_ranking") or ())
    pattern = run.architecture.hybrid_override_pattern if run.architecture else ""
    kept = [row for row in rows if row.layers]
    body = [
        (
            layer,
            KIND_NAMES[pattern[layer]] if layer < len(pattern) else None,
            score,
            ranking.index(layer) + 1 if layer in ranking else None,
            *(layer in row.layers for row in kept),
        )
        for layer, score in layer_scores(run).items()
    ]
    return Sheet("layer_importance", ("layer", "kind", "score", "rank", *(f"kept_{r.name}" for r in kept)), tuple(body))


def _children(run: RunFolder, rows: list[BudgetRow]) -> Sheet:
    body: list[tuple[Any, ...]] = []
    for row in rows:
        subnet = run.subnet(row.subnet)
        for layer, kind in enumerate(run.architecture.hybrid_override_pattern if subnet else ""):
            sizes, kept = layer_sizes(run.architecture, subnet, layer), layer in subnet.layers
            values = (sizes.get(name) if kept else None for name in KEPT[:-1])
            body.append((row.name, layer, KIND_NAMES[kind], kept, *values))
    return Sheet("children", ("budget", "layer", "kind", "kept", *KEPT[:-1]), tuple(body))


def _evaluations(run: RunFolder) -> Sheet:
    names = ("task", "metric", "filter", "value", "stderr", "higher_is_better", "samples", "shots", "version", "file")
    found = evaluation_rows(run.evaluations, run.budget_names)
    body = [(row.budget, s.model, *(getattr(s, name) for name in names)) for row in found for s in row.scores if s]
    return Sheet("evaluations", ("budget", "model", *names), tuple(body))


def _sources(run: RunFolder) -> Sheet:
    clock = Clock(run)
    body = [(step, clock(step), *rest) for step, *rest in source_series(run)]
    return Sheet("sources", ("step", "tokens", "budget", "source", "heldout_loss", "tokens_of_source"), tuple(body))


def _race(run: RunFolder) -> Sheet:
    steps = [f"loss_after_step_{step}" for step in round_steps(run)]
    body = [(r.budget, r.number, *r.sizes.values(), r.parameters, r.damage, *r.losses, r.end) for r in racers(run)]
    columns = ("budget", "candidate", *KEPT, "parameters", "damage", *steps, "end")
    return Sheet("race", columns, tuple(body))


def _timings(run: RunFolder) -> Sheet:
    body = tuple((part.name, part.part_of, part.seconds) for part in parts(run))
    return Sheet("timings", ("phase", "part_of", "seconds"), body)


def _planned(run: RunFolder, rows: list[BudgetRow]) -> Sheet:
    found = [(name, one) for name, pairs in planned_budgets(run, rows) for one in pairs]
    found += [(None, one) for one in planned_run(run)]
    body = tuple((name, one.what, one.kind, one.planned, one.actual, one.note) for name, one in found)
    return Sheet("planned", ("budget", "what", "unit", "planned", "actual", "note"), body)
