"""A router trained on an objective without weights: what the soft phase of a run does to it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import RouterConfig, RunConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.family import family_of
from nemo_elastic.router.budget_loss import BudgetSteering, ExpectedCost, soft_phase_loss
from nemo_elastic.router.model import Router
from nemo_elastic.router.repair import choose
from nemo_elastic.router.sampling import gumbel_noise
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.router.selection import soft_masks
from nemo_elastic.shapes.damage import Damage
from nemo_elastic.shapes.shadow_price import shadow_price
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout


def space_of(choices: Mapping[str, Sequence[float]], per_layer: Sequence[str] = ()) -> tuple[RunConfig, ElasticSpace]:
    """The shipped parent's space with other choices."""
    words = [f"elastic.dims.{name}.choices={json.dumps(row)}" for name, row in choices.items()]
    words += [f"elastic.dims.{name}.per_layer=true" for name in per_layer]
    run = load_config("tiny_parent.yaml", words).config
    return run, family_of(run).space


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


def starting_prices(objective: Any, costs: Mapping[str, BudgetCost], config: RouterConfig) -> dict[str, float]:
    """As a run has them."""
    if config.recipe == "paper":
        return {}
    damage = Damage(objective.space, objective.scores())
    return {name: shadow_price(cost, damage) for name, cost in costs.items()}


def train(
    space: ElasticSpace,
    costs: Mapping[str, BudgetCost],
    config: RouterConfig,
    seed: int,
    steps: int,
    shock: float,
    objective: Any = None,
    prices: Mapping[str, float] | None = None,
):
    """What the soft phase of a run does to a router; the hard phase only commits to its choice."""
    objective, router = objective, Router(space, list(costs), config, seed=seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=config.lr, betas=(0.9, 0.98))
    expected = {name: ExpectedCost(cost) for name, cost in costs.items()}
    steering, generator = BudgetSteering.starting_at(prices or {}, config), torch.Generator().manual_seed(seed)
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
