"""Latency measured here becomes a table, the table a budget, and the budget a subnet that meets it.

What is measured on a busy machine is any shape at all, so tests of budgets go through the verb with a clock of known
times; that the real clock is read, and tells a large layer from a small one, has tests of its own.
"""

import json
from dataclasses import replace

import expert_features
import pytest
import torch
import yaml
from router_spaces import make_layout, make_space, random_probabilities
from small_parent import space_of

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.sections import RouterConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.cost.latency import FORMAT, OUTER, Grid, LatencyTable
from nemo_elastic.family import family_of
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.mcore.models.profile import Timing, measure, profile, thinned
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError
from nemo_elastic.router.budget_loss import ExpectedCost, budget_loss
from nemo_elastic.router.model import Router
from nemo_elastic.router.repair import choose
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.shapes.search import propose_random, propose_uniform
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import subnet_of

CHOICES = {
    "hidden_size": (96, 80, 64, 48, 32),
    "ffn_hidden_size": (256, 192, 128, 64),
    "mamba_num_heads": (16, 12, 8),
    "num_attention_heads": (8, 4),
    "num_layers": (12, 10, 8),
}
QUICK = Timing(batch_size=1, sequence_length=32, warm_up=1, repeats=3, rounds=1)
RUN = (
    "elastic.budgets={full: 1.0, fast: {kind: latency, value: 8.0}}",
    "report.sequence_length=64",
)


@pytest.fixture(scope="module")
def measured(one_rank):
    return profile(make_space(choices=CHOICES), QUICK, points=3)


def known_time(architecture, kind, sizes, timing) -> float:
    """Milliseconds that are no product of sizes."""
    inner = sizes.get("ffn_hidden_size", 1) * sizes.get("mamba_num_heads", 1) * sizes.get("num_attention_heads", 1)
    return 0.05 + sizes["hidden_size"] * inner / 1e4 + (sizes["hidden_size"] * inner) ** 0.5 / 50


@pytest.fixture(scope="module")
def known(one_rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_elastic.mcore.models.profile.measure", known_time)
        return profile(make_space(choices=CHOICES), QUICK, points=3)


@pytest.fixture(scope="module")
def table_file(one_rank, tmp_path_factory):
    """The shipped parent's table of known times, as the verb writes it."""
    path = tmp_path_factory.mktemp("profile") / "latency.yaml"
    words = ["profile", "--config", "tiny_parent.yaml", "--output", str(path), "--repeats", "2", "--rounds", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_elastic.mcore.models.profile.measure", known_time)
        assert main([*words, "--points", "2", "report.sequence_length=64"]) == 0
    return path


def test_every_kind_is_measured_over_its_dims_and_ends_are_always_there(measured):
    assert measured.grids["mamba"].dims == ("hidden_size", "mamba_num_heads", "mamba_head_dim")
    assert measured.grids["mamba"].sizes == ((32, 64, 96), (8, 12, 16), (12,))
    assert measured.grids["attention"].sizes == ((32, 64, 96), (4, 8))
    assert measured.grids["mlp"].sizes == ((32, 64, 96), (64, 192, 256))  # 64, 128, 192, 256: three of four
    assert measured.grids[OUTER].sizes == ((32, 64, 96),)
    assert thinned([1, 2, 3, 4, 5, 6, 7], 3) == [1, 4, 7] and thinned([1, 2], 5) == [1, 2]
    at = measured.origin["conditions"]
    assert (at["batch_size"], at["sequence_length"], at["dtype"]) == (1, 32, "float32")
    assert measured.origin["machine"]["device"] and measured.origin["model"]["vocab_size"] == 256


def test_a_much_larger_layer_takes_longer(one_rank):
    arch = replace(make_space().architecture, mamba_state_dim=32)
    timing = Timing(batch_size=2, sequence_length=128, warm_up=2, repeats=7)
    small = {"hidden_size": 32, "ffn_hidden_size": 64, "mamba_num_heads": 4, "mamba_head_dim": 12}
    large = {"hidden_size": 512, "ffn_hidden_size": 4096, "mamba_num_heads": 64, "mamba_head_dim": 12}
    for kind, names in (("mlp", ["ffn_hidden_size"]), ("mamba", ["mamba_num_heads", "mamba_head_dim"]), (OUTER, [])):
        names = ["hidden_size", *names]
        fast, slow = (measure(arch, kind, {n: of[n] for n in names}, timing) for of in (small, large))
        assert slow > 1.5 * fast, (kind, fast, slow)


def test_a_table_survives_its_file_and_is_exact_at_measured_sizes(measured, tmp_path):
    path = measured.write(tmp_path / "latency.yaml")
    read = LatencyTable.read(path)
    assert read == measured
    text = yaml.safe_load(path.read_text())
    assert text["format"] == FORMAT and text["machine"] and text["sha256"]
    grid = read.grids["mlp"]
    for i, h in enumerate(grid.sizes[0]):
        for j, f in enumerate(grid.sizes[1]):
            assert grid.at({"hidden_size": h, "ffn_hidden_size": f}) == grid.values[i * len(grid.sizes[1]) + j]
    # Between two measured sizes a child costs what lies between, and rising grids stay rising.
    rising = Grid(("hidden_size",), ((10, 20, 40),), (1.0, 3.0, 4.0))
    found = [rising.at({"hidden_size": h}) for h in range(10, 41)]
    assert found == sorted(found) and found[5] == 2.0 and found[20] == 3.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"format": "other"}, "format is not"),
        (lambda t: t | {"version": 9}, "version 9 cannot be read"),
        (lambda t: t | {"sha256": "0" * 64}, "damaged or edited"),
        (lambda t: {k: v for k, v in t.items() if k != "kinds"}, "damaged"),
        (
            lambda t: t | {"model": t["model"] | {"mamba_state_dim": 7}},
            "another parent: mamba_state_dim 7 instead of 32",
        ),
        (lambda t: [1, 2], "format is not"),
    ],
)
def test_a_bad_table_is_one_clear_problem(table_file, tmp_path, capsys, change, words):
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(change(yaml.safe_load(table_file.read_text()))))
    assert main(["plan", "--config", "tiny_parent.yaml", "--json", f"report.latency_table={bad}", *RUN]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["key"] == "report.latency_table" and words in problem["message"]
    assert "nemo-elastic profile" in problem["message"]


def test_no_table_and_no_file_are_problems_too(capsys, tmp_path):
    assert main(["plan", "--config", "tiny_parent.yaml", "--json", *RUN]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["key"] == "elastic.budgets.fast" and "nemo-elastic profile" in problem["message"]
    absent = f"report.latency_table={tmp_path / 'none.yaml'}"
    for frozen in ("false", "true"):
        words = [*RUN, absent, f"router.frozen={frozen}"]
        assert main(["plan", "--config", "tiny_parent.yaml", "--json", *words]) == 2
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert problem["key"] == "report.latency_table" and "No such file" in problem["message"]


def test_an_existing_table_is_not_overwritten(table_file, capsys):
    before = table_file.read_bytes()
    assert main(["profile", "--config", "tiny_parent.yaml", "--output", str(table_file)]) == 2
    assert "--force" in capsys.readouterr().err and table_file.read_bytes() == before


def test_latency_budgets_from_the_verb_to_the_plan_and_the_planner(table_file):
    run = load_config("tiny_parent.yaml", [*RUN, f"report.latency_table={table_file}"]).config
    parent = plan(run)["parent"]["latency_ms"]
    run = load_config(
        "tiny_parent.yaml",
        [
            f"elastic.budgets={{full: 1.0, fast: {{kind: latency, value: {0.8 * parent}}}}}",
            "report.sequence_length=64",
            f"report.latency_table={table_file}",
            "router.shapes=learned",
        ],
    ).config
    planned = plan(run)
    assert planned["problems"] == [] and "1 x 64 tokens in float32" in planned["serving"]["latency"]
    fast = planned["budgets"][-1]
    assert abs(fast["error"]) <= run.router.tolerance
    assert fast["latency_ms"] == pytest.approx(0.8 * parent * (1 + fast["error"]), rel=1e-12)
    family = family_of(run)
    conditions = serving_of(run.report, family.architecture).conditions
    planner = Planner(family, run.router, family.layout, timeline=Timeline(0, 5, 10, 10), seed=1, **conditions)
    assert abs(planner.costs["fast"].error(planner.costs["fast"].of(planner.uniform["fast"]))) <= run.router.tolerance
    router = Router(family.space, planner.learned, run.router, seed=1)
    chosen = planner.choices(router)["fast"]
    subnet = planner.subnet_of_choice("fast", chosen)
    table = LatencyTable.read(table_file)
    by_hand = table.outer(subnet.hidden_size)
    names = {"M": "mamba", "*": "attention", "-": "mlp"}
    for layer in subnet.layers:
        kind = family.architecture.hybrid_override_pattern[layer]
        by_hand += table.layer(names[kind], family.layout.sizes(subnet, layer))
    assert chosen.cost == pytest.approx(by_hand, rel=1e-12)
    assert (
        chosen.error == pytest.approx(by_hand / (0.8 * parent) - 1, abs=1e-12) and chosen.error <= run.router.tolerance
    )


def test_a_router_learns_a_latency_and_its_choice_is_repaired_to_fit(known):
    space, layout = make_space(choices=CHOICES), make_layout()
    full = BudgetCost(space, layout, Budget(name="f", kind="latency_ms", value=1.0), latency=known)
    cost = BudgetCost(space, layout, Budget(name="fast", kind="latency_ms", value=0.7 * full.parent), latency=known)
    config = RouterConfig(shapes="learned")
    router, expected = Router(space, ["fast"], config, seed=0), ExpectedCost(cost)
    optimizer = torch.optim.Adam(router.parameters(), lr=config.lr)
    ratios = []
    for _ in range(60):
        ratio = expected(router(router.budget_vector("fast")).probabilities)
        ratios.append(ratio.item())
        optimizer.zero_grad()
        budget_loss(ratio, 0.0, config).backward()
        optimizer.step()
    assert abs(ratios[0] - 1) > 0.05 > 0.02 > abs(ratios[-1] - 1)
    chosen = choose(router(router.budget_vector("fast")).probabilities, cost, tolerance=0.01, shortfall=0.01)
    assert chosen.error <= 0.01
    assert chosen.cost == pytest.approx(cost.of(subnet_of(space, chosen.selection)), rel=1e-12)
    uniform, drawn = propose_uniform(cost), propose_random(cost, 2, seed=1)
    assert all(cost.error(cost.of(s)) <= 0.01 for s in (uniform, *drawn))
    pi = random_probabilities(space, 3)
    assert expected(pi).item() > 0


def test_what_was_not_measured_is_refused(measured):
    cost = BudgetCost(
        make_space(choices=CHOICES), make_layout(), Budget(name="f", kind="latency_ms", value=1.0), latency=measured
    )
    with pytest.raises(ProblemsError, match=r"24 was not measured \(32 to 96 were\)"):
        cost.of(cost.space.subnet(hidden_size=24))


@pytest.mark.usefixtures("one_rank")
def test_a_parent_with_experts_is_timed_as_it_routes() -> None:
    """A bias of experts needs sigmoid scores: Megatron refuses the model without what the section says of routing."""
    arch, function = expert_features.parts("nemotron")
    table = profile(
        space_of(arch), Timing(batch_size=1, sequence_length=8, function=function, repeats=1, rounds=1), points=1
    )
    assert table.layer("experts", {"hidden_size": 48, "num_moe_experts": 8, "moe_ffn_hidden_size": 16,
                                   "moe_shared_expert_intermediate_size": 24}) > 0  # fmt: skip
