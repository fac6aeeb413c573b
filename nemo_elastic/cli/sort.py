"""`sort`: the parent with its units in order of importance -> `OUT/sorted/`. Its function does not change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from .arguments import configuration, folders, run_folder, verb_parser
from .console import quiet_libraries

FOLDER = "sorted"
EXAMPLES = """examples:
  nemo-elastic sort --config conf/tiny_parent.yaml

reads OUT/importance/ (run `rank` first); a parent of any size passes through the memory of a few tensors"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    flags = ("--config", "--out", "--json", "--force", "--verbose")
    verb_parser(subparsers, "sort", run, "the parent sorted by importance -> OUT/sorted/", flags, epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Sort as `OUT/importance/` says."""
    folders(arguments)
    resolved = configuration(arguments)
    quiet_libraries(arguments.verbose)
    folder = sort_run(resolved, run_folder(arguments, resolved.config.name), force=arguments.force)
    if arguments.json:
        arguments.answer.json({"sorted": str(folder)})
    else:
        arguments.answer.write(f"sorted parent: {folder}")
    return 0


def sort_run(resolved: Any, out: Path, *, force: bool = False) -> Path:
    """Write `out/sorted/` of a `Resolved` run's parent from `out/importance/`; returns it.

    Raises:
        ProblemsError: no scores, scores of another parent, or a folder that exists (without `force`) or that training
            checkpoints belong to.
    """
    from ..family import Configured
    from ..mcore.models.parents import open_parent, write_sorted
    from ..mcore.runtime import cpu
    from ..nemo.run.ranking import stored_importance
    from ..processes.runlock import locked

    if any((out / "checkpoints").glob("step=*")):
        words = "has checkpoints that were trained from its sorted parent; choose another --out"
        raise ProblemsError([Problem(str(out), words)])
    cpu.install()
    configured = Configured(resolved)
    parent, layout = resolved.config.parent, configured.family().layout
    with locked(out):
        importance = stored_importance(configured, out)
        return write_sorted(
            out / FOLDER, open_parent(parent, layout), layout, importance, source=parent.path, force=force
        )
