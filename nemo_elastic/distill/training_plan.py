"""The resolved run before it runs (`plan --train`): what is trained, what is frozen, and the schedules at a few points.

Every number comes from the function that the run itself calls: `curriculum.learning_rate`, `Timeline.point`,
`curriculum.budget_probabilities`. Pure; no torch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from ..config.sections import RouterConfig, RunConfig
from ..cost.counts import parameters
from ..family import Family
from ..router.schedule import Timeline, resolve_recipe
from ..space.budget import Budget
from ..space.choices import choice_shapes
from .curriculum import learning_rate, stage_at, tokens_before, total_steps
from .training_cost import checkpoints_kept

EVEN_POINTS = 8  # of the schedules, beside those where something changes


def training_plan(run: RunConfig, family: Family) -> dict[str, Any] | None:
    """The run as plain values; None without stages."""
    stages = run.train.stages
    steps = total_steps(stages)
    if not steps:
        return None
    config = resolve_recipe(run.router)
    timeline = Timeline.of(config, steps, stages)
    learned, every = family.learned, run.train.save_every_steps
    return {
        "steps": steps,
        "tokens": tokens_before(stages, steps),
        "trained": _trained(run, family, config),
        "frozen": _frozen(run, family),
        "budgets": {b.name: _found_by(family, b) for b in family.budgets},
        "phases": _phases(timeline, bool(family.open)),
        "schedule": [_point(run, config, timeline, step, bool(learned)) for step in _steps(run, timeline)],
        "checkpoints": {"every_steps": every, **checkpoints_kept(run)},
        "parallel": {
            "tensor_model_parallel_size": run.train.tensor_model_parallel_size,
            "pipeline_model_parallel_size": run.train.pipeline_model_parallel_size,
            "context_parallel_size": run.train.context_parallel_size,
            "expert_model_parallel_size": run.train.expert_model_parallel_size,
            "gpus_per_replica": run.train.tensor_model_parallel_size
            * run.train.pipeline_model_parallel_size
            * run.train.context_parallel_size,
            "largest_data_parallel_size": _largest_data_parallel(run),
        },
    }  # fmt: skip


def _found_by(family: Family, budget: Budget) -> str:
    if budget.is_full:
        return "parent"
    return "learned" if budget.name in family.learned else "raced" if budget.name in family.raced else "forced"


def router_parameters(family: Family, config: RouterConfig) -> int:
    """Parameters of the router's MLPs, one per dim that has something to choose; 0 when nothing is learned."""
    budgets, hidden = len(family.learned), config.hidden_size
    if not budgets:
        return 0
    outputs = [rows * choices for rows, choices in choice_shapes(family.space).values()]
    return sum((budgets + 1) * hidden + (hidden + 1) * n for n in outputs)


def _trained(run: RunConfig, family: Family, config: RouterConfig) -> list[dict[str, Any]]:
    weights = {
        "what": "weights of the sorted parent, shared by all budgets",
        "parameters": parameters(family.layout, family.space.full_subnet()),
        "lr": run.train.optimizer.lr,
    }
    router = {"what": "router", "parameters": router_parameters(family, config), "lr": config.lr}
    return [weights, router] if router["parameters"] else [weights]


def _frozen(run: RunConfig, family: Family) -> list[dict[str, Any]]:
    if not run.distill.builds_parent:
        return []
    cached = " (its hidden states come from distill.teacher_cache)" if run.distill.teacher_cache else ""
    cached += ", for the full member alone" if run.distill.self_taught else ""
    count = parameters(family.layout, family.space.full_subnet())
    return [{"what": f"teacher: a copy of the parent{cached}", "parameters": count}]


def _phases(timeline: Timeline, undecided: bool) -> list[dict[str, Any]]:
    """First step and length of each phase that happens."""
    if not undecided:
        return []
    return [{"phase": name, "first_step": a, "steps": b - a} for name, (a, b) in timeline.spans().items() if b > a]


def _steps(run: RunConfig, timeline: Timeline) -> list[int]:
    """Steps worth showing: evenly spread ones, and those where a stage, a phase or the warm-up ends."""
    last = timeline.total - 1
    begins = accumulate(stage.steps for stage in run.train.stages)
    marks = {0, last, run.train.optimizer.warmup_steps, timeline.soft, timeline.hard, timeline.frozen, *begins}
    marks |= {round(i * last / EVEN_POINTS) for i in range(EVEN_POINTS)}
    return sorted(step for step in marks if 0 <= step <= last)


def _point(run: RunConfig, config: RouterConfig, timeline: Timeline, step: int, learned: bool) -> dict[str, Any]:
    rate = learning_rate(run.train.stages, run.train.optimizer, step)
    found = {
        "step": step,
        "tokens_before": tokens_before(run.train.stages, step),
        "stage": stage_at(run.train.stages, step).index,
        "lr": rate,
    }
    if not learned:
        return found
    at = timeline.point(step, config)
    router = {"phase": at.phase, "tau": at.tau, "scale": at.scale, "settle": at.settle}
    return found | router | {"router_lr": rate * run.router.lr / run.train.optimizer.lr}


def _largest_data_parallel(run: RunConfig) -> int:
    """Replicas that every stage's global batch can be dealt to in whole micro-batches."""
    sizes = [s.global_batch_size // (s.micro_batch_size or run.train.micro_batch_size) for s in run.train.stages]
    smallest = min(sizes)
    return next(n for n in range(smallest, 0, -1) if all(size % n == 0 for size in sizes))
