"""Files that grow while a run may die: nothing is lost, repeated or glued together. And loggers that are not there."""

import importlib.util
from pathlib import Path

import pytest

from nemo_elastic.config import load_config
from nemo_elastic.problems import ProblemsError
from nemo_elastic.runlog import MetricsFile, RunLog


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", {"step": step, "loss": step / 10})
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text()[:-9])
    for step in (3, 4):
        RunLog(tmp_path).write("train", {"step": step, "loss": step / 10})
    assert [(r["step"], r["loss"]) for r in log.read("train")] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def rows(file: MetricsFile) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in file.read()]


def test_a_table_goes_on_from_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv", ("step", "phase", "a/kd", "b/kd"))
    file.rewind(0)
    file.write({"step": 0, "phase": "validation"})
    file.write({"step": 10, "phase": "soft, still", "a/kd": 0.1})
    file.write({"step": 20, "phase": "hard", "b/kd": 1e-12})
    file.write({"step": 30, "phase": "hard", "a/kd": 1 / 3})
    with file.path.open("a") as open_file:
        open_file.write("40,hard,0.")  # a kill
    kept = [("0", "validation", "", ""), ("10", "soft, still", "0.1", ""), ("20", "hard", "", "1e-12")]
    assert rows(file) == [*kept, ("30", "hard", "0.3333333333", "")]
    again = MetricsFile(file.path, ("step", "phase", "a/kd", "b/kd"))
    again.rewind(20)
    assert rows(again) == kept
    again.write({"step": 30, "phase": "hard", "a/kd": 0.5})
    assert rows(again)[-1] == ("30", "hard", "0.5", "") and len(rows(again)) == 4
    other = MetricsFile(file.path, ("step", "phase", "a/kd", "c/kd"))  # another version has other columns
    other.rewind(10)
    assert other.read()[1] == {"step": "10", "phase": "soft, still", "a/kd": "0.1", "b/kd": "", "c/kd": ""}
    other.rewind(0)
    assert other.read() == [] and file.path.read_text().startswith("step,phase,")


def test_a_logger_that_is_unknown_or_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ProblemsError, match=r"train\.loggers\.0: 'tensorbord' is no logger; did you mean 'tensorboard'"
    ):
        load_config("tiny_parent.yaml", ["train.loggers=[tensorbord]"])
    from nemo_elastic.mcore import checks

    config = load_config("tiny_parent.yaml", ["train.loggers=[wandb]"]).config
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else stock(name))
    with pytest.raises(ProblemsError, match=r"train\.loggers: wandb is not installed here; `pip install wandb`"):
        checks.check_inputs(config)
