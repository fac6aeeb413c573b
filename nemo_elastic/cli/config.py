"""`config`: the resolved configuration and where each value came from; or a configuration to start from."""

from __future__ import annotations

import argparse
from typing import Any

from ..problems import Problem, ProblemsError
from .arguments import configuration, folders, overrides, verb_parser

EXAMPLES = """examples:
  nemo-elastic config --config conf/tiny_parent.yaml
  nemo-elastic config --config conf/tiny_parent.yaml --json train.micro_batch_size=2
  nemo-elastic config --from builtin:tiny_parent > mine.yaml           # or the folder of your parent"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "the resolved configuration with the origin of each value"
    parser = verb_parser(subparsers, "config", run, help, ("--config", "--json"), epilog=EXAMPLES)
    parser.add_argument(
        "--from",
        dest="parent",
        metavar="PARENT",
        help="write the YAML to start from for this parent (--config is not read)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    from ..config.load import leaves

    folders(arguments)
    if arguments.parent is not None:
        return _start(arguments)
    resolved = configuration(arguments)
    if arguments.json:
        arguments.answer.json({"values": resolved.values, "origins": resolved.origins})
        return 0
    for key, value in leaves(resolved.values):
        arguments.answer.write(f"{key} = {value!r}   # {origin_of(key, resolved.origins)}")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    from ..plan.starting import starting_configuration

    given = [name for name, value in (("--config", arguments.config), ("--json", arguments.json)) if value]
    given += overrides(arguments)
    if given:
        words = "writes a YAML file of its own; leave the other out, and edit what it writes"
        raise ProblemsError([Problem("--from", f"cannot stand beside {', '.join(given)}: it {words}")])
    arguments.answer.write(starting_configuration(arguments.parent).rstrip("\n"))
    return 0


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Where a leaf was set: itself, or the nearest key above it that was."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"
