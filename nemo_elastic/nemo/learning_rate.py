"""The curriculum's learning rate as NeMo's scheduler module: `distill.curriculum.learning_rate` at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nemo.lightning.pytorch.optim.base import LRSchedulerModule

from nemo_elastic.config.sections import OptimizerSettings, StageConfig
from nemo_elastic.distill.curriculum import learning_rate


class CurriculumRate(LRSchedulerModule):
    """Every parameter group follows the curriculum in proportion to its own rate (the router's is a multiple).

    Args:
        stages, settings: as plain mappings, so that NeMo can write them into a checkpoint's context.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.stages = [StageConfig(**stage) for stage in stages]
        self.settings = OptimizerSettings(**settings)

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns."""

        def factor(step: int) -> float:
            return learning_rate(self.stages, self.settings, step) / self.settings.lr

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
            "monitor": "reduced_train_loss",
        }
