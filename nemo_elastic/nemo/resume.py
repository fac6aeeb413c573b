"""Which training checkpoints are whole, and stopping a run so that it can go on.

A checkpoint is whole when NeMo's marker (`step=N-unfinished`, removed last) is gone and Megatron wrote its own last
file, `weights/metadata.json`. Anything else is what a killed process left: it is ignored, and removed on resume.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.lightning.pytorch.callbacks import ModelCheckpoint, PreemptionCallback

logger = logging.getLogger(__name__)
LAST_FILES = ("weights/.metadata", "weights/common.pt", "weights/metadata.json")
NAME = re.compile(r"step=(\d+)")


def steps_done(checkpoint: Path | None) -> int:
    """Steps behind a checkpoint: `step=N` is the one after N + 1 steps; 0 for none."""
    found = NAME.match(checkpoint.name) if checkpoint else None
    return int(found.group(1)) + 1 if found else 0


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    if ModelCheckpoint.is_checkpoint_unfinished(str(checkpoint)):
        return False
    return all((checkpoint / name).is_file() for name in LAST_FILES)


def whole_checkpoints(out: Path) -> list[Path]:
    """The whole training checkpoints under `out`, in the order of their steps."""
    found = [p for p in (out / "checkpoints").glob("step=*") if p.is_dir() and is_whole(p)]
    return sorted(found, key=steps_done)


def remove_unfinished(out: Path) -> None:
    """Delete what a killed process left of checkpoints. To be called by one rank, before the others go on."""
    folder = out / "checkpoints"
    for path in sorted(folder.glob("step=*")):
        if path.is_dir() and not is_whole(path):
            logger.warning("%s was not written to its end and is removed", path)
            shutil.rmtree(path)
    for marker in folder.glob(f"*{ModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX}"):
        marker.unlink()


def save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """A training checkpoint beside the scheduled ones, under the same marker. Called by every rank."""
    trainer.checkpoint_callback._save_checkpoint(trainer, str(path))


class StopOnSignal(PreemptionCallback):
    """SIGTERM on the first rank ends the run after the step; every rank learns of it, and the end is saved as always.

    NeMo's own callback saves a `-last` checkpoint, which this package does not keep, and ends the process.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ask for the end, the same on all ranks."""
        if self.interrupted:
            logger.warning("SIGTERM: stopping after step %d", trainer.global_step)
            trainer.should_stop = True
