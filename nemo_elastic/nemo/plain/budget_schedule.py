"""A learning rate that ends when the budget does, whether steps or minutes run out first.

    u        = max(step / max_steps, elapsed / max_minutes)         in 0 .. 1
    lr(u)    = lr min(1, (step + 1) / warmup_steps) (r + (1 - r) (1 + cos(pi u)) / 2),   r = min_lr_ratio

On a machine whose speed nobody knows beforehand the cosine then really reaches its end. With no
`max_minutes` it is the usual cosine over steps, and a run is a function of its seed alone.
"""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.optim.base import LRSchedulerModule


def cosine_factor(used: float, step: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Factor on the learning rate at `step` when the fraction `used` of the budget is gone."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, used))))


class BudgetCosine(LRSchedulerModule):
    """Warm-up, then cosine over whichever of the two budgets is used up faster.

    Args:
        max_steps: steps of the whole run.
        max_minutes: wall-clock minutes of the whole run, resumed parts included; None counts steps only.
        warmup_steps: linear warm-up.
        min_lr_ratio: last learning rate over the highest.
    """

    def __init__(
        self, max_steps: int, max_minutes: float | None = None, warmup_steps: int = 100, min_lr_ratio: float = 0.05
    ) -> None:
        super().__init__()
        self.max_steps, self.max_minutes = max_steps, max_minutes
        self.warmup_steps, self.min_lr_ratio = warmup_steps, min_lr_ratio
        self.elapsed_minutes = 0.0

    def used(self, step: int) -> float:
        """Fraction of the budget that is gone after `step` steps and `elapsed_minutes`."""
        by_time = self.elapsed_minutes / self.max_minutes if self.max_minutes else 0.0
        return max(step / self.max_steps, by_time)

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns."""

        def factor(step: int) -> float:
            return cosine_factor(self.used(step), step, self.warmup_steps, self.min_lr_ratio)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
            "monitor": "val_loss",
        }


class BudgetClock(pl.Callback):
    """Tells the schedule how long the run has taken, the same on every rank, and stops the run at the end.

    Args:
        schedule: the schedule of the optimizer.
    """

    def __init__(self, schedule: BudgetCosine) -> None:
        self.schedule = schedule
        self._before = 0.0
        self._start = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock after set-up, which is not training."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock; every rank takes the latest one."""
        minutes = torch.tensor(self._before + (time.monotonic() - self._start) / 60, dtype=torch.float64)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            minutes = minutes.to(pl_module.device)
            torch.distributed.all_reduce(minutes, op=torch.distributed.ReduceOp.MAX)
        self.schedule.elapsed_minutes = minutes.item()
        if self.schedule.used(trainer.global_step) >= 1:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        """Minutes used, kept in checkpoints."""
        return {"elapsed_minutes": self.schedule.elapsed_minutes}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting where the checkpoint stopped."""
        self._before = self.schedule.elapsed_minutes = state_dict["elapsed_minutes"]
