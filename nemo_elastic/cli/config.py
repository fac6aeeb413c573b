"""`config`: the resolved configuration, and where each value came from."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import configuration, folders, verb_parser

EXAMPLES = """examples:
  nemo-elastic config --config conf/tiny_parent.yaml
  nemo-elastic config --config conf/tiny_parent.yaml --json train.micro_batch_size=2"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "the resolved configuration with the origin of each value"
    verb_parser(subparsers, "config", run, help, ("--config", "--json"), epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    from ..config.load import leaves

    folders(arguments)
    resolved = configuration(arguments)
    if arguments.json:
        arguments.answer.json({"values": resolved.values, "origins": resolved.origins})
        return 0
    for key, value in leaves(resolved.values):
        arguments.answer.write(f"{key} = {value!r}   # {origin_of(key, resolved.origins)}")
    return 0


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Where a leaf was set: itself, or the nearest key above it that was."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"
