"""Where a learned router's price starts: what cost is worth by estimated damage, counted a second way."""

from itertools import product

import pytest
import torch
from router_spaces import ARCHITECTURE, make_layout, make_space

from nemo_elastic.config.sections import RouterConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.router.budget_loss import BudgetSteering
from nemo_elastic.shapes.damage import Damage, Scores
from nemo_elastic.shapes.shadow_price import STEP, shadow_price
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import choice_shapes, layers_of_dim
from nemo_elastic.space.dims import DEPTH

FFN = {"ffn_hidden_size": (256, 192, 128, 64)}


def random_damage(space) -> Damage:
    g = torch.Generator().manual_seed(5)
    widths = {
        name: {
            layer: torch.rand(space.dims[name].full, generator=g, dtype=torch.float64).add(0.1).tolist()
            for layer in (range(12) if name == "hidden_size" else layers_of_dim(space, name))
        }
        for name in choice_shapes(space)
        if name != DEPTH
    }
    return Damage(space, Scores(widths=widths, layers={i: 0.5 + i / 10 for i in range(12)}))


def cost_of(space, share: float) -> BudgetCost:
    return BudgetCost(space, make_layout(), Budget(name="b", kind="fraction", value=share))


def selections(space):
    shapes = choice_shapes(space)
    rows = [list(product(range(choices), repeat=count)) for count, choices in shapes.values()]
    return [dict(zip(shapes, picked, strict=True)) for picked in product(*rows)]


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_it_is_the_slope_of_the_least_damage_of_all_shapes(share):
    space = make_space()
    cost, damage = cost_of(space, share), random_damage(space)
    points = [(cost.tables.cost(s) / cost.target, damage.of(s)) for s in selections(space)]
    cheapest, parent = min(c for c, _ in points), cost.parent / cost.target
    low, high = max(1 - STEP, cheapest), min(1 + STEP, parent)

    def least(limit: float) -> float:
        return min(d for c, d in points if c <= limit + 1e-9)

    assert shadow_price(cost, damage) == pytest.approx((least(low) - least(high)) / (high - low), rel=1e-9)
    assert shadow_price(cost, damage) > 0


def test_there_is_nothing_to_trade_at_the_smallest_or_without_choices():
    space = make_space(choices=FFN)
    smallest = min(cost_of(space, 1.0).tables.cost(s) for s in selections(space))
    tiny = cost_of(space, smallest / cost_of(space, 1.0).parent / (1 + STEP) / 1.001)
    assert shadow_price(tiny, random_damage(space)) == 0
    fixed = make_space(choices={"ffn_hidden_size": (ARCHITECTURE.ffn_hidden_size,)})
    assert shadow_price(cost_of(fixed, 1.0), random_damage(fixed)) == 0


def test_prices_start_there_within_the_most_a_price_may_be():
    config = RouterConfig(max_price=2.0, dual_ascent_rate=5.0)
    steering = BudgetSteering.starting_at({"a": 0.5, "b": 7.0}, config)
    assert [steering.price(name) for name in ("a", "b", "c")] == [0.5, 2.0, 0.0]
    steering.update("a", 0.1, 10, config)
    assert steering.price("a") == pytest.approx(0.55)
