"""Saves that go on while the run does (`train.async_save`), by Megatron's asynchronous caller.

NeMo hands a save to a forked process and asks after every step, on all ranks together, whether all have ended; then the
last files are written and the mark of an unfinished checkpoint is taken away. Added here: one save is open at a time,
and a run that fails gives its open save up instead of staying for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from nemo.utils.callbacks import dist_ckpt_io

from nemo_elastic.mcore.versions import AsyncCallsQueue

logger = logging.getLogger(__name__)


def install() -> None:
    """Give NeMo the one class of Megatron that these saves need; idempotent. To be called before the trainer is built.

    NeMo 2.7.3 (`utils/callbacks/dist_ckpt_io.py`) imports it behind another format's module, which megatron-core 0.16
    has no more, and takes that for no Megatron at all.
    """
    dist_ckpt_io.AsyncCallsQueue = AsyncCallsQueue
    dist_ckpt_io.HAVE_MEGATRON_CORE = True


class OneSaveAtATime(pl.Callback):
    """Before a save begins, the one that is open ends. Goes before the callbacks that look at what is whole then."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """On every rank: the mark of the new one is there, nothing of it is written."""
        finish_open_saves(trainer)


def is_save_open(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint is being written beside the run; the same on all ranks."""
    io = trainer.strategy.checkpoint_io
    return (
        isinstance(io, dist_ckpt_io.AsyncFinalizableCheckpointIO)
        and io.async_calls_queue.get_num_unfinalized_calls() > 0
    )


def finish_open_saves(trainer: pl.Trainer) -> None:
    """Wait until what is being written is whole. To be called by all ranks, or by none.

    Raises:
        CheckpointException: on all ranks, when one could not write.
    """
    if is_save_open(trainer):
        trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)


@contextmanager
def given_up_on_error(trainer: pl.Trainer) -> Iterator[None]:
    """An error, or Ctrl-C, ends the processes that write: other ranks may not be there to make the checkpoint whole."""
    try:
        yield
    except BaseException:
        if is_save_open(trainer):
            logger.warning("the checkpoint that was being written is given up; --resume removes what is there of it")
            for call in trainer.strategy.checkpoint_io.async_calls_queue.async_calls:
                call.async_caller.close(abort=True)
        raise
