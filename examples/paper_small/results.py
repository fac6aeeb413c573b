"""docs/results.md and its figures from the runs' files: every number on that page comes through here.

python examples/paper_small/results.py [--results FOLDER] [--docs FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from between import GROWN
from claims import KINDS, claims, found_shapes
from exploring import KEPT
from exploring import STEPS as EXPLORE_STEPS
from figures import write as write_figures
from price import predicted, price, touched
from readings import NONE, Results
from runs import BUDGETS, CHILDREN, FOUR_CHILDREN, PARENTS, RUNS, SCRATCH_STEPS, STEPS
from tables import (
    best_rows,
    by_class,
    cpu_seconds,
    family_ratio,
    four_children,
    full_row,
    group_rows,
    headline,
    machines,
    raced,
    real_parent,
    speed,
    summary,
    verdict,
)

from nemo_elastic.files import write_text

HERE = Path(__file__).resolve().parent


def page(parents: Mapping[int, Results], figures: list[str]) -> str:
    """The Markdown, with these figures."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    parts = [
        {"parent": PARENTS[number].name, "number": number, "kind": PARENTS[number].kind, **part(results)}
        for number, results in parents.items()
    ]
    runs = [run for results in parents.values() for run in results.runs.values()]
    return environment.get_template("results.md.j2").render(
        figures=figures,
        parts=parts,
        rows={name: [row | {"parent": p["parent"]} for p in parts for row in p["tables"][name]] for name in TABLES},
        steps=sum(STEPS),
        four_steps=sum(stage["steps"] for stage in RUNS["four-family"].stages),
        stages=STEPS,
        scratch_steps=SCRATCH_STEPS,
        explore_steps=EXPLORE_STEPS,
        explored=KEPT,
        between_steps=sum(GROWN),
        verdict=lambda *which: verdict((r for n, r in parents.items() if PARENTS[n].hybrid), *which),
        claims=claims(parents),
        kinds=KINDS,
        real=real_parent(),
        machines=machines(runs),
        count=len(runs),
    )


def part(results: Results) -> dict[str, Any]:
    """What the runs on one parent give: tables of all parents have its rows, the rest is said of it by itself."""
    tables = {name: make(results) for name, make in TABLES.items()}
    return {
        "tables": tables,
        "seeds": results.seeds("family"),
        "scratch_seeds": results.seeds(*(f"scratch-{child}" for child in CHILDREN)),
        "full": full_row(results),
        "longer_full": full_row(results, "long-family"),
        "greedy_full": full_row(results, "greedy-family"),
        "gentle": full_row(results, "greedy-gentle")["over"].split()[0].strip(f"+{NONE}"),
        "greedy_longer_full": full_row(results, "greedy-long-family"),
        "classes": by_class(results),
        "families": {row["family"]: row for row in tables["families"]},
        "speed": {row["name"]: row for row in tables["speed"]},
        "best_cpu": cpu_seconds(results, "best-family"),
        "best_cpu_alone": cpu_seconds(results, *(f"whole-{child}" for child in CHILDREN)),
        "asked": sum(row["count"] for row in results.parent["problems"].values()),
    }


FAMILIES = (  # with their children, and the prefix of these alone with the same shapes
    ("family", CHILDREN, ""),
    ("shapes-own", CHILDREN, ""),
    ("greedy-family", CHILDREN, "greedy-"),
    ("four-family", FOUR_CHILDREN, "greedy-"),
)


def families(results: Results) -> list[dict[str, str]]:
    """Families against their children one by one."""
    return [row for row in (family_ratio(results, *family) for family in FAMILIES) if row["all"] != NONE]


def of_group(group: str, budgets: Iterable[str], *beside: str) -> Callable[[Results], list[dict[str, str]]]:
    """The runs of a group, with others before them; nothing where it has none."""

    def rows(results: Results) -> list[dict[str, str]]:
        names = [name for name, run in RUNS.items() if run.group == group and results.seeds(name)]
        return group_rows(results, [*beside, *names], tuple(budgets)) if names else []

    return rows


TABLES: dict[str, Callable[[Results], list[dict[str, str]]]] = {
    "summary": summary,
    "headline": headline,
    "longer": lambda results: headline(results, "long-"),
    "greedy": lambda results: headline(results, "greedy-"),
    "greedy_longer": lambda results: headline(results, "greedy-long-"),
    "greedy_helped": lambda results: [
        {"what": RUNS[name].what, **row}
        for name in ("greedy-best", "greedy-slow", "greedy-full-first", "greedy-gentle")
        for row in best_rows(results, name, "greedy-")
    ],
    "raced": raced,
    "price": price,
    "predicted": predicted,
    "touched": touched,
    "four": four_children,
    "best": lambda results: best_rows(results, "best-family"),
    "small_first": lambda results: best_rows(results, "best-small-first"),
    "families": families,
    "shapes": of_group("shapes", BUDGETS, "family", "greedy-family"),
    "depth": of_group("depth", ("shallow",)),
    "mamba": of_group("mamba", ("half",)),
    "curricula": of_group("stages", BUDGETS, "family"),
    "tries": of_group("tries", BUDGETS, "family"),
    "speed": speed,
    "found": found_shapes,
}


def main() -> None:
    """Page and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    args = parser.parse_args()
    try:
        parents = Results.read(args.results)
    except ValueError as error:
        parser.error(str(error))
    if not parents:
        parser.error(f"--results {args.results}: has no parent-NUMBER.json; run.py writes it")
    write_text(args.docs / "results.md", page(parents, write_figures(parents, args.docs / "results")))


if __name__ == "__main__":
    main()
