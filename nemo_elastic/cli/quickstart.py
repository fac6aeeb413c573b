"""`quickstart`: the whole pipeline on the parent and the text that ship with the package, in minutes on two cores."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from ..family import Configured
from .arguments import configuration, folders, run_folder, start_workers, verb_parser
from .console import is_first_rank, progress_bar, quiet_libraries

FOLDER_VARIABLE = "NEMO_ELASTIC_QUICKSTART_FOLDER"
USUAL = Path("runs/quickstart")
MAKE_VARIABLE = "NEMO_ELASTIC_UNDER_MAKE"  # set by the Makefile: remedies are said in its words
EXAMPLES = """examples:
  nemo-elastic quickstart
  nemo-elastic quickstart --json --out runs/first
  nemo-elastic quickstart --nproc 4 train.tensor_model_parallel_size=2 train.pipeline_model_parallel_size=2

exit code 1 when a child differs from its nested subnet"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "rank, train, extract, verify and report the tiny parent that ships with the package"
    flags = ("--config", "--out", "--json", "--nproc", "--force", "--verbose")
    verb_parser(subparsers, "quickstart", run, help, flags, epilog=EXAMPLES)


def free_folder(first: Path, force: bool) -> Path:
    """`first`, or the first of `first-2`, `first-3`, ... that no earlier run has used."""
    if force or "LOCAL_RANK" in os.environ:
        return Path(os.environ.get(FOLDER_VARIABLE, first))
    number, folder = 1, first
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    os.environ[FOLDER_VARIABLE] = str(folder)  # the processes that --nproc starts take the same
    return folder


def remedy(out: Path) -> str:
    """What to do when `out` is in use, in make's words where make was called."""
    from ..report.write import FOLDER, PAGE

    page = out / FOLDER / PAGE
    seen = f"its report is {page}; " if page.is_file() else ""
    if MAKE_VARIABLE in os.environ:
        here = "" if out == USUAL else f" RUN={shlex.quote(str(out))}"
        again, other = f"`make quickstart{here} ARGS=--force`", "`make quickstart RUN=runs/other`"
    else:
        again, other = "--force", "another --out"
    return f"{seen}start over with {again}, or choose another folder with {other}"


def run(arguments: argparse.Namespace) -> int:
    """Everything; prints the table, the verdict and the report's path."""
    folders(arguments)
    resolved = configuration(arguments, default="tiny_parent.yaml")
    out = run_folder(arguments, "quickstart") if arguments.out else free_folder(USUAL, arguments.force)
    from ..nemo.run.start_checks import check_train
    from ..processes.launchers import started_processes

    processes = started_processes() if arguments.nproc is None else arguments.nproc
    configured = Configured(resolved)
    check_train(configured, out, processes, force=arguments.force, remedy=remedy(out))
    start_workers(arguments)
    quiet_libraries(arguments.verbose)
    from ..nemo.pipeline import Run, quickstart

    with progress_bar() as bar:
        work = Run(configured, out, bar.update, begins=True)
        bar.say("loading Megatron and NeMo")
        result = quickstart(work, force=arguments.force)
    if not is_first_rank():
        return 0
    from ..report.table import results_table
    from ..report.write import write_report

    path = write_report(out)
    if arguments.json:
        arguments.answer.json({**result, "report": str(path)})
    else:
        verdict = (
            "verification passed: every child is its nested subnet" if result["verified"] else "verification FAILED"
        )
        arguments.answer.render(results_table(result), verdict)
        arguments.answer.write(f"report: {path}")
    return 0 if result["verified"] else 1
