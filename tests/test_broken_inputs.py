"""Whatever is broken: exit code 2 within 30 seconds, one message, no traceback, nothing written.

`make test-broken` runs every case of broken_inputs.py in this process; the quick tests a sample of them (sweep.py).
"""

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_inputs import ROOT, Broken, cases, copy_good, write_good

from nemo_elastic.cli.main import VERBS, main

ALL = cases()
LONGEST = 90  # seconds on a clock, for 30 seconds of work on a machine that does other things, too


def sample(count: int, verbs: tuple[str, ...], seed: int) -> list[Broken]:
    found = [case for case in ALL if case.words[0] in verbs]
    return random.Random(seed).sample(found, count)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that every case has a spoilt copy of."""
    return write_good(tmp_path_factory.mktemp("good") / "w")


@pytest.fixture
def never_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is broken is refused before processes are started, in this one or beside it."""
    from nemo_elastic.mcore.runtime import process_groups

    def started(*_: object, **__: object) -> None:
        raise AssertionError("the run was started")

    monkeypatch.setattr(process_groups, "start", started)
    monkeypatch.setattr("nemo_elastic.cli.arguments.launch", started)
    return None


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with size and time, and every folder, but for the cache of tokens."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "cache" not in path.relative_to(folder).parts:
            state = path.lstat()
            found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def is_refused(case: Broken, code: object, out: str, err: str) -> None:
    """One message of one problem or several, or a plan that holds its problems, and the right code."""
    assert code in case.codes, (code, out, err)
    assert "Traceback" not in err, err
    if out and case.words[0] in ("plan", "verify") and not err:
        return
    assert out == "", out
    head, *rest = err.rstrip("\n").split("\n")
    if head.startswith("usage:"):
        assert sum(line.startswith("nemo-elastic") for line in rest) == 1, err
        return
    assert head.startswith(f"nemo-elastic {case.words[0]}: ") and "problem" in head and rest, err
    assert all(line.startswith("  ") and ": " in line for line in rest), err
    assert len(err) < 6000, "a message, not a dump"


def command(case: Broken, folder: Path) -> list[str]:
    return [word.replace("{w}", str(folder)) for word in case.words]


@pytest.mark.sweep(40)
@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.words[0]}: {case.name}")
def test_it_is_refused(case: Broken, good: Path, tmp_path: Path, never_started: None) -> None:
    folder, here = copy_good(good, tmp_path / "w"), tmp_path / "here"
    case.spoil(folder)
    here.mkdir()
    before, started = tree(folder), time.process_time()
    with contextlib.chdir(here), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = main(command(case, folder))
            except SystemExit as stop:
                code = stop.code
    is_refused(case, code, out.getvalue(), err.getvalue())
    assert time.process_time() - started < 30
    assert tree(folder) == before and not any(here.iterdir())


def test_there_are_three_hundred_over_all_verbs() -> None:
    assert len(ALL) >= 300 and {case.words[0] for case in ALL} == set(VERBS)
    assert len({(case.name, case.words) for case in ALL}) > 290


SERVER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import torch, nemo.lightning
from nemo_elastic.nemo.export import checkpoints; from nemo_elastic.nemo import pipeline
for line in sys.stdin:
    words, folder = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT), number)
        from nemo_elastic.cli.main import main
        sys.argv = ["nemo-elastic", *words]
        sys.exit(main(words))
    deadline = time.monotonic() + float(sys.argv[2])
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    sys.__stdout__.write(f"answer {os.waitstatus_to_exitcode(ended[1]) if ended[0] else None}\\n")
    sys.__stdout__.flush()
"""


@pytest.mark.slow
def test_real_processes(good: Path, tmp_path: Path) -> None:
    """Twenty: eight by `python -m`, twelve of the heavy verbs forked from one process that has loaded NeMo."""
    heavy = sample(12, ("rank", "sort", "train", "verify", "extract", "profile", "quickstart"), seed=11)
    light = sample(8, ("plan", "config", "nest", "report"), seed=12)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(ROOT), str(LONGEST)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for number, case in enumerate([*light, *heavy]):
        place = tmp_path / str(number)
        place.mkdir()
        folder, here = copy_good(good, place / "w"), place / "here"
        case.spoil(folder)
        here.mkdir()
        before, words = tree(folder), command(case, folder)
        if case in light:
            line = [sys.executable, "-m", "nemo_elastic", *words]
            done = subprocess.run(line, cwd=here, capture_output=True, text=True, timeout=LONGEST)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            server.stdin.write(json.dumps([words, str(here)]) + "\n")
            server.stdin.flush()
            answer = next(line for line in server.stdout if line.startswith("answer"))
            code = int(answer.split()[1]) if "None" not in answer else None
            out, err = ((place / name).read_text() for name in ("out", "err"))
        is_refused(case, code, out, err)
        assert tree(folder) == before and not any(here.iterdir()), case.name
    server.stdin.close()
    assert server.wait(30) == 0


def test_what_is_not_refused_would_be_seen() -> None:
    case = ALL[0]
    for code, out, err in (
        (0, "", ""),
        (2, "", "Traceback (most recent call last):\n  x: y\n"),
        (1, "", "nemo-elastic config: a problem to mend\n  a: b\n"),
        (2, "{}", "nemo-elastic config: a problem to mend\n  a: b\n"),
        (2, "", "list index out of range\n"),
    ):
        with pytest.raises(AssertionError):
            is_refused(case, code, out, err)
    is_refused(case, 2, "", "nemo-elastic config: a problem to mend\n  a: b\n")


def test_the_good_files_are_accepted(good: Path, tmp_path: Path) -> None:
    """Or everything above would be refused for another reason than its own."""
    folder = copy_good(good, tmp_path / "w")
    nested, search = "{w}/family/nested", ("--search", "greedy", "--ranking", "{w}/run")
    for words in (
        ("config", "--config", "{w}/run.yaml"), ("plan", "--config", "{w}/run.yaml"),
        ("plan", nested, "--budget", "0.6"),
        ("plan", "--config", "tiny_parent.yaml", *search), ("extract", nested, "--budget", "small", "--out", "{w}/new"),
        ("report", "{w}/run"),
    ):  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            assert main(command(Broken("", words), folder)) == 0, err.getvalue()
    from nemo_elastic.config import load_config
    from nemo_elastic.data.of_run import check_text

    for words in ("data.paths=[{w}/a.jsonl]", "data.paths=[]|data.blend=[{path: {w}/chat.jsonl}, {path: {w}/pair}]"):
        overrides = words.replace("{w}", str(folder)).split("|")
        check_text(load_config(str(folder / "run.yaml"), overrides).config)
