"""Saving a run beside its schedule, and stopping it so that it can go on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

logger = logging.getLogger(__name__)


def save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """A training checkpoint beside the scheduled ones, under the same marker. Called by every rank."""
    trainer.checkpoint_callback._save_checkpoint(trainer, str(path))


@contextmanager
def interrupts_as_they_are() -> Iterator[None]:
    """Ctrl-C leaves `trainer.fit` as KeyboardInterrupt; Lightning makes the exit code 1 of it."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


class StopOnSignal(pl.Callback):
    """SIGTERM on any rank ends the run after the step; every rank learns of it, and the end is saved as always.

    A context around `trainer.fit` and what follows until the checkpoint is whole: the signal's handler is ours from
    before the first step to behind the last save, so that a second signal, or one to the whole process group, changes
    nothing. (NeMo's own callback listens on the first rank alone, gives the handler back before the last save, saves a
    `-last` checkpoint, which this package does not keep, and ends the process.)
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopOnSignal:
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the handler back from Lightning, whose own makes the rank that was meant leave alone."""
        signal.signal(signal.SIGTERM, self._hear)
        if trainer.received_sigterm:
            self.asked = True
            trainer._signal_connector.received_sigterm = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ask for the end, the same on all ranks."""
        asked = torch.tensor(float(self.asked), device=pl_module.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked:
            logger.warning("SIGTERM: stopping after step %d", trainer.global_step)
            trainer.should_stop = True
