"""The router learns: a toy objective whose best allocation is known, schedules, steering, and its own repeatability."""

from itertools import pairwise, product

import pytest
import torch
from router_spaces import make_layout, make_space

from nemo_elastic.config.sections import RouterConfig, StageConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.router.budget_loss import BudgetSteering, ExpectedCost, budget_loss, commitment_loss, soft_phase_loss
from nemo_elastic.router.model import Router, interpolated_budget
from nemo_elastic.router.repair import choose
from nemo_elastic.router.sampling import gumbel_noise
from nemo_elastic.router.schedule import Timeline, resolve_recipe
from nemo_elastic.router.selection import argmax_selection, soft_masks
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.choices import choice_shapes

CHOICES = {
    "hidden_size": (96, 88, 80, 72, 64, 56, 48),
    "ffn_hidden_size": (256, 224, 192, 160, 128, 96, 64),
    "mamba_num_heads": (16, 12, 8, 4),
    "num_attention_heads": (8, 4),
    "num_layers": (12, 11, 10, 9, 8),
}
# What a dim is worth, and how fast its later units lose worth: FFN neurons go first, Mamba heads and hidden stay.
WORTH = {
    "hidden_size": (2.0, 1.0),
    "ffn_hidden_size": (0.6, 2.5),
    "mamba_num_heads": (1.5, 1.0),
    "num_attention_heads": (0.6, 1.0),
}
BUDGETS = {"0.75": 0.75, "0.5": 0.5}
TOLERANCE = 0.02


def worth(space, name):
    units = space.dims[name].full // space.dims[name].groups
    height, power = WORTH[name]
    value = torch.arange(1, units + 1, dtype=torch.float32) ** -power
    return height * value / value.sum()


class Toy:
    """Loss of masks: what is masked away costs its worth; layers by their place in the ranking."""

    def __init__(self):
        self.space = make_space(choices=CHOICES)
        self.units = {name: worth(self.space, name) for name in WORTH}
        self.layers = torch.zeros(12)
        self.layers[list(self.space.depth_ranking)] = torch.linspace(0.6, 0.1, 12)
        self.costs = {
            name: BudgetCost(self.space, make_layout(), Budget(name=name, kind="fraction", value=value))
            for name, value in BUDGETS.items()
        }

    def loss(self, masks):
        lost = sum((w * (1 - masks.dims[name][0]) ** 2).sum() for name, w in self.units.items())
        return 0.5 + lost + (self.layers * (1 - masks.layers) ** 2).sum()

    def best(self, name):
        """By trying every subnet that fits."""
        shapes = choice_shapes(self.space)
        lost = {
            n: [w[c // self.space.dims[n].groups :].sum().item() for c in self.space.dims[n].choices]
            for n, w in self.units.items()
        }
        ranking = list(self.space.depth_ranking)
        lost["num_layers"] = [self.layers[ranking[n:]].sum().item() for n in self.space.dims["num_layers"].choices]
        best = None
        for picked in product(*(range(n) for _, n in shapes.values())):
            selection = {n: (i,) for n, i in zip(shapes, picked, strict=True)}
            total = sum(lost[n][i] for n, i in zip(shapes, picked, strict=True))
            if (best is None or total < best[0]) and self.costs[name].error(
                self.costs[name].tables.cost(selection)
            ) <= TOLERANCE:
                best = total, selection
        return best[1]


def train(toy: Toy, config: RouterConfig, seed: int, steps: int, noise: float):
    """What a run does, without a model. Returns the router and its noise-free argmax's cost errors."""
    router = Router(toy.space, list(BUDGETS), config, seed=seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=config.lr, betas=(0.9, 0.98))
    expected = {name: ExpectedCost(cost) for name, cost in toy.costs.items()}
    steering, generator = BudgetSteering(), torch.Generator().manual_seed(seed)
    for step in range(steps):
        point = Timeline.of(config, steps).point(step, config)
        if point.phase == "warmup":
            continue
        total = torch.zeros(())
        for index, name in enumerate(BUDGETS):
            gumbel = gumbel_noise(router.shapes, seed, step, index)
            output = router(router.budget_vector(name), tau=point.tau, scale=point.scale, noise=gumbel)
            clean = {n: torch.softmax(z.detach(), -1) for n, z in output.logits.items()}
            chosen = choose(clean, toy.costs[name], tolerance=TOLERANCE, shortfall=TOLERANCE)
            if point.phase == "hard":
                total = total + commitment_loss(output.logits, chosen.selection)
                continue
            price = steering.price(name)
            total = total + soft_phase_loss(output, expected[name], price, point.settle, chosen.selection, config)
            jitter = 1 + noise * torch.randn((), generator=generator)
            total = total + toy.loss(soft_masks(toy.space, output.probabilities)) * jitter
            steering.update(name, chosen.argmax_error, Timeline.of(config, steps).soft_steps, config)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
    return router


def outcome(toy: Toy, router: Router):
    found = {}
    for name, cost in toy.costs.items():
        selection = argmax_selection(router(router.budget_vector(name)).probabilities)
        found[name] = selection, cost.error(cost.tables.cost(selection))
    return found


@pytest.mark.slow
def test_the_best_allocation_is_found_at_every_budget():
    toy = Toy()
    best = {name: toy.best(name) for name in BUDGETS}
    config = RouterConfig(shapes="learned", warmup_fraction=0.0, soft_fraction=0.85, freeze_fraction=0.0)
    for seed in range(5):
        found = outcome(toy, train(toy, config, seed, steps=240, noise=0.1))
        for name in BUDGETS:
            assert found[name][0] == best[name], (seed, name)
            assert abs(found[name][1]) <= TOLERANCE  # the argmax itself, unrepaired


def test_a_short_run_meets_its_budgets_before_any_repair():
    toy = Toy()
    config = RouterConfig(shapes="learned", warmup_fraction=0.1, soft_fraction=0.4, freeze_fraction=0.0)
    found = outcome(toy, train(toy, config, 0, steps=60, noise=0.1))
    assert max(abs(error) for _, error in found.values()) <= TOLERANCE


def test_training_the_router_twice_gives_the_same_bits():
    toy, config = Toy(), RouterConfig(shapes="learned", soft_fraction=0.6, freeze_fraction=0.0)
    first, second = (train(toy, config, 3, steps=12, noise=0.1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_router_starts_from_its_own_generator_in_fp32():
    space = make_space(per_layer=True)
    before = torch.random.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = Router(space, ["a", "b"], RouterConfig(shapes="learned"), seed=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in router.parameters())
    torch.random.set_rng_state(before)
    torch.manual_seed(123)
    other = Router(space, ["a", "b"], RouterConfig(shapes="learned"), seed=4)
    assert all(torch.equal(p, q) for p, q in zip(router.parameters(), other.parameters(), strict=True))
    weights = torch.cat([p.flatten() for n, p in router.named_parameters() if n.endswith("weight")])
    assert abs(weights.std().item() - 0.1) < 0.005
    output = router(router.budget_vector("b"))
    assert {n: tuple(p.shape) for n, p in output.probabilities.items()} == choice_shapes(space)
    with pytest.raises(ValueError, match="knows a, b"):
        router.budget_vector("c")


def test_schedules_are_pure_and_meet_their_ends():
    config = RouterConfig(shapes="learned", warmup_fraction=0.2, soft_fraction=0.3, freeze_fraction=0.4)
    line = Timeline.of(config, 100)
    assert line == Timeline(20, 50, 60, 100) and line.soft_steps == 30
    points = [line.point(step, config) for step in range(100)]
    ends = {0: "warmup", 19: "warmup", 20: "soft", 49: "soft", 50: "hard", 59: "hard", 60: "frozen", 99: "frozen"}
    assert {i: points[i].phase for i in ends} == ends
    assert (points[20].tau, points[20].scale) == (1.0, 1.0)
    assert points[49].tau == pytest.approx(0.05) and points[49].scale == pytest.approx(10.0)
    assert all(a.tau >= b.tau and a.scale <= b.scale for a, b in pairwise(points))
    paper = resolve_recipe(RouterConfig(recipe="paper"))
    assert {Timeline.of(paper, 100).phase(s) for s in range(100)} == {"soft"}
    assert (paper.budget_lambda, paper.dual_ascent_rate) == (1.0, 0.0)
    halfway = Timeline.of(paper, 101).point(50, paper)
    assert halfway.tau == pytest.approx(0.525) and halfway.scale == pytest.approx(5.5)


def test_a_curriculum_may_name_the_phase_of_every_stage():
    config = RouterConfig(shapes="learned")
    stages = [
        StageConfig(steps=n, router=phase) for n, phase in ((5, "warmup"), (3, "soft"), (4, "soft"), (8, "frozen"))
    ]
    assert Timeline.of(config, 20, stages) == Timeline(5, 12, 12, 20)
    assert Timeline.of(config, 4, [StageConfig(steps=4, router="frozen")]) == Timeline(0, 0, 0, 4)
    with pytest.raises(ValueError, match="every stage or for none"):
        Timeline.of(config, 20, [*stages[:3], StageConfig(steps=8)])


def test_the_papers_loss_is_the_relative_error_and_ours_has_a_price():
    paper = resolve_recipe(RouterConfig(recipe="paper"))
    for ratio, slope in ((1.3, 1.0), (0.6, -1.0)):
        r = torch.tensor(ratio, requires_grad=True)
        loss = budget_loss(r, 99.0, paper)
        loss.backward()
        assert loss.item() == pytest.approx(abs(ratio - 1), rel=1e-6) and r.grad.item() == slope
    ours = RouterConfig(budget_lambda=2.0, dead_zone=0.1)
    r = torch.tensor(1.3, requires_grad=True)
    budget_loss(r, 0.5, ours).backward()
    assert r.grad.item() == pytest.approx(0.5 + 2.0 * 0.2, rel=1e-5)
    inside = torch.tensor(1.05, requires_grad=True)
    budget_loss(inside, 0.5, ours).backward()
    assert inside.grad.item() == 0.0


def test_steering_is_dual_ascent_and_survives_a_checkpoint():
    config = RouterConfig(dual_ascent_rate=5.0, max_price=2.0)
    steering = BudgetSteering()
    for _ in range(10):
        steering.update("a", 0.4, 100, config)
        steering.update("b", -0.1, 100, config)
    assert steering.price("a") == pytest.approx(0.2) and steering.price("b") == pytest.approx(-0.05)
    other = BudgetSteering()
    other.load_state_dict(steering.state_dict())
    assert other == steering
    other.update("a", 1000.0, 100, config)
    assert other.price("a") == 2.0


def test_budgets_between_trained_ones_are_blended_and_never_extrapolated():
    trained = {"9B": 9e9, "6B": 6e9, "8B": 8e9}
    assert interpolated_budget(trained, 8.25e9) == pytest.approx({"8B": 0.75, "9B": 0.25})
    assert interpolated_budget(trained, 8e9)["8B"] == 1.0
    for value in (5.9e9, 9.1e9):
        with pytest.raises(ValueError, match="outside the trained range"):
            interpolated_budget(trained, value)
