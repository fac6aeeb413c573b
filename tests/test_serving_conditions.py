"""Budget kinds from the configuration to plan, planner and search, against numbers worked out by hand."""

import json
import re

import pytest
import torch
from router_spaces import make_layout, make_space, random_probabilities

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.sections import RouterConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.cost.conditions import byte_profile, serving_of
from nemo_elastic.cost.counts import BYTE_PROFILES, ByteProfile
from nemo_elastic.family import family_of
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError
from nemo_elastic.router.budget_loss import ExpectedCost, budget_loss
from nemo_elastic.router.model import probabilities_of
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import choice_shapes

NANO = "nemotron_nano_12b_v2.yaml"
# Nemotron Nano 12B v2 at batch 2 and 1,000 tokens, by hand: 6 attention layers of 8 KV heads x 128, keys and values;
# 28 Mamba layers of 128 x 80 channels, 128 states each, and 4 columns of 10,240 + 2 x 8 x 128 convolution channels.
WEIGHTS = 12_310_001_152
KV = 2 * 6 * 2 * 8 * 128 * 1000
SSM = 2 * 28 * 128 * 80 * 128
CONV = 2 * 28 * 4 * (10_240 + 2_048)
BY_HAND = {  # bytes per element of weights, KV, state -> bytes
    "bf16": 2 * WEIGHTS + 2 * KV + 2 * (SSM + CONV),
    "fp32": 4 * WEIGHTS + 4 * KV + 4 * (SSM + CONV),
    "fp8_kv": 2 * WEIGHTS + KV + 2 * (SSM + CONV),
    "fp8": WEIGHTS + KV + SSM + CONV,
    "int8": WEIGHTS + KV + SSM + CONV,
    "fp4": 9 * WEIGHTS / 16 + 9 * KV / 16 + SSM + CONV,
}
OWN = {"name": "mine", "weights": 0.5, "kv_cache": 1, "state": 4}
OWN_BY_HAND = WEIGHTS / 2 + KV + 4 * (SSM + CONV)
AT = ("report.batch_size=2", "report.sequence_length=1000")


def test_the_hand_computed_terms_are_what_they_seem():
    assert (KV, SSM, CONV) == (24_576_000, 73_400_320, 2_752_512)
    assert BY_HAND["bf16"] == 24_821_459_968 and BY_HAND["fp4"] == 7_014_352_480


@pytest.mark.parametrize("profile", BY_HAND)
def test_memory_of_the_12b_parent_by_profile(profile):
    run = load_config(NANO, [*AT, f"report.profile={profile}"]).config
    assert plan(run)["parent"]["memory_bytes"]["total"] == BY_HAND[profile]


def test_own_profiles_are_a_file_or_a_mapping_and_end_up_in_the_configuration(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("{weights: 0.5, kv_cache: 1, state: 4}\n")
    for value in (str(path), json.dumps(OWN)):
        resolved = load_config(NANO, [*AT, f"report.profile={value}"])
        assert resolved.values["report"]["profile"] == OWN  # no path is left: the run explains itself
        planned = plan(resolved.config)
        assert planned["parent"]["memory_bytes"]["total"] == OWN_BY_HAND
        assert planned["serving"]["profile"] == "mine"
    assert main(["plan", "--config", NANO, f"report.profile={path}"]) == 0
    assert "tokens, mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("bf61", "'bf61' must be one of bf16"),
        ("3", "3 must be a name or a mapping"),
        ("{weights: 1, kv_cache: 1}", "report.profile.state: is missing"),
        ("{weights: 1, kv_cache: 1, state: -1}", "-1 must be a number of bytes"),
        ("{weights: 1, kv_cache: 1, state: 1, stat: 2}", "report.profile.stat: unknown key; did you mean 'state'?"),
        ("/no/such/profile.yaml", "'/no/such/profile.yaml' cannot be read: No such file"),
    ],
)
def test_bad_profiles_are_one_clear_problem(value, words, capsys):
    assert main(["plan", "--config", NANO, f"report.profile={value}"]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("report.profile") == 1 and "Traceback" not in shown.err


def test_every_kind_of_budget_in_one_plan(capsys):
    budgets = {
        "half": 0.5,
        "six": 6e9,
        "active": {"kind": "active_parameters", "value": 6e9},
        "fits": {"kind": "memory_gb", "value": 16},
        "short": {"kind": "memory", "value": 16},
    }
    words = [f"elastic.budgets={json.dumps(budgets)}", *AT, "report.profile=fp8_kv"]
    assert main(["plan", "--config", NANO, "--json", *words]) == 0
    rows = {b["name"]: b for b in json.loads(capsys.readouterr().out)["budgets"]}
    assert abs(rows["half"]["parameters"] / (WEIGHTS / 2) - 1) <= 0.01
    assert abs(rows["six"]["parameters"] / 6e9 - 1) <= 0.01
    assert rows["active"]["subnet"] == rows["six"]["subnet"]  # without experts a token passes through everything
    for name in ("fits", "short"):
        assert rows[name]["target"] == {"kind": "memory_gb", "value": 16}
        gigabytes = rows[name]["memory_bytes"]["total"] / 1e9
        assert abs(gigabytes / 16 - 1) <= 0.01 and rows[name]["error"] == pytest.approx(gigabytes / 16 - 1, abs=1e-12)
    assert main(["plan", "--config", NANO, *words]) == 0
    shown = capsys.readouterr().out
    assert "memory_gb 16" in shown and "2 x 1,000 tokens, fp8_kv" in shown
    target = re.search(r"│ active_parameters +│.*\n│ +│ ([\d,]+) ", shown)  # a narrow terminal folds it
    assert "active_parameters 6,000,000,000" in shown or (target and target[1] == "6,000,000,000")


def test_the_planner_counts_what_the_configuration_says():
    run = load_config(NANO, [*AT, f"report.profile={json.dumps(OWN)}", "elastic.budgets.fits={kind: memory, value: 5}"])
    config = run.config
    family = family_of(config)
    conditions = serving_of(config.report, family.architecture).conditions
    planner = Planner(family, config.router, family.layout, timeline=Timeline(0, 5, 10, 10), seed=0, **conditions)
    cost = planner.costs["fits"]
    assert cost.parent * 1e9 == pytest.approx(OWN_BY_HAND, rel=1e-12) and cost.target == 5
    assert abs(cost.of(planner.uniform["fits"]) / 5 - 1) <= 0.01
    expected = planner.expected("fits", torch.device("cpu"))
    assert expected(one_choice(family.space)).item() == pytest.approx(OWN_BY_HAND / 5e9, rel=1e-12)


def one_choice(space):
    """Certain of the parent."""
    return {
        name: torch.zeros(shape, dtype=torch.float64).index_fill(1, torch.tensor([0]), 1.0)
        for name, shape in choice_shapes(space).items()
    }


def test_profiles_without_the_configuration():
    assert byte_profile("fp4") == BYTE_PROFILES["fp4"] == ByteProfile(weights=0.5625, kv_cache=0.5625, state=1)
    assert byte_profile(OWN) == ByteProfile(weights=0.5, kv_cache=1, state=4)
    with pytest.raises(ProblemsError, match="active_parameters"):
        BudgetCost(make_space(), make_layout(), Budget(name="b", kind="parametres", value=1))


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(budget_lambda=3.0),
        RouterConfig(budget_lambda=3.0, dead_zone=0.05),
        RouterConfig(recipe="paper", budget_lambda=1.0),
        RouterConfig(recipe="paper", budget_lambda=1.0, dead_zone=0.05),
    ],
    ids=["default", "default with dead zone", "paper", "paper with dead zone"],
)
@pytest.mark.parametrize("kind", ["fraction", "active_parameters", "memory_gb"])
def test_the_gradient_of_the_budget_loss_equals_finite_differences(config, kind):
    value = {"fraction": 0.5, "active_parameters": 250_000, "memory_gb": 0.0008}[kind]
    budget = Budget(name="b", kind=kind, value=value)
    cost = BudgetCost(make_space(per_layer=True), make_layout(), budget, batch_size=3, sequence_length=64)
    expected = ExpectedCost(cost)
    logits = {n: p.log().requires_grad_() for n, p in random_probabilities(cost.space, 3).items()}

    def loss() -> torch.Tensor:
        return budget_loss(expected(probabilities_of(logits, tau=1.0, scale=2.0)), 0.7, config)

    assert abs(expected(probabilities_of(logits, tau=1.0, scale=2.0)).item() - 1) > 0.06  # outside the dead zone
    loss().backward()
    for name, z in logits.items():
        for place in ((0, 0), (z.shape[0] - 1, z.shape[1] - 1)):
            with torch.no_grad():
                old, step = z[place].item(), 1e-6
                z[place] = old + step
                above = loss().item()
                z[place] = old - step
                below = loss().item()
                z[place] = old
            assert z.grad[place].item() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9), name
    assert max(z.grad.abs().max().item() for z in logits.values()) > 1e-3


def test_inside_the_dead_zone_nothing_pulls():
    ratio = torch.tensor(1.03, requires_grad=True)
    budget_loss(ratio, 0.7, RouterConfig(dead_zone=0.05)).backward()
    assert ratio.grad.item() == 0.0
