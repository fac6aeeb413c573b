"""From a budget to the plan of a micro-batch: what the schedule says, what the router chooses, what is pinned.

A pure function of (configuration, router weights, seed, step, global micro-batch index), so that all tensor- and
pipeline-parallel ranks agree without talking, and data parallelism changes nothing (METHOD section 5). Expert-parallel
ranks, which have other micro-batches, share a draw. Phases:

    warmup  every budget on its search's shape, or even shrink  no router
    soft    masks mixed by the router's noisy probabilities    full compute
    hard    the router's choice, repaired to fit exactly       straight-through gates
    frozen  the choice is pinned for the rest of the run, or the search's shape where that loses less

or, where candidates race instead (`router/race.py`):

    race    every budget's candidates take turns               no router
    frozen  as above
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...config.sections import RouterConfig
from ...cost.budget import BudgetCost
from ...family import Family
from ...plan.proposals import Start
from ...router.budget_loss import BudgetSteering, ExpectedCost, commitment_loss, soft_phase_loss
from ...router.model import Router, RouterOutput
from ...router.race import Race
from ...router.repair import Chosen, choose
from ...router.sampling import gumbel_noise, sample_budgets
from ...router.schedule import RouterPoint, Timeline, resolve_recipe
from ...router.selection import soft_masks, straight_through_gates
from ...shapes.search import propose_uniform
from ...space.choices import subnet_of
from ...space.dims import DEPTH
from ...space.layout import ParamLayout
from ...space.subnet import Subnet
from ..elastic.plan import Mode, Plan, hard_plan, soft_plan


@dataclass(frozen=True)
class StepState:
    """What one optimizer step shares over its micro-batches: the schedule's point and the choice per learned budget.

    `draws`: in a race, the budgets of every draw of the step over all replicas, and `turns`: whose turn it is in each.
    """

    step: int
    phase: str
    point: RouterPoint
    chosen: Mapping[str, Chosen]
    draws: Sequence[Mapping[str, float]] = ()
    turns: Sequence[Mapping[str, int]] = ()


@dataclass(frozen=True)
class Planned:
    """One micro-batch: its budget, its plan (None: the full network), and the router loss's inputs when learning."""

    budget: str
    phase: str
    plan: Plan | None
    output: RouterOutput | None = None
    settle: float = 0.0
    chosen: Chosen | None = None
    weight: float = 1.0  # this budget's share of the micro-batch's loss


@dataclass
class PlannerState:
    """What must survive a restart beside the weights: prices and the pinned subnets."""

    steering: BudgetSteering = field(default_factory=BudgetSteering)
    frozen: dict[str, Subnet] = field(default_factory=dict)


class Planner:
    """Makes plans for a family.

    Args:
        layout: the table of this rank's tensor-parallel shard.
        timeline: when the router's phases begin (`Timeline.of`).
        race: of the budgets whose candidates race.
        starts: per learned budget, what scores tell; without them it warms up on its even shrink, at a price of 0.
        mode: how hard plans run.
        sharing: micro-batches, one after the other, that share a draw: those of an expert-parallel group, whose ranks
            run one subnet between them.
        conditions: serving conditions of memory budgets (`BudgetCost`).
    """

    def __init__(
        self,
        family: Family,
        config: RouterConfig,
        layout: ParamLayout,
        *,
        timeline: Timeline,
        seed: int,
        race: Race | None = None,
        starts: Mapping[str, Start] | None = None,
        mode: Mode = "sliced",
        sharing: int = 1,
        **conditions: Any,
    ) -> None:
        self.family, self.layout, self.mode, self.sharing = family, layout, mode, sharing
        self.race = race
        self.config = resolve_recipe(config)
        self.timeline, self.seed, self.conditions = timeline, seed, conditions
        self.starts = dict(starts or {})
        prices = {name: start.price for name, start in self.starts.items()}
        self.state = PlannerState(BudgetSteering.starting_at(prices, self.config))
        self._expected: dict[tuple[str, torch.device], ExpectedCost] = {}

    @cached_property
    def costs(self) -> dict[str, BudgetCost]:
        """Cost and target per budget that is neither full nor forced."""
        return {
            b.name: BudgetCost(self.family.space, self.family.layout, b, **self.conditions)
            for b in self.family.budgets
            if b.name in self.family.open
        }

    @property
    def learned(self) -> tuple[str, ...]:
        """Budgets the router decides."""
        return self.family.learned

    @cached_property
    def uniform(self) -> dict[str, Subnet]:
        """Uniformly shrunk subnet per learned budget."""
        return {name: propose_uniform(cost, tolerance=self.config.tolerance) for name, cost in self.costs.items()}

    def expected(self, name: str, device: torch.device) -> ExpectedCost:
        """Differentiable expected cost of a learned budget; its tables are made once per device."""
        if (name, device) not in self._expected:
            self._expected[name, device] = ExpectedCost(self.costs[name], device)
        return self._expected[name, device]

    def begin_step(self, router: Router | None, step: int, draws: Sequence[Mapping[str, float]] = ()) -> StepState:
        """The choices of a step; pins them when the frozen phase begins.

        Args:
            draws: `draws_of`, which a race needs.
        """
        point = self.timeline.point(step, self.config)
        phase = point.phase
        chosen: dict[str, Chosen] = {}
        if phase != "frozen":
            self.state.frozen = {}  # a run that was made longer on a resume chooses again
        if (router is not None and phase in ("soft", "hard")) or (phase == "frozen" and not self.state.frozen):
            chosen = self.choices(router, repair=phase != "soft" or point.settle > 0)
        if phase == "frozen" and not self.state.frozen:
            self.state.frozen = {n: self.subnet_of_choice(n, c) for n, c in chosen.items()} | self._leaders()
        if phase != "race" or self.race is None:
            return StepState(step, phase, point, chosen)
        return StepState(step, phase, point, chosen, draws, self.race.turns(draws))

    @torch.no_grad()
    def choices(self, router: Router | None, *, repair: bool = True) -> dict[str, Chosen]:
        """Noise-free choice per learned budget, exactly within its budget; without repair: as it is, to steer by."""
        if router is None or not self.learned:
            return {}
        outputs = {n: router(router.budget_vector(n), tau=1.0, scale=1.0).probabilities for n in self.learned}
        return {
            name: choose(
                pi, self.costs[name], tolerance=self.config.tolerance, shortfall=self._shortfall, repair=repair
            )
            for name, pi in _on_the_host(outputs).items()
        }

    @property
    def _shortfall(self) -> float:
        given = self.config.shortfall
        return self.config.tolerance if given is None else given

    def subnet_of_choice(self, name: str, chosen: Chosen) -> Subnet:
        """The subnet that a choice names."""
        return subnet_of(self.family.space, chosen.selection)

    def budgets_of(
        self, probabilities: Mapping[str, float], step: int, global_micro_batch: int, count: int = 1
    ) -> dict[str, float]:
        """The budgets a micro-batch is assigned, with their shares of its loss."""
        return sample_budgets(probabilities, self.seed, step, self._draw(global_micro_batch), count)

    def draws_of(
        self, probabilities: Mapping[str, float], step: int, micro_batches: int, count: int = 1
    ) -> list[dict[str, float]]:
        """All draws of a step of so many micro-batches over all replicas; none where no race is on."""
        if self.timeline.phase(step) != "race":
            return []
        return [self.budgets_of(probabilities, step, i, count) for i in range(0, micro_batches, self.sharing)]

    def rivals(self, state: StepState) -> dict[str, dict[str, Subnet]]:
        """At the step that pins what was learned, of budgets that they differ in: the choice and the search's shape."""
        if state.phase != "frozen" or not state.chosen:
            return {}
        pairs = {n: {"learned": self.state.frozen[n], "search": start.shape} for n, start in self.starts.items()}
        return {name: pair for name, pair in pairs.items() if pair["learned"] != pair["search"]}

    def fall_back(self, losses: Mapping[str, Mapping[str, float]]) -> list[str]:
        """Pin the search's shape where it loses less than the choice of the router; the budgets that this happens to.

        Args:
            losses: of `rivals`, on text that no loss is reported on.
        """
        fallen = [name for name, row in losses.items() if row["search"] < row["learned"]]
        self.state.frozen |= {name: self.starts[name].shape for name in fallen}
        return fallen

    def _leaders(self) -> dict[str, Subnet]:
        return {name: self.race.leader(name) for name in self.family.raced}

    def _draw(self, global_micro_batch: int) -> int:
        """The first of the micro-batches that share its draw, of budgets and of noise."""
        return global_micro_batch - global_micro_batch % self.sharing

    def pinned(self, name: str, phase: str) -> Subnet | None:
        """The subnet of a budget that is nobody's to choose now; None when it is."""
        budget = self.family.budget(name)
        if budget.is_full:
            return self.family.space.full_subnet()
        if name in self.family.forced:
            return self.family.forced[name]
        if phase == "warmup":
            return self.starts[name].shape if name in self.starts else self.uniform[name]
        return self.state.frozen.get(name) if phase == "frozen" else None

    def micro_batch(
        self, router: Router | None, state: StepState, budgets: Mapping[str, float], global_micro_batch: int
    ) -> tuple[Planned, ...]:
        """The plans of one micro-batch of a training step, by budget and share."""
        return tuple(
            replace(self._planned(router, state, name, global_micro_batch, index), weight=share)
            for index, (name, share) in enumerate(budgets.items())
        )

    def _planned(self, router: Router | None, state: StepState, budget: str, index: int, student: int) -> Planned:
        pinned = self.pinned(budget, state.phase)
        if state.phase == "race" and pinned is None:
            pinned = self.race.subnet(budget, state.turns[index // self.sharing][budget])
        if pinned is not None:
            return Planned(budget, state.phase, self.plan_of(pinned))
        noise = gumbel_noise(router.shapes, self.seed, state.step, self._draw(index), student)
        output = router(router.budget_vector(budget), tau=state.point.tau, scale=state.point.scale, noise=noise)
        pi, chosen = output.probabilities, state.chosen[budget]
        if state.phase == "soft":
            masks = soft_masks(self.family.space, pi)
            plan = soft_plan(self.layout, self.family.space.full_subnet(), {**masks.dims, DEPTH: masks.layers})
        else:
            gates = straight_through_gates(self.family.space, pi, chosen.selection)
            subnet = self.subnet_of_choice(budget, chosen)
            plan = hard_plan(self.layout, subnet, self.mode, {**gates.dims, DEPTH: gates.layers})
        return Planned(budget, state.phase, plan, output, state.point.settle, chosen)

    def plan_of(self, subnet: Subnet) -> Plan | None:
        """A plan without gradients for the router; None (Megatron's own forward) for the whole parent."""
        if subnet == self.family.space.full_subnet():
            return None
        return hard_plan(self.layout, subnet, self.mode)

    def loss(self, planned: Planned) -> Tensor | None:
        """The router's own loss: towards the budget while soft, towards its repaired choice while hard; or None."""
        if planned.output is None:
            return None
        output, selection = planned.output, planned.chosen.selection
        if planned.phase == "hard":
            return commitment_loss(output.logits, selection)
        device = next(iter(output.logits.values())).device
        price, expected = self.state.steering.price(planned.budget), self.expected(planned.budget, device)
        return soft_phase_loss(output, expected, price, planned.settle, selection, self.config).float()

    def end_step(self, state: StepState) -> None:
        """Steer by the discrete errors of the step's choices; count the turns of a race."""
        if state.turns:
            self.race.end_step(state.draws)
        if state.phase == "soft":
            for name, chosen in state.chosen.items():
                self.state.steering.update(name, chosen.argmax_error, self.timeline.soft_steps, self.config)

    def current_subnets(self, router: Router | None, step: int) -> dict[str, Subnet]:
        """Per budget, the subnet that would be extracted now."""
        phase = self.timeline.phase(step)
        found, chosen = {}, None
        for budget in self.family.budgets:
            subnet = self.pinned(budget.name, phase)
            if subnet is None and budget.name in self.family.raced:
                subnet = self.race.leader(budget.name)
            if subnet is None:
                chosen = chosen or self.choices(router)
                subnet = self.subnet_of_choice(budget.name, chosen[budget.name])
            found[budget.name] = subnet
        return found

    def state_dict(self) -> dict:
        """For checkpoints: plain values."""
        frozen = {name: subnet.to_dict() for name, subnet in self.state.frozen.items()}
        race = None if self.race is None else self.race.state_dict()
        return {
            "steering": self.state.steering.state_dict(),
            "frozen": frozen,
            "race": race,
            "starts": bool(self.starts),
        }

    def load_state_dict(self, values: Mapping) -> None:
        """Take up where a checkpoint left off."""
        self.state.steering.load_state_dict(values["steering"])
        self.state.frozen = {n: self.family.space.subnet_from_dict(s) for n, s in values["frozen"].items()}
        if not values.get("starts"):
            self.starts = {}  # of a run that began without them: it warmed up on its even shrink
        if self.race is not None:
            self.race.load_state_dict(values["race"])


def _on_the_host(outputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Probabilities per budget and dim on the CPU, in one copy: a step waits for the device once, not once a dim."""
    flat = [p.flatten() for pi in outputs.values() for p in pi.values()]
    parts = iter(torch.cat(flat).cpu().split([len(p) for p in flat]))
    return {name: {dim: next(parts).view(p.shape) for dim, p in pi.items()} for name, pi in outputs.items()}
