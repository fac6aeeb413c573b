"""`sort`: the parent with its units in order of importance -> `OUT/sorted/`. Its function does not change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    config = configuration(arguments).config
    quiet_libraries(arguments.verbose)
    folder = sort_run(config, run_folder(arguments, config.name), force=arguments.force)
    if arguments.json:
        arguments.answer.json({"sorted": str(folder)})
    else:
        arguments.answer.write(f"sorted parent: {folder}")
    return 0


def sort_run(config: Any, out: Path, *, force: bool = False) -> Path:
    """Write `out/sorted/` of a `RunConfig`'s parent from `out/importance/`; returns it.

    Raises:
        ProblemsError: no scores, scores of another parent, or a folder that exists (without `force`).
    """
    from ..family import family_of
    from ..importance.store import Importance
    from ..mcore import cpu
    from ..mcore.parents import open_parent, write_sorted

    cpu.install()
    family = family_of(config)
    importance = Importance.load(out / "importance", family.architecture)
    reader = open_parent(config.parent.path, family.layout)
    return write_sorted(out / FOLDER, reader, family.layout, importance, source=config.parent.path, force=force)
