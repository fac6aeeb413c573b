"""Stages as pure functions of the step."""

import pytest

from nemo_elastic.config.sections import StageConfig
from nemo_elastic.distill.curriculum import (
    budget_probabilities,
    samples_before,
    stage_at,
    tokens_before,
    total_steps,
)

STAGES = (
    StageConfig(steps=3, seq_length=8, global_batch_size=6),
    StageConfig(steps=2, seq_length=48, global_batch_size=2, budget_probabilities={"6B": 1.0, "12B": 2.0, "9B": 1.0}),
)


def test_every_step_has_its_stage():
    points = [stage_at(STAGES, step) for step in range(7)]
    assert [(p.index, p.step_in_stage) for p in points] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert points[3].stage is STAGES[1] and total_steps(STAGES) == 5


def test_data_seen_is_the_sum_over_steps():
    for step in range(7):
        stages = [stage_at(STAGES, s).stage for s in range(step)]
        assert samples_before(STAGES, step) == sum(s.global_batch_size for s in stages)
        assert tokens_before(STAGES, step) == sum(s.global_batch_size * s.seq_length for s in stages)


def test_probabilities_follow_the_order_of_the_budgets():
    budgets = ("12B", "9B", "6B")
    assert list(budget_probabilities(STAGES[1], budgets).items()) == [("12B", 0.5), ("9B", 0.25), ("6B", 0.25)]
    assert budget_probabilities(STAGES[0], budgets) == pytest.approx(dict.fromkeys(budgets, 1 / 3))


def test_a_run_without_stages_or_before_its_start_is_refused():
    with pytest.raises(ValueError, match="at least one stage"):
        stage_at((), 0)
    with pytest.raises(ValueError, match="must not be negative"):
        stage_at(STAGES, -1)
