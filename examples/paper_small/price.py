"""What finding shapes costs, one by one and in a family, and how well estimates tell them apart: rows of the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from readings import Result, Results, finished_to, ratio, spread
from runs import CHILDREN, FOUR_CHILDREN

from nemo_elastic.config.sections import RouterConfig
from nemo_elastic.router.race import SLACK

RACE_MEASURES = 6 + 6 + 3 + 2  # shapes of a budget that a race measures at most, before it and after each of its rounds
FAMILIES = (
    ("race-family", CHILDREN),
    ("four-family", FOUR_CHILDREN),
)  # whose losses are to be met, with their children


def distilled_on(results: Results, child: str, seed: int, best: Mapping[str, Any]) -> list[Result]:
    """The runs of a child alone with the shape that exploring chose: its own, or those that have the same shape."""
    for prefix in ("explored", "greedy"):
        pair = [results.runs.get((f"{prefix}-{kind}-{child}", seed)) for kind in ("alone", "whole")]
        if all(run is not None and run["subnets"][child] == best for run in pair):
            return [run for run in pair if run is not None]
    return []


def one_by_one(results: Results, family: str, children: Sequence[str]) -> list[dict[str, Any]]:
    """Per seed: tokens and CPU seconds of exploring, of distilling on to the family's losses, and the family's."""
    rows, found = [], results.explored
    for seed in results.seeds(family):
        if not all((child, seed) in found for child in children):
            continue
        row: dict[str, Any] = {"seed": seed, "reached": True, "tokens": [0.0, 0.0], "cpu": [0.0, 0.0], "measuring": 0.0}
        row["raced"] = {"tokens": 0.0, "cpu": 0.0}
        parent = results.runs[family, seed]["curve"][0]["losses"]["full"]
        for child in children:
            one = found[child, seed]
            tried = [c for c in one["candidates"] if not c["spare"]]
            pair = distilled_on(results, child, seed, one["best"])
            if not pair:
                break
            ends = [(run["curve"][-1]["tokens"][child], results.loss(run["name"], seed, child)) for run in pair]
            needed = finished_to(ends, results.loss(family, seed, child))
            row["reached"] &= needed is not None
            tokens = max(ends)[0] if needed is None else needed
            end = max((run["curve"][-1] for run in pair), key=lambda point: point["cpu"])
            row["measuring"] += one["measuring_cpu"]
            started = _would_race(tried, parent)
            for what in ("tokens", "cpu"):
                row["raced"][what] += sum(c[what] for c in started) if len(started) > 1 else 0
            row["tokens"][0] += sum(c["tokens"] for c in tried)
            row["cpu"][0] += sum(c["cpu"] for c in tried)
            row["tokens"][1] += tokens
            row["cpu"][1] += tokens * end["cpu"] / end["tokens"][child]
        else:
            last = results.runs[family, seed]["curve"][-1]
            each = max(found[child, seed]["measuring_cpu"] / found[child, seed]["near"] for child in children)
            measuring = each * RACE_MEASURES * len(children) if family == "race-family" else 0.0
            row["family"] = {"tokens": sum(last["tokens"].values()), "cpu": last["cpu"] + measuring}
            row["of_children"] = sum(last["tokens"][child] for child in children)
            rows.append(row)
    return rows


def price(results: Results) -> list[dict[str, str]]:
    """A row per number of children."""
    rows = []
    for family, children in FAMILIES:
        found = one_by_one(results, family, children)
        if not found:
            continue
        row = {"measuring_cpu": spread([one["measuring"] for one in found], ".0f")}
        row |= {"children": str(len(children)), "seeds": ", ".join(str(one["seed"]) for one in found)}
        for what, scale, form in (("tokens", 1000, ".0f"), ("cpu", 1, ".0f")):
            for number, part in enumerate(("exploring", "distilling")):
                row[f"{part}_{what}"] = spread([one[what][number] / scale for one in found], form)
            row[f"family_{what}"] = spread([one["family"][what] / scale for one in found], form)
            extra = [one["measuring"] if what == "cpu" else 0.0 for one in found]
            both = [
                ((sum(o[what]) + more) / o["family"][what], o["reached"]) for o, more in zip(found, extra, strict=True)
            ]
            row[f"ratio_{what}"] = ratio([n for n, met in both if met], [n for n, met in both if not met], ".2f")
            alone = [(one[what][1] / one["family"][what], one["reached"]) for one in found]
            few = [(o["raced"][what] + o[what][1] + more, o["family"][what], o["reached"])
                   for o, more in zip(found, extra, strict=True)]  # fmt: skip
            reached, bounds = ([n / f for n, f, met in few if met is wanted] for wanted in (True, False))
            row[f"few_{what}"] = ratio(reached, bounds, ".2f")
            row[f"given_{what}"] = ratio([n for n, met in alone if met], [n for n, met in alone if not met], ".2f")
        rows.append(row)
    return rows


def _would_race(shapes: Sequence[Result], parent: float) -> list[Result]:
    """Those that are not too far behind before training to start in a race, whose rule this is."""
    least = min(shape["before"] for shape in shapes) - parent
    return [
        shape for shape in shapes if shape["before"] - parent <= max(RouterConfig().race_spread * least, least + SLACK)
    ]


def predicted(results: Results) -> list[dict[str, str]]:
    """A row per budget: how well estimated damage and the loss before training order the losses after it."""
    rows = []
    for (budget, seed), one in results.explored.items():
        shapes = one["candidates"]
        if not any(c["spare"] for c in shapes):
            continue
        near = [c for c in shapes if not c["spare"]]
        rows.append({
            "budget": budget, "seed": str(seed), "shapes": str(len(shapes)), "near": str(len(near)),
            **{f"{name}{suffix}": f"{rank_correlation(some, key):.2f}"
               for name, key in (("damage", "damage"), ("before", "before"))
               for suffix, some in (("", shapes), ("_near", near))},
        })  # fmt: skip
    return rows


def rank_correlation(shapes: Sequence[Result], key: str) -> float:
    """Spearman's, of `key` and the loss after training."""
    orders = [[sorted(s[k] for s in shapes).index(shape[k]) for shape in shapes] for k in (key, "after")]
    return statistics.correlation(*orders)


def _neighbours(results: Results, seeds: Sequence[int], size: int) -> str:
    """Losses of the trained members above and below a size, at the end of the family that a child is read out of."""
    runs = [results.runs["race-family", seed] for seed in seeds]
    sizes = sorted(runs[0]["parameters"].items(), key=lambda item: item[1])
    names = [next(name for name, n in reversed(sizes) if n < size), next(name for name, n in sizes if n >= size)]
    means = (spread([run["curve"][-1]["losses"][name] for run in runs]) for name in names)
    return ", ".join(f"`{name}` {mean}" for name, mean in zip(names, means, strict=True))


def touched(results: Results) -> list[dict[str, Any]]:
    """A row per budget that nobody trained: between, after some steps of its own, and in a family trained for it."""
    files, rows = list(results.between.values()), []
    for name in files[0]["children"] if files else ():
        each = [one["children"][name] for one in files]
        goal = [row["trained"] for row in each]
        row: dict[str, Any] = {"budget": f"{each[0]['fraction']:g}", "seeds": ", ".join(str(f["seed"]) for f in files)}
        row["parameters"] = f"{each[0]['parameters']:,}"
        row["trained"] = spread(goal)
        row["between"] = spread([r["between"] for r in each])
        row["full"] = spread([one["full"] for one in files])
        row["neighbours"] = _neighbours(results, list(results.between), each[0]["parameters"])
        row["over"] = spread([r["between"] / g - 1 for r, g in zip(each, goal, strict=True)], "+.2%")
        row["steps"] = {
            steps: spread([r["touched"][steps] / g - 1 for r, g in zip(each, goal, strict=True)], "+.2%")
            for steps in each[0]["touched"]
        }
        rows.append(row)
    return rows
