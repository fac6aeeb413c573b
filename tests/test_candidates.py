"""A wide search finds the least damage there is, offers what is close to it, and nothing that another one contains."""

from itertools import product
from math import inf

import pytest
import torch
from router_spaces import ARCHITECTURE, make_layout, make_space
from test_proposals import FEW, scores_of

from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.problems import ProblemsError
from nemo_elastic.shapes import candidates as candidates_module
from nemo_elastic.shapes import knapsack as knapsack_module
from nemo_elastic.shapes.candidates import SLACK, SummedDamage, candidates, reach
from nemo_elastic.shapes.damage import Damage
from nemo_elastic.shapes.greedy import greedy_selection
from nemo_elastic.shapes.knapsack import Knapsack
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import choice_shapes, selection_of, smallest_selection

TOLERANCE, SPREAD = 0.02, 1.6
MAMBA, ATTENTION = ARCHITECTURE.layers_of("M"), ARCHITECTURE.layers_of("*")


def setting(tmp_path, seed: int, value: float = 0.6, **space) -> tuple[BudgetCost, Damage]:
    made = make_space(**space)
    cost = BudgetCost(made, make_layout(), Budget(name="b", kind="fraction", value=value))
    return cost, Damage(made, scores_of(made.architecture, tmp_path, seed))


def every_selection(space):
    shapes = choice_shapes(space)
    rows = [(name, row) for name, (count, _) in shapes.items() for row in range(count)]
    for picked in product(*(range(shapes[name][1]) for name, _ in rows)):
        found = {name: [] for name in shapes}
        for (name, _), i in zip(rows, picked, strict=True):
            found[name].append(i)
        yield {name: tuple(row) for name, row in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_close_to_the_least_damage_is_found_and_nothing_inside_another(tmp_path, seed):
    """Against every selection of the space, one by one."""
    assert (reach(1.0, SPREAD), reach(0.0, SPREAD)) == (SPREAD, SLACK)
    cost, damage = setting(tmp_path, seed, choices=FEW)
    fits = [s for s in every_selection(cost.space) if cost.error(cost.tables.cost(s)) <= TOLERANCE]
    within = [s for s in fits if cost.error(cost.tables.cost(s)) >= -TOLERANCE]
    meets, least = min(map(damage.of, within), default=inf), min(map(damage.of, fits))
    close = [s for s in fits if damage.of(s) <= reach(least, SPREAD) and (s in within or damage.of(s) < meets)]
    outer = [s for s in close if not any(
        o != s and all(i <= j for n in s for i, j in zip(o[n], s[n], strict=True)) for o in close)]  # fmt: skip
    found = candidates(cost, damage, count=10_000, spread=SPREAD, tolerance=TOLERANCE)
    assert sorted(c.damage for c in found) == pytest.approx(sorted(map(damage.of, outer)), rel=1e-12)
    assert found[0].damage == pytest.approx(least, rel=1e-12) and [c.damage for c in found] == sorted(
        c.damage for c in found
    )
    for c in found:
        selection = selection_of(cost.space, c.subnet)
        assert selection in outer and c.error == pytest.approx(cost.error(cost.of(c.subnet)), abs=1e-12)
    assert least <= damage.of(greedy_selection(cost, damage, tolerance=TOLERANCE)) + 1e-12


@pytest.mark.parametrize("per_layer", [False, True])
def test_damage_adds_up_over_rows(tmp_path, per_layer):
    cost, damage = setting(tmp_path, 1, per_layer=per_layer)
    knapsack, generator = Knapsack(cost, SummedDamage(damage)), torch.Generator().manual_seed(2)
    for rest in list(knapsack.rests())[:: 7 if per_layer else 3]:
        picked = [int(torch.randint(len(row.costs), (), generator=generator)) for row in rest.rows]
        selection = knapsack.selection(rest, picked)
        loss, price = rest.of(picked)
        assert loss == pytest.approx(damage.of(selection), rel=1e-9)
        assert price == pytest.approx(cost.tables.cost(selection), rel=1e-12)
        assert rest.bound <= loss + 1e-12 and rest.cheapest <= price + 1e-9


def test_where_layers_differ_the_search_is_never_behind_greedy_search(tmp_path):
    for seed in range(3):
        cost, damage = setting(tmp_path, seed, per_layer=True)
        found = candidates(cost, damage, count=6)
        greedy = damage.of(greedy_selection(cost, damage))
        assert found[0].damage <= greedy * 1.0001
        assert all(c.error <= 0.01 for c in found) and 1 < len({c.subnet for c in found}) == len(found) <= 6
        even = candidates(*setting(tmp_path, seed), count=1)
        assert found[0].damage <= even[0].damage + 1e-12  # that has all layers alike


def test_a_price_of_cost_comes_close_to_trying_everything_out(tmp_path, monkeypatch):
    few = {"num_attention_heads": (8, 4), "mamba_num_heads": (16, 8), "num_layers": (12, 10)}
    cost, damage = setting(tmp_path, 3, value=0.8, per_layer=True, choices=few)
    exact = candidates(cost, damage, count=1)[0]
    for module in (knapsack_module, candidates_module):
        monkeypatch.setattr(module, "EXHAUSTIVE_ROWS", 0)
    assert exact.damage <= candidates(cost, damage, count=1)[0].damage <= 1.02 * exact.damage


def test_few_candidates_are_unlike_and_the_least_damage_is_among_them(tmp_path):
    cost, damage = setting(tmp_path, 0)
    every = candidates(cost, damage, count=10_000, spread=3.0, tolerance=TOLERANCE)
    assert len(every) > 4
    few = candidates(cost, damage, count=4, spread=3.0, tolerance=TOLERANCE)
    assert few[0] == every[0] and len(few) == 4 and set(c.subnet for c in few) <= set(c.subnet for c in every)

    def apart(found) -> float:
        rows = [selection_of(cost.space, c.subnet) for c in found]
        return min(candidates_module._distance(a, b, cost) for i, a in enumerate(rows) for b in rows[:i])

    assert apart(few) >= apart(every[:4])


def test_there_is_always_one(tmp_path):
    """Nothing within the tolerance: what lies below. A budget below all there is: refused, as everywhere."""
    few = {"hidden_size": (96, 64), "num_layers": (12, 8)}
    cost, damage = setting(tmp_path, 0, value=0.9, choices=few)
    found = candidates(cost, damage, count=1)[0]
    fits = [s for s in every_selection(cost.space) if cost.error(cost.tables.cost(s)) <= 0.01]
    assert found.damage == pytest.approx(min(map(damage.of, fits))) and found.error < -0.01
    smallest = cost.tables.cost(smallest_selection(cost.space)) / cost.parent
    impossible = setting(tmp_path, 0, value=0.5 * smallest, choices=few)
    with pytest.raises(ProblemsError, match="cannot be reached"):
        candidates(*impossible, count=6)


@pytest.mark.parametrize("value", [0.6, 0.7, 0.8])
def test_candidates_are_different_shapes_also_where_dropped_layers_may_have_any_size(tmp_path, value):
    few = {"num_attention_heads": (8, 4), "mamba_num_heads": (16, 8), "num_layers": (12, 10, 8)}
    for seed in range(3):
        cost, damage = setting(tmp_path, seed, value=value, per_layer=True, choices=few)
        found = [c.subnet for c in candidates(cost, damage, count=6, tolerance=0.03)]
        ran = {(s.layers, *cut(s, MAMBA, s.mamba_num_heads), *cut(s, ATTENTION, s.num_attention_heads)) for s in found}
        assert len(ran) == len(found) > 1


def cut(subnet, layers, sizes) -> list[int]:
    """Sizes of the layers that are still there."""
    return [size for layer, size in zip(layers, sizes, strict=True) if layer in subnet.layers]


def test_a_spread_of_one_leaves_the_least_and_what_is_as_good(tmp_path):
    cost, damage = setting(tmp_path, 0, choices=FEW)
    found = candidates(cost, damage, count=6, spread=1.0, tolerance=TOLERANCE)
    assert found and all(c.damage <= found[0].damage + SLACK + 1e-12 for c in found)
    assert reach(inf, 1.0) == inf
