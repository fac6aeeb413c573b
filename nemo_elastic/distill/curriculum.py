"""The curriculum: which stage a step belongs to, and what that stage asks for. Pure functions; no torch.

A stage says steps, sequence length, global batch and how often each budget is drawn (METHOD section 5: uniform first,
then weighted towards the large ones, because uniform sampling in the long second stage hurts the largest model).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.sections import OptimizerSettings, StageConfig


@dataclass(frozen=True)
class StagePoint:
    """Where a step lies: the stage's number, the step within it, and the stage itself."""

    index: int
    step_in_stage: int
    stage: StageConfig


def total_steps(stages: Sequence[StageConfig]) -> int:
    """Steps of the whole run."""
    return sum(stage.steps for stage in stages)


def stage_at(stages: Sequence[StageConfig], step: int) -> StagePoint:
    """The stage that `step` (0-based, over the whole run) belongs to; past the end, the last stage goes on."""
    if not stages:
        raise ValueError("train.stages must have at least one stage")
    if step < 0:
        raise ValueError(f"step {step} must not be negative")
    begin = 0
    for index, stage in enumerate(stages):
        if step < begin + stage.steps or index == len(stages) - 1:
            return StagePoint(index, step - begin, stage)
        begin += stage.steps
    raise AssertionError("the last stage returns")


def samples_before(stages: Sequence[StageConfig], step: int) -> int:
    """Samples consumed before `step`: where the data stands when a run resumes there."""
    point = stage_at(stages, step)
    done = sum(s.steps * s.global_batch_size for s in stages[: point.index])
    return done + point.step_in_stage * point.stage.global_batch_size


def tokens_before(stages: Sequence[StageConfig], step: int) -> int:
    """Tokens consumed before `step`."""
    point = stage_at(stages, step)
    done = sum(s.steps * s.global_batch_size * s.seq_length for s in stages[: point.index])
    return done + point.step_in_stage * point.stage.global_batch_size * point.stage.seq_length


def history(stages: Sequence[StageConfig], step: int) -> list[tuple[int, int, int]]:
    """(steps, seq_length, global_batch_size) of what was read before `step`, equal neighbours joined."""
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < step:
        point = stage_at(stages, at)
        last = point.index == len(stages) - 1
        steps = step - at if last else min(step - at, point.stage.steps - point.step_in_stage)
        sizes = (point.stage.seq_length, point.stage.global_batch_size)
        if found and found[-1][1:] == sizes:
            steps, at = steps + found.pop()[0], at + steps
        else:
            at += steps
        found.append((steps, *sizes))
    return found


def learning_rate(stages: Sequence[StageConfig], settings: OptimizerSettings, step: int) -> float:
    """Warm-up, then cosine to `min_lr` over a segment: all stages, or each run of stages that begins with an `lr`."""
    begin, peak, end = 0, settings.lr, 0
    for stage in stages:
        if stage.lr is not None:
            if step < end:
                break
            begin, peak = end, stage.lr
        end += stage.steps
    at, length = step - begin, max(1, end - begin)
    warm = min(settings.warmup_steps, length - 1)
    if at < warm:
        return peak * (at + 1) / (warm + 1)
    used = min(1.0, (at - warm) / max(1, length - warm))
    return settings.min_lr + (peak - settings.min_lr) * (1 + math.cos(math.pi * used)) / 2


def budget_probabilities(stage: StageConfig, budgets: Sequence[str]) -> dict[str, float]:
    """Probability of every budget in a stage, in the order of `budgets`; uniform when the stage names none."""
    if not stage.budget_probabilities:
        return {name: 1 / len(budgets) for name in budgets}
    given = stage.budget_probabilities
    total = sum(given.values())
    return {name: given.get(name, 0.0) / total for name in budgets}
