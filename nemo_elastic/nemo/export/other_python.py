"""Scripts of this package that run in the Python of another venv, as processes of their own; only files travel.

NeMo's pins exclude some references (transformers 5), and others need nothing of ours (llama.cpp).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_elastic.problems import Problem, ProblemsError


def python_that(key: str, given: str | None, check: str, *, lacks: str, remedy: str) -> str:
    """The Python to ask: `given`, or this one.

    Args:
        key: the flag that names it.
        check: code that leaves with 0 in a Python that will do.
        lacks: what is said of this Python when it will not do; `remedy` of any.

    Raises:
        ProblemsError: it is no program, or no such Python.
    """
    python = shutil.which(sys.executable if given is None else given)
    if python is None:
        raise ProblemsError([Problem(key, f"{given!r} is no program; {remedy}")])
    try:
        knows = subprocess.run([python, "-I", "-c", check], env=_environment({}), capture_output=True).returncode == 0
    except OSError:  # a file that may be executed and cannot
        knows = False
    if knows:
        return python
    words = f"is not given, and this Python{lacks}" if given is None else f"{given!r} is no such Python"
    raise ProblemsError([Problem(key, f"{words}; {remedy}")])


def run_script(key: str, python: str, script: str, arguments: list[Path], more: Mapping[str, str], what: str) -> None:
    """Run `script` there, with the environment `more`; `what` it runs is named when it fails.

    Raises:
        ProblemsError: with the last line that it said.
    """
    command = [python, "-I", script, *map(str, arguments)]
    done = subprocess.run(command, env=_environment(more), capture_output=True, text=True)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"code {done.returncode}")
        raise ProblemsError([Problem(key, f"{python} could not run {what}: {last[:300]}")])


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | dict(more) | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
