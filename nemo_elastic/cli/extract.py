"""`extract`: children out of a nested checkpoint, as plain NeMo checkpoints, Hugging Face folders or GGUF files."""

from __future__ import annotations

import argparse
from typing import Any

from ..problems import raise_if_any
from ..verbs.extracting import CHOICES, Wanted
from .arguments import folders, overrides, rather_a_folder, verb_parser
from .console import progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic extract runs/tiny/nested --budget small --out runs/tiny/children/small
  nemo-elastic extract runs/tiny/nested --subnet subnet.yaml
  nemo-elastic extract runs/tiny/nested --all --format hf --out runs/tiny/hf export.dtype=bfloat16
  nemo-elastic extract runs/tiny/nested --nested --format hf --out runs/tiny/hf_nested   # every budget in one folder
  nemo-elastic extract runs/tiny/nested --all --format gguf --out runs/tiny/gguf --dtype float16   # for llama.cpp"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "one child or all of a nested checkpoint, without any training"
    flags = ("--budget", "--all", "--format", "--out", "--force", "--json", "--verbose")
    parser = verb_parser(subparsers, "extract", run, help, flags, epilog=EXAMPLES)
    parser.add_argument(
        "--hf-schema",
        choices=CHOICES["hf_schema"],
        help="how a Hugging Face folder says sizes that differ per layer (default: export.hf_schema of the run)",
    )
    parser.add_argument("--subnet", metavar="YAML", help="children that `plan NESTED --output YAML` wrote")
    words = "with --format hf: the parent's folder, elastic.json, and a script that cuts any budget out of it"
    parser.add_argument("--nested", action="store_true", help=words)
    words = "cast the weights (default: export.dtype of the run; float16: gguf only)"
    parser.add_argument("--dtype", choices=CHOICES["dtype"], help=words)


def run(arguments: argparse.Namespace) -> int:
    """Write the children; answers with their folders."""
    names = ("budget", "all", "subnet", "nested", "format", "hf_schema", "dtype")
    wanted = Wanted(
        **{name: getattr(arguments, name) for name in names},
        overrides=tuple(overrides(arguments)),
        hint=rather_a_folder(overrides(arguments)),
    )
    found = list(wanted.problems())
    raise_if_any(problem for problem in found if problem.key in wanted.overrides)
    (nested,) = folders(arguments, "NESTED")
    raise_if_any(found)
    quiet_libraries(arguments.verbose)
    from ..nemo.api.children import extract_wanted

    with progress_bar() as bar:
        done = extract_wanted(nested, arguments.out, wanted, force=arguments.force, progress=bar.update)
    written = {name: str(folder) for name, folder in done.folders.items()}
    if arguments.nested:
        (target,) = set(written.values())
        if arguments.json:
            arguments.answer.json({"format": "hf", "nested": target, "budgets": list(written)})
        else:
            arguments.answer.write(f"nested: {target}")
    elif arguments.json:
        arguments.answer.json({"format": arguments.format, "children": written})
    else:
        for name, folder in written.items():
            arguments.answer.write(f"{name}: {folder}")
    return 0
