"""`train`: the elastic run, from a parent to a nested checkpoint. Ranks and sorts first when that is missing."""

from __future__ import annotations

import argparse
from typing import Any

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
    check_unused(out, arguments)
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


def check_unused(out: Any, arguments: argparse.Namespace) -> None:
    """Never train over another run's checkpoints.

    Raises:
        ProblemsError: `out` has checkpoints, and neither `--resume` nor `--force` was given.
    """
    import shutil

    from ..problems import Problem, ProblemsError

    used = [name for name in ("checkpoints", "nested") if (out / name).exists()]
    if not used or arguments.resume:
        return
    if not arguments.force:
        words = (
            f"already has {' and '.join(used)}; go on with --resume, start over with --force, or choose another --out"
        )
        raise ProblemsError([Problem(str(out), words)])
    if is_first_rank():
        for name in ("checkpoints", "nested", "children", "logs", "sorted", "importance"):
            shutil.rmtree(out / name, ignore_errors=True)
