"""Figures of a run over time: loss per budget, and what the router did.

Time is tokens seen by the whole run (all budgets), the one axis on which curricula of different lengths agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..kinds import dims
from .budget_rows import KEPT, parent_loss
from .drawing import loss_axis, new_figure, short_count, tip
from .palette import LIGHT, budget_colour, budget_marker
from .run_folder import RunFolder
from .spending import speed_series, utilisation_series
from .time_axis import POINTS, Clock, binned, end_labels, shade, token_axis

KD_RANGE = 300.0  # KD losses under the largest by more than this factor are drawn at the edge
SIZE_WORDS = {
    "hidden_size": "hidden size",
    **{dim.name: dim.words for dim in dims()},
    "num_layers": "layers",
}


def losses(run: RunFolder) -> Figure:
    """Held-out loss per budget over tokens, and the distillation loss of the training steps below."""
    clock, names = Clock(run), run.budget_names
    with new_figure(5.6 if run.train else 3.7) as figure:
        ratios = [1.65, 1] if run.train else [1]
        rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        shade(rows, run, clock)
        _heldout(rows[0], run, clock, names)
        if run.train:
            _distillation(rows[1], run, clock, names)
        token_axis(rows[-1], clock)
    return figure


def _heldout(axes: Axes, run: RunFolder, clock: Clock, names: Sequence[str]) -> None:
    axes.set_title("Held-out loss (nats per token)")
    ends: list[tuple[int, float]] = []
    for i, name in enumerate(names):
        points = [(r["step"], r["losses"][name]) for r in run.validation if name in r.get("losses", {})]
        if not points:
            continue
        colour = LIGHT[budget_colour(i)]
        xs, ys = [clock(step) for step, _ in points], [loss for _, loss in points]
        axes.plot(xs, ys, color=colour, linewidth=2, zorder=3)
        for x, (step, loss) in zip(xs, points, strict=True):
            zero_shot = step == 0
            face = LIGHT["paper"] if zero_shot else colour
            (dot,) = axes.plot(x, loss, budget_marker(i), color=face, markeredgecolor=colour, zorder=4 + zero_shot)
            dot.set(markersize=7 if zero_shot else 4.5, markeredgewidth=1.6 if zero_shot else 0.5, clip_on=False)
            tip(dot, f"{name}: {loss:.4f} at step {step}" + (" (zero-shot)" if zero_shot else ""))
        ends.append((i, ys[-1]))
    parent = parent_loss(run)
    loss_axis(axes, [v for r in run.validation for v in r.get("losses", {}).values()] + [parent])
    if parent is not None:
        axes.axhline(parent, color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"parent {parent:.3f}", (0.5, parent), xycoords=("axes fraction", "data"), xytext=(0, -5),
            textcoords="offset points", ha="center", va="top", color=LIGHT["muted"], fontsize=8.5,
        )  # fmt: skip
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, parent / (high / low) ** 0.09), high)
    end_labels(axes, clock.end, [(names[i], budget_colour(i), y, f"{y:.3f}") for i, y in ends])


def _distillation(axes: Axes, run: RunFolder, clock: Clock, names: Sequence[str]) -> None:
    axes.set_title("Distillation loss of the training steps (KD, nats per token)")
    drawn: list[float] = []
    ends = []
    for i, name in enumerate(names):
        points = [(clock(r["step"]), r["budgets"][name].get("kd")) for r in run.train if name in r.get("budgets", {})]
        points = [(x, y) for x, y in points if y is not None and y == y and 0 < y < float("inf")]
        if not points:
            continue
        colour, raw, smooth = LIGHT[budget_colour(i)], binned(points), binned(points, 48)
        axes.plot(*zip(*raw, strict=True), color=colour, linewidth=0.8, alpha=0.28)
        (line,) = axes.plot(*zip(*smooth, strict=True), color=colour, linewidth=1.8)
        tip(line, f"{name}: KD loss of its micro-batches")
        drawn += [y for _, y in raw]
        ends.append((name, budget_colour(i), smooth[-1][1], f"{smooth[-1][1]:.3f}"))
    top = max(drawn, default=0.0)
    loss_axis(axes, [y for y in drawn if y > top / KD_RANGE])
    end_labels(axes, clock.end, ends)


def router_series(run: RunFolder) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(step, budget, what was logged of its choice)."""
    for record in run.train:
        for name, entry in record.get("router", {}).items():
            yield record["step"], name, entry


def router(run: RunFolder) -> Figure:
    """Relative cost error of the router's own choice, and its price."""
    clock, names = Clock(run), run.budget_names
    panels = (
        ("argmax_error", "Cost of the router's choice against its budget", 100.0, "%+.3g%%"),
        ("price", "Price of a budget (weight of its cost error)", 1.0, "%.3g"),
    )
    with new_figure(4.4) as figure:
        rows = figure.subplots(2, 1, sharex=True)
        shade(rows, run, clock)
        for axes, (key, title, scale, form) in zip(rows, panels, strict=True):
            axes.set_title(title)
            ends, last = [], 0.0
            for i, name in enumerate(names):
                points = [(clock(s), scale * e[key]) for s, n, e in router_series(run) if n == name and key in e]
                if not points:
                    continue
                points = points if len(points) <= 2 * POINTS else binned(points)
                (line,) = axes.plot(*zip(*points, strict=True), color=LIGHT[budget_colour(i)], linewidth=1.7)
                tip(line, f"{name}: {title.lower()}")
                last = max(last, points[-1][0])
                ends.append((name, budget_colour(i), points[-1][1], form % points[-1][1]))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, f=form: f % y if y else f.replace("+", "") % 0))
            axes.set_ylim(*axes.get_ylim())
            end_labels(axes, last, ends)
        tolerance = 100 * run.config.router.tolerance if run.config else 0.0
        rows[0].axhline(0, color=LIGHT["muted"], linewidth=1)
        rows[0].axhspan(-tolerance, tolerance, color=LIGHT["good"], alpha=0.14, linewidth=0)
        token_axis(rows[1], clock)
    return figure


def speed(run: RunFolder) -> Figure:
    """Tokens per second of the steps, and on GPUs the share of their peak."""
    clock, used = Clock(run), utilisation_series(run)
    panels = [("Tokens per second", speed_series(run), short_count)]
    panels += [("Share of the GPUs' peak", used, lambda y: f"{y:.3g}%")] if used else []
    with new_figure(0.6 + 1.6 * len(panels)) as figure:
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        shade(rows, run, clock)
        for axes, (title, series, words) in zip(rows, panels, strict=True):
            axes.set_title(title)
            points = binned([(clock(step), y) for step, y in series])
            (line,) = axes.plot(*zip(*points, strict=True), color=LIGHT["budget-1"], linewidth=1.7)
            tip(line, title.lower())
            axes.set_ylim(0, 1.25 * max(y for _, y in points))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, words=words: words(y)))
        token_axis(rows[-1], clock)
    return figure


def choices(run: RunFolder) -> Figure:
    """Kept share of the parent per elastic dim over time: what would have been extracted at each validation."""
    clock, names = Clock(run), run.budget_names
    shown = [d for d in KEPT if len({_share(run, r, n, d) for r in run.validation for n in names} - {None}) > 1]
    columns = min(3, max(1, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    with new_figure(0.5 + 1.75 * lines) as figure:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, dim in zip(grid.flat, shown, strict=False):
            axes.set_title(SIZE_WORDS[dim])
            for i, name in enumerate(names):
                points = [(clock(r["step"]), _share(run, r, name, dim)) for r in run.validation]
                points = [(x, y) for x, y in points if y is not None]
                if points:
                    xs, ys = zip(*points, strict=True)
                    axes.plot(xs, ys, color=LIGHT[budget_colour(i)], linewidth=1.8, drawstyle="steps-post", label=name)
            axes.set_ylim(0, 106)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
            axes.set_xlim(0, max(clock.end, 1))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
            axes.xaxis.set_tick_params(labelbottom=True)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), labelcolor="linecolor")
    return figure


def _share(run: RunFolder, record: Mapping[str, Any], name: str, dim: str) -> float | None:
    """Kept units in percent of the parent's; the mean where layers differ."""
    size = record.get("subnets", {}).get(name, {}).get(dim)
    full = getattr(run.architecture, dim, None) if run.architecture else None
    if size in (None, []) or not full:
        return None
    return 100 * (sum(size) / len(size) if isinstance(size, list) else size) / full
