"""The Pareto figure: held-out loss against parameters and against memory, before and after training."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..cost.conditions import profile_name
from .baselines import KINDS
from .budget_rows import BudgetRow, parent_loss, parent_parameters
from .drawing import loss_axis, new_figure, short_count, tip
from .palette import LIGHT, budget_colour, budget_marker
from .run_folder import RunFolder

GB = 1e9
MARKS = {"zero_shot": "1", "distilled_alone": "x", "scratch": "+"}


def pareto(run: RunFolder, rows: list[BudgetRow]) -> Figure:
    """Every budget twice: hollow before training (zero-shot), full after it; the nested family is one line."""
    with new_figure(3.7) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        losses = [v for row in rows for v in (row.before, row.final)] + [b.heldout_loss for b in run.baselines]
        for axes in (left, right):
            loss_axis(axes, [*losses, parent_loss(run)])
        _points(left, [(row.parameters, row) for row in rows])
        _points(right, [(row.memory_bytes, row) for row in rows])
        _baselines(left, run, "parameters")
        _baselines(right, run, "memory_bytes")
        left.set_title("Held-out loss against parameters")
        left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
        left.set_xlabel("parameters")
        at = run.conditions
        unit, words = _memory_unit(rows)
        right.set_title("Held-out loss against memory")
        right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / unit:.3g}"))
        right.set_xlabel(
            f"{words} to serve {at.batch_size} x {at.sequence_length:,} tokens ({profile_name(at.profile)})"
        )
        parent, count = parent_loss(run), parent_parameters(run)
        if parent is not None and count is not None:
            (star,) = left.plot(count, parent, "*", markersize=13, color=LIGHT["muted"], zorder=2)
            tip(star, f"parent: {parent:.4f} at {count:,} parameters")
        _key(left, run)
    return figure


def _points(axes: Axes, points: list[tuple[float | None, BudgetRow]]) -> None:
    known = [(x, row.final) for x, row in points if x is not None and row.final is not None]
    if known:
        axes.plot(*zip(*sorted(known), strict=True), color=LIGHT["muted"], linewidth=1.2, zorder=1)
    for i, (x, row) in enumerate(points):
        if x is None:
            continue
        colour, marker = LIGHT[budget_colour(i)], budget_marker(i)
        if row.before is not None and row.final is not None:
            axes.plot([x, x], [row.before, row.final], color=colour, linewidth=1.2, linestyle=(0, (1, 2)), zorder=2)
        for loss, face, words in (
            (row.before, LIGHT["paper"], "before training"),
            (row.final, colour, "after training"),
        ):
            if loss is None:
                continue
            (dot,) = axes.plot(x, loss, marker, color=face, markeredgecolor=colour, markeredgewidth=1.8, markersize=8)
            dot.set_zorder(4)
            tip(dot, f"{row.name} {words}: {loss:.4f}")
        if row.final is not None:
            axes.annotate(
                row.name, (x, row.final), xytext=(9, 4), textcoords="offset points", color=colour,
                fontweight="bold", fontsize=9, va="bottom",
            )  # fmt: skip
    axes.margins(x=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _memory_unit(rows: list[BudgetRow]) -> tuple[float, str]:
    largest = max((row.memory_bytes or 0 for row in rows), default=0)
    return (GB, "GB") if largest >= GB else (1e6, "MB")


def _baselines(axes: Axes, run: RunFolder, cost: str) -> None:
    names = run.budget_names
    for point in run.baselines:
        if (x := getattr(point, cost)) is None:
            continue
        colour = LIGHT[budget_colour(names.index(point.budget))] if point.budget in names else LIGHT["muted"]
        (mark,) = axes.plot(x, point.heldout_loss, MARKS[point.kind], color=colour, markersize=9, markeredgewidth=2)
        mark.set_zorder(5)
        tip(mark, f"{point.words}: {point.heldout_loss:.4f}" + (f" ({point.note})" if point.note else ""))


def _key(axes: Axes, run: RunFolder) -> None:
    """What hollow, full, star and crosses mean."""
    ink = LIGHT["muted"]
    marks = [
        Line2D([], [], marker="o", linestyle="", color=LIGHT["paper"], markeredgecolor=ink, markeredgewidth=1.8),
        Line2D([], [], marker="o", linestyle="", color=ink),
        Line2D([], [], marker="*", linestyle="", color=ink, markersize=11),
    ]
    words = ["before training (zero-shot)", "after training", "parent"]
    for kind in dict.fromkeys(point.kind for point in run.baselines):
        mark = Line2D([], [], marker=MARKS[kind], linestyle="", color=ink, markersize=8, markeredgewidth=2)
        marks, words = [*marks, mark], [*words, f"{KINDS[kind]} (outside the family)"]
    axes.legend(marks, words, loc="upper right", fontsize=8.5, labelcolor=ink, handletextpad=0.3)
