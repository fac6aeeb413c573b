"""`report`: one HTML page, PNG figures and CSV files of a run -> `OUT/report/`.

    nemo-elastic report runs/tiny_parent

Works at any moment: what a run does not have yet is named in the page.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    words = {"help": "HTML, PNG and CSV of a run -> OUT/report/", "description": __doc__}
    parser = subparsers.add_parser("report", formatter_class=argparse.RawDescriptionHelpFormatter, **words)
    parser.add_argument("out", help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print the files and what is missing as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report of a run folder."""
    from ..report.run_folder import read_run
    from ..report.write import write_report

    page = write_report(Path(args.out))
    missing = [str(problem) for problem in read_run(Path(args.out)).missing]
    if args.json:
        files = sorted(path.name for path in page.parent.iterdir() if path.suffix in (".html", ".png", ".csv"))
        sys.stdout.write(json.dumps({"report": str(page), "files": files, "missing": missing}, indent=2) + "\n")
        return 0
    sys.stdout.write("".join(f"not in this run: {words}\n" for words in missing) + f"report: {page}\n")
    return 0
