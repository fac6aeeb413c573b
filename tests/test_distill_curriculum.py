"""Stages as pure functions of the step."""

from itertools import pairwise

import pytest

from nemo_elastic.config.sections import OptimizerSettings, StageConfig
from nemo_elastic.distill.curriculum import (
    budget_probabilities,
    history,
    learning_rate,
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


def test_history_joins_equal_sizes_and_goes_on_past_the_end():
    assert history(STAGES, 0) == [] and history(STAGES, 2) == [(2, 8, 6)]
    assert history(STAGES, 5) == [(3, 8, 6), (2, 48, 2)] and history(STAGES, 9)[-1] == (6, 48, 2)
    split = (StageConfig(steps=1, seq_length=8, global_batch_size=6), *STAGES)
    assert history(split, 4) == [(4, 8, 6)]


def test_tokens_become_whole_steps():
    stage = StageConfig(tokens=1000, seq_length=16, global_batch_size=4)
    assert stage.steps == 16 and StageConfig(steps=3).tokens is None


def test_a_stage_with_a_rate_begins_a_new_warm_up_and_cosine():
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, warmup_steps=2)
    plain = [StageConfig(steps=6), StageConfig(steps=4)]
    whole = [learning_rate(plain, settings, step) for step in range(11)]
    assert whole[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and whole[6] == pytest.approx(0.55)
    assert whole[10] == pytest.approx(0.1) and all(a >= b for a, b in pairwise(whole[2:]))
    again = [StageConfig(steps=6), StageConfig(steps=6, lr=0.5), StageConfig(steps=4)]
    rates = [learning_rate(again, settings, step) for step in range(17)]
    assert rates[:6] == [learning_rate([StageConfig(steps=6)], settings, step) for step in range(6)]
    assert rates[6:9] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5]) and rates[12] == pytest.approx(0.3)
    assert rates[16] == pytest.approx(0.1)
