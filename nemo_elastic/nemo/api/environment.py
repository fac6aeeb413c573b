"""Which process of a run this is, asked before anything is loaded; only the first one speaks."""

import os

from nemo_elastic.problems import raise_if_any
from nemo_elastic.processes.launchers import launcher_problems, started_processes
from nemo_elastic.processes.progress import Progress, silent


def own_processes() -> int:
    """Processes of this run: those that torchrun started, or 1.

    Raises:
        ProblemsError: half of a launcher's variables, so that nobody can tell.
    """
    raise_if_any(launcher_problems(os.environ))
    return started_processes()


def on_first(progress: Progress | None) -> Progress:
    """Who is told how far a run is: the given one in the first process, nobody in the others."""
    return silent if progress is None or os.environ.get("RANK", "0") != "0" else progress
