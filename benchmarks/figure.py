"""The raw results as one figure and one table: `docs/benchmarks.png` and `## Last results` of `benchmarks/README.md`.

    python benchmarks/figure.py [--check] [--results FOLDER] [--png FILE] [--readme FILE]

Every number comes from `results/*.json` through `measures.py`, which says what of a file is shown. `--check` writes
nothing and fails where the README's table is not the one that the files give. The upper panel has what a limit is set
for, as a share of that limit; the lower one what is compared without a limit, where 1 is equal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import ROOT
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from measures import MEASURES, Measure, Shown, shown

from nemo_elastic.files import write_text
from nemo_elastic.report.drawing import new_figure, save_png
from nemo_elastic.report.palette import LIGHT

BEGIN, END = "<!-- results: written by figure.py -->", "<!-- results end -->"
MET, MISSED, COMPARED = LIGHT["budget-1"], LIGHT["attention"], LIGHT["budget-0"]
ROW_INCHES = 0.27
NAMES_AT = 264  # points left of the axes
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


def read(folder: Path) -> dict[str, Any]:
    """Benchmark -> its result; what is not there is left out, and a quick run is none."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if not result.get("quick")}


def taken_on(result: dict[str, Any]) -> str:
    """`3 repetitions, load 0.2`: what a reader must know to trust a time."""
    machine, words = result.get("machine", {}), []
    if "repetitions" in result:
        words.append(f"{result['repetitions']} repetition{'s' if result['repetitions'] != 1 else ''}")
    if "seeds" in result:
        words.append(f"{result['seeds']} seed{'s' if result['seeds'] != 1 else ''}")
    if "load_average_at_start" in machine:
        words.append(f"load {machine['load_average_at_start']:.1f}")
    return ", ".join(words) or "-"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per measure, and the machines."""
    lines = ["| benchmark | what | result | limit | met | taken with |", "|---|---|---|---|---|---|"]
    for measure in MEASURES:
        if measure.benchmark not in results:
            lines.append(f"| `{measure.benchmark}` | {measure.what} | not measured yet |  |  |  |")
            continue
        result = results[measure.benchmark]
        row = shown(measure, result)
        met = "" if row.met is None else "yes" if row.met else "**no**"
        cells = (f"`{measure.benchmark}`", measure.what, row.text, row.limit_text, met, taken_on(result))
        lines.append("| " + " | ".join(cells) + " |")
    machines: dict[str, list[str]] = {}
    for name, result in results.items():
        machine = result.get("machine", {})
        facts = (machine.get("cpu"), f"{machine['cores']} cores" if "cores" in machine else None)
        facts += (f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}" if "threads" in machine else None,)
        facts += (f"torch {machine['torch']}" if machine.get("torch") else None,)
        words = ", ".join(fact for fact in facts if fact) or "a machine that the file does not name"
        machines.setdefault(words, []).append(f"`{name}`")
    lines += ["", *(f"{', '.join(names)}: {words}.  " for words, names in machines.items())]
    return "\n".join(line.rstrip() if line.endswith("|") else line for line in lines).rstrip()


def with_table(readme: str, text: str) -> str:
    """The README with everything between the markers replaced.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README lacks {BEGIN} or {END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def panel(axes: Axes, rows: list[tuple[Measure, Shown]], title: str) -> None:
    """A row per measure: its values as dots on a logarithmic axis around 1, the numbers themselves at the right."""
    axes.set_title(title)
    axes.set_xscale("log")
    axes.axvline(1, color=LIGHT["ink"], linewidth=1.2, zorder=1)
    previous, names = None, []
    for y, (measure, row) in enumerate(rows):
        colour = COMPARED if row.met is None else MET if row.met else MISSED
        marker = "o" if row.met is None or row.met else "X"
        axes.plot([min(row.shares), max(row.shares)], [y, y], color=colour, linewidth=2, alpha=0.45, zorder=2)
        axes.plot(row.shares, [y] * len(row.shares), marker, color=colour, markersize=5.5, alpha=0.85, zorder=3)
        words = f"{row.text}  (limit {row.limit_text})" if row.limit_text else row.text
        axes.annotate(words, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=LIGHT["ink"])
        if measure.benchmark != previous:
            axes.axhline(y - 0.5, color=LIGHT["line"], linewidth=0.8, zorder=0)
            axes.annotate(
                measure.benchmark,
                (0, y),
                xycoords=("axes fraction", "data"),
                xytext=(-NAMES_AT, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                weight="bold",
            )
        names.append(measure.what)
        previous = measure.benchmark
    axes.set_yticks(range(len(rows)), names, fontsize=8.5, color=LIGHT["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def draw(results: dict[str, Any], png: Path) -> None:
    """Both panels."""
    rows = [(m, shown(m, results[m.benchmark])) for m in MEASURES if m.benchmark in results]
    limited = [row for row in rows if row[1].met is not None]
    compared = [row for row in rows if row[1].met is None]
    with new_figure(ROW_INCHES * len(rows) + 1.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[len(limited), len(compared)])
        panel(upper, limited, "share of the limit: left of the line is within it")
        panel(lower, compared, "ours over the alternative: left of the line is less")
        low, high = upper.get_xlim()
        upper.set_xlim(low / 1.1, max(high * 1.1, 1.25))
        upper.tick_params(labelbottom=True)
        lower.set_xlabel("dots: cases of a benchmark; blue: within the limit, orange cross: not", fontsize=8.5)
        save_png(figure, png)


def main() -> int:
    """Write both, or check the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    words.add_argument("--png", type=Path, default=ROOT / "docs" / "benchmarks.png")
    words.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    words.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the table is not current")
    arguments = words.parse_args()
    results, readme = read(arguments.results), arguments.readme.read_text(encoding="utf-8")
    new = with_table(readme, table(results))
    if arguments.check:
        if new != readme:
            print(f"{arguments.readme} is not what the results give: run benchmarks/figure.py", file=sys.stderr)
        return int(new != readme)
    write_text(arguments.readme, new)
    draw(results, arguments.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
