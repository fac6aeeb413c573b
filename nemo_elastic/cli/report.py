"""`report`: one HTML page, PNG figures and CSV files of a run -> `OUT/report/`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import folders, verb_parser

EXAMPLES = """examples:
  nemo-elastic report runs/quickstart
  nemo-elastic report runs/quickstart --evaluations evaluations     # what `lm_eval --output_path evaluations` wrote

works at any moment: what a run does not have yet is named in the page"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = verb_parser(
        subparsers, "report", run, "HTML, PNG and CSV of a run -> OUT/report/", ("--json",), epilog=EXAMPLES
    )
    help = "results of lm-evaluation-harness (default: OUT/evaluations, where it exists)"
    parser.add_argument("--evaluations", type=Path, metavar="DIR", help=help)


def run(arguments: argparse.Namespace) -> int:
    """Write the report of a run folder."""
    (out,) = folders(arguments, "OUT")
    from ..report.run_folder import read_run
    from ..report.write import write_report

    page = write_report(Path(out), arguments.evaluations)
    missing = [str(problem) for problem in read_run(Path(out), arguments.evaluations).missing]
    if arguments.json:
        files = sorted(path.name for path in page.parent.iterdir() if path.suffix in (".html", ".png", ".csv"))
        arguments.answer.json({"report": str(page), "files": files, "missing": missing})
    else:
        for words in missing:
            arguments.answer.write(f"not in this run: {words}")
        arguments.answer.write(f"report: {page}")
    return 0
