"""Kill -9 at random moments, also while a checkpoint is written or deleted: the end is bit-equal to a run left alone.

A run is killed, resumed, killed again, ... until it gets to its end; then the next one begins. Odd kills wait until
NeMo has set the marker of an unfinished checkpoint and strike while the files are written, even ones while none is.
The killed runs keep two checkpoints: there are never fewer whole ones than there were, up to two.

Ten more kills meet runs that save beside their steps (`train.async_save`): five while a save is open, three while an
old checkpoint is being deleted. Both are slowed down, and what was open must still be so when the process is dead.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from small_run import Server, difference, helpers_of, records

from nemo_elastic.processes.training_checkpoints import whole_checkpoints

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
KILLS, SEED = 10, 20
MOMENTS = {
    "beside_1": ["saving", "training", "saving", "deleting", "saving"],
    "beside_2": ["training", "saving", "deleting", "saving", "deleting"],
}
TIMES = ("seconds", "cpu_seconds", "tokens_per_second", "peak_memory_bytes")


def strike(server: Server, out: Path, rng: random.Random, *, while_saving: bool, resume: bool) -> str:
    """Start or go on, and kill: what was hit (`end` when the run was faster)."""
    before = whole_checkpoints(out)
    (pid,) = server.start(out, "train.keep_checkpoints=2", resume=resume)
    deadline = time.monotonic() + (60 if while_saving else rng.uniform(0.3, 7.0))
    folder = out / "checkpoints"
    while time.monotonic() < deadline and _alive(pid) and not (while_saving and list(folder.glob("*-unfinished"))):
        time.sleep(0.005)
    if while_saving:
        time.sleep(rng.uniform(0.0, 0.25))
    while not while_saving and _alive(pid) and list(folder.glob("*-unfinished")):
        time.sleep(0.005)  # on a slow machine nearly every moment is one of saving
    hit = "saving" if list(folder.glob("*-unfinished")) else "training" if folder.exists() else "before training"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    (code,) = server.wait([pid])
    assert helpers_of([pid]) == [], "a process of the killed run lives on"
    assert code in (0, -9), Path(f"{out}.log").read_text()[-6000:]
    assert len(whole_checkpoints(out)) >= min(2, len(before)), "nothing goes before the next one is whole"
    return hit if code else "end"


def strike_beside(server: Server, out: Path, what: str, rng: random.Random, *, resume: bool) -> None:
    """Start or go on, wait for the moment, kill: the open save stays unfinished, the deletion stays half done."""
    before, old = whole_checkpoints(out), moments(out, what)
    slow = {"writer": 8.0 if what == "saving" else 0.2, "deletion": 3.0}  # longer than helpers have time to end
    (pid,) = server.start(out, "train.keep_checkpoints=2", "train.async_save=true", resume=resume, slow=slow)
    while not (new := moments(out, what) - old):
        assert _alive(pid), f"the run never came to a moment of {what}: {Path(f'{out}.log').read_text()[-6000:]}"
        time.sleep(0.003)
    while what == "saving" and len(helpers_of([pid], 0.0)) < 2:
        time.sleep(0.003)  # files are written by a process beside the run
    time.sleep(rng.uniform(0.0, 0.5))
    os.kill(pid, signal.SIGKILL)
    assert server.wait([pid]) == [-9]
    assert helpers_of([pid]) == [], "a process of the killed run lives on"
    assert {name for name, _ in new} <= {p.name for p in (out / "checkpoints").iterdir()}, "it was over before the kill"
    assert len(whole_checkpoints(out)) >= min(2, len(before)), "nothing goes before the next one is whole"


def moments(out: Path, what: str) -> set[tuple[str, int]]:
    """Marks of open saves with the time they were set, halves of deleted checkpoints, whole checkpoints."""
    if what == "training":
        return {(p.name, 0) for p in whole_checkpoints(out)}
    with contextlib.suppress(FileNotFoundError):
        if what == "saving":
            return {(p.name, p.stat().st_ctime_ns) for p in (out / "checkpoints").glob("*-unfinished")}
        return {(p.name, 0) for p in (out / "checkpoints").glob(".removed-*")}
    return set()


def _alive(pid: int) -> bool:
    """False for what has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def check_end(server: Server, out: Path) -> None:
    """Weights, router and optimizer of the last checkpoint, the nested checkpoint, and the log."""
    whole = server.folder / "whole"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step=11", "step=15"]
    for part in (Path("checkpoints") / "step=15", Path("nested")):
        assert difference(out / part, whole / part) == []
    for kind in ("train", "validation"):
        ours, theirs = (
            [{k: v for k, v in r.items() if k not in TIMES} for r in records(o, kind)] for o in (out, whole)
        )
        assert ours == theirs
    assert [line.split(",")[:2] for line in (out / "logs" / "metrics.csv").read_text().splitlines()] == [
        line.split(",")[:2] for line in (whole / "logs" / "metrics.csv").read_text().splitlines()
    ]


def test_ten_kills_leave_no_trace(small_runs: Server) -> None:
    rng, hits, runs, out = random.Random(SEED), Counter(), 0, None
    while hits.total() - hits["end"] < KILLS:
        if out is None:
            runs, out, resume = runs + 1, small_runs.folder / f"killed_{runs}", False
        number = hits.total() - hits["end"]
        hit = strike(small_runs, out, rng, while_saving=number % 2 == 1, resume=resume)
        hits[hit] += 1
        resume = True
        if hit == "end":
            check_end(small_runs, out)
            out = None
    if out is not None:
        small_runs.run(out, "train.keep_checkpoints=2", resume=True)
        check_end(small_runs, out)
    print(dict(hits), f"in {runs} runs")
    assert hits["saving"] >= 3 and hits["training"] >= 2, hits


@pytest.mark.parametrize("name", MOMENTS)
def test_kills_beside_open_saves_leave_no_trace(small_runs: Server, name: str) -> None:
    out, rng = small_runs.ranked(name), random.Random(f"{SEED} {name}")
    for number, what in enumerate(MOMENTS[name]):
        strike_beside(small_runs, out, what, rng, resume=number > 0)
    small_runs.run(out, "train.keep_checkpoints=2", "train.async_save=true", resume=True)
    check_end(small_runs, out)


def test_what_a_kill_left_of_a_checkpoint_is_ignored_and_removed(small_runs: Server) -> None:
    import shutil

    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    from nemo_elastic.processes.training_checkpoints import (
        UNFINISHED,
        is_whole,
        remove_unfinished,
        steps_done,
        whole_checkpoints,
    )

    out = small_runs.ranked("leftovers")
    shutil.copytree(small_runs.folder / "whole" / "checkpoints", out / "checkpoints")
    folder = out / "checkpoints"
    (folder / "step=15" / "weights" / "metadata.json").unlink()  # Megatron writes it last
    (folder / "step=11-unfinished").touch()  # NeMo's marker
    (folder / "step=9").mkdir()
    assert [p.name for p in whole_checkpoints(out)] == ["step=3", "step=7"] and steps_done(folder / "step=7") == 8
    assert ModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX == UNFINISHED
    assert not is_whole(folder / "step=15") and is_whole(folder / "step=3")
    remove_unfinished(out)
    assert sorted(p.name for p in folder.iterdir()) == ["step=3", "step=7"]
