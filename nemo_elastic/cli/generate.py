"""`generate`: a nested checkpoint continues a prompt, by one budget or by one that thinks and one that answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ..problems import Problem, ProblemsError, raise_if_any
from ..verbs.generating import UNTIL, Wanted
from .arguments import folders, overrides, rather_a_folder, verb_parser
from .console import quiet_libraries

EXAMPLES = """examples:
  nemo-elastic generate runs/quickstart/nested --prompt "def main(" --budget small
  nemo-elastic generate runs/mine/nested --prompt "sum 37+58" --think small --answer full --stream
  nemo-elastic generate runs/mine/nested --prompt - --think small --think-tokens 100 --answer full --json < question.txt

special tokens are spelt in the prompt by their names; none is added to it"""
STDIN = "-"


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "a prompt continued by a budget of a nested checkpoint, or by one that thinks and one that answers"
    parser = verb_parser(subparsers, "generate", run, help, ("--budget", "--json", "--verbose"), epilog=EXAMPLES)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="what is continued; -: read from stdin")
    add("--think", metavar="NAME", help="the budget that begins, until --until or for --think-tokens")
    add("--answer", dest="answer_by", metavar="NAME", help="the budget that goes on from there, to the end")
    add("--until", metavar="TEXT", help=f"what ends the thinking (default: {UNTIL})")
    add("--think-tokens", type=int, metavar="N", help="the thinking ends after so many tokens at the latest")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="tokens in all (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default); else drawn")
    add("--top-k", type=int, metavar="N", help="draw among so many (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end in front of it (may be given again)")
    add("--stream", action="store_true", help="print the text as it comes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu, in fp32)")


def run(arguments: argparse.Namespace) -> int:
    """Answer with the text; which budget wrote how much of it goes to stderr."""
    (nested,) = folders(arguments, "NESTED")
    names = ("prompt", "budget", "think", "until", "think_tokens", "max_new_tokens", "temperature", "top_k", "seed")
    asked = {name: getattr(arguments, name) for name in names}
    asked |= {"answer": arguments.answer_by, "stop": tuple(arguments.stop)}
    wanted = Wanted(**asked)
    raise_if_any([*_own_problems(arguments), *wanted.problems()])
    quiet_libraries(arguments.verbose)
    from ..checkpoint.manifest import load_manifest

    raise_if_any(wanted.budget_problems(load_manifest(nested).subnets))
    if arguments.prompt == STDIN:
        asked["prompt"] = sys.stdin.read()
        if not asked["prompt"]:
            raise ProblemsError([Problem("--prompt", "has no tokens; give a text to continue")])
    from ..nemo import api

    heard = (lambda piece: arguments.answer.write(piece.text, end="")) if arguments.stream else None
    found = api.generate(nested, **asked, device=arguments.device, stream=heard)
    if arguments.json:
        arguments.answer.json(found.to_dict())
    else:
        arguments.answer.write("" if arguments.stream else found.text)
        for part in found.parts:
            sys.stderr.write(f"{part.budget}: {part.tokens} tokens ({part.ended})\n")
    return 0


def _own_problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    for word in overrides(arguments):
        yield Problem(word, f"cannot be set for a nested checkpoint{rather_a_folder(overrides(arguments))}")
    if arguments.json and arguments.stream:
        yield Problem("--stream", "prints text as it comes, --json one object at the end: give one of the two")
