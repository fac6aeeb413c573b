"""`verify`: extracted children against their nested subnets, on real text. Exit code 1 when one differs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from .arguments import folders, overrides, restart_under_torchrun, verb_parser
from .console import is_first_rank, progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic verify runs/tiny/nested                                  # all of runs/tiny/children
  nemo-elastic verify runs/tiny/nested runs/tiny/children/small
  nemo-elastic verify runs/tiny/nested --nproc 2 train.tensor_model_parallel_size=2"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "child against nested subnet on real text: logits, loss, size, hashes"
    flags = ("--budget", "--nproc", "--json", "--verbose")
    verb_parser(subparsers, "verify", run, help, flags, epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 when something differs."""
    nested, *child = folders(arguments, "NESTED", "CHILD", optional=1)
    restart_under_torchrun(arguments)
    quiet_libraries(arguments.verbose)
    from ..checkpoint.manifest import load_manifest
    from ..config import load_config
    from ..nemo.train import data_module, heldout_batches
    from ..nemo.verify import verify

    manifest = load_manifest(nested)
    stored = dict(manifest.provenance.get("config") or {})
    if not stored:
        raise ProblemsError([Problem(nested, "its manifest holds no run configuration; it was not made by `train`")])
    run_config = load_config(None, overrides(arguments), base=stored).config
    children = _children(Path(nested), child, arguments.budget, list(manifest.subnets))
    batches = heldout_batches(data_module(run_config), run_config)
    with progress_bar() as bar:
        checks = verify(nested, children, run_config, batches, report=bar.update)
    passed = all(check.ok for check in checks)
    if arguments.json:
        arguments.answer.json({"verified": passed, "children": [check.to_dict() for check in checks]})
    elif is_first_rank():
        arguments.answer.render(_table(checks))
        arguments.answer.write("verification passed" if passed else "verification FAILED")
    return 0 if passed else 1


def _children(nested: Path, child: list[str], budget: str | None, known: list[str]) -> dict[str, Path]:
    """budget -> folder."""
    if child:
        name = budget or Path(child[0]).name
        if name not in known:
            words = f"{name!r} is no budget of this family ({', '.join(known)}); name it with --budget"
            raise ProblemsError([Problem("--budget", words)])
        return {name: Path(child[0])}
    base = nested.parent / "children"
    names = [budget] if budget else [n for n in known if (base / n).is_dir()]
    if not names:
        words = f"no children at {base}; run `nemo-elastic extract {nested} --all`, or name a child's folder"
        raise ProblemsError([Problem("CHILD", words)])
    return {name: base / name for name in names}


def _table(checks: list[Any]) -> Any:
    from rich.table import Table

    table = Table()
    for heading in ("budget", "parameters", "loss nested", "loss child", "max |diff|", "relative", "KL", "top-1", ""):
        table.add_column(heading, justify="left" if heading in ("budget", "") else "right")
    for c in checks:
        d = c.comparison
        table.add_row(
            c.budget, f"{c.numel:,}", f"{c.loss_nested:.6f}", f"{c.loss_child:.6f}", f"{d.max_abs:.1e}",
            f"{d.relative:.1e}", f"{d.kl:.1e}", f"{d.top1_agreement:.4f}", "same" if c.ok else "DIFFERS",
        )  # fmt: skip
    return table
