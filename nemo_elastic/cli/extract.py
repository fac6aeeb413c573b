"""`extract`: children out of a nested checkpoint, as plain NeMo checkpoints, Hugging Face folders or GGUF files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from .arguments import folders, overrides, verb_parser
from .console import progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic extract runs/tiny/nested --budget small --out runs/tiny/children/small
  nemo-elastic extract runs/tiny/nested --subnet subnet.yaml
  nemo-elastic extract runs/tiny/nested --all --format hf --out runs/tiny/hf
  nemo-elastic extract runs/tiny/nested --all --format gguf --out runs/tiny/gguf --dtype float16   # for llama.cpp"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "one child or all of a nested checkpoint, without any training"
    flags = ("--budget", "--all", "--format", "--out", "--force", "--json", "--verbose")
    parser = verb_parser(subparsers, "extract", run, help, flags, epilog=EXAMPLES)
    schemas = ("uniform", "list", "per_layer_config")
    parser.add_argument(
        "--hf-schema",
        choices=schemas,
        default="uniform",
        help="how a Hugging Face folder says sizes that differ per layer (default: pad with zeros, without loss)",
    )
    parser.add_argument("--subnet", metavar="YAML", help="children that `plan NESTED --output YAML` wrote")
    dtypes = ("bfloat16", "float32", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="cast the weights (default: as stored; float16: gguf only)")


def run(arguments: argparse.Namespace) -> int:
    """Write the children; answers with their folders."""
    (nested,) = folders(arguments, "NESTED")
    if overrides(arguments):
        raise ProblemsError([Problem(overrides(arguments)[0], "extract reads everything from the nested checkpoint")])
    if sum(map(bool, (arguments.budget, arguments.all, arguments.subnet))) != 1:
        raise ProblemsError([Problem("--budget", "give one budget by --budget NAME, or --all, or --subnet YAML")])
    quiet_libraries(arguments.verbose)
    import torch

    from ..nemo.checkpoints import extract, extract_all, open_nested
    from ..nested_plan import with_subnets

    opened = open_nested(nested)
    if arguments.subnet:
        opened = replace(opened, manifest=with_subnets(opened.manifest, arguments.subnet))
    base = Path(arguments.out) if arguments.out else Path(nested).parent / "children"
    how = {
        "format": arguments.format,
        "hf_schema": arguments.hf_schema,
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
        "force": arguments.force,
    }
    with progress_bar() as bar:
        if not arguments.budget:
            targets = extract_all(
                opened, base, progress=lambda name, done, total: bar.update("extract", done, total, name), **how
            )
        else:
            bar.update("extract", 0, 1, arguments.budget)
            target = base if arguments.out else base / arguments.budget
            targets = {arguments.budget: extract(opened, arguments.budget, target, **how)}
        bar.update("extract", len(targets), len(targets))
    written = {name: str(target) for name, target in targets.items()}
    if arguments.json:
        arguments.answer.json({"format": arguments.format, "children": written})
    else:
        for name, target in written.items():
            arguments.answer.write(f"{name}: {target}")
    return 0
