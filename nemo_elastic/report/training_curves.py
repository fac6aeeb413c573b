"""Figures of a run over time: loss per budget, and what the router did.

Time is tokens seen by the whole run (all budgets), the one axis on which curricula of different lengths agree.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..kinds import dims
from .budget_rows import KEPT, parent_loss
from .drawing import loss_axis, new_figure, short_count, spread, tip
from .palette import LIGHT, budget_colour, budget_marker
from .run_folder import RunFolder

POINTS = 240  # most points a training curve is drawn with; each is the mean of its share of the steps
KD_RANGE = 300.0  # KD losses under the largest by more than this factor are drawn at the edge
SIZE_WORDS = {
    "hidden_size": "hidden size",
    **{dim.name: dim.words for dim in dims()},
    "num_layers": "layers",
}


class Clock:
    """Tokens seen up to a step, from the training log; validations correct it where steps were not logged."""

    def __init__(self, run: RunFolder) -> None:
        known = {r["step"]: sum(r["tokens"].values()) for r in run.validation if r.get("tokens")}
        seen, by_step = 0, {0: 0}
        for record in run.train:
            seen += sum(b.get("tokens", 0) for b in record.get("budgets", {}).values())
            seen = known.get(record["step"], seen)
            by_step[record["step"]] = seen
        by_step.update(known)
        self.steps = sorted(by_step)
        self.tokens = [by_step[s] for s in self.steps]

    def __call__(self, step: int) -> int:
        """Tokens seen when `step` steps are done."""
        return self.tokens[max(0, bisect_right(self.steps, step) - 1)]

    @property
    def end(self) -> int:
        """Tokens seen in all."""
        return self.tokens[-1]


def phases(run: RunFolder) -> list[tuple[str, int, int]]:
    """(phase, first step, last step) of every stretch of the training log."""
    found: list[tuple[str, int, int]] = []
    for record in run.train:
        phase, step = str(record.get("phase", "")), record["step"]
        if found and found[-1][0] == phase:
            found[-1] = (phase, found[-1][1], step)
        else:
            found.append((phase, step, step))
    return found


def binned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of equally many neighbours."""
    size = max(1, -(-len(points) // most))
    shares = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in shares]


def losses(run: RunFolder) -> Figure:
    """Held-out loss per budget over tokens, and the distillation loss of the training steps below."""
    clock, names = Clock(run), run.budget_names
    with new_figure(5.6 if run.train else 3.7) as figure:
        ratios = [1.65, 1] if run.train else [1]
        rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        _shade(rows, run, clock)
        _heldout(rows[0], run, clock, names)
        if run.train:
            _distillation(rows[1], run, clock, names)
        _token_axis(rows[-1], clock)
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
    _end_labels(axes, clock.end, [(names[i], budget_colour(i), y, f"{y:.3f}") for i, y in ends])


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
    _end_labels(axes, clock.end, ends)


def _end_labels(axes: Axes, x: float, ends: Sequence[tuple[str, str, float, str]]) -> None:
    """The name and last value of every curve where curves end, moved apart."""
    if not ends:
        return
    transform, height = axes.transScale, axes.get_window_extent().height
    low, high = (transform.transform((1, y))[1] for y in axes.get_ylim())
    places = [(transform.transform((1, max(y, axes.get_ylim()[0])))[1] - low) / (high - low) for _, _, y, _ in ends]
    for (name, colour, _, value), place in zip(ends, spread(places, 17 / max(height * 0.72, 1)), strict=True):
        axes.annotate(
            f"{name}  {value}", (x, place), xycoords=("data", "axes fraction"), xytext=(9, 0),
            textcoords="offset points", color=LIGHT[colour], va="center", fontweight="bold",
            fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _shade(rows: Sequence[Axes], run: RunFolder, clock: Clock) -> None:
    """Alternate bands for the phases, named in the uppermost axes."""
    stretches = phases(run)
    for i, (name, first, last) in enumerate(stretches):
        left, right = clock(first - 1), clock(last)
        for axes in rows:
            if i % 2 == 0:
                axes.axvspan(left, right, color=LIGHT["faint"], alpha=0.75, linewidth=0, zorder=0)
        wide = (right - left) >= 0.05 * max(clock.end, 1)
        if wide:
            rows[0].annotate(
                name, ((left + right) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, -5),
                textcoords="offset points", ha="center", va="top", fontsize=8.5, color=LIGHT["muted"],
            )  # fmt: skip


def _token_axis(axes: Axes, clock: Clock) -> None:
    axes.set_xlim(0, max(clock.end, 1))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    axes.set_xlabel(f"training tokens of all budgets ({clock.steps[-1]:,} steps)")


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
        _shade(rows, run, clock)
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
            _end_labels(axes, last, ends)
        tolerance = 100 * run.config.router.tolerance if run.config else 0.0
        rows[0].axhline(0, color=LIGHT["muted"], linewidth=1)
        rows[0].axhspan(-tolerance, tolerance, color=LIGHT["good"], alpha=0.14, linewidth=0)
        _token_axis(rows[1], clock)
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
