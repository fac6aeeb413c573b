"""Repair: exact budgets, at the least loss of router probability (brute force is the judge)."""

from itertools import product

import pytest
import torch
from expert_features import SIZES as EXPERTS
from router_spaces import make_layout, make_space, random_probabilities
from small_parent import architecture

from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.cost.counts import active_parameters, parameters
from nemo_elastic.problems import ProblemsError
from nemo_elastic.router.repair import choose
from nemo_elastic.shapes import knapsack
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import choice_shapes, subnet_of
from nemo_elastic.space.dims import ElasticDim, dim_groups, parent_size
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

TOLERANCE = 0.01


def make_cost(value: float, per_layer: bool = False, choices=None) -> BudgetCost:
    budget = Budget(name="b", kind="fraction", value=value)
    return BudgetCost(make_space(per_layer=per_layer, choices=choices), make_layout(), budget)


def all_selections(space):
    """Every selection of a small space."""
    shapes = choice_shapes(space)
    rows = [(name, row) for name, (count, _) in shapes.items() for row in range(count)]
    for picked in product(*(range(shapes[name][1]) for name, _ in rows)):
        found = {name: [] for name in shapes}
        for (name, _), i in zip(rows, picked, strict=True):
            found[name].append(i)
        yield {name: tuple(row) for name, row in found.items()}


def lost(pi, selection) -> float:
    return sum((p[r].max().log() - p[r, i].log()).item() for n, p in pi.items() for r, i in enumerate(selection[n]))


def shortfall(error, price) -> float:
    """Nothing within the tolerance; outside, more than any probability, and the price besides."""
    short = max(0.0, -error - TOLERANCE)
    return 1e4 + price * short if short and price else 0.0


def best_by_brute_force(pi, cost, price):
    best = None
    for selection in all_selections(cost.space):
        error = cost.error(cost.tables.cost(selection))
        if error <= TOLERANCE:
            score = lost(pi, selection) + shortfall(error, price)
            best = min(best or (score, selection), (score, selection), key=lambda x: x[0])
    return best


@pytest.mark.parametrize("seed", range(2))
def test_repair_is_the_best_there_is(seed):
    cost = make_cost(0.55)
    pi = random_probabilities(cost.space, seed, sharpness=3.0)
    pi = {n: p.flip(-1).sort(descending=True).values for n, p in pi.items()}  # the argmax is the full network
    for price in (0.0, 1000.0):
        chosen = choose(pi, cost, tolerance=TOLERANCE, shortfall_price=price)
        score, _ = best_by_brute_force(pi, cost, price)
        own = chosen.lost_log_probability + shortfall(chosen.error, price)
        assert own == pytest.approx(score, rel=1e-9)
        assert chosen.is_repaired and chosen.error <= TOLERANCE
        assert chosen.cost == parameters(cost.layout, subnet_of(cost.space, chosen.selection))


@pytest.mark.parametrize("per_layer", [(), ("num_moe_experts",), ("num_moe_experts", "moe_ffn_hidden_size")])
@pytest.mark.parametrize("kind", ["parameters", "active_parameters"])
def test_several_dims_of_a_layer_are_set_together(kind, per_layer):
    """Experts have a count, a width and a shared one: in all layers alike, or layer by layer."""
    arch = architecture("ME*EM", **EXPERTS)
    sizes = {"hidden_size": (48, 40), "num_moe_experts": (8, 4), "moe_ffn_hidden_size": (16, 12, 8),
             "moe_shared_expert_intermediate_size": (24, 12), "num_layers": (5, 4)}  # fmt: skip
    groups = dim_groups(arch, 4)
    dims = {n: ElasticDim(name=n, full=parent_size(arch, n), groups=groups[n], choices=c, per_layer=n in per_layer)
            for n, c in sizes.items()}  # fmt: skip
    space = ElasticSpace(architecture=arch, dims=dims, ffn_groups=4)
    layout = ParamLayout(arch, ffn_groups=4)
    full = {"parameters": parameters, "active_parameters": active_parameters}[kind](layout, space.full_subnet())
    cost = BudgetCost(space, layout, Budget(name="b", kind=kind, value=0.8 * full))
    pi = random_probabilities(space, 5, sharpness=3.0)
    pi = {n: p.flip(-1).sort(descending=True).values for n, p in pi.items()}
    chosen = choose(pi, cost, tolerance=TOLERANCE, shortfall_price=0.0)
    score, _ = best_by_brute_force(pi, cost, 0.0)
    assert chosen.is_repaired and chosen.lost_log_probability == pytest.approx(score, rel=1e-9)
    assert chosen.cost == cost.of(subnet_of(space, chosen.selection))


def test_repair_by_multiplier_is_close_to_the_best(monkeypatch):
    monkeypatch.setattr(knapsack, "EXHAUSTIVE_ROWS", 0)  # what spaces too large to try out take
    few = {"num_attention_heads": (8, 4), "mamba_num_heads": (16, 12, 8), "num_layers": (12, 10)}
    cost = make_cost(0.85, per_layer=True, choices=few)
    for seed in range(3):
        pi = random_probabilities(cost.space, seed, sharpness=2.0)
        pi = {n: p.sort(descending=True).values for n, p in pi.items()}
        chosen = choose(pi, cost, tolerance=TOLERANCE, shortfall_price=0.0)
        score, _ = best_by_brute_force(pi, cost, 0.0)
        assert chosen.error <= TOLERANCE
        assert score - 1e-9 <= chosen.lost_log_probability <= score * 1.05 + 0.05


@pytest.mark.parametrize("value", [0.45, 0.6, 0.75, 0.9])
def test_a_large_space_is_repaired_to_within_the_tolerance(value):
    cost = make_cost(value, per_layer=True)
    for seed in range(2):
        pi = random_probabilities(cost.space, seed, sharpness=4.0)
        chosen = choose(pi, cost, tolerance=TOLERANCE, shortfall=TOLERANCE)
        assert abs(chosen.error) <= TOLERANCE


def test_what_fits_is_left_alone_and_a_shortfall_is_said():
    cost = make_cost(0.9)
    pi = {n: torch.zeros(s).index_fill(1, torch.tensor([s[1] - 1]), 1.0) for n, s in choice_shapes(cost.space).items()}
    chosen = choose(pi, cost, tolerance=TOLERANCE)
    assert not chosen.is_repaired and chosen.error == chosen.argmax_error < -TOLERANCE
    assert "below the budget" in chosen.note(TOLERANCE)
    filled = choose(pi, cost, tolerance=TOLERANCE, shortfall=TOLERANCE)
    assert filled.is_repaired and abs(filled.error) <= TOLERANCE
    assert "repaired to" in filled.note(TOLERANCE)


def test_saturated_probabilities_can_be_repaired():
    cost = make_cost(0.5)
    pi = {n: torch.zeros(s).index_fill(1, torch.tensor([0]), 1.0) for n, s in choice_shapes(cost.space).items()}
    assert abs(choose(pi, cost, tolerance=TOLERANCE).error) <= TOLERANCE


def test_an_impossible_budget_is_refused():
    cost = make_cost(0.05)
    with pytest.raises(ProblemsError, match="smallest subnet"):
        choose(random_probabilities(cost.space, 0), cost, tolerance=TOLERANCE)


def test_without_repair_the_argmax_and_its_error_come_back():
    cost = make_cost(0.5)
    pi = {n: torch.zeros(s).index_fill(1, torch.tensor([0]), 1.0) for n, s in choice_shapes(cost.space).items()}
    chosen = choose(pi, cost, tolerance=TOLERANCE, repair=False)
    assert chosen.cost == cost.parent and chosen.error == chosen.argmax_error == pytest.approx(1.0)
