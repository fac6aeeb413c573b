"""Tokens per expert of every budget are those that its students sent, in every layout, and the bias moves by them."""

from types import SimpleNamespace
from typing import Any

import pool_family
import pytest
import torch
from expert_features import parts
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from pool_elastic import layout_of, tokens
from small_parent import FFN_GROUPS, space_of
from test_family_parallel import FULL, SELECTIVE
from worker_pool import WorkerPool

from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.family.expert_load import ExpertLoad
from nemo_elastic.mcore.kernels import routing
from nemo_elastic.mcore.models.build import build_elastic_model

BIAS, RATE = "mlp.router.expert_bias", 0.05
STEPS = (0, 1, 3, 5)  # warm-up, soft, hard, frozen
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "dp2": {},
    "tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True},
    "cp2": {"cp": 2},
    "ep2": {"ep": 2},
}


def small_load(budgets: tuple[str, ...] = ("full", "large", "small")) -> tuple[Any, ExpertLoad]:
    arch, function = parts("nemotron")
    model = build_elastic_model({**vars(arch), **function}, ffn_groups=FFN_GROUPS)
    return model, ExpertLoad(model, budgets)


def run(**more: Any) -> dict[str, Any]:
    return pool_family.train_steps(steps=STEPS, feature="nemotron", bias_rate=RATE, **more)


@pytest.mark.usefixtures("one_rank")
def test_counts_are_of_the_tokens_of_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every student's token goes to `topk` experts of every layer that it runs, of those that its budget keeps."""
    found = run()
    arch, _ = parts("nemotron")
    load = torch.zeros_like(found["steps"][0]["load"])
    for record in found["steps"]:
        step, load = record["load"] - load, record["load"]
        for row, (name, subnet) in enumerate(record["ran"].items()):
            per_layer = step[:, row].sum(-1)
            if not per_layer.any():
                continue
            ran = [n in subnet.layers for n in arch.layers_of("E")]
            sums = per_layer[torch.tensor(ran)].unique()
            assert len(sums) == 1 and sums.item() % (2 * 16 * arch.moe_router_topk) == 0
            for place, (number, experts) in enumerate(zip(arch.layers_of("E"), subnet.num_moe_experts, strict=True)):
                kept = torch.zeros(FFN_GROUPS, arch.num_moe_experts // FFN_GROUPS, dtype=torch.bool)
                kept[:, : experts // FFN_GROUPS] = number in subnet.layers
                if record is not found["steps"][1]:  # the soft step
                    assert not step[place, row][~kept.flatten()].any(), name
    assert load.sum() > 0


@pytest.mark.usefixtures("one_rank")
def test_a_count_is_the_choice_of_the_router() -> None:
    model, load = small_load()
    arch, layout = model.layout.architecture, layout_of(model.layout.architecture)
    subnet = space_of(arch).subnet(num_moe_experts=4)
    expected = torch.zeros_like(load.step)
    stock, place = routing.chosen, iter(range(len(load.layers)))
    experts = [group * 2 for group in range(FFN_GROUPS)]

    def watched(*args: Any) -> Any:
        weights, places = stock(*args)
        expected[next(place), 2, experts] = (weights > 0).sum(0)
        return weights, places

    from nemo_elastic.mcore.elastic import experts as elastic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic, "chosen", watched)
        with load.counting("small"):
            model(tokens(arch), None, None, elastic=hard_plan(layout, subnet))
    assert torch.equal(load.step, expected) and expected.any()
    model(tokens(arch), None, None, elastic=hard_plan(layout, subnet))  # a validation
    assert torch.equal(load.step, expected)


@pytest.mark.usefixtures("one_rank")
def test_without_a_rate_nothing_moves_and_megatron_finds_nothing_to_move_by() -> None:
    """The full budget runs the stock forward, which counts for Megatron in a plain model."""
    still, again = (pool_family.train_steps(steps=STEPS, feature="nemotron", bias_rate=r) for r in (0.0, None))
    moved = run()
    names = [name for name in still["weights"] if name.endswith(BIAS)]
    before = dict(pool_family.train_steps(steps=(), feature="nemotron")["weights"])
    assert names
    for name in names:
        assert torch.equal(still["weights"][name], before[name]) and torch.equal(again["weights"][name], before[name])
        assert not torch.equal(moved["weights"][name], before[name])
    assert torch.equal(still["steps"][0]["load"], moved["steps"][0]["load"])


@pytest.mark.usefixtures("one_rank")
def test_with_one_budget_the_rule_is_megatrons() -> None:
    model, load = small_load(("full",))
    full = space_of(model.layout.architecture).full_subnet()
    load.step.copy_(torch.randint(0, 9, load.step.shape, generator=torch.Generator().manual_seed(1)))
    before = torch.stack([load.routers[n].bias.clone() for n in load.layers])
    expected = get_updated_expert_bias(load.step[:, 0].float(), before, 1e-3)
    load.end_step(1e-3, {"full": full})
    now = torch.stack([load.routers[n].bias for n in load.layers])
    assert torch.equal(now, expected) and not torch.equal(now, before) and not load.step.any()
    config = SimpleNamespace(moe_router_bias_update_rate=1.0)
    _update_router_expert_bias([model], config)  # as Megatron does after every step: it has counted nothing
    assert torch.equal(torch.stack([load.routers[n].bias for n in load.layers]), now)


@pytest.mark.usefixtures("one_rank")
def test_an_expert_is_measured_by_the_budgets_that_keep_it() -> None:
    """By hand: `small` keeps every other expert, `large` has not the last layer, `soft` moves nothing."""
    model, load = small_load(("full", "large", "small", "soft"))
    space, experts = space_of(model.layout.architecture), 8
    layers = load.layers
    full, small = space.full_subnet(), space.subnet(num_moe_experts=4)
    large = space.subnet(layers=tuple(n for n in full.layers if n != layers[-1]))
    counts = torch.zeros(3, 4, experts, dtype=torch.int64)
    counts[:, 0] = torch.tensor([6, 1, 3, 3, 3, 3, 3, 2])  # mean 3
    counts[:2, 1] = torch.tensor([0, 2, 2, 2, 2, 2, 2, 4])  # mean 2
    counts[:, 2] = torch.tensor([5, 0, 1, 0, 3, 0, 3, 0])  # mean 3 over its four experts
    counts[:, 3] = 100 * torch.arange(experts)
    load.step.copy_(counts)
    load.end_step(1.0, {"full": full, "large": large, "small": small})
    first = torch.tensor([-1.0, 1, 1, 0, 0, 0, 0, -1])  # 11, 3, 6, 5, 8, 5, 8, 6 tokens; 8 fair ones, or 5
    last = torch.tensor([-1.0, 1, 1, 0, 0, 0, 0, 1])  # 11, 1, 4, 3, 6, 3, 6, 2 tokens; 6 fair ones, or 3
    for n, expected in zip(layers, (first, first, last), strict=True):
        assert torch.equal(load.routers[n].bias, expected), n
    load.end_step(1.0, {"full": full, "large": large, "small": small})  # a step without a token
    assert torch.equal(load.routers[layers[0]].bias, first)


@pytest.mark.usefixtures("one_rank")
def test_what_is_logged() -> None:
    model, load = small_load(("full", "small"))
    space = space_of(model.layout.architecture)
    first, second, third = load.layers
    small = space.subnet(num_moe_experts=4, layers=tuple(n for n in range(8) if n != third))
    load.total[0, 1] = torch.tensor([4, 9, 0, 0, 2, 0, 2, 0])  # 9: of a step before, when it kept that expert
    load.total[1, 1] = torch.tensor([2, 0, 2, 0, 2, 0, 2, 0])
    found = load.take({"full": space.full_subnet(), "small": small})
    assert found == {
        "small": {
            "tokens": {str(first): [4, None, 0, None, 2, None, 2, None], str(second): [2, None] * 4},
            "busiest": (2.0 + 1.0) / 2,
            "idle": (0.25 + 0) / 2,
        }
    }
    assert not load.take({"small": small}) and not load.total.any()
    load.total[0, 0, 3] = 5
    state, (_, other) = load.state_dict(), small_load(("full", "small"))
    other.load_state_dict(state)
    assert torch.equal(other.total, load.total)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", [FULL, SELECTIVE], ids=["full", "selective"])
def test_what_is_computed_again_is_not_counted_again(kind: dict[str, Any]) -> None:
    one, other = run(), run(**kind)
    for left, right in zip(one["steps"], other["steps"], strict=True):
        assert torch.equal(left["load"], right["load"])


@pytest.fixture(scope="module")
def one_process(one_rank: None) -> dict[str, Any]:
    return run()


QUICK = ("tp2_sp", "pp2", "ep2")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_every_layout_counts_and_moves_alike(
    name: str, one_process: dict[str, Any], pool2: WorkerPool, request: pytest.FixtureRequest
) -> None:
    """Ranks that share out experts share their draws, too: so does the one process that they are compared with."""
    pool = request.getfixturevalue("pool4") if name.count("2") > 1 else pool2
    expected = run(sharing=2) if "ep" in LAYOUTS[name] else one_process
    for rank in pool.run(run, **LAYOUTS[name]):
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert torch.equal(ours["load"], theirs["load"])
        biases = {n: w for n, w in rank["weights"].items() if n.endswith(BIAS)}
        assert all(torch.equal(w, expected["weights"][n]) for n, w in biases.items())
