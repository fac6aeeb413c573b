"""The curriculum's learning rate as NeMo's scheduler module: `distill.curriculum.learning_rate` at every step.

The rate is a function of the step and of today's configuration, never of a checkpoint: a resumed run may lower it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nemo.lightning.pytorch.optim.base import LRSchedulerModule

from nemo_elastic.config.sections import OptimizerSettings, StageConfig
from nemo_elastic.distill.curriculum import learning_rate

ROUTER_MARK = (
    10.0  # `lr_mult` of the router's groups: Megatron finds groups again by it, so it does not follow the rates
)


class FollowsStep(torch.optim.lr_scheduler.LRScheduler):
    """Sets every group to `rate(step)`, the router's to `router_scale` times that."""

    def __init__(self, optimizer: Any, rate: Callable[[int], float], router_scale: float) -> None:
        self.rate, self.router_scale = rate, router_scale
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Of the step to come."""
        groups, rate = self.optimizer.param_groups, self.rate(self.last_epoch)
        return [rate * (self.router_scale if is_routers(group) else 1.0) for group in groups]

    def state_dict(self) -> dict[str, int]:
        """The position alone."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Take up the position; the optimizer's groups, which came back with old rates, get today's."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def is_routers(group: Mapping[str, Any]) -> bool:
    """Whether an optimizer's group holds the router (NeMo renames `lr_mult` once it has applied it)."""
    return group.get("pre_lr_mult", group.get("lr_mult", 1.0)) != 1.0


class CurriculumRate(LRSchedulerModule):
    """The rate of a run.

    Args:
        stages, settings: as plain mappings, so that NeMo can write them into a checkpoint's context.
        router_lr: highest rate of the router; it follows the same curve.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], router_lr: float) -> None:
        super().__init__()
        self.stages = [StageConfig(**stage) for stage in stages]
        self.settings = OptimizerSettings(**settings)
        self.router_lr = router_lr

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns."""

        def rate(step: int) -> float:
            return learning_rate(self.stages, self.settings, step)

        schedule = FollowsStep(optimizer, rate, self.router_lr / self.settings.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
            "monitor": "reduced_train_loss",
        }
