"""The pools of distributed tests: what they cost between uses, and that they end, however the tests end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from worker_pool import RankFailed, WorkerPool

TESTS = Path(__file__).parent
USES_A_POOL = """
import os, sys, time

def test_it(pool1):
    print(*pool1.run(os.getpid), flush=True)
    if {end!r} == "killed":
        time.sleep(600)
"""
CONFTEST = """
import pytest
from worker_pool import WorkerPool, open_pool

@pytest.fixture
def pool1():
    {fixture}
"""


def facts(pid: int) -> tuple[str, float]:
    """State of a process as in proc(5), `Z` when it is gone, and the CPU seconds it has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "Z", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(state: str, pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if facts(pid)[0] != state]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def test_a_pool_costs_nothing_between_uses(pool2: WorkerPool) -> None:
    """Two seconds of gloo's threads are a fifth of a second or more."""
    pids = pool2.run(os.getpid)
    wait_for("T", pids)
    before = sum(facts(pid)[1] for pid in pids)
    time.sleep(2.0)
    assert sum(facts(pid)[1] for pid in pids) - before <= 0.02
    assert pool2.run(os.getpid) == pids
    assert {os.getsid(pid) for pid in pids} == set(pids), "a hang-up of the tests' group, or Ctrl-C, would reach them"


def test_a_rank_that_died_between_uses_is_named_and_replaced(pool2: WorkerPool) -> None:
    pids = pool2.run(os.getpid)
    os.kill(pids[1], signal.SIGKILL)
    wait_for("Z", pids[1:])
    with pytest.raises(RankFailed, match="rank 1 died"):
        pool2.run(os.getpid)
    assert facts(pids[0])[0] == "Z" and not set(pids) & set(pool2.run(os.getpid))


def pytest_with_a_pool(folder: Path, end: str) -> subprocess.Popen:
    """Tests of one file in a process of their own, whose pool of one is stopped when this returns."""
    folder.mkdir()
    (folder / "test_it.py").write_text(USES_A_POOL.format(end=end))
    fixture = "return WorkerPool(1)" if end == "forgotten" else "yield from open_pool(1)"
    (folder / "conftest.py").write_text(CONFTEST.format(fixture=fixture))
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)]
    environment, pipe = os.environ | {"PYTHONPATH": path}, subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def pid_of_the_pool(tests: subprocess.Popen) -> int:
    for line in tests.stdout:
        if line.strip().isdecimal():
            return int(line)
    raise AssertionError("the tests ended before their pool had answered")


@pytest.mark.slow
def test_no_process_stays_behind(tmp_path: Path) -> None:
    """After SIGKILL, after Ctrl-C, and after a pool that no fixture ended: the tests end at once, and the pool too."""
    ends = ("killed", "interrupted", "forgotten")
    running = {end: pytest_with_a_pool(tmp_path / end, "killed" if end == "interrupted" else end) for end in ends}
    pids = {end: pid_of_the_pool(tests) for end, tests in running.items()}
    running["killed"].kill()
    running["interrupted"].send_signal(signal.SIGINT)
    try:
        codes = {end: tests.wait(90) for end, tests in running.items()}
        assert codes == {"killed": -signal.SIGKILL, "interrupted": 2, "forgotten": 0}
        wait_for("Z", pids.values())
    finally:
        for pid in [*pids.values(), *(tests.pid for tests in running.values())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
