"""`train.keep_checkpoints`, `train.max_time`: what goes, when, and what is left when a process dies meanwhile."""

import shutil
import time
from pathlib import Path

import pytest

from nemo_elastic.config import load_config
from nemo_elastic.config.durations import seconds_of
from nemo_elastic.distill.training_cost import checkpoints_kept
from nemo_elastic.problems import ProblemsError
from nemo_elastic.processes import started
from nemo_elastic.processes.training_checkpoints import (
    LAST_FILES,
    remove_unfinished,
    set_aside,
    steps_done,
    superfluous,
    whole_checkpoints,
)


def checkpoint(out: Path, step: int) -> Path:
    folder = out / "checkpoints" / f"step={step - 1}"
    for name in LAST_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def simulated(steps: int, every: int, last: int, forever: int | None, out: Path) -> tuple[list[int], int]:
    """Checkpoints at the end of a run that saves, looks and deletes; and how many there were at most."""
    most = 0
    for step in [*range(every, steps + 1, every), *([steps] if steps % every else [])]:
        checkpoint(out, step)
        most = max(most, len(whole_checkpoints(out)))
        for path in superfluous(whole_checkpoints(out), last, forever):
            shutil.rmtree(set_aside(path))
        assert len(whole_checkpoints(out)) >= min(last, step // every)
    return [steps_done(p) for p in whole_checkpoints(out)], most


@pytest.mark.parametrize(
    ("steps", "every", "last", "forever", "left"),
    [
        (20, 4, 2, None, [16, 20]),
        (22, 4, 2, None, [20, 22]),
        (40, 4, 2, 12, [12, 24, 36, 40]),
        (42, 4, 1, 8, [8, 16, 24, 32, 40, 42]),
        (3, 4, 2, None, [3]),
        (8, 4, 5, None, [4, 8]),
    ],
)
def test_the_newest_stay_and_every_mth(
    steps: int, every: int, last: int, forever: int | None, left: list[int], tmp_path: Path
) -> None:
    found, most = simulated(steps, every, last, forever, tmp_path)
    assert found == left
    words = [f"train.stages=[{{steps: {steps}}}]", f"train.save_every_steps={every}", f"train.keep_checkpoints={last}"]
    words += [f"train.keep_every_steps={forever}"] if forever else []
    counted = checkpoints_kept(load_config("tiny_parent.yaml", words).config)
    assert counted["kept"] == len(left) and counted["most"] >= most >= len(left)


def test_all_stay_without_the_key() -> None:
    counted = checkpoints_kept(load_config("tiny_parent.yaml", ["train.stages=[{steps: 6954}]"]).config)
    assert counted == {"count": 70, "kept": 70, "most": 70}


def test_half_a_deletion_is_no_checkpoint_and_goes_with_the_next_resume(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    aside = set_aside(first)
    assert whole_checkpoints(tmp_path) == [second] and aside.is_dir()
    (aside / LAST_FILES[0]).unlink()
    remove_unfinished(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=7"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["train.keep_checkpoints=0"], "at least 1"),
        (["train.keep_every_steps=100"], "set train.keep_checkpoints"),
        (["train.keep_checkpoints=2", "train.keep_every_steps=150"], "multiple of train.save_every_steps"),
        (["train.max_time=soon"], "HH:MM:SS"),
        (["train.max_time='03:61:00'"], "HH:MM:SS"),
        (["train.max_time='00:00:00'"], "no time"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], what: str) -> None:
    with pytest.raises(ProblemsError, match=what):
        load_config("tiny_parent.yaml", words)


def test_times_are_those_of_slurm(tmp_path: Path) -> None:
    assert [seconds_of(t) for t in ("03:55:00", "1-00:00:01", "90", "0.5", None)] == [14100, 86401, 90, 0.5, None]
    (tmp_path / "a.yaml").write_text("base: tiny_parent.yaml\ntrain:\n  max_time: 03:55:00\n")
    assert seconds_of(load_config(str(tmp_path / "a.yaml")).config.train.max_time) == 14100


def test_the_clock_begins_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = started.seconds_running()
    assert 0 < before < 86400
    time.sleep(0.05)
    assert 0.04 < started.seconds_running() - before < 5
    monkeypatch.setenv(started.VARIABLE, str(started.started() - 100))  # what a launcher says
    assert 99 < started.seconds_running() - before < 110
