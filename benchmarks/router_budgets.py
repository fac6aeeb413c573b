"""How far a router's subnets are from their budgets before and after repair: our recipe against the paper's.

    python benchmarks/router_budgets.py [--quick] [--seeds N] [--output FILE]

No weights: the loss of a subnet is what its masks cut off, each unit with a known worth, and at first every cut costs
`--shock` times as much, as it does while the weights of a real family have not yet adapted. Two spaces: a toy one and
that of the parent that ships; budgets in parameters and in memory. Everything else is what a run does: noise,
schedules, soft masks, steering, settling, repair (`router/`).

`expected` and `before` are the errors of the expected cost and of the noise-free argmax at the end of the soft phase,
`after` that of the repaired choice: the worst of all seeds; positive is too large. `repaired`: how many of the choices
needed a repair. `lost`: worth that the repaired subnets have cut off, mean over seeds; `uniform`: of even shrinking.

Prices start as they do in a run, near the shadow price by scores, here of the objective itself. `joint`: the same where
units count in pairs, per seed against searches by scores (`joint_rows.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from harness import finish, parser, start
from joint_rows import HEADINGS, KINDS, WIDTHS, cells, joint, words
from joint_worth import measured_scores
from toy_router import costs_of, space_of, starting_prices, train

from nemo_elastic.config.sections import RouterConfig, RunConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.router.repair import Chosen, choose
from nemo_elastic.router.schedule import resolve_recipe
from nemo_elastic.router.selection import one_hot, soft_masks
from nemo_elastic.shapes.damage import Scores
from nemo_elastic.shapes.search import uniform_selection
from nemo_elastic.space.elastic_space import ElasticSpace

RECIPES = {"default": RouterConfig(shapes="learned"), "paper": RouterConfig(recipe="paper")}
FRESH = range(1, 11)  # seeds of `joint`; the start of prices and `twins.py` were made on 101 to 110
LIMITS = {"before": 0.02, "after": 0.01}  # of the default recipe, either way
TWINS_LIMIT = 1.0  # of `over_best`, with a run's own settings
BUDGETS = {"parameters": ("fraction", (0.75, 0.5)), "memory": ("memory_gb", (0.8, 0.65))}  # of the parent's
WORTH = {  # what a dim is worth, and how fast its later units lose worth
    "hidden_size": (2.0, 1.0),
    "ffn_hidden_size": (0.6, 2.5),
    "mamba_num_heads": (1.5, 1.0),
    "num_attention_heads": (0.6, 1.0),
}
TOY = {**WIDTHS, "hidden_size": [1.0, 0.9375, 0.875, 0.8125, 0.75, 0.625, 0.5]}


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

    def scores(self) -> Scores:
        """What a ranking would measure."""
        return measured_scores(self.space, list(WORTH), self.lost)

    def lost(self, masks: Any) -> torch.Tensor:
        """Worth of what the masks cut off."""
        cut = sum(
            (w * (1 - masks.dims[n]) ** 2).sum() / len(masks.dims[n]) for n, w in self.units.items() if n in masks.dims
        )
        return cut + (self.layers * (1 - masks.layers) ** 2).sum()


def spaces() -> dict[str, tuple[RunConfig, ElasticSpace]]:
    """The shipped parent's space, and a finer one on the same parent."""
    return {"toy": space_of(TOY), "tiny_parent": space_of({})}


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


def worst(values: list[float]) -> float:
    """The value furthest from zero."""
    return max(values, key=abs)


def main() -> int:
    """JSON, and a table on standard error while it runs."""
    flags = parser(__doc__, quick="one seed, few steps: that it runs, not what it shows")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--steps", type=int, default=160, help="length of the run the schedules are for")
    flags.add_argument("--shock", type=float, default=5.0, help="what a cut costs at first, over what it costs at last")
    args = start(flags)
    seeds, steps = (1, 20) if args.quick else (args.seeds, args.steps)
    results, headings = [], "| space | budget | recipe | expected | before | after | repaired | lost | uniform |\n"
    print(headings + "|" + "---|" * 9, file=sys.stderr)
    for space_name, (run, space) in spaces().items():
        for kind_name, (kind, values) in BUDGETS.items():
            costs = costs_of(run, space, kind, values)
            for recipe, settings in RECIPES.items():
                config, objective, found = resolve_recipe(settings), Objective(space), []
                prices = starting_prices(objective, costs, config)
                for seed in range(seeds):
                    trained = train(space, costs, config, seed, steps, args.shock, objective, prices)
                    rows = outcome(space, costs, config, trained)
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
    pairs, fresh = [], [101] if args.quick else FRESH[: 2 * args.seeds]
    print(f"\n{HEADINGS}", file=sys.stderr)
    for kind in KINDS:
        for length, settings, priced in cells(kind, steps):
            for row in joint(kind, fresh, length, args.shock, settings, priced=priced):
                pairs.append(row)
                print(words(row), file=sys.stderr, flush=True)
    own = [row for row in results if row["recipe"] == "default"]
    met = all(abs(row[key]) <= limit for row in own for key, limit in LIMITS.items())
    met &= all(row["over_best"] < TWINS_LIMIT for row in pairs if row["objective"] == "twins" and row["priced"])
    limits = {**LIMITS, "twins": TWINS_LIMIT}
    counts = {"seeds": seeds, "steps": steps, "shock": args.shock}
    return finish(args, {"met": met, "limits": limits, **counts, "results": results, "joint": pairs})


if __name__ == "__main__":
    raise SystemExit(main())
