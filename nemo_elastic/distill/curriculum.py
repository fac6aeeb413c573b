"""The curriculum: which stage a step belongs to, and what that stage asks for. Pure functions; no torch.

A stage says steps, sequence length, global batch and how often each budget is drawn (METHOD section 5: uniform first,
then weighted towards the large ones, because uniform sampling in the long second stage hurts the largest model).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config.sections import StageConfig
from ..problems import Problem, did_you_mean, raise_if_any


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


def budget_probabilities(stage: StageConfig, budgets: Sequence[str]) -> dict[str, float]:
    """Probability of every budget in a stage, in the order of `budgets`; uniform when the stage names none."""
    if not stage.budget_probabilities:
        return {name: 1 / len(budgets) for name in budgets}
    given = stage.budget_probabilities
    total = sum(given.values())
    return {name: given.get(name, 0.0) / total for name in budgets}


def stage_problems(stages: Sequence[StageConfig], budgets: Sequence[str], data_parallel: int, micro_batch: int) -> list:
    """Every stage that cannot run: sizes, batches that do not divide, budgets nobody knows."""
    found = []
    for i, stage in enumerate(stages):
        key = f"train.stages.{i}"
        for name in ("steps", "seq_length", "global_batch_size"):
            if getattr(stage, name) < 1:
                found.append(Problem(f"{key}.{name}", f"{getattr(stage, name)} must be at least 1"))
        per_micro_batch = data_parallel * micro_batch
        if stage.global_batch_size % per_micro_batch:
            words = f"{stage.global_batch_size} must be a multiple of data parallel x train.micro_batch_size"
            found.append(Problem(f"{key}.global_batch_size", f"{words} = {per_micro_batch}"))
        given: Mapping[str, float] = stage.budget_probabilities or {}
        for name, p in given.items():
            if name not in budgets:
                words = f"no budget of this name{did_you_mean(name, budgets)}"
                found.append(Problem(f"{key}.budget_probabilities.{name}", words))
            if not p >= 0:
                found.append(Problem(f"{key}.budget_probabilities.{name}", f"{p} must not be negative"))
        if given and not sum(given.values()) > 0:
            found.append(Problem(f"{key}.budget_probabilities", "must not all be zero"))
    return found


def check_stages(stages: Sequence[StageConfig], budgets: Sequence[str], data_parallel: int, micro_batch: int) -> None:
    """Raise all of `stage_problems` at once.

    Raises:
        ProblemsError: when there is any.
    """
    raise_if_any(stage_problems(stages, budgets, data_parallel, micro_batch))
