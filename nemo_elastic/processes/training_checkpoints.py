"""Which training checkpoints of a run are whole.

A checkpoint is whole when NeMo's marker (`step=N-unfinished`, removed last) is gone and Megatron wrote its own last
file, `weights/metadata.json`. Anything else is what a killed process left: it is ignored, and removed on resume. One
that is deleted is renamed first (`.removed-step=N`), so that no half of it is ever taken for a whole one.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
LAST_FILES = ("weights/.metadata", "weights/common.pt", "weights/metadata.json")
NAME = re.compile(r"step=(\d+)")
REMOVED = ".removed-"
UNFINISHED = "-unfinished"  # ModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX of NeMo


def steps_done(checkpoint: Path | None) -> int:
    """Steps behind a checkpoint: `step=N` is the one after N + 1 steps; 0 for none."""
    found = NAME.match(checkpoint.name) if checkpoint else None
    return int(found.group(1)) + 1 if found else 0


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    if checkpoint.with_name(f"{checkpoint.name}{UNFINISHED}").exists():
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
    for marker in folder.glob(f"*{UNFINISHED}"):
        marker.unlink()
    for rest in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(rest)


def superfluous(whole: Sequence[Path], last: int, every: int | None = None) -> list[Path]:
    """Of whole checkpoints in the order of their steps, those that are neither among the `last` newest nor made after a
    multiple of `every` steps.
    """
    old = whole[: max(0, len(whole) - last)]
    return [path for path in old if not every or steps_done(path) % every]


def set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint out of those of the run, at once; what is left of it is the caller's to delete."""
    aside = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    checkpoint.rename(aside)
    return aside
