"""What the processes of a run agree on before they start: one looks, all leave alike. Workers are a few lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_elastic.mcore.runtime.meeting import raise_together
from nemo_elastic.problems import Problem, ProblemsError

ROOT = Path(__file__).resolve().parent.parent
START = "import sys; from nemo_elastic.cli.launch import launch; sys.exit(launch([sys.executable, *sys.argv[1:]], 2))"
WORKER = """
import os, sys
from nemo_elastic.mcore.runtime.meeting import raise_together
from nemo_elastic.problems import Problem, ProblemsError
rank = int(os.environ["RANK"])

def see(*who, word):
    return [Problem(word, "is wrong")] if rank in who else []

def plain(*who):
    if rank in who:
        raise ValueError("no key")
    return []

def once():
    assert rank == 0
    return []

def meet(shared, own):
    try:
        raise_together(shared, own, wait_minutes=1)
    except ProblemsError as error:
        return str(error)
    except ValueError as error:
        return "ValueError " + str(error)
    return "nothing"

found = [
    meet(once, lambda: []),
    meet(lambda: see(0, 1, word="out"), lambda: []),
    meet(lambda: see(0, word="text"), lambda: see(1, word="TMPDIR")),
    meet(once, lambda: see(0, 1, word="cache")),
    meet(lambda: plain(0), lambda: []),
    meet(once, lambda: []),
]
open(sys.argv[1] + f"/{rank}", "w").write("; ".join(found))
"""


def test_all_processes_leave_with_what_any_of_them_found(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", START, str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / str(rank)).read_text().replace("\n", ", ").split("; ") for rank in (0, 1))
    both = "text: is wrong, TMPDIR: is wrong"
    assert first == ["nothing", "out: is wrong", both, "cache: is wrong", "ValueError no key", "nothing"]
    assert second == [*first[:4], "process 0: no key", "nothing"]


def test_alone_there_is_nobody_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    raise_together(list, list, wait_minutes=1)
    with pytest.raises(ProblemsError, match=r"a: 1\nb: 2"):
        raise_together(lambda: [Problem("b", "2")], lambda: [Problem("a", "1")], wait_minutes=1)
