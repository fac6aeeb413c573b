"""`sort`: the parent with its units in order of importance -> `OUT/sorted/`. Its function does not change.

    nemo-elastic sort --config conf/tiny_parent.yaml

Reads `OUT/importance/`; streams, so that a parent of any size passes through the memory of a few tensors.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = "sorted"


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    words = {"help": "the parent sorted by importance -> OUT/sorted/", "description": __doc__}
    parser = subparsers.add_parser("sort", formatter_class=argparse.RawDescriptionHelpFormatter, **words)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a shipped one")
    parser.add_argument("--out", help="folder of the run (default: runs/<name>)")
    parser.add_argument("--force", action="store_true", help="replace OUT/sorted when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sort as `OUT/importance/` says."""
    from ..config.load import load_config

    config = load_config(args.config, args.overrides).config
    folder = sort_run(config, Path(args.out or f"runs/{config.name}"), force=args.force)
    result = {"sorted": str(folder)}
    sys.stdout.write((json.dumps(result, indent=2) if args.json else f"sorted parent: {folder}") + "\n")
    return 0


def sort_run(config: Any, out: Path, *, force: bool = False) -> Path:
    """Write `out/sorted/` of a `RunConfig`'s parent from `out/importance/`; returns it.

    Raises:
        ProblemsError: no scores, scores of another parent, or a folder that exists (without `force`).
    """
    from ..family import family_of
    from ..importance.store import Importance
    from ..mcore import cpu
    from ..mcore.parents import open_parent, write_sorted

    cpu.install()
    family = family_of(config)
    importance = Importance.load(out / "importance", family.architecture)
    reader = open_parent(config.parent.path, family.layout)
    return write_sorted(out / FOLDER, reader, family.layout, importance, source=config.parent.path, force=force)
