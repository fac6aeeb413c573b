"""`train.keep_checkpoints`: old training checkpoints go once newer ones are whole.

Looked at before every step behind a save, until that save has ended, before the next save, and once behind the last
step: a checkpoint leaves only while as many newer ones as are to be kept are whole. The first rank renames it; it is
deleted beside the run.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.nemo.plain.open_saves import is_save_open
from nemo_elastic.processes.training_checkpoints import set_aside, superfluous, whole_checkpoints

logger = logging.getLogger(__name__)


class KeptCheckpoints(pl.Callback):
    """Keeps the newest `last` checkpoints of a run, and those after multiples of `every` steps.

    A context around `trainer.fit`, which waits for what is being deleted.
    """

    def __init__(self, out: Path, last: int, every: int | None = None) -> None:
        self.out, self.last, self.every = out, last, every
        self._saved = False
        self._worker: ThreadPoolExecutor | None = None  # not before the trainer is made: NeMo copies its callbacks
        self._deleting: list[Future[None]] = []

    def __enter__(self) -> KeptCheckpoints:
        self._worker = ThreadPoolExecutor(1, "deletes-checkpoints")
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(wait=True)
        self._worker = None

    def on_save_checkpoint(self, *_: Any) -> None:
        """One is being written: there is something to look at when it is whole. The one before is whole by now."""
        self.clear()
        self._saved = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The save of the step before has ended, or goes on beside the run and is looked at again."""
        if self._saved:
            self.clear()
            self._saved = is_save_open(trainer)

    def clear(self) -> None:
        """Delete what is superfluous now. Every rank may call it; the first one works."""
        if process_groups.rank():
            return
        for path in superfluous(whole_checkpoints(self.out), self.last, self.every):
            logger.info("%s: newer checkpoints are whole, it goes (train.keep_checkpoints)", path)
            try:
                self._deleting.append(self._worker.submit(shutil.rmtree, set_aside(path)))
            except OSError as error:  # the run is worth more than the room
                logger.warning("an old checkpoint cannot be deleted: %s", error)
        for done in [future for future in self._deleting if future.done()]:
            self._deleting.remove(done)
            if (error := done.exception()) is not None:
                logger.warning("an old checkpoint could not be deleted: %s", error)
