"""Files that grow while a run may die: nothing is lost, repeated or glued together. And loggers that are not there."""

import importlib.util
import json
from pathlib import Path

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER
from nemo_elastic.family import Configured
from nemo_elastic.files import folder_problems
from nemo_elastic.problems import ProblemsError
from nemo_elastic.processes.runlog import MetricsFile, RunLog


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
    from nemo_elastic.mcore.family import checks

    run = Configured(load_config("tiny_parent.yaml", ["train.loggers=[wandb]"]))
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else stock(name))
    with pytest.raises(ProblemsError, match=r"train\.loggers: wandb is not installed here; `pip install wandb`"):
        checks.check_inputs(run)


def test_a_folder_is_tried_before_work_is_done_for_it(tmp_path: Path) -> None:
    assert folder_problems("--out", tmp_path / "a" / "b") == [] and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        (found,) = folder_problems("--out", folder)
        assert found.key == "--out" and "is a file, not a folder" in found.message
    (found,) = folder_problems("distill.teacher_cache", "/proc/nope/x")
    assert "'/proc/nope/x' cannot be made (" in found.message and "give another path" in found.message


@pytest.mark.parametrize("verb", ["train", "rank", "quickstart"])
def test_a_run_folder_that_is_a_file_is_one_message(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "taken").write_text("mine")
    assert main([verb, "--config", "tiny_parent.yaml", "--out", str(tmp_path / "taken")]) == 2
    assert "is a file, not a folder; give another path" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.paths=[/nope]"], "data.paths: /nope does not exist"),
        (["data.tokenizer=/nope.json"], "data.tokenizer: /nope.json: no such file"),
        (["distill.teacher_cache=/proc/nope"], "distill.teacher_cache: '/proc/nope' cannot be made"),
        (["--nproc", "3", "train.pipeline_model_parallel_size=2"], "needs a multiple of 2 processes, 3 started"),
        (["--nproc", "3"], "rank.samples: 64 must be a multiple of the 3 data-parallel ranks"),
        (["--nproc", "0"], "--nproc: 0 must be at least 1"),
    ],
)
def test_train_refuses_before_it_writes_or_starts_anything(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nemo_elastic.cli.arguments.launch", lambda *_: pytest.fail("processes were started"))
    assert main(["train", "--config", "tiny_parent.yaml", "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_tokenizer_must_fit_the_embedding(tmp_path: Path) -> None:
    from nemo_elastic.data.of_run import check_text

    content = json.loads(DEFAULT_TOKENIZER.read_text())
    content["model"]["vocab"]["one more"] = 2048
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    run = load_config("tiny_parent.yaml", [f"data.tokenizer={tmp_path / 'tokenizer.json'}"]).config
    with pytest.raises(ProblemsError, match=r"'one more' has id 2048, but model\.vocab_size=2048 rows end at 2047"):
        check_text(run)
