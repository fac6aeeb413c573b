"""Random subnets that meet a family's budgets: what a shape is worth that nobody chose."""

from __future__ import annotations

import random
from typing import Any

from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.family import Family
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.subnet import Subnet

DRAWS = 20_000


def random_subnets(family: Family, seed: int, tolerance: float = 0.01) -> dict[str, Any]:
    """Per budget below the full one a subnet within `tolerance` of it, nested or not, as the configuration takes it.

    Raises:
        ValueError: none among the draws.
    """
    return {
        budget.name: _random(family, BudgetCost(family.space, family.layout, budget), seed, tolerance).to_dict()
        for budget in family.budgets
        if not budget.is_full
    }


def _random(family: Family, cost: BudgetCost, seed: int, tolerance: float) -> Subnet:
    generator = random.Random(seed)
    for _ in range(DRAWS):
        sizes = {name: generator.choice(dim.choices) for name, dim in family.space.dims.items()}
        try:
            subnet = family.space.subnet(**sizes)
        except ProblemsError:
            continue
        if abs(cost.error(cost.of(subnet))) <= tolerance:
            return subnet
    raise ValueError(f"none of {DRAWS} random shapes is within {tolerance:.0%} of budget {cost.budget.name}")
