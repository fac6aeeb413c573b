"""`profile`: how long layers of every kind and width take on this machine -> a table that latency budgets read."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import configuration, folders, verb_parser
from .console import progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic profile --config conf/tiny_parent.yaml --output latency.yaml report.sequence_length=256
  nemo-elastic plan --config conf/tiny_parent.yaml report.latency_table=latency.yaml \\
      'elastic.budgets.fast={kind: latency, value: 20}'

batch and length come from the report section, the precision from train.precision; one process, no weights needed"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "latency table of layer kinds and widths on this machine"
    parser = verb_parser(
        subparsers, "profile", run, help, ("--config", "--json", "--force", "--verbose"), epilog=EXAMPLES
    )
    parser.add_argument("--output", metavar="YAML", required=True, help="the table")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times all points are gone through")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timings per point and round")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="runs before the first timing")
    parser.add_argument("--points", type=int, default=5, metavar="N", help="sizes per dim; others are interpolated")


def run(arguments: argparse.Namespace) -> int:
    """Measure and write; answers with the table."""
    folders(arguments)
    resolved = configuration(arguments)
    quiet_libraries(arguments.verbose)
    from ..nemo import api

    names = ("rounds", "repeats", "warm_up", "points", "force")
    how = {name: getattr(arguments, name) for name in names}
    with progress_bar() as bar:
        done = api.profile(resolved, arguments.output, progress=bar.update, **how)
    table = done.table
    if arguments.json:
        arguments.answer.json(table.to_dict())
    else:
        counts = ", ".join(f"{kind} {len(grid.values)}" for kind, grid in table.grids.items())
        arguments.answer.write(f"latency table: {done.file}\n{table.describe()}; sizes measured: {counts}")
    return 0
