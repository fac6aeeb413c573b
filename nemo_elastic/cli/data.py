"""`data`: what training will read, before a GPU-hour is spent: sources, lengths, epochs, and the first samples."""

from __future__ import annotations

import argparse
from typing import Any

from ..problems import raise_if_any
from .arguments import configuration, folders, verb_parser

EXAMPLES = """examples:
  nemo-elastic data --config conf/tiny_parent.yaml
  nemo-elastic data --config mine.yaml --samples 5 data.blend='[{path: chat.jsonl}, {path: books/, weight: 3}]'
  nemo-elastic data --config mine.yaml --documents 0 --json

text without loss stands between ⟨ and ⟩ (dim on a terminal)"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "what training will read: tokens, lengths, epochs of every source, and the first samples with their loss"
    parser = verb_parser(subparsers, "data", run, help, ("--config", "--json"), epilog=EXAMPLES)
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="first samples to show (default: 2)")
    words = "documents of each source to tokenize at most (default: 20,000, and 4 M tokens; 0: all of them)"
    parser.add_argument("--documents", type=int, default=None, metavar="N", help=words)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    folders(arguments)
    from ..verbs.reading import count_problems, read_ahead

    raise_if_any(count_problems(arguments.samples, arguments.documents))
    found = read_ahead(configuration(arguments), samples=arguments.samples, documents=arguments.documents)
    if arguments.json:
        arguments.answer.json(found)
    else:
        from .data_table import data_tables

        arguments.answer.render(*data_tables(found))
    return 0
