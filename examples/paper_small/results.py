"""docs/results.md and its figures from the runs' files: every number on that page comes through here.

python examples/paper_small/results.py [--results FOLDER] [--docs FOLDER]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import figures
import jinja2
from readings import Results, ratio, relative, spread, tokens_to
from runs import BUDGETS, CHILDREN, FOUR, RUNS, SCRATCH_STEPS, STEPS

from nemo_elastic.files import write_text

HERE = Path(__file__).resolve().parent
LAYERS = 12  # of the parent


def headline(results: Results) -> list[dict[str, str]]:
    """A row per child: before, the family's, alone, whole, scratch, and how they compare."""
    rows = []
    for child in CHILDREN:
        row = {"child": child}
        seeds = results.seeds("family")
        first = [results.runs["family", s] for s in seeds]
        row["share"] = spread([100 * r["parameters"][child] / r["parameters"]["full"] for r in first], ".1f")
        row["before"] = spread([r["curve"][0]["losses"][child] for r in first], ".3f")
        row["family"] = spread(results.losses("family", child, seeds))
        shared = results.seeds("family", f"alone-{child}")
        ends = [
            [results.runs[n, s]["curve"][-1]["tokens"][child] for n in ("family", f"alone-{child}")] for s in shared
        ]
        row["tokens"] = spread([ours / theirs for ours, theirs in ends], ".2f")
        for kind in ("alone", "whole", "scratch"):
            both = results.seeds("family", f"{kind}-{child}")
            other = results.losses(f"{kind}-{child}", child, both)
            row[kind], row[f"over_{kind}"] = spread(other), relative(results.losses("family", child, both), other)
        rows.append(row)
    return rows


def full_row(results: Results) -> dict[str, str]:
    """The full member against its own parent."""
    seeds = results.seeds("family")
    ours, parent = results.losses("family", "full", seeds), results.parent["heldout_loss"]
    return {
        "parent": f"{parent:.4f}",
        "parent_solved": f"{results.parent['solved']:.1%}",
        "full": spread(ours),
        "solved": spread([results.solved("family", s, "full") for s in seeds], ".1%"),
        "over": relative(ours, [parent] * len(ours)),
    }


def equal_loss(results: Results) -> list[dict[str, str]]:
    """Tokens that a child alone or from scratch needs for the loss of the family's child, over the family's for it."""
    rows = []
    for child in CHILDREN:
        row = {"child": child}
        for kind in ("whole", "scratch"):
            found, limits = [], []
            for seed in results.seeds("family", f"{kind}-{child}"):
                own = results.runs["family", seed]["curve"][-1]
                curve = results.runs[f"{kind}-{child}", seed]["curve"]
                needed = tokens_to(curve, child, own["losses"][child])
                found.append(None if needed is None else needed / own["tokens"][child])
                limits.append(curve[-1]["tokens"][child] / own["tokens"][child])
            row[kind] = ratio(found, f"{min(limits):.1f}" if limits else "")
        rows.append(row)
    return rows


def family_ratio(results: Results, family: str, children: Sequence[str]) -> dict[str, str]:
    """Tokens of children trained one by one to the family's losses, over the family's: of all members, of these."""
    found: dict[str, list[float]] = {"all": [], "children": []}
    for seed in results.seeds(family, *(f"whole-{c}" for c in children)):
        own = results.runs[family, seed]["curve"][-1]
        curves = {c: results.runs[f"whole-{c}", seed]["curve"] for c in children}
        needed = [tokens_to(curve, c, own["losses"][c]) for c, curve in curves.items()]
        # what a child does not reach in its run counts as the whole run: the ratio is then a lower bound
        spent = [n if n is not None else curves[c][-1]["tokens"][c] for n, c in zip(needed, curves, strict=True)]
        found["all"].append(sum(spent) / sum(own["tokens"].values()))
        found["children"].append(sum(spent) / sum(own["tokens"][c] for c in children))
    return {"count": str(len(children)), **{name: spread(values, ".2f") for name, values in found.items()}}


def group_rows(results: Results, group: str, budgets: Sequence[str], beside: Sequence[str] = ()) -> list[dict]:
    """A row per run of a group that has a file (first seed), in the order of `runs.py`; `beside` come first."""
    rows = []
    for name in (*beside, *(n for n, run in RUNS.items() if run.group == group)):
        seeds = results.seeds(name)
        if not seeds:
            continue
        run = results.runs[name, seeds[0]]
        row = {"what": RUNS[name].what, "cpu": f"{run['curve'][-1]['cpu']:.0f}"}
        smallest = min(run["subnets"].values(), key=lambda subnet: len(subnet["layers"]))["layers"]
        row["dropped"] = ", ".join(str(n) for n in range(LAYERS) if n not in smallest) or "none"
        for budget in budgets:
            row[budget] = f"{run['score'][budget]['heldout_loss']:.4f}" if budget in run["score"] else "–"
            row[f"{budget}_solved"] = f"{run['score'][budget]['solved']:.1%}" if budget in run["score"] else "–"
            row[f"{budget}_before"] = f"{run['curve'][0]['losses'][budget]:.3f}" if budget in run["score"] else "–"
        rows.append(row)
    return rows


def by_class(results: Results) -> list[dict[str, str]]:
    """Solved by kind and size: the parent, the family's members and each child alone, over seeds."""
    columns = {f"family {b}": ("family", b) for b in BUDGETS} | {f"alone {c}": (f"alone-{c}", c) for c in CHILDREN}
    rows = []
    for name, own in results.parent["problems"].items():
        row = {"class": name.replace("_", " ").replace("/", ", "), "parent": f"{own['solved'] / own['count']:.0%}"}
        for column, (run, budget) in columns.items():
            found = [results.runs[run, s]["score"][budget]["problems"][name] for s in results.seeds(run)]
            row[column] = spread([f["solved"] / f["count"] for f in found], ".0%")
        rows.append(row)
    return rows


def speed(results: Results) -> list[dict[str, str]]:
    """CPU time of a run's training steps, as it is and over the masked run that does the same."""
    pairs = {"shapes-own": "speed-masked", "speed-masked": "speed-masked", "family": "speed-masked",
             "speed-soft": "speed-masked", "whole-small": "speed-masked-small",
             "speed-masked-small": "speed-masked-small"}  # fmt: skip
    rows = []
    for name, masked in pairs.items():
        for seed in results.seeds(name, masked)[:1]:
            end, other = (results.runs[n, seed]["curve"][-1] for n in (name, masked))
            row = {"what": RUNS[name].what, "cpu": f"{end['cpu']:.0f}", "of_masked": f"{end['cpu'] / other['cpu']:.2f}"}
            rows.append(row | {c: f"{end['losses'][c]:.4f}" if c in end["losses"] else "–" for c in CHILDREN})
    return rows


def machines(results: Results) -> list[str]:
    """Where the runs were done, and how loaded it was."""
    loads = defaultdict(list)
    for run in results.runs.values():
        machine = run["machine"]
        loads[f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"].append(run["load_before"])
    return [
        f"{name}: {len(v)} runs, load average {min(v):.1f} to {max(v):.1f} when they began" for name, v in loads.items()
    ]


def page(results: Results) -> str:
    """The Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.get_template("results.md.j2")
    return template.render(
        steps=sum(STEPS),
        stages=STEPS,
        scratch_steps=SCRATCH_STEPS,
        seeds=results.seeds("family"),
        headline=headline(results),
        full=full_row(results),
        equal=equal_loss(results),
        families=[
            family_ratio(results, "family", CHILDREN),
            family_ratio(results, "four", [b for b in FOUR if b != "full"]),
        ],
        classes=by_class(results),
        shapes=group_rows(results, "shapes", tuple(BUDGETS), ("family",)),
        depth=group_rows(results, "depth", ("shallow",)),
        mamba=group_rows(results, "mamba", ("half",)),
        curricula=group_rows(results, "stages", tuple(BUDGETS), ("family",)),
        tries=group_rows(results, "tries", tuple(BUDGETS), ("family",)),
        speed=speed(results),
        same=results.same_losses("shapes-own", "speed-masked"),
        asked=sum(row["count"] for row in results.parent["problems"].values()),
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
    write_text(args.docs / "results.md", page(results))
    figures.write(results, args.docs / "results")


if __name__ == "__main__":
    main()
