"""`verify --parent`: a Hugging Face parent's held-out loss here against transformers'. Exit code 1 when they differ."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..problems import Problem, ProblemsError
from .arguments import folders, overrides
from .console import progress_bar, quiet_libraries


def run_parent(arguments: argparse.Namespace) -> int:
    """Compare; 1 when the losses differ by more than 1e-4 nats, or the parameters at all."""
    folders(arguments)
    for flag in ("budget", "nproc"):
        if getattr(arguments, flag) is not None:
            raise ProblemsError([Problem(f"--{flag}", "is for children of a nested checkpoint, not for --parent")])
    quiet_libraries(arguments.verbose)
    from ..nemo import api

    python, words = arguments.hf_python, overrides(arguments)
    with progress_bar() as bar:
        check = api.verify_parent(arguments.parent, hf_python=python, overrides=words, progress=bar.update)
    if arguments.json:
        arguments.answer.json({"verified": check.ok, **asdict(check)})
    else:
        arguments.answer.write(
            f"held-out loss of {arguments.parent} over {check.tokens:,} tokens: here {check.loss:.6f}, in transformers "
            f"{check.loss_transformers:.6f}; parameters {check.parameters:,} and {check.parameters_transformers:,}"
        )
        arguments.answer.write("verification passed" if check.ok else "verification FAILED")
    return 0 if check.ok else 1
