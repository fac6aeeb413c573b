"""Held-out loss per budget and source of a blend: a table of the end, curves over time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .budget_rows import BudgetRow
from .drawing import loss_axis, new_figure, short_count, tip
from .palette import LIGHT, budget_colour
from .run_folder import RunFolder
from .time_axis import Clock, resumes


@dataclass(frozen=True)
class SourceRow:
    """One source: its held-out tokens, and per budget (loss before training, loss now)."""

    name: str
    tokens: float
    losses: tuple[tuple[float | None, float | None], ...]


def source_series(run: RunFolder) -> Iterator[tuple[int, str, str, float, float]]:
    """(step, budget, source, loss, tokens) of every validation."""
    for record in run.validation:
        for budget, sources in (record.get("sources") or {}).items():
            for source, one in sources.items():
                yield record["step"], budget, source, one["loss"], one["tokens"]


def source_rows(run: RunFolder, rows: list[BudgetRow]) -> list[SourceRow]:
    """A row per source, in the order of the blend; nothing where there is one source."""
    last = run.validation[-1].get("sources") or {} if run.validation else {}
    names = list(dict.fromkeys(source for sources in last.values() for source in sources))
    found = []
    for name in names:
        pairs = []
        for row in rows:
            before = _sources_before(run, row).get(name, {})
            pairs.append((before.get("loss"), last.get(row.name, {}).get(name, {}).get("loss")))
        tokens = next(sources[name]["tokens"] for sources in last.values() if name in sources)
        found.append(SourceRow(name, tokens, tuple(pairs)))
    return found


def _sources_before(run: RunFolder, row: BudgetRow) -> dict:
    measured = run.zero_shot.get("budgets", {}).get(row.name, {})
    if measured and measured["subnet"] == row.subnet:
        return measured.get("sources") or {}
    first = run.validation[0]
    same = first["step"] == 0 and first.get("subnets", {}).get(row.name) == row.subnet
    return (first.get("sources") or {}).get(row.name, {}) if same else {}


def curves(run: RunFolder) -> Figure:
    """A panel per source, a curve per budget."""
    clock, series = Clock(run), list(source_series(run))
    sources = list(dict.fromkeys(source for _, _, source, _, _ in series))
    columns = min(3, len(sources))
    lines = -(-len(sources) // columns)
    with new_figure(0.6 + 2.1 * lines) as figure:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(sources) :]:
            axes.set_visible(False)
        for axes, source in zip(grid.flat, sources, strict=False):
            resumes([axes], run, clock)
            axes.set_title(short_name(source, sources))
            for i, name in enumerate(run.budget_names):
                points = [(clock(s), loss) for s, budget, of, loss, _ in series if (budget, of) == (name, source)]
                if points:
                    colour = LIGHT[budget_colour(i)]
                    (line,) = axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=name)
                    tip(line, f"{name} on {source}: {points[-1][1]:.4f}")
            axes.set_xlim(0, max(clock.end, 1))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
            axes.xaxis.set_tick_params(labelbottom=True)
        loss_axis(grid[0, 0], [loss for *_, loss, _ in series])
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), labelcolor="linecolor")
    return figure


def short_name(source: str, sources: list[str]) -> str:
    """The last part of a path, where that tells the sources apart; a long one loses its middle."""
    names = [PurePath(one).name for one in sources]
    name = PurePath(source).name if len(set(names)) == len(names) else source
    return name if len(name) <= 34 else f"{name[:16]}...{name[-15:]}"
