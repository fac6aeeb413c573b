"""Every command in README, docs and help texts parses; the cheap ones run; others are listed with what runs them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from nemo_elastic.cli.arguments import overrides
from nemo_elastic.cli.main import main, parse
from nemo_elastic.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
STARTS = (
    "nemo-elastic ",
    ".venv/bin/nemo-elastic ",
    "make ",
    "torchrun ",
    "python ",
    "nemo elastic ",
    "pip ",
    "docker ",
)
ASSIGNMENT = re.compile(r"^[A-Z_]+=\S*$|^[A-Z_]+=<")

# What no test here runs, and what does instead.
NEEDS_GPU = {"make test-gpu"}
ELSEWHERE = {
    "make quickstart": "tests/test_quickstart.py",
    "make quickstart ARGS=--json": "tests/test_quickstart.py",
    "make test": "the test suite itself",
    "make test-slow": "the test suite itself",
    "make test-sweep": "the test suite itself; tests/test_sweep.py",
    "make test-broken": "a sample of it by the test suite itself; tests/test_broken_inputs.py",
    "make setup": "tests/test_repository.py (its parts); .ci",
    "make setup-hf": "tests/test_hf.py (where that venv is)",
    "make setup-gguf": "tests/test_gguf.py (where that venv is)",
    "make test-families": "by hand: test-slow runs two of them; tests/test_hf_families.py",
    "make test-vllm": "by hand: its venv takes 3 GB",
    "make help": "tests/test_repository.py",
    "make smoke-engine": ".ci",
    "make test-engine": "by hand: it takes longer than all other tests",
    "make test-engine LINE=0.19 PYTHON=python3.12": "by hand: torch for another Python is a large download",
    "make docs": "tests/test_reference.py",
    "TORCH_INDEX_URL=<index of CPU wheels> make setup": "tests/test_repository.py (its parts)",
    "PYTHON=python3.11 make setup": "tests/test_repository.py (its parts)",
    "torchrun --nproc-per-node 8 my_script.py": "the command line calls the same functions; tests/test_api.py",
    "nemo elastic --help": "tests/test_nemo_run.py",
    "nemo elastic train --help": "tests/test_nemo_run.py",
    "nemo elastic train --factory tiny_parent": "tests/test_nemo_run.py, with --dryrun",
    **dict.fromkeys(
        (
            "nemo elastic train config=my_parent.yaml out=runs/mine --dryrun",
            "nemo elastic train config=my_parent.yaml out=runs/mine "
            """'overrides=["train.tensor_model_parallel_size=8"]' --yes""",
            "nemo elastic train --factory tiny_parent --yes",
            "nemo elastic extract nested=runs/mine/nested format=hf out=runs/mine/hf --yes",
        ),
        "tests/test_nemo_run.py reads them as NeMo-Run does",
    ),
    "pip install wandb": "none: an optional package",
    "python scripts/reference.py": "tests/test_reference.py",
    "python scripts/scale.py": "tests/test_reference.py",
    "python benchmarks/gpu/build.py": "tests/test_gpu_kit.py (its parts); it downloads and compiles for minutes",
    "python benchmarks/gpu/checks.py scan_triton": "tests/test_gpu_kit.py, on the CPU",
    "python benchmarks/gpu/pages.py": "tests/test_gpu_kit.py",
    "python runs/mine/hf_nested/from_nested.py": "tests/test_hf_nested.py",
    "python runs/mine/hf_nested/from_nested.py --budget small --out runs/mine/small_hf": "tests/test_hf_nested.py",
    "python examples/paper_small/run.py --out runs/paper_small": "tests/test_paper_small.py, --quick",
    "python examples/paper_small/results.py": "tests/test_paper_small.py",
    "python examples/paper_small/run.py --out runs/paper_small --results runs/paper_small/results --only greedy-best "
    "--seeds 4": "tests/test_paper_small.py, --quick",
    "python examples/paper_small/think.py --out runs/paper_small --nested runs/paper_small/nested/greedy-best-4": (
        "tests/test_think.py (its parts); the run before it takes ten minutes"
    ),
    "python examples/paper_small/think.py --draw": "tests/test_think.py",
}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every fenced line, every `inline` command and every example of a help text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in fenced for line in re.sub(r"\\\n\s*", "", block).splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        lines += [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
        for line in map(str.strip, lines):
            bare = re.sub(r"^([A-Z_]+=(<[^>]*>|\S*) )+", "", line)
            if bare.startswith(STARTS):
                found.append((page.name, line))
    return list(dict.fromkeys(found))


COMMANDS = commands()


def of_the_cli(command: str) -> list[str] | None:
    """The words behind `nemo-elastic`, None for what is another program."""
    words = shlex.split(command, comments=True)
    if words[0].endswith("nemo-elastic"):
        return words[1:]
    if "nemo_elastic" in words and words[words.index("nemo_elastic") - 1] == "-m":
        return words[words.index("nemo_elastic") + 1 :]
    return None


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40
    assert {"README.md", "cli.md", "ranking.md", "router.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c}" for p, c in COMMANDS])
def test_the_command_is_one(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = of_the_cli(command)
    if words is None:
        without_comment = command.partition(" #")[0].strip()
        assert without_comment in NEEDS_GPU or without_comment in ELSEWHERE, "say what runs it, or that it needs a GPU"
        if "make " in without_comment:
            assert without_comment.partition("make ")[2].split()[0] in TARGETS
        return
    if words in (["--help"], ["--version"]) or len(words) == 1:
        assert len(words) == 1  # a verb that is spoken of
        return
    parsed = parse(words)
    capsys.readouterr()
    keys = [word for word in overrides(parsed) if "latency" not in word]  # a table that is the reader's
    given = getattr(parsed, "config", None)
    if given and (ROOT / given).exists():
        load_config(ROOT / given, keys)
    else:  # a file that is the reader's: the keys must exist all the same
        load_config("tiny_parent.yaml", keys)


def is_cheap(command: str) -> bool:
    """`plan` and `config` of a file that is here."""
    words = of_the_cli(command)
    return bool(words) and words[0] in ("plan", "config") and (ROOT / "".join(words[2:3])).is_file()


CHEAP = sorted({command for _, command in COMMANDS if is_cheap(command)})


@pytest.mark.parametrize("command", CHEAP)
def test_cheap_commands_run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    words = of_the_cli(command)
    if {"--ranking", "--score"} & set(words) or any("latency_table" in w for w in words):
        pytest.skip("needs a run or a table; tests/test_proposals.py and tests/test_profile.py make them")
    assert main([*words, *(["--json"] * ("--json" not in words))]) == 0
    assert json.loads(capsys.readouterr().out)
