"""The figures of docs/results.md: loss against tokens and CPU time, solved problems, what was tried."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from price import FAMILIES, one_by_one
from runs import BUDGETS, CHILDREN, RUNS

COLOURS = {"family": "#0072b2", "alone": "#e69f00", "whole": "#d55e00", "scratch": "#666666", "parent": "#000000",
           "greedy-family": "#009e73", "greedy-alone": "#cc79a7"}  # fmt: skip
LABELS = {
    "family": "in the family",
    "alone": "alone, the family's tokens for it",
    "whole": "alone, all of the family's steps",
    "scratch": "from scratch",
    "greedy-family": "in the family, shapes by greedy search",
    "greedy-alone": "alone, these shapes and the family's tokens",
}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
Result = Mapping[str, Any]


def write(parents: Mapping[int, Any], folder: Path) -> list[str]:
    """Figures of every parent's runs, as far as there are enough of them; their names, with the parent's number.

    The hash of the results goes into each: a figure of other results is found out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts, written = {"Software": None, "Results": digest(parents)}, []
    for kind, make in {"tokens": tokens, "time": time, "solved": solved, "tries": tries, "price": price,
                       "predicted": predicted}.items():  # fmt: skip
        for number, results in parents.items():
            name = f"{kind}-{number}"
            with plt.rc_context(STYLE):
                figure = make(results)
                if figure is not None:
                    temporary = folder / f"{name}.tmp.png"
                    figure.savefig(temporary, dpi=130, bbox_inches="tight", metadata=facts)
                    temporary.replace(folder / f"{name}.png")
                    plt.close(figure)
                    written.append(name)
    return written


def digest(parents: Mapping[int, Any]) -> str:
    """SHA-256 of everything that the figures could show."""
    runs = [[*key, run] for results in parents.values() for key, run in results.runs.items()]
    more = [[r.parent, [*r.explored.values()], [*r.between.values()]] for r in parents.values()]
    return hashlib.sha256(json.dumps([runs, more]).encode()).hexdigest()


def _curves(results: Any, name: str, budget: str, x: str) -> list[tuple[list[float], list[float]]]:
    found = []
    for seed in results.seeds(name):
        points = results.runs[name, seed]["curve"]
        places = [p["cpu"] if x == "cpu" else p["tokens"][budget] / 1000 for p in points]
        found.append((places, [p["losses"][budget] for p in points]))
    return found


def tokens(results: Any) -> Any:
    """Held-out loss of a child against the tokens that it was trained on: all of it, and where the teachers lead."""
    if not results.seeds("family"):
        return None
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    parent = _parent_on_curve(results)
    for column, child in enumerate(CHILDREN):
        for axis in axes[:, column]:
            for kind, label in LABELS.items():
                name = kind if kind.endswith("family") else f"{kind}-{child}"
                for number, (x, y) in enumerate(_curves(results, name, child, "tokens")):
                    axis.plot(x[1:], y[1:], color=COLOURS[kind], lw=1.2, marker="o", ms=2.5,
                              label=label if number == 0 else None)  # fmt: skip
            axis.axhline(parent, color=COLOURS["parent"], lw=0.8, ls=":", label="parent")
        longest = [x[-1] for x, _ in _curves(results, f"whole-{child}", child, "tokens")]
        axes[0, column].set(title=f"{child}: {BUDGETS[child]:.0%} of the parameters", xscale="log")
        axes[0, column].xaxis.set_major_locator(matplotlib.ticker.FixedLocator([25 * 2**n for n in range(8)]))
        axes[0, column].xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes[0, column].xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes[1, column].set(ylim=(parent - 0.01, parent + 0.15), xlim=(0, 1.05 * max(longest, default=200)))
        axes[1, column].set_xlabel("thousand tokens of this child")
    for axis, words in zip(axes[:, 0], ("held-out loss, nats per token", "the same, near the parent"), strict=True):
        axis.set_ylabel(words)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def _parent_on_curve(results: Any) -> float:
    """The parent's loss on the windows of the curves: the full member before any training."""
    return statistics.fmean(results.runs["family", s]["curve"][0]["losses"]["full"] for s in results.seeds("family"))


TIMED = {  # panel: child and runs, first seed; the last panel's have no other budget than the child
    "large in the family": ("large", ("shapes-own", "speed-masked", "family", "speed-soft")),
    "small in the family": ("small", ("shapes-own", "speed-masked", "family", "speed-soft")),
    "small alone": ("small", ("whole-small", "speed-masked-small")),
}
TIMED_AS = {
    "shapes-own": ("sliced", "#0072b2"),
    "speed-masked": ("masked, the same shapes", "#d55e00"),
    "family": ("learned shapes: soft, then sliced", "#009e73"),
    "speed-soft": ("soft masks to the end", "#cc79a7"),
    "whole-small": ("sliced", "#0072b2"),
    "speed-masked-small": ("masked, the same shapes", "#d55e00"),
}


def time(results: Any) -> Any:
    """Held-out loss against CPU time: sliced, masked, soft."""
    if not results.seeds("speed-masked"):
        return None
    figure, axes = plt.subplots(1, len(TIMED), figsize=(11, 3.4), layout="constrained")
    for axis, (title, (child, names)) in zip(axes, TIMED.items(), strict=True):
        for name in names:
            label, colour = TIMED_AS[name]
            for x, y in _curves(results, name, child, "cpu")[:1]:
                axis.plot(x[1:], y[1:], color=colour, marker="o", ms=3, label=label)
        axis.set(title=title, xlabel="CPU seconds of training", yscale="log", xlim=(0, None))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    axes[0].set_ylabel("held-out loss, nats per token")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def solved(results: Any) -> Any:
    """Solved problems by kind and size."""
    classes = list(results.parent["problems"])
    members = [("parent", None, "parent"), *((f"family {b}", "family", b) for b in BUDGETS)]
    members += [(f"{c} {kind}", f"{kind}-{c}", c) for kind in ("alone", "scratch") for c in CHILDREN]
    rows = []
    for label, run, budget in members:
        scores = [results.parent]
        if run is not None:
            scores = [results.runs[run, seed]["score"][budget] for seed in results.seeds(run)]
        if scores:
            rows.append((label, [_share([s["problems"][c] for s in scores]) for c in classes]))
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.3), layout="constrained")
    axis.grid(False)
    image = axis.imshow([values for _, values in rows], cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(classes)), [_class_label(c) for c in classes], fontsize=8)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    for y, (_, values) in enumerate(rows):
        for x, value in enumerate(values):
            colour = "black" if value > 0.55 else "white"
            axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axis, label="solved")
    return figure


def price(results: Any) -> Any:
    """Tokens until all children have the family's losses: exploring and distilling one by one, beside the family."""
    found = {children: one_by_one(results, family, children) for family, children in FAMILIES}
    found = {children: rows for children, rows in found.items() if rows}
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    parts = {"exploring": COLOURS["alone"], "distilling": COLOURS["whole"], "the family": COLOURS["family"]}
    for axis, (what, scale, label) in zip(axes, (("tokens", 1000, "thousand tokens"), ("cpu", 1, "CPU seconds")),
                                          strict=True):  # fmt: skip
        for place, rows in enumerate(found.values()):
            means = [statistics.fmean(row[what][i] / scale for row in rows) for i in (0, 1)]
            family = statistics.fmean(row["family"][what] / scale for row in rows)
            axis.barh(place - 0.2, means[0], 0.36, color=parts["exploring"])
            axis.barh(place - 0.2, means[1], 0.36, left=means[0], color=parts["distilling"])
            axis.barh(place + 0.2, family, 0.36, color=parts["the family"])
        axis.set_xlabel(label)
        axis.set_yticks(range(len(found)), [f"{len(children)} children" for children in found])
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in parts.values()]
    names = ["one by one: exploring", "one by one: distilling", "the family, its full member included"]
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def predicted(results: Any) -> Any:
    """Shapes of a budget before and after short distillation, against estimated damage and measured loss."""
    found = {key[0]: one["candidates"] for key, one in results.explored.items()
             if any(c["spare"] for c in one["candidates"])}  # fmt: skip
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    marks = {"large": ("#0072b2", "o"), "small": ("#d55e00", "^")}
    for axis, (key, label) in zip(axes, (("damage", "estimated damage"), ("before", "held-out loss before training")),
                                  strict=True):  # fmt: skip
        for budget, shapes in found.items():
            colour, mark = marks[budget]
            axis.scatter([s[key] for s in shapes], [s["after"] for s in shapes], s=24, color=colour, marker=mark,
                         label=budget)  # fmt: skip
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out loss after 24 steps")
    axes[0].legend(frameon=False)
    return figure


def _class_label(name: str) -> str:
    kind, size = name.split("/")
    words = {
        "chain_sum": "sum\n{} terms",
        "number_sorting": "sort\n{} numbers",
        "spell_backward": "backward\nto {} letters",
    }
    return words[kind].format(size)


def _share(rows: Sequence[Mapping[str, int]]) -> float:
    return sum(r["solved"] for r in rows) / sum(r["count"] for r in rows)


def tries(results: Any) -> Any:
    """Every try against the families of the same seeds: relative difference of the held-out loss, mean over them."""
    groups = ("best", "greedy", "shapes", "stages", "tries", "speed")
    names = [n for n, run in RUNS.items() if run.group in groups and results.seeds(n, "family")]
    steps = {name: sum(stage["steps"] for stage in RUNS[name].stages) for name in ("family", *names)}
    names = [n for n in names if RUNS[n].budgets == BUDGETS and steps[n] <= steps["family"]]
    if not names:
        return None
    figure, axis = plt.subplots(figsize=(8, 0.34 * len(names) + 1.2), layout="constrained")
    marks = {"full": ("#000000", "s"), "large": ("#0072b2", "o"), "small": ("#d55e00", "^")}
    for budget, (colour, mark) in marks.items():
        places = []
        for name in names:
            both = results.seeds(name, "family")
            ratios = [results.loss(name, seed, budget) / results.loss("family", seed, budget) for seed in both]
            places.append(100 * (statistics.fmean(ratios) - 1))
        axis.scatter(places, range(len(names)), color=colour, marker=mark, s=28, label=budget, zorder=3)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(names)), [RUNS[n].what.replace("`", "") for n in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss against the family with the default settings, % (left is better)")
    figure.legend(frameon=False, loc="outside upper right", ncols=len(marks), fontsize=8)
    return figure
