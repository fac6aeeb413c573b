"""`profile`: how long layers of every kind and width take on this machine -> a table that latency budgets read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import folder_problems
from ..problems import Problem, raise_if_any
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
    config = resolved.config
    out = Path(arguments.output)
    raise_if_any(_problems(arguments, out))
    quiet_libraries(arguments.verbose)
    from ..family import Configured

    family = Configured(resolved).family()
    import torch

    from ..config.function_fields import ROUTING, arithmetic_of
    from ..mcore.models.profile import Timing, profile
    from ..mcore.runtime.automatic import settled

    timing = Timing(
        batch_size=config.report.batch_size,
        sequence_length=config.report.sequence_length,
        dtype=torch.bfloat16 if settled(config).train.precision == "bf16-mixed" else torch.float32,
        function={n: v for n, v in arithmetic_of(config.model).items() if n in ("activation_func", *ROUTING)},
        warm_up=arguments.warm_up,
        repeats=arguments.repeats,
        rounds=arguments.rounds,
    )
    with progress_bar() as bar:
        table = profile(
            family.space,
            timing,
            points=arguments.points,
            report=lambda kind, done, total: bar.update("profile", done, total, kind),
        )
    table.write(out)
    if arguments.json:
        arguments.answer.json(table.to_dict())
    else:
        counts = ", ".join(f"{kind} {len(grid.values)}" for kind, grid in table.grids.items())
        arguments.answer.write(f"latency table: {out}\n{table.describe()}; sizes measured: {counts}")
    return 0


def _problems(arguments: argparse.Namespace, out: Path) -> list[Problem]:
    found = []
    for name, lowest in (("repeats", 1), ("rounds", 1), ("warm_up", 0), ("points", 2)):
        value = getattr(arguments, name)
        if value < lowest:
            found.append(Problem(f"--{name.replace('_', '-')}", f"{value} must be at least {lowest}"))
    if out.exists() and not arguments.force:
        found.append(Problem("--output", f"{str(out)!r} is there already; replace it with --force"))
    elif out.is_dir():
        found.append(Problem("--output", f"{str(out)!r} is a folder; name a file"))
    return found or folder_problems("--output", out.parent)
