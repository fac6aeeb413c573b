"""The axis that figures of a run share: tokens seen, the phases along it, and names where curves end.

Time is tokens seen by the whole run (all budgets), the one axis on which curricula of different lengths agree.
"""

from bisect import bisect_right
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .drawing import short_count, spread, tip
from .palette import LIGHT
from .run_folder import RunFolder

POINTS = 240  # most points a training curve is drawn with; each is the mean of its share of the steps


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


def end_labels(axes: Axes, x: float, ends: Sequence[tuple[str, str, float, str]]) -> None:
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


def resumes(rows: Sequence[Axes], run: RunFolder, clock: Clock) -> None:
    """A dotted line where the run went on after an interruption."""
    for step in run.resumes:
        for axes in rows:
            line = axes.axvline(clock(step), color=LIGHT["muted"], linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)
            tip(line, f"resumed after step {step:,}")


def shade(rows: Sequence[Axes], run: RunFolder, clock: Clock) -> None:
    """Alternate bands for the phases, named in the uppermost axes, and a line for every resume."""
    resumes(rows, run, clock)
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


def token_axis(axes: Axes, clock: Clock) -> None:
    axes.set_xlim(0, max(clock.end, 1))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    axes.set_xlabel(f"training tokens of all budgets ({clock.steps[-1]:,} steps)")
