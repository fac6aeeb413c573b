"""Run the tests that touch Megatron under another line of megatron-core than the one that constraints.txt pins.

    python3 scripts/test_engine.py [--line 0.15] [--smoke] [pytest arguments]

- 0.15, the older line that is supported: a venv on top of `.venv` that differs in the pins of constraints-0.15.txt.
  Every test file that comes to Megatron, directly or through a module or a script that it names, quick and slow (a
  quickstart is among the slow ones); and children that go from one line to the other (tests/test_other_line.py).
- 0.19, a look ahead: a venv of its own without NeMo, which has no version for this line, and with Python 3.12, which
  the line asks for. The tests of `mcore/elastic` and of the door, `mcore/versions.py`.

`--smoke` is what CI runs: children that go from one line to the other, and of the quick tests a few files that are
always the same and two drawn by the commit.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path.append(str(TESTS))

import sweep  # noqa: E402  beside the tests: which cases a commit draws

# Where the modules and scripts lie that tests import or start.
FOLDERS = ("tests", "benchmarks", "benchmarks/gpu", "examples/*", "scripts")
# What a file that comes to Megatron has in it: Megatron, one of the four parts of this package that may import it
# (tests/test_import_rules.py holds all others to that), the command line in a process of its own, or NeMo's.
TOUCHES = re.compile(
    r"\bmegatron\b|\bnemo_elastic(\.| import )(mcore|nemo|serving|cli)\b|[\"']nemo[_-]elastic[\"']|\bnemo_run\b"
)
ELASTIC = ("test_versions", "test_elastic_census", "test_elastic_modes", "test_elastic_parallel", "test_layer_specs")
ALWAYS = ("test_other_line", "test_versions", "test_elastic_census", "test_optimizer", "test_layer_specs")
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


@cache
def fixtures() -> re.Pattern[str]:
    """The names of the fixtures of all tests (tests/conftest.py), each of which comes to Megatron."""
    tree = ast.parse((TESTS / "conftest.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = [f.name for f in functions if any("fixture" in ast.unparse(d) for d in f.decorator_list)]
    return re.compile(rf"\b({'|'.join(names)})\b")


def named_in(path: Path) -> Iterator[str]:
    """Names of modules that a file imports, by a statement or a function, and of the scripts that it names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".py"):
            yield Path(node.value).stem
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("__import__", "import_module")):
            yield from (a.value.split(".")[0] for a in node.args if isinstance(getattr(a, "value", None), str))


@cache
def leads_to(path: Path) -> list[Path]:
    """The modules and scripts of `FOLDERS` that a file names."""
    return sorted(found for name in set(named_in(path)) for f in FOLDERS for found in ROOT.glob(f"{f}/{name}.py"))


def touches_megatron(path: Path, seen: set[Path] | None = None) -> bool:
    """Whether a test file, or a module or script of `FOLDERS` that it leads to, comes to Megatron."""
    seen = set() if seen is None else seen
    seen.add(path)
    text = path.read_text()
    if TOUCHES.search(text) or fixtures().search(text):
        return True
    return any(touches_megatron(other, seen) for other in leads_to(path) if other not in seen)


def files_of(line: str, smoke: bool, seed: str) -> list[str]:
    """The test files of a line, as pytest is given them."""
    if smoke:
        names = [*ALWAYS, *sorted(sweep.drawn({"smoke": list(DRAWN)}, {"smoke": 2}, seed))]
    elif line == "0.19":
        names = list(ELASTIC)
    else:
        names = [path.stem for path in sorted(TESTS.glob("test_*.py")) if touches_megatron(path)]
    return [f"tests/{name}.py" for name in names]


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
    if of.on_top_of_venv:
        give_commands(target / "bin" / "python", ROOT / ".venv" / "bin" / "python")
    return target / "bin" / "python"


def give_commands(python: Path, base: Path) -> None:
    """Lay the commands of `base`'s venv beside `python`, which runs them: `nemo-elastic` is then of that line, too."""
    for command in base.parent.iterdir():
        first, _, rest = command.read_bytes().partition(b"\n")
        own = python.with_name(command.name)
        if first == f"#!{base}".encode() and not own.exists():
            own.write_bytes(f"#!{python}\n".encode() + rest)
            own.chmod(0o755)


def environment_of(line: str) -> dict[str, str]:
    """Variables of the tests: where the package is, and the Python of the line that it is compared with, or none."""
    other = str(ROOT / ".venv" / "bin" / "python") if LINES[line].on_top_of_venv else ""
    return {"NEMO_ELASTIC_OTHER_LINE": other, "PYTHONPATH": str(ROOT)}


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
    files = files_of(arguments.line, arguments.smoke, sweep.commit())
    marks = "not slow and not gpu" if arguments.smoke else "not gpu and not vllm"
    print(f"test-engine: megatron-core {arguments.line}, {len(files)} files", flush=True)
    command = [python, "-m", "pytest", "-m", marks, *files, *rest]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment_of(arguments.line)).returncode


if __name__ == "__main__":
    raise SystemExit(main())
