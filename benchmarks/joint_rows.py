"""Routers against searches by scores where units count in pairs (`joint_worth.py`, `twins.py`): a row per budget.

A run's own settings, and others to compare: `from 0` is a price that starts as without scores, `steered` is
`dual_ascent_rate: 20, settle_fraction: 0.4` besides, chosen for `spare` on seeds 0 to 4. `least`: by trying every
shape; `greedy`, `wide`: what these searches pin; `race`: the best, by true loss, of the candidates that the wide search
proposes; `even`: even shrinking. `over_best`: the router's loss over the least of these four, in its worst seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import twins
from joint_worth import JointWorth, searched
from toy_router import costs_of, space_of, starting_prices, train

from nemo_elastic.config.sections import RouterConfig, RunConfig
from nemo_elastic.router.repair import choose
from nemo_elastic.router.schedule import resolve_recipe
from nemo_elastic.shapes.search import uniform_selection
from nemo_elastic.space.elastic_space import ElasticSpace

KINDS = ("apart", "together", "spare", "twins")
BUDGETS = (0.8, 0.65)
STEERED = {"dual_ascent_rate": 20.0, "settle_fraction": 0.4}  # a price that gets there, later settling
LONG = 4  # times the steps
SEARCHES = ("greedy", "wide", "race", "even")
WIDTHS = {
    "hidden_size": [1.0],  # by which every unit would count with every other
    "ffn_hidden_size": [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25],
    "mamba_num_heads": [1.0, 0.75, 0.5, 0.25],
    "num_attention_heads": [1.0, 0.75, 0.5],
    "num_layers": [16, 15, 14, 13, 12, 11, 10],
}
HEADINGS = (
    "| objective | budget | steps | settings | least | greedy | wide | race | even | router | wins, greedy | wide "
    "| race | even |\n" + "|---" * 14 + "|"
)


def joint_space() -> tuple[RunConfig, ElasticSpace]:
    """The toy space at the parent's hidden size, by which every unit would count with every other."""
    return space_of(WIDTHS)


def twin_space() -> tuple[RunConfig, ElasticSpace]:
    """Widths per layer, at the parent's hidden size."""
    return space_of(twins.CHOICES, twins.PAIRED)


def joint(
    kind: str,
    seeds: Sequence[int],
    steps: int,
    shock: float,
    settings: Mapping[str, float] | None = None,
    *,
    priced: bool = True,
) -> list[dict]:
    """Per budget what searches by scores lose, what the router loses per seed, and the least that can be lost.

    Args:
        priced: prices start where a run's do; or at 0.
    """
    run, space = twin_space() if kind == "twins" else joint_space()
    objective = twins.Twins(space) if kind == "twins" else JointWorth(space, kind)
    costs = costs_of(run, space, "fraction", BUDGETS)
    config = replace(resolve_recipe(RouterConfig(shapes="learned")), **(settings or {}))
    prices = starting_prices(objective, costs, config) if priced else {}
    if kind == "twins":
        least = {name: objective.least(cost, config.tolerance) for name, cost in costs.items()}
    else:
        best = objective.best(costs, config.tolerance)
        least = {name: objective.lost_by(best[name]) for name in costs}
    rows = {}
    for name, cost in costs.items():
        what = {"objective": kind, "budget": name, "steps": steps, "settings": settings or {}, "priced": priced}
        found = {"least": least[name], **searched(objective, cost, config.tolerance)}
        even = objective.lost_by(uniform_selection(cost, tolerance=config.tolerance))
        rows[name] = {**what, **found, "even": even, "price": prices.get(name, 0.0), "router": {}, "error": {}}
    for seed in seeds:
        router, _, _ = train(space, costs, config, seed, steps, shock, objective, prices)
        for name, cost in costs.items():
            with torch.no_grad():
                pi = router(router.budget_vector(name), scale=config.scale_end).probabilities
            chosen = choose(pi, cost, tolerance=config.tolerance, shortfall=config.tolerance)
            rows[name]["router"][str(seed)] = objective.lost_by(chosen.selection)
            rows[name]["error"][str(seed)] = chosen.error
    for row in rows.values():
        lost = row["router"].values()
        row["over_best"] = max(lost) / min(row[what] for what in SEARCHES)
        row["wins"] = {what: sum(x < row[what] - 1e-6 for x in lost) for what in SEARCHES}
    return list(rows.values())


def cells(kind: str, steps: int) -> list[tuple[int, dict[str, float], bool]]:
    """(steps, settings, whether prices start by scores): a run's own, then others to compare."""
    if kind == "twins":
        return [(steps, {}, True), (LONG * steps, {}, True), (steps, {}, False)]
    return [(steps, {}, True), (steps, {}, False), (steps, STEERED, False)]


def words(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    lost = sorted(row["router"].values())
    settings = ("steered" if row["settings"] else "default") + ("" if row["priced"] else ", from 0")
    searches = " | ".join(f"{row[what]:.3f}" for what in ("least", *SEARCHES))
    wins = " | ".join(f"{row['wins'][what]} of {len(lost)}" for what in SEARCHES)
    name = f"{row['objective']} | {row['budget']} | {row['steps']} | {settings}"
    return f"| {name} | {searches} | {lost[0]:.3f} to {lost[-1]:.3f} | {wins} |"
