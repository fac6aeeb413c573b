"""docs/results.md and its figures from the runs' files: every number on that page comes through here.

python examples/paper_small/results.py [--results FOLDER] [--docs FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jinja2
from figures import write as write_figures
from readings import NONE, Results
from runs import BUDGETS, CHILDREN, FOUR, SCRATCH_STEPS, STEPS
from tables import (
    best_rows,
    by_class,
    cpu_seconds,
    equal_loss,
    family_ratio,
    full_row,
    group_rows,
    headline,
    machines,
    real_parent,
    speed,
)

from nemo_elastic.files import write_text

HERE = Path(__file__).resolve().parent


def page(results: Results, figures: list[str]) -> str:
    """The Markdown, with these figures."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    families = [
        family_ratio(results, "family", CHILDREN),
        family_ratio(results, "long-family", CHILDREN, "long-"),
        family_ratio(results, "four", [b for b in FOUR if b != "full"]),
    ]
    template = environment.get_template("results.md.j2")
    return template.render(
        figures=figures,
        steps=sum(STEPS),
        stages=STEPS,
        scratch_steps=SCRATCH_STEPS,
        scratch_seeds=results.seeds(*(f"scratch-{child}" for child in CHILDREN)),
        seeds=results.seeds("family"),
        headline=headline(results),
        full=full_row(results),
        equal=equal_loss(results),
        longer=headline(results, "long-") if results.seeds("long-family") else [],
        longer_full=full_row(results, "long-"),
        longer_seeds=results.seeds("long-family"),
        longer_equal=equal_loss(results, "long-"),
        best=best_rows(results, "best-family"),
        small_first=best_rows(results, "best-small-first"),
        best_cpu={
            "family": cpu_seconds(results, "best-family"),
            "children": cpu_seconds(results, *(f"best-whole-{c}" for c in CHILDREN)),
        },
        families={row["family"]: row for row in families if row["all"] != NONE},
        classes=by_class(results),
        shapes=group_rows(results, "shapes", tuple(BUDGETS), ("family",)),
        depth=group_rows(results, "depth", ("shallow",)),
        mamba=group_rows(results, "mamba", ("half",)),
        curricula=group_rows(results, "stages", tuple(BUDGETS), ("family",)),
        tries=group_rows(results, "tries", tuple(BUDGETS), ("family",)),
        speed={row["name"]: row for row in speed(results)},
        asked=sum(row["count"] for row in results.parent["problems"].values()),
        real=real_parent(),
        machines=machines(results),
        count=len(results.runs),
    )


def main() -> None:
    """Page and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    args = parser.parse_args()
    if not (args.results / "parent.json").is_file():
        parser.error(f"--results {args.results}: has no parent.json; run.py writes it")
    results = Results.read(args.results)
    write_text(args.docs / "results.md", page(results, write_figures(results, args.docs / "results")))


if __name__ == "__main__":
    main()
