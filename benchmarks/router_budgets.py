"""How far a router's subnets are from their budgets before and after repair: our recipe against the paper's.

    python benchmarks/router_budgets.py [--quick] [--seeds N] [--output FILE]

No weights: the loss of a subnet is what its masks cut off, each unit with a known worth, and at first every cut costs
`--shock` times as much, as it does while the weights of a real family have not yet adapted. Two spaces: a toy one and
that of the parent that ships; budgets in parameters and in memory. Everything else is what a run does: noise,
schedules, soft masks, steering, settling, repair (`router/`).

`expected` and `before` are the errors of the expected cost and of the noise-free argmax at the end of the soft phase,
`after` that of the repaired choice: the worst of all seeds; positive is too large. `repaired`: how many of the choices
needed a repair. `lost`: worth that the repaired subnets have cut off, mean over seeds; `uniform`: of even shrinking.

`joint`: the same on objectives in which units count in pairs (`joint_worth.py`), per seed against searches by scores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from harness import finish, parser, start
from joint_worth import KINDS, JointWorth, searched

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import RouterConfig, RunConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.family import family_of
from nemo_elastic.router.budget_loss import BudgetSteering, ExpectedCost, soft_phase_loss
from nemo_elastic.router.model import Router
from nemo_elastic.router.repair import Chosen, choose
from nemo_elastic.router.sampling import gumbel_noise
from nemo_elastic.router.schedule import Timeline, resolve_recipe
from nemo_elastic.router.selection import one_hot, soft_masks
from nemo_elastic.shapes.search import uniform_selection
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

RECIPES = {"default": RouterConfig(shapes="learned"), "paper": RouterConfig(recipe="paper")}
STEERED = {"dual_ascent_rate": 20.0, "settle_fraction": 0.4}  # for joint worth: a price that gets there, later settling
JOINT_BUDGETS = (0.8, 0.65)
LIMITS = {"before": 0.02, "after": 0.01}  # of the default recipe, either way
BUDGETS = {"parameters": ("fraction", (0.75, 0.5)), "memory": ("memory_gb", (0.8, 0.65))}  # of the parent's
WORTH = {  # what a dim is worth, and how fast its later units lose worth
    "hidden_size": (2.0, 1.0),
    "ffn_hidden_size": (0.6, 2.5),
    "mamba_num_heads": (1.5, 1.0),
    "num_attention_heads": (0.6, 1.0),
}
TOY = {
    "hidden_size": [1.0, 0.9375, 0.875, 0.8125, 0.75, 0.625, 0.5],
    "ffn_hidden_size": [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25],
    "mamba_num_heads": [1.0, 0.75, 0.5, 0.25],
    "num_attention_heads": [1.0, 0.75, 0.5],
    "num_layers": [16, 15, 14, 13, 12, 11, 10],
}


class Objective:
    """Loss of masks: what is cut off costs its worth, layers by their place in the ranking."""

    def __init__(self, space: ElasticSpace) -> None:
        self.space, self.units = space, {}
        for name, (height, power) in WORTH.items():
            units = space.dims[name].full // space.dims[name].groups
            value = torch.arange(1, units + 1, dtype=torch.float32) ** -power
            self.units[name] = height * value / value.sum()
        ranking = list(space.kept_layers(space.architecture.num_layers))
        self.layers = torch.zeros(len(ranking))
        kept = [
            i for n in range(1, len(ranking) + 1) for i in space.kept_layers(n) if i not in space.kept_layers(n - 1)
        ]
        self.layers[kept] = torch.linspace(0.6, 0.1, len(kept))

    def lost(self, masks: Any) -> torch.Tensor:
        """Worth of what the masks cut off."""
        cut = sum(
            (w * (1 - masks.dims[n]) ** 2).sum() / len(masks.dims[n]) for n, w in self.units.items() if n in masks.dims
        )
        return cut + (self.layers * (1 - masks.layers) ** 2).sum()


def spaces() -> dict[str, tuple[RunConfig, ElasticSpace]]:
    """The shipped parent's space, and a finer one on the same parent."""
    run = load_config("tiny_parent.yaml").config
    toy = load_config("tiny_parent.yaml", [f"elastic.dims.{n}.choices={json.dumps(c)}" for n, c in TOY.items()]).config
    return {"toy": (toy, family_of(toy).space), "tiny_parent": (run, family_of(run).space)}


def costs_of(run: RunConfig, space: ElasticSpace, kind: str, values: tuple[float, ...]) -> dict[str, BudgetCost]:
    """One cost per budget; memory values are shares of the parent's."""
    layout = ParamLayout(space.architecture, ffn_groups=space.groups)
    found = {}
    for value in values:
        budget = Budget(name=f"{value:g}", kind=kind, value=value)
        if kind != "fraction":
            parent = BudgetCost(space, layout, replace(budget, value=1.0), sequence_length=512, batch_size=4).parent
            budget = replace(budget, value=value * parent)
        found[budget.name] = BudgetCost(space, layout, budget, sequence_length=512, batch_size=4)
    return found


def train(
    space: ElasticSpace,
    costs: Mapping[str, BudgetCost],
    config: RouterConfig,
    seed: int,
    steps: int,
    shock: float,
    objective: Any = None,
):
    """What the soft phase of a run does to a router; the hard phase only commits to its choice."""
    objective, router = objective or Objective(space), Router(space, list(costs), config, seed=seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=config.lr, betas=(0.9, 0.98))
    expected = {name: ExpectedCost(cost) for name, cost in costs.items()}
    steering, generator = BudgetSteering(), torch.Generator().manual_seed(seed)
    timeline = Timeline.of(config, steps)
    for step in range(timeline.soft, timeline.hard):
        point = timeline.point(step, config)
        unadapted = 1 + (shock - 1) * 0.5 ** (step / (0.08 * steps))  # half of it is gone after 8 % of the run
        total = torch.zeros(())
        for index, (name, cost) in enumerate(costs.items()):
            noise = gumbel_noise(router.shapes, seed, step, index)
            output = router(router.budget_vector(name), tau=point.tau, scale=point.scale, noise=noise)
            clean = {n: torch.softmax(z.detach(), -1) for n, z in output.logits.items()}
            chosen = choose(
                clean, cost, tolerance=config.tolerance, shortfall=config.tolerance, repair=point.settle > 0
            )
            price = steering.price(name)
            total = total + soft_phase_loss(output, expected[name], price, point.settle, chosen.selection, config)
            jitter = 1 + 0.1 * torch.randn((), generator=generator)
            total = total + unadapted * objective.lost(soft_masks(space, output.probabilities)) * jitter
            steering.update(name, chosen.argmax_error, timeline.soft_steps, config)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
    return router, expected, objective


def outcome(space: ElasticSpace, costs: Mapping[str, BudgetCost], config: RouterConfig, trained: Any) -> list[dict]:
    """Errors per budget at the end."""
    router, expected, objective = trained
    rows = []
    for name, cost in costs.items():
        with torch.no_grad():
            output = router(router.budget_vector(name), scale=config.scale_end)
            pi = output.probabilities
            chosen: Chosen = choose(pi, cost, tolerance=config.tolerance, shortfall=config.tolerance)
            lost = objective.lost(soft_masks(space, one_hot(chosen.selection, pi))).item()
            rows.append(
                {
                    "budget": name,
                    "expected": expected[name](pi).item() - 1,
                    "before": chosen.argmax_error,
                    "after": chosen.error,
                    "repaired": chosen.is_repaired,
                    "lost": lost,
                    "uniform": objective.lost(soft_masks(space, one_hot(uniform_selection(cost), pi))).item(),
                }
            )
    return rows


def joint_space() -> tuple[RunConfig, ElasticSpace]:
    """The toy space at the parent's hidden size, by which every unit would count with every other."""
    dims = {**TOY, "hidden_size": [1.0]}
    run = load_config("tiny_parent.yaml", [f"elastic.dims.{n}.choices={json.dumps(c)}" for n, c in dims.items()]).config
    return run, family_of(run).space


def joint(kind: str, settings: Mapping[str, float], seeds: range, steps: int, shock: float) -> list[dict]:
    """Per budget what searches by scores lose, what the router loses per seed, and the least that can be lost."""
    run, space = joint_space()
    objective, costs = JointWorth(space, kind), costs_of(run, space, "fraction", JOINT_BUDGETS)
    config = replace(resolve_recipe(RECIPES["default"]), **settings)
    best = objective.best(costs, config.tolerance)
    rows = {}
    for name, cost in costs.items():
        found = {"least": objective.lost_by(best[name]), **searched(objective, cost, config.tolerance)}
        rows[name] = {"objective": kind, "budget": name, "settings": dict(settings), **found, "router": {}, "error": {}}
    for seed in seeds:
        router, _, _ = train(space, costs, config, seed, steps, shock, objective)
        for name, cost in costs.items():
            with torch.no_grad():
                pi = router(router.budget_vector(name), scale=config.scale_end).probabilities
            chosen = choose(pi, cost, tolerance=config.tolerance, shortfall=config.tolerance)
            rows[name]["router"][str(seed)] = objective.lost_by(chosen.selection)
            rows[name]["error"][str(seed)] = chosen.error
    for row in rows.values():
        lost = row["router"].values()
        row["wins"] = {what: sum(x < row[what] - 1e-6 for x in lost) for what in ("greedy", "wide", "race")}
    return list(rows.values())


def joint_words(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    lost, settings = sorted(row["router"].values()), "steered" if row["settings"] else "default"
    searches = " | ".join(f"{row[what]:.3f}" for what in ("least", "greedy", "wide", "race"))
    wins = " | ".join(f"{row['wins'][what]} of {len(lost)}" for what in ("greedy", "wide", "race"))
    return (
        f"| {row['objective']} | {row['budget']} | {settings} | {searches} | {lost[0]:.3f} to {lost[-1]:.3f} | {wins} |"
    )


def worst(values: list[float]) -> float:
    """The value furthest from zero."""
    return max(values, key=abs)


def main() -> int:
    """JSON, and a table on standard error while it runs."""
    words = parser(__doc__, quick="one seed, few steps: that it runs, not what it shows")
    words.add_argument("--seeds", type=int, default=5)
    words.add_argument("--steps", type=int, default=160, help="length of the run the schedules are for")
    words.add_argument("--shock", type=float, default=5.0, help="what a cut costs at first, over what it costs at last")
    args = start(words)
    seeds, steps = (1, 20) if args.quick else (args.seeds, args.steps)
    results, headings = [], "| space | budget | recipe | expected | before | after | repaired | lost | uniform |\n"
    print(headings + "|" + "---|" * 9, file=sys.stderr)
    for space_name, (run, space) in spaces().items():
        for kind_name, (kind, values) in BUDGETS.items():
            costs = costs_of(run, space, kind, values)
            for recipe, settings in RECIPES.items():
                config = resolve_recipe(settings)
                found = []
                for seed in range(seeds):
                    rows = outcome(space, costs, config, train(space, costs, config, seed, steps, args.shock))
                    found += [{"seed": seed, **row} for row in rows]
                for budget in costs:
                    own = [row for row in found if row["budget"] == budget]
                    summary = {key: worst([row[key] for row in own]) for key in ("expected", "before", "after")}
                    summary["lost"] = sum(row["lost"] for row in own) / len(own)
                    summary["uniform"] = own[0]["uniform"]
                    summary["repaired"] = sum(row["repaired"] for row in own)
                    what = {"space": space_name, "counts": kind_name, "budget": budget, "recipe": recipe}
                    results.append({**what, **summary, "seeds": own})
                    print(
                        f"| {space_name} | {kind_name} {budget} | {recipe} | {summary['expected']:+.1%} | "
                        f"{summary['before']:+.1%} | {summary['after']:+.1%} | {summary['repaired']} of {seeds} | "
                        f"{summary['lost']:.3f} | {summary['uniform']:.3f} |",
                        file=sys.stderr,
                        flush=True,
                    )
    pairs = []
    for kind in KINDS:
        for settings in ({}, STEERED):
            for row in joint(kind, settings, range(seeds), steps, args.shock):
                pairs.append(row)
                print(joint_words(row), file=sys.stderr, flush=True)
    own = [row for row in results if row["recipe"] == "default"]
    met = all(abs(row[key]) <= limit for row in own for key, limit in LIMITS.items())
    counts = {"seeds": seeds, "steps": steps, "shock": args.shock}
    return finish(args, {"met": met, "limits": LIMITS, **counts, "results": results, "joint": pairs})


if __name__ == "__main__":
    raise SystemExit(main())
