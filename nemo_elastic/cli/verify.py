"""`verify`: extracted children against their nested subnets, on real text. Exit code 1 when one differs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .arguments import folders, overrides, start_workers, verb_parser
from .console import is_first_rank, progress_bar, quiet_libraries, show_problems

EXAMPLES = """examples:
  nemo-elastic verify runs/tiny/nested                                  # all of runs/tiny/children
  nemo-elastic verify runs/tiny/nested runs/tiny/children/small
  nemo-elastic verify runs/tiny/nested --format hf --hf-python .venv-hf/bin/python   # make setup-hf
  nemo-elastic verify runs/tiny/nested --format gguf --gguf-python .venv-gguf/bin/python   # make setup-gguf
  nemo-elastic verify --parent /models/mine --hf-python .venv-hf/bin/python      # before anything is trained
  nemo-elastic verify runs/tiny/nested --nproc 2 train.tensor_model_parallel_size=2"""

READ = {"hf": "the first two micro-batches", "gguf": "the first row"}  # of what the other engine is asked for


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
    quiet_libraries(arguments.verbose)
    from ..checkpoint.manifest import HashMismatch
    from ..nemo.api.checks import Verification
    from ..processes.launchers import started_processes

    ready = Verification.of(
        nested,
        child[0] if child else None,
        processes=started_processes() if arguments.nproc is None else arguments.nproc,
        budget=arguments.budget,
        format=arguments.format,
        hf_python=arguments.hf_python,
        gguf_python=arguments.gguf_python,
        overrides=overrides(arguments),
    )
    start_workers(arguments)
    try:
        with progress_bar() as bar:
            found = ready.run(bar.update)
    except HashMismatch as error:
        show_problems(error, verb="verify")
        return 1
    checks = found.checks
    if arguments.json:
        answer = {
            "verified": found.ok,
            "kernels": found.kernels,
            "children": [check.to_dict() for check in checks],
        }
        pairs = [asdict(pair) for pair in found.pairs]
        arguments.answer.json({**answer, "files_hashed": found.files_hashed, "pairs": pairs})
    elif is_first_rank():
        arguments.answer.render(_table(checks))
        for check in checks:
            if check.greedy is not None:
                arguments.answer.write(f"{check.budget}: {check.greedy:.0%} of the prompts continued alike, greedily")
            if check.difference:
                arguments.answer.write(f"{check.budget}: first difference: {check.difference}")
        arguments.answer.write(f"compared with {found.kernels}")
        if part := READ.get(arguments.format):
            arguments.answer.write(f"losses are of {part} of the held-out text, not of all of it as those of `train`")
        arguments.answer.write(f"{found.files_hashed} files of {nested}: SHA-256 as in the manifest")
        for pair in found.pairs:
            words = "is nested in" if pair.nested else "has units or layers that are not in"
            arguments.answer.write(f"{pair.smaller} {words} {pair.larger}")
        if not all(pair.nested for pair in found.pairs):
            arguments.answer.write("(each budget's shape was chosen on its own; all are cut from the same weights)")
        arguments.answer.write("verification passed" if found.ok else "verification FAILED")
    return 0 if found.ok else 1


def _table(checks: Sequence[Any]) -> Any:
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
