"""The HTML page: what the template is given, in words and formatted numbers. No decisions are left to the template."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..config.load import leaves
from ..cost.conditions import profile_name
from .budget_rows import BudgetRow, kept_sizes, parent_loss, parent_parameters
from .evaluations import columns as evaluation_columns
from .evaluations import rows as evaluation_rows
from .loading import ways
from .palette import DARK, LIGHT, budget_colour, part_colour
from .planned import BYTES, COUNT, FLOPS, Compared, planned_budgets, planned_run
from .race_rounds import fallbacks, racers, round_steps
from .run_folder import RunFolder
from .source_losses import source_rows
from .spending import TOTALS, logged_flops, parts, peak_memory, shares, throughput, utilisation
from .time_axis import Clock

DASH = "–"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    name: str
    heading: str
    caption: str
    svg: str


def render(run: RunFolder, rows: list[BudgetRow], pictures: list[Picture], files: list[str]) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count,
        loss=loss,
        percent=percent,
        size=size,
        seconds=seconds,
        signed=signed,
        marked=marked,
        planned=quantity,
    )
    colours = {name: budget_colour(i) for i, name in enumerate(run.budget_names)}
    context = {
        "title": run.title,
        "style": Markup((Path(__file__).parent / "style.css.j2").read_text(encoding="utf-8")),
        "colours": {"light": LIGHT, "dark": DARK},
        "chips": chips(run, rows),
        "missing": run.missing,
        "cards": cards(run, rows),
        "rows": [(budget_colour(i), row, kept_sizes(row)) for i, row in enumerate(rows)],
        "sizes": [name for name in kept_sizes(BudgetRow(name="")) if any(kept_sizes(row)[name] for row in rows)],
        "parent": {"parameters": parent_parameters(run), "loss": parent_loss(run), "sizes": _parent_sizes(run)},
        "evaluations": _evaluations(run),
        "pictures": [(p, Markup(p.svg)) for p in pictures],
        "facts": facts(run),
        "parts": _parts(run),
        "bar": [(part_colour(i), name, share) for i, (name, share) in enumerate(shares(run))],
        "sources": source_rows(run, rows),
        "race": [(colours.get(r.budget, "ink"), r) for r in racers(run)],
        "race_steps": round_steps(run),
        "fallback": fallbacks(run),
        "planned_budgets": planned_budgets(run, rows),
        "planned_run": planned_run(run),
        "loading": [(budget_colour(i), row.name, ways(run, row)) for i, row in enumerate(rows)],
        "provenance": flat(_without_config(run.results.get("provenance") or {})),
        "rank_provenance": flat(run.importance.get("provenance") or {}),
        "config": [(key, value, run.origins.get(key, "default")) for key, value in leaves(run.values)]
        if run.values
        else [],
        "files": files,
        "memory_words": _memory_words(run),
        "any_memory": any(row.memory_bytes is not None for row in rows),
    }
    template = environment.get_template("report.html.j2")
    whole = template.render(context | {"contents": ()})
    return template.render(context | {"contents": contents(whole)})


def contents(page: str) -> list[tuple[str, str]]:
    """(id, heading) of every section of a page, for the links on top."""
    return re.findall(r'<section[^>]* id="([^"]+)">\s*<h2>([^<]+)</h2>', page)


def _evaluations(run: RunFolder) -> dict[str, Any]:
    """A row per budget and other model, a column per task and metric; empty where nothing was evaluated."""
    if not run.evaluations:
        return {}
    order = {name: budget_colour(i) for i, name in enumerate(run.budget_names)}
    first = {score.column: score for score in reversed(run.evaluations)}
    columns = [first[column] for column in evaluation_columns(run.evaluations)]
    versions = sorted({score.version for score in run.evaluations if score.version})
    found = evaluation_rows(run.evaluations, run.budget_names)
    rows = [(order[row.budget] if row.budget else None, row.model, row.scores) for row in found]
    return {"columns": columns, "rows": rows, "versions": ", ".join(versions)}


def chips(run: RunFolder, rows: list[BudgetRow]) -> list[tuple[str, str]]:
    """(tone, words) of the lines under the title."""
    found = []
    verified = run.results.get("verified")
    if verified is True:
        worst = max((r.max_abs_difference for r in rows if r.max_abs_difference is not None), default=None)
        found.append(("good", "verified" + (f": largest difference {worst:.2g}" if worst is not None else "")))
    elif verified is False:
        failed = ", ".join(r.name for r in rows if r.verified is False)
        found.append(("bad", f"verification failed{': ' + failed if failed else ''}"))
    else:
        found.append(("plain", "not verified yet"))
    done, total = run.last_step, run.total_steps
    if run.resumes:
        times = len(run.resumes)
        found.append(("plain", f"resumed {'once' if times == 1 else f'{times} times'}"))
    if done is not None:
        found.append(("plain", f"{done:,} of {total:,} steps" if total else f"{done:,} steps"))
        if tokens := Clock(run).end:
            found.append(("plain", f"{count(tokens)} training tokens"))
    if run.architecture:
        found.append(("plain", f"{run.architecture.num_layers} layers in the parent"))
    return found


def cards(run: RunFolder, rows: list[BudgetRow]) -> list[dict[str, Any]]:
    """The short story of every budget: cost, loss, distance to the parent, and what training won back."""
    parent, found = parent_loss(run), []
    for i, row in enumerate(rows):
        gap = None if parent is None or row.final is None else row.final - parent
        closed = None
        if parent is not None and row.final is not None and row.before is not None and row.before - parent > 1e-3:
            closed = min(100.0, 100 * (row.before - row.final) / (row.before - parent))  # below the parent: all of it
        found.append({"colour": budget_colour(i), "row": row, "gap": gap, "closed": closed})
    return found


def facts(run: RunFolder) -> list[tuple[str, str, str]]:
    """(name, value, what it is of) of speed, memory and use of the GPUs."""
    speed, memory, used, work = throughput(run), peak_memory(run), utilisation(run), logged_flops(run)
    if not run.train:
        return []
    processes = run.sessions[-1]["processes"] if run.sessions else None
    on = f"{processes} x {'CPU process' if run.device == 'cpu' else run.device}" if processes else ""
    where = "process that had most, resident" if run.device == "cpu" else "GPU that had most, allocated"
    share = f"of {run.conditions.peak_tflops:g} TFLOP/s a GPU (report.peak_tflops)"
    done = f"{work:.3g} FLOPs in all" if work else ""
    return [
        ("throughput", NOT_MEASURED if speed is None else f"{count(speed)} tokens/s", on or "over all steps"),
        ("peak memory", *((NOT_MEASURED, "") if memory is None else (size(memory), where))),
        ("model FLOPs utilisation", *((NOT_MEASURED, done) if used is None else (f"{used:.1f}%", share))),
    ]


def _parts(run: RunFolder) -> list[tuple[str, bool, float, float | None]]:
    """(name, whether it is part of the row above, seconds, percent of all) of the time table."""
    found = parts(run)
    total = sum(part.seconds for part in found if part.part_of is None and part.name not in TOTALS)
    return [
        (p.name, p.part_of is not None, p.seconds, None if p.name in TOTALS or not total else 100 * p.seconds / total)
        for p in found
    ]


def quantity(one: Compared, value: float | None) -> str:
    """A planned or actual quantity in its unit."""
    if value is None:
        return DASH
    if one.kind == COUNT:
        return count(value)
    if one.kind == BYTES:
        return size(value)
    return f"{value:.3g}" if one.kind == FLOPS else f"{value:,.3g} h"


def flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, words) of nested provenance."""
    return (
        [(key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in leaves(values)]
        if values
        else []
    )


def _without_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The page has the resolved configuration in a place of its own, with origins."""
    return {key: value for key, value in values.items() if key != "config"}


def _parent_sizes(run: RunFolder) -> dict[str, str]:
    full = run.subnet({})
    return kept_sizes(BudgetRow(name="parent", subnet=full.to_dict() if full else None))


def _memory_words(run: RunFolder) -> str:
    at = run.conditions
    return f"{at.batch_size} x {at.sequence_length:,} tokens, {profile_name(at.profile)}"


def marked(words: str) -> Markup:
    """Words with `code` in backticks."""
    parts = [escape(part) for part in words.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def count(value: float | None) -> str:
    """12,310,001,152."""
    return DASH if value is None else f"{value:,.0f}"


def loss(value: float | None) -> str:
    """Nats, four decimals."""
    return DASH if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Two decimals."""
    return DASH if value is None else f"{value:.2f}%"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return DASH if value is None else f"{value:+.4f}".replace("-", "−")


def size(value: float | None) -> str:
    """Bytes in the unit that suits them (decimal, as budgets are given)."""
    if value is None:
        return DASH
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """4.2 s, 3 min 05 s, 2 h 10 min."""
    if value is None:
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
