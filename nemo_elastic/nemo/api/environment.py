"""Which process of a run this is, asked before anything is loaded."""

import os

from nemo_elastic.problems import raise_if_any
from nemo_elastic.processes.launchers import launcher_problems, started_processes


def own_processes() -> int:
    """Processes of this run: those that torchrun started, or 1.

    Raises:
        ProblemsError: half of a launcher's variables, so that nobody can tell.
    """
    raise_if_any(launcher_problems(os.environ))
    return started_processes()
