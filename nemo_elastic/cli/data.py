"""`data`: what training will read, before a GPU-hour is spent: sources, lengths, epochs, and the first samples."""

from __future__ import annotations

import argparse
from typing import Any

from ..problems import Problem, ProblemsError, raise_if_any
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
    given = {"--samples": arguments.samples, "--documents": arguments.documents or 0}
    raise_if_any([Problem(name, f"{value} must be at least 0") for name, value in given.items() if value < 0])
    config = configuration(arguments).config
    from ..data.entries import entry_problems
    from ..data.of_run import text_tokenizer
    from ..data.preview import LIMIT, preview

    raise_if_any(entry_problems(config.data))
    limit = LIMIT if arguments.documents is None else arguments.documents
    try:
        found = preview(config, text_tokenizer(config), limit=limit, samples=arguments.samples)
    except ProblemsError:
        raise
    except ValueError as error:
        raise ProblemsError(
            [Problem("data", str(error).removeprefix("data.paths: ").removeprefix("data: "))]
        ) from error
    if arguments.json:
        arguments.answer.json(found)
    else:
        from .data_table import data_tables

        arguments.answer.render(*data_tables(found))
    return 0
