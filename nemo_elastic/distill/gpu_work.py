"""What a run has to do, whatever the layout: what its micro-batches run in each stage of the curriculum. No torch here.

What runs: the parent as it is; a budget's subnet sliced (or masked, `train.mode`), with gates while the router's choice
is hard and learned; the full width under soft masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.function_fields import arithmetic_of
from ..config.sections import RunConfig
from ..cost.gpu_layout import GpuLayout, Running
from ..family import Family
from ..problems import ProblemsError
from ..router.schedule import resolve_recipe
from ..space.choices import choice_shapes
from ..space.layout import ParamLayout
from ..space.subnet import Subnet
from .curriculum import budget_probabilities
from .training_cost import phase_steps


@dataclass(frozen=True)
class Share:
    """A budget in a phase of the router: what runs, and how many students of it a micro-batch has in the mean."""

    budget: str
    running: Running
    per_micro_batch: float


Phases = list[tuple[str, float, list[Share]]]  # of one stage: phase, its part of the steps, what runs in it


class Work:
    """What a run has to do.

    Args:
        subnets: what each budget runs once its choice is hard.
    """

    def __init__(self, run: RunConfig, family: Family, subnets: Mapping[str, Subnet]) -> None:
        self.run, self.family = run, family
        self.stages = [shares(run, family, subnets, i) for i in range(len(run.train.stages))]
        self.router = router_elements(run, family)
        self._tables: dict[tuple[int, int], ParamLayout | None] = {}

    def table(self, tp: int, ep: int = 1) -> ParamLayout | None:
        """The table of a tensor- and an expert-parallel size, made once; None where the sizes do not allow it."""
        if (tp, ep) not in self._tables:
            groups = self.family.space.groups
            try:
                made = ParamLayout(self.family.architecture, ffn_groups=groups, tp_size=tp, ep_size=ep)
            except ProblemsError:
                made = None
            self._tables[tp, ep] = made
        return self._tables[tp, ep]

    def table_of(self, how: GpuLayout) -> ParamLayout:
        """The table of a layout's rank."""
        return self.table(how.tensor_model_parallel_size, how.expert_model_parallel_size)

    def micro_batches(self, how: GpuLayout, index: int) -> int:
        """Micro-batches of a replica in a step of stage `index`."""
        return self.run.train.stages[index].global_batch_size // (how.micro_batch_size * how.data_parallel_size)


def shares(run: RunConfig, family: Family, subnets: Mapping[str, Subnet], index: int) -> Phases:
    """What runs in every phase of the router that stage `index` of the curriculum has steps in."""
    stage, full = run.train.stages[index], family.space.full_subnet()
    drawn = budget_probabilities(stage, [b.name for b in family.budgets])
    steps = {phase: n for phase, n in phase_steps(run, index).items() if n}
    hard = "masked" if run.train.mode == "masked" else "sliced"
    found = []
    for phase, n in steps.items():
        row = []
        for name, p in drawn.items():
            learned = name in family.learned
            if family.budget(name).is_full:
                running = Running(subnet=full)
            elif learned and phase == "soft":
                running = Running(subnet=full, mode="soft")
            else:
                running = Running(subnet=subnets[name], mode=hard, gates=learned and phase == "hard")
            if p:
                row.append(Share(name, running, min(1.0, run.distill.budgets_per_batch * p)))
        found.append((phase, n / sum(steps.values()), row))
    return found


def router_elements(run: RunConfig, family: Family) -> list[int]:
    """Elements of each tensor of the router, in its order: per dim two layers with biases."""
    budgets, hidden = len(family.learned), resolve_recipe(run.router).hidden_size
    if not budgets:
        return []
    outputs = [rows * choices for rows, choices in choice_shapes(family.space).values()]
    return [n for out in outputs for n in (budgets * hidden, hidden, hidden * out, out)]


def rotary_percent(model: Mapping[str, Any]) -> float:
    """Share of a head's channels that a model's positions turn."""
    said = arithmetic_of(model)
    return said["rotary_percent"] if said["position_embedding_type"] == "rope" else 0.0
