"""`train`: the elastic run, from a parent to a nested checkpoint. Ranks and sorts first when that is missing."""

from __future__ import annotations

import argparse
from typing import Any

from ..family import Configured
from .arguments import configuration, folders, run_folder, start_workers, verb_parser
from .console import progress_bar, quiet_libraries

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
    quiet_libraries(arguments.verbose)
    from ..nemo.run.start_checks import check_train
    from ..processes.launchers import started_processes

    processes = started_processes() if arguments.nproc is None else arguments.nproc
    configured = Configured(resolved)
    check_train(configured, out, processes, resume=arguments.resume, force=arguments.force)
    start_workers(arguments)
    from ..nemo import api

    with progress_bar() as bar:
        if arguments.resume and not any((out / "checkpoints").glob("*")):
            bar.say(f"{out}: no training checkpoint to go on from; this run begins at step 0")
        done = api.train(configured, out, resume=arguments.resume, force=arguments.force, progress=bar.update)
    if arguments.json:
        answer = {"nested": str(done.nested), "heldout_losses": done.heldout_losses, "tokens": done.tokens}
        arguments.answer.json(answer)
    else:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in done.heldout_losses.items())
        arguments.answer.write(f"nested checkpoint: {done.nested}\nheld-out loss: {losses}")
    return 0
