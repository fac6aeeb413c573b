"""`generate`: a nested checkpoint continues a prompt, by one budget or by one that thinks and one that answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ..problems import Problem, ProblemsError, did_you_mean, raise_if_any
from .arguments import folders, overrides, rather_a_folder, verb_parser
from .console import quiet_libraries

EXAMPLES = """examples:
  nemo-elastic generate runs/quickstart/nested --prompt "def main(" --budget small
  nemo-elastic generate runs/mine/nested --prompt "sum 37+58" --think small --answer full --stream
  nemo-elastic generate runs/mine/nested --prompt - --think small --think-tokens 100 --answer full --json < question.txt

special tokens are spelt in the prompt by their names; none is added to it"""
UNTIL, STDIN = "</think>", "-"


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
    raise_if_any(_flag_problems(arguments))
    quiet_libraries(arguments.verbose)
    from ..checkpoint.manifest import load_manifest

    raise_if_any(_budget_problems(arguments, load_manifest(nested).subnets))
    prompt = sys.stdin.read() if arguments.prompt == STDIN else arguments.prompt
    import torch

    from ..data.tokenizer import BPETokenizer
    from ..serving import ElasticFamily, Phase, Request, complete, think_then_answer

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ProblemsError([Problem("--device", "cuda: torch sees no GPU here; leave it out to run on the CPU")])
    dtype = torch.float32 if arguments.device == "cpu" else None
    family = ElasticFamily.load(nested, device=arguments.device, dtype=dtype)
    if family.tokenizer is None:
        raise ProblemsError([Problem(nested, "has no tokenizer in context/; write it again with `nest`")])
    tokenizer = BPETokenizer(family.tokenizer)
    if arguments.budget:
        phases: tuple[Phase, ...] = (Phase(budget=arguments.budget),)
    else:
        until = UNTIL if arguments.until is None else arguments.until
        phases = think_then_answer(arguments.think, arguments.answer_by, until=until, max_tokens=arguments.think_tokens)
    ids = tokenizer.encode_markers(prompt)
    if not ids:
        raise ProblemsError([Problem("--prompt", "has no tokens; give a text to continue")])
    request = Request(
        prompt=ids,
        phases=phases,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=(tokenizer.eod, *arguments.stop),
    )
    heard = (lambda piece: arguments.answer.write(piece.text, end="")) if arguments.stream else None
    (found,) = complete(family, [request], stream=heard, compact=True)
    if arguments.json:
        arguments.answer.json(found.to_dict())
    else:
        arguments.answer.write("" if arguments.stream else found.text)
        for part in found.parts:
            sys.stderr.write(f"{part.budget}: {part.tokens} tokens ({part.ended})\n")
    return 0


def _flag_problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    for word in overrides(arguments):
        yield Problem(word, f"cannot be set for a nested checkpoint{rather_a_folder(overrides(arguments))}")
    if not arguments.prompt:
        yield Problem("--prompt", "give the text to continue, or - to read it from stdin")
    if bool(arguments.budget) == bool(arguments.think or arguments.answer_by):
        yield Problem("--budget", "give one budget by --budget NAME, or two by --think NAME --answer NAME")
    elif not arguments.budget and not (arguments.think and arguments.answer_by):
        lacks = "--answer" if arguments.think else "--think"
        yield Problem(lacks, "give both --think NAME and --answer NAME, or one budget by --budget NAME")
    for flag in ("until", "think_tokens"):
        if arguments.budget and getattr(arguments, flag) is not None:
            yield Problem(f"--{flag.replace('_', '-')}", "says where thinking ends; add --think and --answer")
    for flag in ("think_tokens", "max_new_tokens", "top_k"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            yield Problem(f"--{flag.replace('_', '-')}", f"{value} must be at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        yield Problem("--temperature", f"{arguments.temperature} must be at least 0")
    if not -(2**63) <= arguments.seed < 2**64:
        yield Problem("--seed", f"{arguments.seed} must be a number of 64 bits")
    if arguments.until == "" or "" in arguments.stop:
        yield Problem("--until" if arguments.until == "" else "--stop", "'' is in every text; give one that is not")
    if arguments.json and arguments.stream:
        yield Problem("--stream", "prints text as it comes, --json one object at the end: give one of the two")


def _budget_problems(arguments: argparse.Namespace, known: Any) -> Iterator[Problem]:
    given = {"budget": arguments.budget, "think": arguments.think, "answer": arguments.answer_by}
    for flag, name in given.items():
        if name and name not in known:
            yield Problem(f"--{flag}", f"{name!r} is not in this family{did_you_mean(name, known)}")
