"""Lightning loggers that a configuration asks for: TensorBoard in `logs/tensorboard`, Weights & Biases in `logs/wandb`.

A resumed run goes on in the same place: TensorBoard is told from which step on older points do not count, W&B gets the
id of the first start. `WANDB_MODE=offline` keeps everything on disk.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nemo_elastic.config.sections import RunConfig
from nemo_elastic.files import write_text


def loggers_of(run: RunConfig, out: Path, resume_step: int) -> list[Logger]:
    """The loggers of `train.loggers`.

    Args:
        resume_step: steps done by the checkpoint that the run goes on from; 0 for a new run.
    """
    logs, found = out / "logs", []
    for name in run.train.loggers:
        if name == "tensorboard":
            how = {"purge_step": resume_step + 1} if resume_step else {}
            found.append(TensorBoardLogger(str(logs), name="tensorboard", version="", default_hp_metric=False, **how))
        else:
            project = run.train.wandb_project or "nemo-elastic"
            (logs / "wandb").mkdir(parents=True, exist_ok=True)
            found.append(
                WandbLogger(
                    project=project, name=run.name, save_dir=str(logs), id=_run_id(logs, resume_step), resume="allow"
                )
            )
    return found


def finish(loggers: Iterable[Logger]) -> None:
    """Have W&B write out what it holds: the process goes on after training, and may end without its exit hook."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        if wandb.run is not None:  # on the first rank, once something was logged
            wandb.run.finish()


def _run_id(logs: Path, resume_step: int) -> str | None:
    """The id of this run, kept in `logs/wandb_id.txt`; only the first rank has a use for it."""
    if os.environ.get("RANK", "0") != "0":
        return None
    file = logs / "wandb_id.txt"
    if not (resume_step and file.is_file()):
        write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8").strip()
