"""`verify`: extracted children against their nested subnets, on real text. Exit code 1 when one differs."""

from __future__ import annotations

import argparse
import os
from itertools import combinations
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from .arguments import folders, overrides, start_workers, verb_parser
from .console import is_first_rank, progress_bar, quiet_libraries, show_problems

EXAMPLES = """examples:
  nemo-elastic verify runs/tiny/nested                                  # all of runs/tiny/children
  nemo-elastic verify runs/tiny/nested runs/tiny/children/small
  nemo-elastic verify runs/tiny/nested --format hf --hf-python .venv-hf/bin/python   # make setup-hf
  nemo-elastic verify runs/tiny/nested --format gguf --gguf-python .venv-gguf/bin/python   # make setup-gguf
  nemo-elastic verify --parent /models/mine --hf-python .venv-hf/bin/python      # before anything is trained
  nemo-elastic verify runs/tiny/nested --nproc 2 train.tensor_model_parallel_size=2"""

HOLDS = {"nemo": "weights", "hf": "config.json", "gguf": "model.gguf"}  # what a child's folder has


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "child against nested subnet on real text: tensors, logits, loss, size, hashes"
    flags = ("--budget", "--format", "--hf-python", "--gguf-python", "--nproc", "--json", "--verbose")
    parser = verb_parser(subparsers, "verify", run, help, flags, epilog=EXAMPLES)
    words = "instead: a Hugging Face parent's held-out loss here against transformers' (data.paths=[...]: your text)"
    parser.add_argument("--parent", metavar="PARENT", help=words)


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 when something differs."""
    if arguments.parent is not None:
        from .verify_parent import run_parent

        return run_parent(arguments)
    nested, *child = folders(arguments, "NESTED", "CHILD", optional=1)
    if arguments.hf_python and arguments.format != "hf":
        raise ProblemsError([Problem("--hf-python", "runs children of --format hf; add that, or leave it out")])
    if arguments.gguf_python and arguments.format != "gguf":
        raise ProblemsError([Problem("--gguf-python", "runs children of --format gguf; add that, or leave it out")])
    quiet_libraries(arguments.verbose)
    from ..checkpoint.manifest import HashMismatch, load_manifest
    from ..config import load_config

    manifest = load_manifest(nested)
    stored = dict(manifest.provenance.get("config") or {})
    if not stored:
        raise ProblemsError([Problem(nested, "its manifest holds no run configuration; it was not made by `train`")])
    run_config = load_config(None, overrides(arguments), base=_with_own_tokenizer(stored, Path(nested))).config
    children = _children(Path(nested), child, arguments.budget, list(manifest.subnets), arguments.format)
    from ..mcore.family.checks import check_processes
    from ..processes.launchers import started_processes

    processes = started_processes() if arguments.nproc is None else arguments.nproc
    check_processes(run_config, processes, trains=False)
    start_workers(arguments)
    from ..nemo.export.results import note_verified  # NeMo takes seconds, and says things: not for bad input
    from ..nemo.export.verify import KERNELS, verify
    from ..nemo.run.train import data_module, heldout_batches

    batches = heldout_batches(data_module(run_config), run_config)
    python = arguments.gguf_python if arguments.format == "gguf" else arguments.hf_python
    how = {"format": arguments.format, "python": python}
    try:
        with progress_bar() as bar:
            checks = verify(nested, children, run_config, batches, report=bar.update, **how)
    except HashMismatch as error:
        show_problems(error, verb="verify")
        return 1
    if arguments.format == "nemo" and is_first_rank() and _is_run(Path(nested)):
        note_verified(Path(nested).parent, run_config, Path(nested), checks)
    passed, pairs = all(check.ok for check in checks), _pairs(manifest)
    if arguments.json:
        answer = {
            "verified": passed,
            "kernels": KERNELS[arguments.format],
            "children": [check.to_dict() for check in checks],
        }
        arguments.answer.json({**answer, "files_hashed": len(manifest.files), "pairs": pairs})
    elif is_first_rank():
        arguments.answer.render(_table(checks))
        for check in checks:
            if check.greedy is not None:
                arguments.answer.write(f"{check.budget}: {check.greedy:.0%} of the prompts continued alike, greedily")
            if check.difference:
                arguments.answer.write(f"{check.budget}: first difference: {check.difference}")
        arguments.answer.write(f"compared with {KERNELS[arguments.format]}")
        arguments.answer.write(f"{len(manifest.files)} files of {nested}: SHA-256 as in the manifest")
        for pair in pairs:
            words = "nested in" if pair["nested"] else "NOT nested in"
            arguments.answer.write(f"{pair['smaller']} is {words} {pair['larger']}")
        arguments.answer.write("verification passed" if passed else "verification FAILED")
    return 0 if passed else 1


def _with_own_tokenizer(stored: dict[str, Any], nested: Path) -> dict[str, Any]:
    """The run's configuration with the tokenizer that travels in `context/`: the parent may have moved."""
    found = sorted((nested / "context").rglob("tokenizer.json"))
    return {**stored, "data": {**stored.get("data", {}), "tokenizer": str(found[0])}} if found else stored


def _is_run(nested: Path) -> bool:
    """Whether the folder around a nested checkpoint is the run that made it, and may be written in."""
    return (nested.parent / "config.json").is_file() and os.access(nested.parent, os.W_OK)


def _pairs(manifest: Any) -> list[dict[str, Any]]:
    """Every two budgets: whether each unit and layer of the smaller one is in the larger one."""
    from ..cost.counts import parameters

    by_size = sorted(manifest.subnets, key=lambda name: parameters(manifest.layout, manifest.subnets[name]))
    return [
        {"smaller": a, "larger": b, "nested": manifest.subnets[a].is_nested_in(manifest.subnets[b])}
        for a, b in combinations(by_size, 2)
    ]


def _children(nested: Path, child: list[str], budget: str | None, known: list[str], format: str) -> dict[str, Path]:
    """budget -> folder."""
    if child:
        name = budget or Path(child[0]).name
        if name not in known:
            words = f"{name!r} is no budget of this family ({', '.join(known)}); name it with --budget"
            raise ProblemsError([Problem("--budget", words)])
        return {name: Path(child[0])}
    base, holds = nested.parent / "children", HOLDS[format]
    if format != "nemo" and (nested.parent / format).is_dir():
        base = nested.parent / format
    names = [budget] if budget else [n for n in known if (base / n / holds).exists()]
    if not names:
        words = f"no children of format {format} at {base}; run `nemo-elastic extract {nested} --all --format {format}`"
        words += ", or name a child's folder"
        raise ProblemsError([Problem("CHILD", words)])
    return {name: base / name for name in names}


def _table(checks: list[Any]) -> Any:
    from rich.table import Table

    table = Table()
    for heading in (
        "budget",
        "cost",
        "numel",
        "loss nested",
        "loss child",
        "max |diff|",
        "relative",
        "KL",
        "top-1",
        "",
    ):
        table.add_column(heading, justify="left" if heading in ("budget", "") else "right")
    for c in checks:
        d = c.comparison
        table.add_row(
            c.budget, f"{c.parameters:,}", f"{c.numel:,}", f"{c.loss_nested:.6f}", f"{c.loss_child:.6f}",
            f"{d.max_abs:.1e}", f"{d.relative:.1e}", f"{d.kl:.1e}", f"{d.top1_agreement:.4f}",
            "same" if c.ok else "DIFFERS",
        )  # fmt: skip
    return table
