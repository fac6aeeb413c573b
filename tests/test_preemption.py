"""SIGTERM as launchers send it: to the launcher, to every process of a group, to one worker; twice; while saving.

One worker gets SIGUSR1 instead, as Slurm warns of the end of a job; `train.max_time` ends a run in the same way.

Right is always the same: every rank leaves with 143, the last checkpoint is whole and later than the signal, and no
process stays behind.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import Server, difference, helpers_of

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
LAYOUTS = {"tp2": "train.tensor_model_parallel_size=2", "pp2": "train.pipeline_model_parallel_size=2"}
WHO, WHEN = ("group", "first worker", "last worker"), ("training", "saving")
CASES = list(itertools.product(LAYOUTS, WHO, WHEN))


def wait_for(what: Callable[[], bool], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.003)


def send(who: str, pids: list[int]) -> None:
    """torchrun and Slurm reach every process of a group, a node that is drained may reach one."""
    if who == "group":
        for pid in pids:
            os.killpg(pid, signal.SIGTERM)
    elif who == "first worker":
        os.kill(pids[0], signal.SIGTERM)
    else:
        os.kill(pids[-1], signal.SIGUSR1)


def check_stopped(out: Path, text: str, after: int) -> None:
    """One message, and a whole checkpoint of the step it names."""
    from nemo_elastic.processes.training_checkpoints import steps_done, whole_checkpoints

    assert "go on with --resume" in text and "Traceback" not in text, text[-6000:]
    assert text.count("stopped after step ") == 1
    names = [p.name for p in (out / "checkpoints").iterdir()]
    assert not [name for name in names if "unfinished" in name], names
    last = whole_checkpoints(out)[-1]
    assert last.name in names and after < steps_done(last) < 16
    assert f"stopped after step {steps_done(last)} of 16 and saved {last}" in text


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("layout", "who", "when"), CASES)
def test_a_signal_never_costs_the_checkpoint(small_runs: Server, layout: str, who: str, when: str) -> None:
    out = small_runs.ranked(f"signal_{layout}_{who}_{when}".replace(" ", "_"))
    folder = out / "checkpoints"
    pids = small_runs.start(out, LAYOUTS[layout], "data.num_workers=1", size=2)
    name = "step=7-unfinished" if when == "saving" else "step=7"
    wait_for(lambda: (folder / name).exists() and (when == "saving" or not (folder / "step=7-unfinished").exists()))
    send(who, pids)
    wait_for(lambda: any(p.name != "step=7-unfinished" for p in folder.glob("*-unfinished")))
    send(who, pids)  # again, while the last checkpoint is being written
    assert small_runs.wait(pids) == [143, 143], Path(f"{out}.log").read_text()[-6000:]
    assert helpers_of(pids) == []
    check_stopped(out, Path(f"{out}.log").read_text(), after=7)


def test_the_launcher_of_nproc_passes_a_signal_on_and_leaves_with_143(small_runs: Server) -> None:
    out = small_runs.ranked("launched")
    words = ["train", "--config", str(small_runs.config), "--out", str(out), "--nproc", "2", LAYOUTS["tp2"]]
    with Path(f"{out}.log").open("w") as log:
        launcher = subprocess.Popen([sys.executable, "-m", "nemo_elastic", *words], stdout=log, stderr=log)
        try:
            wait_for(lambda: (out / "checkpoints" / "step=7").exists() or launcher.poll() is not None)
            launcher.terminate()
            time.sleep(0.1)
            launcher.terminate()
            assert launcher.wait(400) == 143, Path(f"{out}.log").read_text()[-6000:]
        finally:
            launcher.kill()  # its workers end with it
    check_stopped(out, Path(f"{out}.log").read_text(), after=7)


def test_the_end_of_its_time_is_heard_as_a_signal_is(small_runs: Server) -> None:
    out = small_runs.ranked("timed")
    small_runs.run(out, "train.max_time=0.001", codes=(143,))
    text = Path(f"{out}.log").read_text()
    check_stopped(out, text, after=0)
    assert "stopped after step 1 of 16" in text, "no time is left for a second step"
    small_runs.run(out, "train.max_time=01:00:00", "train.keep_checkpoints=1", resume=True)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step=15"]
    assert difference(out / "nested", small_runs.folder / "whole" / "nested") == []


def test_ctrl_c_leaves_with_130_and_one_line(small_runs: Server) -> None:
    out = small_runs.ranked("interrupted")
    pids = small_runs.start(out)
    wait_for(lambda: (out / "checkpoints" / "step=3").exists())
    os.kill(pids[0], signal.SIGINT)
    assert small_runs.wait(pids) == [130]
    text = Path(f"{out}.log").read_text()
    assert "nemo-elastic: interrupted" in text and "Traceback" not in text, text[-6000:]
