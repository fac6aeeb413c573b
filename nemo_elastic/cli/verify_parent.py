"""`verify --parent`: a Hugging Face parent's held-out loss here against transformers'. Exit code 1 when they differ."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..problems import Problem, ProblemsError
from .arguments import folders, overrides
from .console import quiet_libraries

# What text is held out and how it is cut, where the command line does not say.
DEFAULTS = (
    "train.stages=[{steps: 1, seq_length: 256, global_batch_size: 4}]",
    "train.micro_batch_size=2",
    "train.val_samples=8",
)


def run_parent(arguments: argparse.Namespace) -> int:
    """Compare; 1 when the losses differ by more than 1e-4 nats, or the parameters at all."""
    folders(arguments)
    for flag in ("budget", "nproc"):
        if getattr(arguments, flag) is not None:
            raise ProblemsError([Problem(f"--{flag}", "is for children of a nested checkpoint, not for --parent")])
    quiet_libraries(arguments.verbose)
    from ..config import load_config

    path = arguments.parent.replace("'", "''")  # a YAML word
    config = load_config(None, [f"parent.path='{path}'", *DEFAULTS, *overrides(arguments)]).config
    from ..data.of_run import check_text
    from ..nemo.export.verify_parent import verify_parent
    from ..nemo.run.train import data_module, heldout_batches

    check_text(config, trains=False)
    check = verify_parent(config, heldout_batches(data_module(config), config), arguments.hf_python)
    if arguments.json:
        arguments.answer.json({"verified": check.ok, **asdict(check)})
    else:
        arguments.answer.write(
            f"held-out loss of {arguments.parent} over {check.tokens:,} tokens: here {check.loss:.6f}, in transformers "
            f"{check.loss_transformers:.6f}; parameters {check.parameters:,} and {check.parameters_transformers:,}"
        )
        arguments.answer.write("verification passed" if check.ok else "verification FAILED")
    return 0 if check.ok else 1
