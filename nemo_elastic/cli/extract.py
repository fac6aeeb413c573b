"""`extract`: children out of a nested checkpoint, as plain NeMo checkpoints, Hugging Face folders or GGUF files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import load_config
from ..config.sections import ExportConfig
from ..problems import Problem, ProblemsError, raise_if_any
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
    schemas = ("uniform", "list", "per_layer_config")
    parser.add_argument(
        "--hf-schema",
        choices=schemas,
        help="how a Hugging Face folder says sizes that differ per layer (default: export.hf_schema of the run)",
    )
    parser.add_argument("--subnet", metavar="YAML", help="children that `plan NESTED --output YAML` wrote")
    words = "with --format hf: the parent's folder, elastic.json, and a script that cuts any budget out of it"
    parser.add_argument("--nested", action="store_true", help=words)
    dtypes = ("bfloat16", "float32", "float16")
    words = "cast the weights (default: export.dtype of the run; float16: gguf only)"
    parser.add_argument("--dtype", choices=dtypes, help=words)


def run(arguments: argparse.Namespace) -> int:
    """Write the children; answers with their folders."""
    for word in overrides(arguments):
        if not word.startswith("export."):
            words = "cannot be set for a nested checkpoint, export.* can"
            raise ProblemsError([Problem(word, f"{words}{rather_a_folder(overrides(arguments))}")])
    (nested,) = folders(arguments, "NESTED")
    if arguments.format != "hf" and arguments.hf_schema:
        raise ProblemsError([Problem("--hf-schema", "says how a Hugging Face folder is written; add --format hf")])
    if arguments.nested and arguments.format != "hf":
        raise ProblemsError([Problem("--nested", "writes a Hugging Face folder; add --format hf")])
    if arguments.nested and (arguments.budget or arguments.all):
        raise ProblemsError([Problem("--nested", "holds every budget; leave --budget and --all out")])
    if not arguments.nested and sum(map(bool, (arguments.budget, arguments.all, arguments.subnet))) != 1:
        raise ProblemsError([Problem("--budget", "give one budget by --budget NAME, or --all, or --subnet YAML")])
    quiet_libraries(arguments.verbose)
    import torch

    from ..nemo.export.checkpoints import extract, extract_all, open_nested
    from ..plan.of_nested import with_subnets

    opened = open_nested(nested)
    if arguments.subnet:
        opened = replace(opened, manifest=with_subnets(opened.manifest, arguments.subnet))
    export = export_of(opened.manifest, arguments)
    base = Path(arguments.out) if arguments.out else Path(nested).parent / "children"
    how = {
        "format": arguments.format,
        "hf_schema": export.hf_schema,
        "dtype": getattr(torch, export.dtype) if export.dtype else None,
        "force": arguments.force,
    }
    if arguments.nested:
        return write_nested_folder(opened, how, arguments)
    with progress_bar() as bar:
        if not arguments.budget:
            targets = extract_all(
                opened, base, progress=lambda name, done, total: bar.update("extract", done, total, name), **how
            )
        else:
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


def write_nested_folder(opened: Any, how: dict[str, Any], arguments: argparse.Namespace) -> int:
    """`--nested`: one folder of all budgets."""
    from ..nemo.export.hf_nested import extract_hf_nested

    target = Path(arguments.out) if arguments.out else opened.path.parent / "hf_nested"
    extract_hf_nested(opened, target, **{name: value for name, value in how.items() if name != "format"})
    if arguments.json:
        arguments.answer.json({"format": "hf", "nested": str(target), "budgets": list(opened.manifest.subnets)})
    else:
        arguments.answer.write(f"nested: {target}")
    return 0


def export_of(manifest: Any, arguments: argparse.Namespace) -> ExportConfig:
    """The run's `export` section, with the overrides and flags of this call.

    Raises:
        ProblemsError: another word than the section knows, or a flag and an override that disagree.
    """
    stored = (manifest.provenance.get("config") or {}).get("export") or {}
    base = {"model": dict(manifest.model), "export": dict(stored)}
    given = {word.partition("=")[0] for word in overrides(arguments)}
    export = load_config(None, overrides(arguments), base=base).config.export
    flags = {name: value for name in ("dtype", "hf_schema") if (value := getattr(arguments, name)) is not None}
    raise_if_any(
        Problem(
            f"export.{name}", f"{getattr(export, name)!r} and --{name.replace('_', '-')} {value}: give one of the two"
        )
        for name, value in flags.items()
        if f"export.{name}" in given and getattr(export, name) != value
    )
    return replace(export, **flags)
