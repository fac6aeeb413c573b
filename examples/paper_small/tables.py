"""The tables of docs/results.md, as rows of words: what the runs' files give, and `plan` of the real parent."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from readings import NONE, Result, Results, finished_to, ratio, relative, spent_to, spread
from runs import BUDGETS, CHILDREN, FOUR, RUNS

LAYERS = 12  # of the parent
SAME = 1e-4  # nats: losses of runs that do the same in another order of sums differ by less


OWN = {"": "shapes-own"}  # a family with its final shapes from the first step, by prefix


def headline(results: Results, prefix: str = "") -> list[dict[str, str]]:
    """A row per child: before, the family's, alone, whole, scratch, and how they compare; then the full member's.

    Args:
        prefix: of the names of these runs, see `runs.compared`.
    """
    rows, name = [], f"{prefix}family"
    seeds = results.seeds(name)
    first = [results.runs[name, s] for s in seeds]
    for child in CHILDREN if seeds else ():
        row = {"child": child, "seeds": ", ".join(map(str, seeds))}
        row["share"] = spread([100 * r["parameters"][child] / r["parameters"]["full"] for r in first], ".1f")
        row["before"] = spread([r["curve"][0]["losses"][child] for r in first], ".3f")
        row["family"] = spread(results.losses(name, child, seeds))
        row["tokens"] = token_ratio(results, name, f"{prefix}alone-{child}", child)
        for kind in ("alone", "whole", "scratch"):
            row[kind], row[f"over_{kind}"] = compared(results, name, f"{prefix}{kind}-{child}", child)
        own = OWN.get(prefix, "")
        row["own"] = spread(results.losses(own, child, results.seeds(own)))
        row["own_over_alone"] = compared(results, own, f"{prefix}alone-{child}", child)[1]
        rows.append(row | equal_loss(results, child, prefix))
    return rows


def compared(results: Results, name: str, other: str, budget: str) -> tuple[str, str]:
    """Loss of a budget in another run, and that of one over it, seed by seed."""
    ours, theirs = paired(results, name, other, budget)
    return spread(theirs), relative(ours, theirs)


def paired(results: Results, name: str, other: str, budget: str) -> list[list[float]]:
    """Losses of a budget in two runs, of the seeds that both have."""
    seeds = results.seeds(name, other)
    return [results.losses(n, budget, seeds) for n in (name, other)]


def verdict(parents: Iterable[Results], name: str, prefix: str, kind: str, limit: float = 0.0) -> str:
    """Whether the children in a family have at most the losses of those alone, up to a share of them, on the mean.

    Args:
        kind: `alone` (equal tokens) or `whole` (all steps).
    """
    met = []
    for results in parents:
        for child in CHILDREN:
            ours, theirs = paired(results, name, f"{prefix}{kind}-{child}", child)
            if ours:
                met.append(statistics.fmean(a / b - 1 for a, b in zip(ours, theirs, strict=True)) <= limit)
    return "Not shown" if not met else "Agrees" if all(met) else "Agrees in part" if any(met) else "Does not agree"


WAYS = (  # family, prefix of its children alone, whether a child in it has the tokens of these at equal tokens
    ("family", "", True),
    ("shapes-own", "", True),
    ("greedy-family", "greedy-", True),
    ("race-family", "greedy-", True),
    ("race-lr-7", "greedy-", True),
    ("long-family", "long-", True),
    ("greedy-long-family", "greedy-long-", True),
    ("best-family", "", False),
    ("best-small-first", "", False),
    ("greedy-best", "greedy-", False),
    ("greedy-slow", "greedy-", False),
    ("greedy-full-first", "greedy-", False),
    ("greedy-gentle", "greedy-", False),
)


def summary(results: Results) -> list[dict[str, str]]:
    """A row per way of training a family: against children alone, and its full member against the parent."""
    rows = []
    for name, prefix, equal in WAYS:
        if seeds := results.seeds(name):
            row = {
                "what": RUNS[name].what,
                "seeds": ", ".join(map(str, seeds)),
                "full": full_row(results, name)["over"],
            }
            for child in CHILDREN:
                row[f"alone_{child}"] = compared(results, name, f"{prefix}alone-{child}", child)[1] if equal else NONE
                row[f"whole_{child}"] = compared(results, name, f"{prefix}whole-{child}", child)[1]
            rows.append(row)
    return rows


RACES = (("race-family", "greedy-family"), ("race-per-layer", "greedy-per-layer"))


def raced(results: Results) -> list[dict[str, str]]:
    """A row per member of a family whose candidates raced: beside the shapes of greedy search, seed by seed."""
    rows = []
    for name, other in RACES:
        seeds = results.seeds(name, other)
        for budget in BUDGETS if seeds else ():
            ours, theirs = (results.losses(n, budget, seeds) for n in (name, other))
            shares = [
                [
                    100 * results.runs[n, s]["parameters"][budget] / results.runs[n, s]["parameters"]["full"]
                    for s in seeds
                ]
                for n in (name, other)
            ]
            rows.append(
                {
                    "what": RUNS[name].what,
                    "budget": budget,
                    "seeds": ", ".join(map(str, seeds)),
                    "race": spread(ours),
                    "greedy": spread(theirs),
                    "share": spread(shares[0], ".1f"),
                    "greedy_share": spread(shares[1], ".1f"),
                    "over": relative(ours, theirs),
                }
            )
    return rows


def four_children(results: Results) -> list[dict[str, str]]:
    """A row per member of the family of four children: against itself alone, and the full one against the parent."""
    rows, name = [], "four-family"
    seeds = results.seeds(name)
    for budget in FOUR if seeds else ():
        ours = results.losses(name, budget, seeds)
        row = {"budget": budget, "seeds": ", ".join(map(str, seeds)), "family": spread(ours)}
        row["over_parent"] = relative(ours, [results.parent["heldout_loss"]] * len(ours))
        row["tokens"] = token_ratio(results, name, f"greedy-alone-{budget}", budget)
        for kind in ("alone", "whole"):
            row[kind], row[f"over_{kind}"] = compared(results, name, f"greedy-{kind}-{budget}", budget)
        rows.append(row)
    return rows


def token_ratio(results: Results, name: str, other: str, budget: str) -> str:
    """Tokens of a budget in one run over those in another one."""
    seeds = results.seeds(name, other)
    ours, theirs = ([results.runs[n, s]["curve"][-1]["tokens"][budget] for s in seeds] for n in (name, other))
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], ".2f")


def full_row(results: Results, name: str = "family") -> dict[str, str]:
    """The full member of a family against its own parent."""
    seeds = results.seeds(name)
    ours, parent = results.losses(name, "full", seeds), results.parent["heldout_loss"]
    return {
        "parent": f"{parent:.4f}",
        "parent_solved": f"{results.parent['solved']:.1%}",
        "full": spread(ours),
        "solved": spread([results.solved(name, s, "full") for s in seeds], ".1%"),
        "over": relative(ours, [parent] * len(ours)),
    }


def best_rows(results: Results, name: str, prefix: str = "") -> list[dict[str, str]]:
    """A row per member of a family with what helped: against the plain family, the parent, and itself alone.

    Args:
        prefix: of the names of the plain family and of the children alone that have the same shapes.
    """
    rows, seeds = [], results.seeds(name)
    for budget in BUDGETS if seeds else ():
        ours = results.losses(name, budget, seeds)
        row = {"budget": budget, "seeds": ", ".join(map(str, seeds)), "family": spread(ours)}
        row["solved"] = spread([results.solved(name, s, budget) for s in seeds], ".1%")
        row["over_plain"] = compared(results, name, f"{prefix}family", budget)[1]
        row["over_parent"] = relative(ours, [results.parent["heldout_loss"]] * len(seeds))
        row["tokens"] = token_ratio(results, name, f"{prefix}whole-{budget}", budget)
        for other in ("whole", "best-whole"):
            alone = f"{prefix}{other}-{budget}" if other == "whole" else f"{other}-{budget}"
            row[other], row[f"over_{other}"] = compared(results, name, alone, budget)
        rows.append(row)
    return rows


def equal_loss(results: Results, child: str, prefix: str = "") -> dict[str, str]:
    """Tokens that a child alone or from scratch needs for the loss of the family's child, over the family's for it."""
    name, scratch = f"{prefix}family", f"{prefix}scratch-{child}"
    alone = [
        (*needed_alone(results, name, prefix, child, seed), spent(results, name, seed, child))
        for seed in results.seeds(name, *alone_runs(prefix, child))
    ]
    from_scratch = [
        (*needed_from_scratch(results, name, child, seed), spent(results, name, seed, child))
        for seed in results.seeds(name, scratch)
    ]
    return {"tokens_alone": over_own(alone), "tokens_scratch": over_own(from_scratch)}


def over_own(needed: Sequence[tuple[float, bool, int]]) -> str:
    """Ratios of (tokens, got there, the family's tokens)."""
    return ratio(
        [n / own for n, reached, own in needed if reached], [n / own for n, reached, own in needed if not reached]
    )


def spent(results: Results, name: str, seed: int, budget: str) -> int:
    """Tokens that a run trained a budget on."""
    return results.runs[name, seed]["curve"][-1]["tokens"][budget]


def needed_alone(results: Results, family: str, prefix: str, child: str, seed: int) -> tuple[float, bool]:
    """Tokens of the child alone for the family's loss; of its longest run, and False, where that did not get there."""
    ends = [(spent(results, n, seed, child), results.loss(n, seed, child)) for n in alone_runs(prefix, child)]
    needed = finished_to(ends, results.loss(family, seed, child))
    return (max(ends)[0], False) if needed is None else (needed, True)


def needed_from_scratch(results: Results, family: str, child: str, seed: int) -> tuple[float, bool]:
    """The same of a child from scratch; there is one run of it, so that this is where its curve gets there."""
    curve = results.runs[f"scratch-{child}", seed]["curve"]
    needed = spent_to(curve, child, results.runs[family, seed]["curve"][-1]["losses"][child])
    return (curve[-1]["tokens"][child], False) if needed is None else (needed, True)


def alone_runs(prefix: str, child: str) -> tuple[str, str]:
    """Runs of a child alone that ended, short and long."""
    return f"{prefix}alone-{child}", f"{prefix}whole-{child}"


def family_ratio(results: Results, family: str, children: Sequence[str], prefix: str = "") -> dict[str, str]:
    """Tokens of children trained one by one to the family's losses, over the family's: of all members, of these."""
    found: dict[str, list[float]] = {"all": [], "children": []}
    limits: dict[str, list[float]] = {"all": [], "children": []}
    seeds = results.seeds(family, *(name for child in children for name in alone_runs(prefix, child)))
    for seed in seeds:
        own = results.runs[family, seed]["curve"][-1]["tokens"]
        needed = [needed_alone(results, family, prefix, child, seed) for child in children]
        into = found if all(reached for _, reached in needed) else limits
        into["all"].append(sum(n for n, _ in needed) / sum(own.values()))
        into["children"].append(sum(n for n, _ in needed) / sum(own[c] for c in children))
    what = f"{len(children)} children, {RUNS[family].what}" if family in RUNS else family
    row = {"what": what, "family": family, "seeds": ", ".join(map(str, seeds))}
    return row | {name: ratio(found[name], limits[name], ".2f") for name in found}


def group_rows(results: Results, names: Sequence[str], budgets: Sequence[str]) -> list[dict[str, str]]:
    """A row per run that has a file, of its first seed."""
    rows = []
    for name in names:
        seeds = results.seeds(name)
        if not seeds:
            continue
        run = results.runs[name, seeds[0]]
        row = {"what": RUNS[name].what, "cpu": f"{run['curve'][-1]['cpu']:.0f}"}
        smallest = min(run["subnets"].values(), key=lambda subnet: len(subnet["layers"]))["layers"]
        row["dropped"] = ", ".join(str(n) for n in range(LAYERS) if n not in smallest) or "none"
        for budget in budgets:
            row[budget] = f"{run['score'][budget]['heldout_loss']:.4f}" if budget in run["score"] else NONE
            row[f"{budget}_solved"] = f"{run['score'][budget]['solved']:.1%}" if budget in run["score"] else NONE
            row[f"{budget}_before"] = f"{run['curve'][0]['losses'][budget]:.3f}" if budget in run["score"] else NONE
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


def cpu_seconds(results: Results, *names: str) -> str:
    """Of the training steps of these runs together, first seed."""
    seeds = results.seeds(*names)[:1]
    return spread([sum(results.runs[n, s]["curve"][-1]["cpu"] for n in names) for s in seeds], ".0f")


PAIRS = {"shapes-own": "speed-masked", "whole-small": "speed-masked-small", "family": "speed-soft"}


def speed(results: Results) -> list[dict[str, str]]:
    """CPU time of a run's training steps over that of the masked one, whole and to that one's last loss."""
    rows = []
    for name, masked in PAIRS.items():
        for seed in results.seeds(name, masked)[:1]:
            ours, theirs = (results.runs[n, seed]["curve"] for n in (name, masked))
            end, other = ours[-1], theirs[-1]
            row = {"name": name, "what": RUNS[name].what, "masked": RUNS[masked].what, "cpu": f"{end['cpu']:.0f}"}
            row["same"] = NONE if name == "family" else f"{results.same_losses(name, masked):.0e}"
            row |= {"masked_cpu": f"{other['cpu']:.0f}", "ratio": f"{end['cpu'] / other['cpu']:.2f}"}
            for child in CHILDREN:
                if child in end["losses"]:
                    reached = spent_to(ours, child, other["losses"][child] + SAME, "cpu")
                    row[child] = f"{end['losses'][child]:.4f} / {other['losses'][child]:.4f}"
                    row[f"{child}_to"] = "not reached" if reached is None else f"{reached / other['cpu']:.2f}"
                else:
                    row |= {child: NONE, f"{child}_to": NONE}
            rows.append(row)
    return rows


def machines(runs: Iterable[Result]) -> list[str]:
    """Where these were done, and how loaded it was."""
    loads = defaultdict(list)
    for run in runs:
        machine = run["machine"]
        loads[f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"].append(run["load_before"])
    return [
        f"{name}: {len(v)} runs, load average {min(v):.1f} to {max(v):.1f} when they began" for name, v in loads.items()
    ]


def real_parent() -> dict[str, Any]:
    """What `nemo-elastic plan` prints for the paper's own run, as `nemotron_elastic_paper.yaml` has it."""
    command = [sys.executable, "-m", "nemo_elastic", "plan", "--config", "nemotron_elastic_paper.yaml", "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
