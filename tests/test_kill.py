"""Kill -9 at ten random moments, also while a checkpoint is being written: the end is bit-equal to a run left alone.

A run is killed, resumed, killed again, ... until it gets to its end; then the next one begins. Odd kills wait until
NeMo has set the marker of an unfinished checkpoint and strike while the files are written, even ones while none is.
The killed runs keep two checkpoints: there are never fewer whole ones than there were, up to two.
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
TIMES = ("seconds", "cpu_seconds", "tokens_per_second")


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
