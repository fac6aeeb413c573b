"""`plan PARENT`: whether a parent is supported, and what a family of it could be.

The verdict is one: a plan, or the reason why there is none. The plan is that of the configuration that
`config --from PARENT` writes. Where the weights are there, they are counted in their headers. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.parent_files import BUILTIN, folder_of
from ..config.stored_rows import stored_parameters
from ..processes.run_parts import MARKS
from .of_run import plan
from .starting import starting_run


def is_parent(path: str) -> bool:
    """Whether `path` is a parent's folder (or `builtin:NAME`), and neither a nested checkpoint nor a run's folder."""
    if path.startswith(BUILTIN):
        return True
    folder = Path(path).expanduser()
    described = (folder / "config.json").is_file() or (folder / "context").is_dir()
    other = (folder / "elastic" / "manifest.json").is_file() or any((folder / name).is_dir() for name in MARKS)
    return described and not other


def plan_parent(path: str) -> dict[str, Any]:
    """The plan of a parent as plain values, with `supported: true` and, where weights are there, `stored_parameters`.

    Raises:
        ProblemsError: it is not supported, and why.
    """
    result = plan(starting_run(path))
    counted, stored = result["parent"]["parameters"], stored_parameters(folder_of(path))
    words = ["supported"]
    if stored is not None:
        result["stored_parameters"] = stored
        other = "as counted" if stored == counted else f"{stored - counted:+,} against the {counted:,} of the model"
        words.append(f"its files hold {stored:,} parameters, {other}")
    words.append(f"`nemo-elastic config --from {path} > mine.yaml` writes the configuration of this plan")
    return result | {"supported": not result["problems"], "notes": ["; ".join(words), *result["notes"]]}
