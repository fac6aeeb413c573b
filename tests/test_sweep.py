"""The sample of a sweep: as many as asked, the same for the same seed, others for another, everything in the end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import sweep

HERE = Path(__file__).resolve().parent
CASES = {"a": [f"a[{i}]" for i in range(30)], "b": [f"b[{i}]" for i in range(4)]}
COUNTS = {"a": 6, "b": 9}
SAMPLE = """
import pytest

@pytest.mark.parametrize("i", [0, *(pytest.param(i, marks=pytest.mark.sweep(3)) for i in range(1, 20))])
def test_one(i):
    pass
"""


def test_a_sample_has_the_asked_size() -> None:
    found = sweep.drawn(CASES, COUNTS, "seed")
    assert len([name for name in found if name.startswith("a")]) == 6
    assert {name for name in found if name.startswith("b")} == set(CASES["b"])


def test_a_sample_is_a_function_of_its_seed() -> None:
    again = {test: list(reversed(names)) for test, names in CASES.items()}
    assert sweep.drawn(CASES, COUNTS, "seed") == sweep.drawn(again, COUNTS, "seed")
    samples = [sweep.drawn(CASES, COUNTS, str(seed)) for seed in range(40)]
    assert len({frozenset(sample) for sample in samples}) > 30
    assert set().union(*samples) == {*CASES["a"], *CASES["b"]}  # nothing is never drawn


@pytest.mark.parametrize(("words", "count"), [(["--sweep-seed", "x"], 4), (["--sweep", "all"], 20)])
def test_pytest_runs_what_was_drawn(words: list[str], count: int, tmp_path: Path) -> None:
    """Cases that carry no mark always run."""
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {HERE}\nmarkers = sweep(n): drawn\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *words,
        "test_sample.py",
    ]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert re.search(rf"\b{count} passed", shown), shown
