"""`nest`: a nested checkpoint from any training checkpoint of a run."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import configuration, folders, run_folder, verb_parser
from .console import progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic nest --config conf/tiny_parent.yaml --out runs/tiny
  nemo-elastic nest --config conf/tiny_parent.yaml --out runs/tiny runs/tiny/checkpoints/step=199 --force"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "OUT/nested from a training checkpoint (the last one, or the folder given)"
    flags = ("--config", "--out", "--force", "--json", "--verbose")
    verb_parser(subparsers, "nest", run, help, flags, epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Write it; answers with its folder."""
    given = folders(arguments, "CHECKPOINT", optional=1)
    resolved = configuration(arguments)
    out = run_folder(arguments, resolved.config.name)
    quiet_libraries(arguments.verbose)
    from ..nemo import api

    checkpoint = given[0] if given else None
    with progress_bar() as bar:
        nested = api.nest(resolved, out, checkpoint=checkpoint, force=arguments.force, progress=bar.update)
    if arguments.json:
        arguments.answer.json({"nested": str(nested)})
    else:
        arguments.answer.write(f"nested checkpoint: {nested}")
    return 0
