"""Saving a run beside its schedule, and stopping it so that it can go on."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_elastic.processes.started import seconds_running

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's at the limit, and what `--signal=USR1@300` sends before it


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
    """A signal on any rank, or the end of its time, ends the run after the step; every rank learns of it.

    The end is saved as always.

    A context around `trainer.fit` and what follows until the checkpoint is whole: the signals' handlers are ours from
    before the first step to behind the last save, so that a second signal, or one to the whole process group, changes
    nothing. (NeMo's own callback listens on the first rank alone, gives the handler back before the last save, saves a
    `-last` checkpoint, which this package does not keep, and ends the process.)

    Args:
        listens: to `SIGNALS`; else they do what they always do.
        seconds: after the start of the command, when the next step may end no later; None: no limit.
    """

    def __init__(self, listens: bool = True, seconds: float | None = None) -> None:
        self.listens, self.seconds = listens, seconds
        self.asked: str | None = None
        self.began, self.longest = 0.0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._hear) for number in self._signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signals(self) -> tuple[signal.Signals, ...]:
        return SIGNALS if self.listens else ()

    def _hear(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number).name

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the handlers back from Lightning, whose own makes the rank that was meant leave alone."""
        for number in self._signals():
            signal.signal(number, self._hear)
        if self.listens and trainer.received_sigterm:
            self.asked = signal.SIGTERM.name
            trainer._signal_connector.received_sigterm = False

    def on_train_batch_start(self, *_: Any) -> None:
        """The clock of a step."""
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ask for the end, the same on all ranks."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.began)
        if self.seconds is not None and seconds_running() + self.longest > self.seconds:
            self.asked = self.asked or f"train.max_time={self.seconds:g} s"
        if not self.listens and self.seconds is None:
            return
        asked = torch.tensor(float(self.asked is not None), device=pl_module.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked:
            why = self.asked or "another process was asked to"
            logger.warning("%s: stopping after step %d", why, trainer.global_step)
            trainer.should_stop = True
