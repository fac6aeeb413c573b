"""Run the tests that touch Megatron under another line of megatron-core than the one that constraints.txt pins.

    python3 scripts/test_engine.py [--line 0.15] [--smoke] [pytest arguments]

- 0.15, the older line that is supported: a venv on top of `.venv` that differs in the pins of constraints-0.15.txt.
  Every test file that comes to `mcore/`, directly or through a module beside it, quick and slow (a quickstart is among
  the slow ones); and children that go from one line to the other (tests/test_other_line.py).
- 0.19, a look ahead: a venv of its own without NeMo, which has no version for this line, and with Python 3.12, which
  the line asks for. The tests of `mcore/elastic` and of the door, `mcore/versions.py`.

`--smoke` is what CI runs: of the quick tests a few files that are always the same, and two drawn by the commit.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# What a test file, or a module beside it, has in it when it comes to Megatron.
TOUCHES = re.compile(
    r"nemo_elastic\.(mcore|nemo|serving)|\bmegatron\b|\bpool[24]\b|one_rank|small_runs|quickstart|nemo_run"
)
ELASTIC = ("test_versions", "test_elastic_census", "test_elastic_modes", "test_elastic_parallel", "test_layer_specs")
ALWAYS = ("test_versions", "test_elastic_census", "test_optimizer", "test_layer_specs")
DRAWN = ("test_attention", "test_checkpoint_dist", "test_depth", "test_elastic_modes", "test_nemo_trainer", "test_ssd")


@dataclass(frozen=True)
class Line:
    """One line of megatron-core: its pins, whether the rest comes from .venv, the Pythons it runs on."""

    constraints: str
    on_top_of_venv: bool
    lowest_python: tuple[int, int]


LINES = {
    "0.15": Line("constraints-0.15.txt", True, (3, 11)),
    "0.19": Line("constraints-0.19.txt", False, (3, 12)),
}


def touches_megatron(path: Path, seen: set[Path] | None = None) -> bool:
    """Whether a test module, or one beside it that it imports, comes to Megatron."""
    seen = set() if seen is None else seen
    seen.add(path)
    text = path.read_text()
    if TOUCHES.search(text):
        return True
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    beside = [TESTS / f"{name}.py" for name in sorted(imported)]
    return any(touches_megatron(other, seen) for other in beside if other.exists() and other not in seen)


def files_of(line: str, smoke: bool, seed: str) -> list[str]:
    """The test files of a line, as pytest is given them."""
    if smoke:
        names = [*ALWAYS, *random.Random(seed).sample(DRAWN, 2)]
    elif line == "0.19":
        names = list(ELASTIC)
    else:
        names = [path.stem for path in sorted(TESTS.glob("test_*.py")) if touches_megatron(path)]
    return [f"tests/{name}.py" for name in names]


def commit() -> str:
    """Hash of HEAD, which draws the smoke's files; 0 where there is no repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "0"


def set_up(line: str) -> Path | None:
    """The interpreter of the line's venv; None when set-up failed."""
    of, target = LINES[line], ROOT / (".venv-engine" if LINES[line].on_top_of_venv else f".venv-engine-{line}")
    script = [sys.executable, str(ROOT / "scripts" / "setup_venv.py")]
    words = [*script, "--venv", str(target), "--constraints", str(ROOT / of.constraints)]
    commands = [[*words, "--no-project"]]
    if of.on_top_of_venv:
        commands = [script, [*words, "--on-top-of", str(ROOT / ".venv")]]
    for command in commands:
        if subprocess.run(command).returncode:
            return None
    return target / "bin" / "python"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--line", default="0.15", choices=sorted(LINES))
    parser.add_argument("--smoke", action="store_true", help="a few quick files only")
    arguments, rest = parser.parse_known_args()
    lowest = LINES[arguments.line].lowest_python
    if sys.version_info[:2] < lowest:
        needed = ".".join(map(str, lowest))
        print(
            f"test-engine: megatron-core {arguments.line} needs Python {needed}, this is {sys.version.split()[0]}: "
            f"skipped; try PYTHON=python{needed}"
        )
        return 0
    python = set_up(arguments.line)
    if python is None:
        return 1
    files = files_of(arguments.line, arguments.smoke, commit())
    marks = "not slow and not gpu" if arguments.smoke else "not gpu and not vllm"
    print(f"test-engine: megatron-core {arguments.line}, {len(files)} files", flush=True)
    other = str(ROOT / ".venv" / "bin" / "python") if LINES[arguments.line].on_top_of_venv else ""
    environment = os.environ | {"NEMO_ELASTIC_OTHER_LINE": other, "PYTHONPATH": str(ROOT)}
    return subprocess.run([python, "-m", "pytest", "-m", marks, *files, *rest], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
