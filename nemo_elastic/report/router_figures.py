"""What the router believed over time: the probability of every choice, stacked, a panel per budget and dim."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..space.dims import KIND_OF_DIM
from .drawing import new_figure, short_count, tip
from .palette import KIND_COLOURS, LIGHT, budget_colour
from .run_folder import RunFolder
from .time_axis import Clock
from .training_curves import SIZE_WORDS, router_series

Series = Mapping[str, Mapping[str, Sequence[tuple[int, Sequence[float]]]]]


def probability_series(run: RunFolder) -> Series:
    """budget -> dim -> (step, probability of each choice from the largest size down, mean over layers)."""
    found: dict[str, dict[str, list[tuple[int, list[float]]]]] = {}
    for step, name, entry in router_series(run):
        for dim, rows in (entry.get("probabilities") or {}).items():
            if rows and dim in SIZE_WORDS:
                mean = [fmean(column) for column in zip(*rows, strict=True)]
                found.setdefault(name, {}).setdefault(dim, []).append((step, mean))
    return found


def probabilities(run: RunFolder, series: Series) -> Figure:
    """Stacked over time; the strongest tone is the parent's own size, lighter ones are smaller."""
    clock, names = Clock(run), [name for name in run.budget_names if name in series]
    dims = [dim for dim in SIZE_WORDS if any(dim in series[name] for name in names)]
    with new_figure(0.5 + 1.45 * len(names)) as figure:
        grid = figure.subplots(len(names), len(dims), sharex=True, sharey=True, squeeze=False)
        for line, name in zip(grid, names, strict=True):
            for axes, dim in zip(line, dims, strict=True):
                points = series[name].get(dim, [])
                kind = KIND_OF_DIM.get(dim)
                _stack(axes, clock, points, LIGHT[KIND_COLOURS[kind]] if kind else LIGHT["ink"], sizes(run, dim))
                axes.set_ylim(0, 100)
                axes.grid(False)
            colour = LIGHT[budget_colour(run.budget_names.index(name))]
            line[0].set_ylabel(name, color=colour, fontweight="bold")
            line[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
        for axes, dim in zip(grid[0], dims, strict=True):
            axes.set_title(SIZE_WORDS[dim], fontsize=9.5)
        for axes in grid[-1]:
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
        figure.supxlabel("training tokens of all budgets", fontsize=9.5, color=LIGHT["muted"])
    return figure


def sizes(run: RunFolder, dim: str) -> tuple[int, ...]:
    """Choices of a dim from the largest down, where the configuration says."""
    return run.family.space.dims[dim].choices if run.family else ()


def _stack(axes: Any, clock: Clock, points: Sequence[tuple[int, Sequence[float]]], colour: str, named: Any) -> None:
    if not points:
        return
    xs, count = [clock(step) for step, _ in points], len(points[0][1])
    below = [0.0] * len(points)
    for i in range(count):
        above = [b + 100 * p[i] for b, (_, p) in zip(below, points, strict=True)]
        tone = 0.95 - 0.8 * i / max(count - 1, 1)
        area = axes.fill_between(xs, below, above, color=colour, alpha=tone, linewidth=0)
        what = f"size {named[i]}" if len(named) == count else f"choice {i + 1} of {count}"
        tip(area, f"{what}: {100 * points[-1][1][i]:.1f}% at step {points[-1][0]}")
        below = above
