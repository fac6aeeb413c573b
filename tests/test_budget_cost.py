"""What budgets count: tables against exact counts, expectation against sampling, gradients against differences."""

import pytest
import torch
from router_spaces import CHOICES, draw, make_layout, make_space, random_probabilities

from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.cost.counts import BYTE_PROFILES, memory, parameters
from nemo_elastic.cost.latency import Grid, LatencyTable
from nemo_elastic.problems import ProblemsError
from nemo_elastic.router.budget_loss import ExpectedCost
from nemo_elastic.router.selection import one_hot
from nemo_elastic.shapes.search import propose_random, propose_uniform
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import subnet_of


def latency_table() -> LatencyTable:
    """Not a product of sizes, so that an expectation at expected sizes would be wrong."""

    def grid(dims, sizes, f):
        from itertools import product

        return Grid(dims, sizes, tuple(f(*point) for point in product(*sizes)))

    h = (48, 72, 96)
    return LatencyTable(
        {
            "mamba": grid(
                ("hidden_size", "mamba_num_heads", "mamba_head_dim"),
                (h, (8, 16), (8, 12)),
                lambda h, m, p: 0.1 + h * m * p / 1e4 + (m * p) ** 0.5 / 10,
            ),
            "attention": grid(
                ("hidden_size", "num_attention_heads"), (h, (4, 8)), lambda h, q: 0.2 + (h * q) ** 0.5 / 50
            ),
            "mlp": grid(
                ("hidden_size", "ffn_hidden_size"), (h, (64, 160, 256)), lambda h, f: 0.1 + max(h * f, 9e3) / 1e4
            ),
            "embedding_and_output": grid(("hidden_size",), (h,), lambda h: h / 30),
        }
    )


BUDGETS = {
    "parameters": Budget(name="b", kind="parameters", value=400_000),
    "fraction": Budget(name="b", kind="fraction", value=0.6),
    "memory_gb": Budget(name="b", kind="memory_gb", value=0.002),
    "latency_ms": Budget(name="b", kind="latency_ms", value=6.0),
}


def make_cost(kind: str, per_layer: bool = False) -> BudgetCost:
    return BudgetCost(
        make_space(per_layer=per_layer),
        make_layout(),
        BUDGETS[kind],
        batch_size=2,
        sequence_length=128,
        profile=BYTE_PROFILES["fp8_kv"],
        latency=latency_table(),
    )


@pytest.mark.parametrize("per_layer", [False, True])
def test_tables_hold_the_exact_counts(per_layer):
    g = torch.Generator().manual_seed(0)
    count, gigabytes = make_cost("fraction", per_layer), make_cost("memory_gb", per_layer)
    for _ in range(30):
        selection = draw(random_probabilities(count.space, 1, 0.5), g)
        subnet = subnet_of(count.space, selection)
        assert count.tables.cost(selection) == count.of(subnet) == parameters(count.layout, subnet)
        served = memory(count.layout, subnet, batch_size=2, sequence_length=128, profile=BYTE_PROFILES["fp8_kv"]).total
        assert gigabytes.tables.cost(selection) * 1e9 == pytest.approx(served, rel=1e-12)
        assert gigabytes.of(subnet) * 1e9 == pytest.approx(served, rel=1e-12)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", BUDGETS)
def test_expected_cost_is_the_mean_over_sampled_architectures(kind, per_layer):
    cost = make_cost(kind, per_layer)
    pi = random_probabilities(cost.space, 2)
    expected = ExpectedCost(cost)(pi).item()
    g, n = torch.Generator().manual_seed(3), 1000
    ratios = torch.tensor([cost.tables.cost(draw(pi, g)) / cost.target for _ in range(n)], dtype=torch.float64)
    assert abs(ratios.mean().item() - expected) < 4 * ratios.std().item() / n**0.5


@pytest.mark.parametrize("kind", BUDGETS)
def test_one_hot_probabilities_cost_exactly_the_subnet(kind):
    cost = make_cost(kind, per_layer=True)
    like = random_probabilities(cost.space, 4)
    g = torch.Generator().manual_seed(5)
    for _ in range(10):
        selection = draw(like, g)
        ratio = ExpectedCost(cost)(one_hot(selection, like)).item()
        assert ratio == pytest.approx(cost.of(subnet_of(cost.space, selection)) / cost.target, rel=1e-12)


@pytest.mark.parametrize("kind", BUDGETS)
def test_gradient_equals_finite_differences(kind):
    cost = make_cost(kind)
    expected, logits = ExpectedCost(cost), {}
    for name, pi in random_probabilities(cost.space, 6).items():
        logits[name] = pi.log().requires_grad_()
    names = list(logits)
    torch.manual_seed(0)  # the direction that gradcheck's fast mode projects on

    def ratio(*values):
        return expected({n: torch.softmax(z, -1) for n, z in zip(names, values, strict=True)})

    assert torch.autograd.gradcheck(ratio, tuple(logits.values()), eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_latency_is_interpolated_and_never_extrapolated():
    grid = Grid(("hidden_size", "ffn_hidden_size"), ((10, 20), (100, 300)), (1.0, 3.0, 2.0, 8.0))
    assert grid.at({"hidden_size": 15, "ffn_hidden_size": 200}) == pytest.approx((1 + 3 + 2 + 8) / 4)
    assert grid.at({"hidden_size": 20, "ffn_hidden_size": 150}) == pytest.approx(2 + 6 / 4)
    with pytest.raises(ProblemsError, match=r"9 was not measured \(10 to 20 were\)"):
        grid.at({"hidden_size": 9, "ffn_hidden_size": 100})
    table = latency_table()
    assert LatencyTable.from_dict(table.to_dict()) == table
    with pytest.raises(ProblemsError, match="nemo-elastic profile"):
        BudgetCost(make_space(), make_layout(), BUDGETS["latency_ms"])


def test_uniform_shrink_meets_the_target_evenly():
    cost = make_cost("fraction")
    subnet = propose_uniform(cost, tolerance=0.02)
    assert abs(cost.error(cost.of(subnet))) <= 0.02
    assert propose_uniform(make_cost("fraction"), tolerance=0.02) == subnet
    ratios = [
        getattr(subnet, n)[0] / c[0] if isinstance(getattr(subnet, n), tuple) else getattr(subnet, n) / c[0]
        for n, c in CHOICES.items()
    ]
    assert max(ratios) - min(ratios) <= 0.5
    full = BudgetCost(make_space(), make_layout(), Budget(name="full", kind="fraction", value=1.0))
    assert propose_uniform(full) == full.space.full_subnet()


def test_uniform_shrink_of_a_space_too_large_to_try_out():
    fine = {
        "hidden_size": tuple(range(96, 40, -1)),
        "ffn_hidden_size": tuple(range(256, 56, -8)),
        "mamba_num_heads": (16, 12, 8),
        "mamba_head_dim": tuple(range(12, 5, -1)),
        "num_layers": tuple(range(12, 6, -1)),
    }
    cost = BudgetCost(make_space(choices=fine), make_layout(), BUDGETS["fraction"])
    assert abs(cost.error(cost.of(propose_uniform(cost)))) <= 0.01


def test_random_proposals_differ_meet_the_target_and_repeat():
    cost = make_cost("fraction", per_layer=True)
    found = propose_random(cost, 6, seed=3, tolerance=0.02)
    assert len(set(found)) == 6
    assert all(abs(cost.error(cost.of(s))) <= 0.02 for s in found)
    assert propose_random(cost, 6, seed=3, tolerance=0.02) == found
    assert propose_random(cost, 6, seed=4, tolerance=0.02) != found


@pytest.mark.parametrize(("kind", "value"), [("fraction", 0.05), ("parameters", 1000), ("memory_gb", 1e-6)])
def test_an_impossible_budget_names_the_smallest_reachable(kind, value):
    cost = BudgetCost(make_space(), make_layout(), Budget(name="tiny", kind=kind, value=value))
    smallest = cost.of(make_space().subnet(**{n: c[-1] for n, c in CHOICES.items()}))
    with pytest.raises(ProblemsError, match=r"elastic.budgets.tiny: .* smallest subnet") as error:
        propose_uniform(cost)
    words = f"{smallest}" if kind == "parameters" else f"{cost.in_user_units(smallest):.4g}"
    assert words in str(error.value)


def test_the_fast_cost_of_uniform_subnets_is_the_cost():
    cost = make_cost("memory_gb")
    names = ("num_layers", "hidden_size", "mamba_num_heads", "ffn_hidden_size")
    fast = cost.tables.uniform_cost(names)
    for picked in ((0, 0, 0, 0), (2, 3, 2, 3), (1, 2, 0, 3), (2, 0, 1, 1)):
        sizes = {n: CHOICES[n][i] for n, i in zip(names, picked, strict=True)}
        assert fast(picked) == pytest.approx(cost.of(cost.space.subnet(**sizes)), rel=1e-12)
