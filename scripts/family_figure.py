"""Draw the map of a family (a cell per layer and child) from a finished run: the figure of the README.

python scripts/family_figure.py runs/quickstart docs/family.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_elastic.report.budget_rows import budget_rows
from nemo_elastic.report.drawing import save_png
from nemo_elastic.report.layer_figures import children
from nemo_elastic.report.run_folder import read_run


def main() -> None:
    """Read the run, write the PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with config.json and results.json")
    parser.add_argument("png", type=Path)
    words = parser.parse_args()
    run = read_run(words.run)
    save_png(children(run, budget_rows(run)), words.png)


if __name__ == "__main__":
    main()
