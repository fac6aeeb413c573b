"""The rate of a resumed run is today's, whatever the checkpoint remembers."""

import pytest
import torch

from nemo_elastic.nemo.run.learning_rate import ROUTER_MARK, CurriculumRate

STAGES = [{"steps": 10}]


def scheduled(lr: float, router_lr: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr_mult": 1.0}, {"params": [weights[1]], "pre_lr_mult": ROUTER_MARK}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    rate = CurriculumRate(STAGES, {"lr": lr, "min_lr": lr / 100, "warmup_steps": 0}, router_lr)
    return optimizer, rate.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def steps(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, count: int) -> None:
    for _ in range(count):
        optimizer.step()
        schedule.step()


def test_router_and_model_follow_one_curve() -> None:
    optimizer, schedule = scheduled(1e-3, 2e-2)
    assert rates(optimizer) == pytest.approx([1e-3, 2e-2])
    steps(optimizer, schedule, 5)
    assert rates(optimizer) == pytest.approx([5.05e-4, 20 * 5.05e-4])


def test_a_lower_rate_holds_from_the_first_resumed_step() -> None:
    before, schedule = scheduled(1e-3, 2e-2)
    steps(before, schedule, 5)
    saved = before.state_dict(), schedule.state_dict()
    optimizer, again = scheduled(1e-4, 1e-3)
    optimizer.load_state_dict(saved[0])
    assert rates(optimizer)[0] == pytest.approx(5.05e-4)  # what the checkpoint remembers
    again.load_state_dict(saved[1])
    assert rates(optimizer) == pytest.approx([5.05e-5, 5.05e-4])
    fresh, other = scheduled(1e-4, 1e-3)
    steps(fresh, other, 8)
    steps(optimizer, again, 3)
    assert rates(optimizer) == pytest.approx(rates(fresh))
