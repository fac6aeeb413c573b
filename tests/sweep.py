"""Which cases of exhaustive products run: a sample of each, drawn by the commit, or all.

A case marked `sweep(n)` is one of many that prove the same thing (every layout x every kind of loss, say). `pytest`
draws n of each test's cases by a seed and leaves the others out; `--sweep all` (`make test-sweep`) runs them all. The
seed is the commit's hash, so that each commit runs the same cases everywhere and the next one others; the header of a
run says it, and `--sweep-seed` gives it by hand.
"""

from __future__ import annotations

import random
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scripts/test_engine.py draws too, before there is a pytest
    import pytest


def add_options(parser: pytest.Parser) -> None:
    """`--sweep` and `--sweep-seed`."""
    group = parser.getgroup("nemo_elastic")
    group.addoption("--sweep", choices=("sample", "all"), default="sample", help="a seeded sample of sweeps, or all")
    group.addoption("--sweep-seed", default=None, help="what the sample is drawn by (default: the commit's hash)")


def seed_of(config: pytest.Config) -> str:
    """The given seed, else the commit's hash."""
    given = config.getoption("--sweep-seed")
    return commit() if given is None else given


def commit() -> str:
    """HEAD's hash, 0 where there is no repository or no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "0"


def drawn(cases: dict[str, list[str]], counts: dict[str, int], seed: str) -> set[str]:
    """Of every test's cases, as many as its count says; a pure function of the names and the seed."""
    return {
        case
        for test, names in cases.items()
        for case in random.Random(f"{seed}:{test}").sample(sorted(names), min(counts[test], len(names)))
    }


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the cases that were not drawn out of `items`; nothing with `--sweep all`."""
    if config.getoption("--sweep") == "all":
        return
    cases: dict[str, list[str]] = defaultdict(list)
    counts: dict[str, int] = {}
    for item in items:
        for mark in item.iter_markers("sweep"):
            test = item.nodeid.partition("[")[0]
            cases[test].append(item.nodeid)
            counts[test] = mark.args[0]
    kept = drawn(cases, counts, seed_of(config))
    swept = {name for names in cases.values() for name in names}
    left_out = [item for item in items if item.nodeid in swept - kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in swept - kept]
