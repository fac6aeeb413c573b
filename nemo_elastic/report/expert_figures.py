"""How evenly tokens meet the experts of every budget: over the run, and per layer in the last logged steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .drawing import new_figure, tip
from .palette import LIGHT, budget_colour
from .run_folder import RunFolder
from .time_axis import Clock, end_labels, shade, token_axis

TOP = 2.0  # times the mean: the strongest tone
COLUMNS = 3


def load_series(run: RunFolder) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """budget -> (step, what was logged of its experts since the row before)."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for record in run.train:
        for name, row in record.get("expert_load", {}).items():
            found.setdefault(name, []).append((record["step"], row))
    return {name: found[name] for name in run.budget_names if name in found}


def shares(tokens: Sequence[int | None]) -> list[float | None]:
    """Tokens of every expert over the mean of those that are there."""
    kept = [n for n in tokens if n is not None]
    return [None if n is None else n * len(kept) / max(1, sum(kept)) for n in tokens]


def load(run: RunFolder) -> Figure:
    """Above, the busiest expert of every budget over time; below, every expert of every layer at the end."""
    series, clock = load_series(run), Clock(run)
    layers, lines = max(len(rows[-1][1]["tokens"]) for rows in series.values()), -(-len(series) // COLUMNS)
    below = lines * (0.5 + 0.17 * layers)
    with new_figure(2.6 + below) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=[2.6, below])
        _busiest(upper.subplots(), run, clock, series)
        grid = lower.subplots(lines, min(COLUMNS, len(series)), squeeze=False)
        for axes in grid.flat[len(series) :]:
            axes.set_visible(False)
        for axes, (name, rows) in zip(grid.flat, series.items(), strict=False):
            _layers(axes, name, LIGHT[budget_colour(run.budget_names.index(name))], *rows[-1])
    return figure


def _busiest(axes: Axes, run: RunFolder, clock: Clock, series: Mapping[str, list]) -> None:
    axes.set_title("Tokens of the busiest expert over the mean (mean over layers)")
    shade([axes], run, clock)
    ends = []
    for name, rows in series.items():
        place = run.budget_names.index(name)
        points = [(clock(step), row["busiest"]) for step, row in rows]
        (line,) = axes.plot(*zip(*points, strict=True), color=LIGHT[budget_colour(place)], linewidth=1.7)
        tip(line, f"{name}: busiest expert over the mean")
        ends.append((name, budget_colour(place), points[-1][1], f"{points[-1][1]:.2f}"))
    axes.set_ylim(1, 1 + 1.12 * (max(axes.get_ylim()[1], 1.1) - 1))
    end_labels(axes, clock.end, ends)
    token_axis(axes, clock)


def _layers(axes: Axes, name: str, colour: str, step: int, row: Mapping[str, Any]) -> None:
    rows = {layer: shares(tokens) for layer, tokens in row["tokens"].items()}
    for y, (layer, values) in enumerate(rows.items()):
        for x, value in enumerate(values):
            if value is None:
                axes.plot(x, y, ".", color=LIGHT["line"], markersize=3)
                continue
            tone = 0.06 + 0.94 * min(value / TOP, 1.0)
            box = axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor=colour, alpha=tone, linewidth=0))
            tip(box, f"{name}, layer {layer}, expert {x}: {value:.2f} times the mean at step {step}")
    axes.set_xlim(-0.6, max(map(len, rows.values())) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [f"layer {layer}" for layer in rows], fontsize=8)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    idle = f", {row['idle']:.0%} without a token" if row["idle"] else ""
    axes.set_title(f"{name}: busiest {row['busiest']:.2f} x the mean{idle}", color=colour, fontsize=9.5)
