"""`sort`: the parent with its units in order of importance -> `OUT/sorted/`. Its function does not change."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import configuration, folders, run_folder, verb_parser
from .console import progress_bar, quiet_libraries

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
    from ..nemo import api

    out = run_folder(arguments, resolved.config.name)
    with progress_bar() as bar:
        folder = api.sort(resolved, out, force=arguments.force, progress=bar.update)
    if arguments.json:
        arguments.answer.json({"sorted": str(folder)})
    else:
        arguments.answer.write(f"sorted parent: {folder}")
    return 0
