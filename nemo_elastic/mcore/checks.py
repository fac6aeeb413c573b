"""What can be known to fail before anything is started or written. Quick: no model, no Megatron, no NeMo."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from ..config.sections import RunConfig
from ..family import family_of
from ..plan import plan
from ..problems import Problem, ProblemsError, raise_if_any
from .parents import open_parent

RUN_PARTS = ("checkpoints", "nested", "children", "logs", "sorted", "importance", "results.json", "report")


def check_inputs(config: RunConfig) -> None:
    """Layout, curriculum, budgets and the parent of a training run.

    Raises:
        ProblemsError: all that is wrong, at once.
    """
    found = [Problem(p["key"], p["message"]) for p in plan(config)["problems"]]
    for name in config.train.loggers:
        if importlib.util.find_spec(name) is None:
            words = f"{name} is not installed here; `pip install {name}`, or leave it out"
            found.append(Problem("train.loggers", words))
        elif name == "wandb" and not _wandb_can_log():
            words = "wandb has no API key here; `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
            found.append(Problem("train.loggers", words))
    if not config.train.stages:
        found.append(Problem("train.stages", "is empty; give at least one stage, e.g. [{steps: 100}]"))
    if not config.elastic.budgets:
        found.append(Problem("elastic.budgets", "is empty; name at least one, e.g. {full: 1.0, half: 0.5}"))
    if not found:
        try:
            open_parent(config.parent.path, family_of(config).layout)
        except ProblemsError as error:
            found += error.problems
    raise_if_any(found)


def _wandb_can_log() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")


def make_room(out: Path, *, force: bool, resume: bool = False) -> None:
    """Never train over another run: with `force` its parts are removed, otherwise they are an error.

    Raises:
        ProblemsError: `out` has checkpoints, and neither `resume` nor `force` was given.
    """
    used = [name for name in ("checkpoints", "nested") if (out / name).exists()]
    if not used or resume:
        return
    if not force:
        found = " and ".join(used)
        words = f"already has {found}; go on with --resume, start over with --force, or choose another --out"
        raise ProblemsError([Problem(str(out), words)])
    if os.environ.get("RANK", "0") == "0":
        for part in (out / name for name in RUN_PARTS):
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
