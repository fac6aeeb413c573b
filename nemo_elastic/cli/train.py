"""`train`: the elastic run, from a parent to a nested checkpoint. Ranks and sorts first when that is missing."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ..family import family_of
from ..problems import Problem, ProblemsError, raise_if_any
from .arguments import configuration, folders, restart_under_torchrun, run_folder, verb_parser, write_resolved
from .console import is_first_rank, progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic train --config conf/tiny_parent.yaml --out runs/tiny
  torchrun --nproc-per-node 8 -m nemo_elastic train --config conf/my_parent.yaml train.tensor_model_parallel_size=8
  nemo-elastic train --config conf/tiny_parent.yaml --out runs/tiny --resume"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "the elastic run: one training, one nested checkpoint in OUT/nested"
    flags = ("--config", "--out", "--resume", "--force", "--nproc", "--json", "--verbose")
    verb_parser(subparsers, "train", run, help, flags, epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Train; answers with the nested checkpoint's folder."""
    folders(arguments)
    resolved = configuration(arguments)
    out = run_folder(arguments, resolved.config.name)
    check_unused(out, force=arguments.force, resume=arguments.resume)
    check_inputs(resolved.config)
    restart_under_torchrun(arguments)
    quiet_libraries(arguments.verbose)
    from ..nemo.pipeline import Run

    with progress_bar() as bar:
        work = Run(resolved, out, bar.update)
        work.start()
        write_resolved(out, resolved)
        sorted_folder = work.sort(work.importance(resume=arguments.resume))
        trained = work.train(sorted_folder, resume_from=work.resume_point() if arguments.resume else None)
        nested = work.nest(force=arguments.force or arguments.resume)
    answer = {"nested": str(nested), "heldout_losses": trained.heldout_losses, "tokens": trained.tokens}
    if arguments.json:
        arguments.answer.json(answer)
    elif is_first_rank():
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in trained.heldout_losses.items())
        arguments.answer.write(f"nested checkpoint: {nested}\nheld-out loss: {losses}")
    return 0


def check_inputs(config: Any) -> None:
    """What can be known to fail before anything is started or written: layout, curriculum, budgets, the parent.

    Raises:
        ProblemsError: all that is wrong, at once.
    """
    from ..mcore.parents import open_parent
    from ..plan import plan

    found = [Problem(p["key"], p["message"]) for p in plan(config)["problems"]]
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


def check_unused(out: Path, *, force: bool, resume: bool = False) -> None:
    """Never train over another run's checkpoints.

    Raises:
        ProblemsError: `out` has checkpoints, and neither `--resume` nor `--force` was given.
    """
    used = [name for name in ("checkpoints", "nested") if (out / name).exists()]
    if not used or resume:
        return
    if not force:
        words = (
            f"already has {' and '.join(used)}; go on with --resume, start over with --force, or choose another --out"
        )
        raise ProblemsError([Problem(str(out), words)])
    if is_first_rank():
        for name in ("checkpoints", "nested", "children", "logs", "sorted", "importance"):
            shutil.rmtree(out / name, ignore_errors=True)
