"""lm-evaluation-harness in the report, from a results file as the harness wrote it; and the example that makes one."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from synthetic_run import write_run

from nemo_elastic.cli.main import main
from nemo_elastic.report import write
from nemo_elastic.report.evaluations import columns, read_evaluations, rows
from nemo_elastic.report.write import write_report

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "evaluate"
RECORDED = json.loads((ROOT / "tests" / "lm_eval_results.json").read_text())  # of `full`, by examples/evaluate/run.sh
ACCURACY, NORMALIZED = ("continuation", "acc", "none"), ("continuation", "acc_norm", "none")
BITS = ("heldout_text", "bits_per_byte", "none")


def add(folder: Path, model: str, accuracy: float, time: str = "2026-11-28T10-00-00.000000", **more) -> Path:
    """A results file as the harness lays it out: a folder named after the model's path, a file after the time."""
    results = json.loads(json.dumps(RECORDED)) | more
    results["config"]["model_args"] = {"pretrained": model, "dtype": "float32"}
    results["results"]["continuation"]["acc,none"] = accuracy
    path = folder / model.replace("/", "__") / f"results_{time}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without evaluations; its report draws nothing."""
    monkeypatch.setattr(write, "figures", lambda run, rows: iter(()))
    return write_run(tmp_path / "run", steps=25)


def test_a_results_file_is_read_as_the_harness_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "results_2026-11-28T10-00-00.000000.json").write_text(json.dumps(RECORDED))
    scores, problems = read_evaluations(tmp_path, tmp_path / "run")
    assert problems == []
    assert columns(scores) == [
        ACCURACY,
        ("continuation", "acc_norm", "none"),
        ("heldout_text", "bits_per_byte", "none"),
    ]
    accuracy, _, bits = sorted(scores, key=lambda score: score.column)
    of_file = RECORDED["results"]
    assert (accuracy.model, accuracy.child) == ("runs/mine/hf/full", None)
    assert accuracy.value == of_file["continuation"]["acc,none"]
    assert accuracy.stderr == of_file["continuation"]["acc_stderr,none"]
    assert (accuracy.higher_is_better, accuracy.samples, accuracy.version) == (True, 143, "0.4.13")
    assert (bits.value, bits.stderr, bits.higher_is_better) == (
        of_file["heldout_text"]["bits_per_byte,none"],
        None,  # the harness wrote "N/A"
        False,
    )


def test_model_arguments_as_words_name_the_model_too(tmp_path: Path) -> None:
    for number, more in enumerate(("", ",peft=/data/adapter")):
        words = {"model_args": f"pretrained={tmp_path}/hf/large/,dtype=float32{more}"}
        changed = RECORDED | {"config": RECORDED["config"] | words}
        (tmp_path / f"results_{number}.json").write_text(json.dumps(changed))
    assert {(score.model, score.child) for score in read_evaluations(tmp_path, tmp_path)[0]} == {
        (f"{tmp_path}/hf/large", "large"),
        (f"{tmp_path}/hf/large with peft=/data/adapter", None),  # no child of ours any more
    }


def accuracies(folder: Path, run: Path) -> list[tuple[str | None, str, float | None]]:
    """(budget, model, accuracy) of every row."""
    found = rows(read_evaluations(folder, run)[0], ("full", "small"))
    return [(row.budget, row.model, row.scores[0].value if row.scores[0] else None) for row in found]


def test_a_rival_of_the_same_name_does_not_take_the_row_of_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine, scores = Path("runs/a"), tmp_path / "scores"
    rivals = ("runs/b/hf/small", "/data/runs/a/hf/small", "runs/a/other/small", "hf/small", "small", "full")
    for i, model in enumerate(rivals):
        add(scores, model, i / 16, time=f"2026-11-28T13-00-0{i}.000000")  # later than the run's own
    assert accuracies(scores, mine)[:2] == [("full", "full", None), ("small", "small", None)]
    add(scores, "runs/a/hf/small", 0.75, time="2026-11-28T12-00-00.000000")
    assert accuracies(scores, mine) == [
        ("full", "full", None),
        ("small", "small", 0.75),
        *sorted((None, model, i / 16) for i, model in enumerate(rivals)),
    ]


def test_the_later_file_about_a_child_counts_however_its_path_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "runs" / "a"
    ways = (
        "runs/a/hf/small",
        f"{mine}/hf/small/",
        "./runs/../runs/a/hf/small",
        "runs/a/children/small",
        "link/hf/small",
    )
    mine.mkdir(parents=True)
    (tmp_path / "link").symlink_to(mine)
    for i, model in enumerate(ways):
        add(tmp_path / "scores", model, i / 16, time=f"2026-11-28T12-00-0{i}.000000")
        assert accuracies(tmp_path / "scores", mine)[1:] == [("small", "small", i / 16)]


def test_a_relative_path_in_the_runs_own_evaluations_is_from_any_folder_above_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "runs" / "a"
    for i, model in enumerate(("runs/a/hf/small", "a/hf/small", "hf/small")):
        add(mine / "evaluations", model, i / 16, time=f"2026-11-28T12-00-0{i}.000000")
        assert accuracies(mine / "evaluations", mine)[1:] == [("small", "small", i / 16)]
    add(mine / "evaluations", "small", 0.5)
    add(mine / "evaluations", "b/hf/small", 0.625)
    assert accuracies(mine / "evaluations", mine)[2:] == [(None, "b/hf/small", 0.625), (None, "small", 0.5)]
    (tmp_path / "hf" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # where another `hf/small` lies
    assert (None, "hf/small", 2 / 16) in accuracies(mine / "evaluations", mine)


def test_the_report_has_a_row_per_budget(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, accuracy in ((run / "hf" / "full", 0.9375), (run / "hf" / "large", 0.8125), ("/data/parent", 0.9625)):
        add(tmp_path / "scores", str(model), accuracy)
    torn = add(tmp_path / "scores", f"{run}/hf/small", 0.5)
    torn.write_text(torn.read_text()[:100])
    assert main(["report", str(run), "--evaluations", str(tmp_path / "scores"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert any("is no results file of lm-evaluation-harness" in words for words in said["missing"])
    with (run / "report" / "evaluations.csv").open(newline="") as file:
        sheet = [row for row in csv.DictReader(file) if row["metric"] == "acc"]
    assert [(row["budget"], row["model"], float(row["value"])) for row in sheet] == [
        ("full", f"{run}/hf/full", 0.9375),
        ("large", f"{run}/hf/large", 0.8125),
        ("", "/data/parent", 0.9625),
    ]
    section = (run / "report" / "report.html").read_text().partition('id="evaluations"')[2].partition("</section>")[0]
    body = [line for line in section.partition("<tbody>")[2].split("<tr>")[1:]]
    names = ["full", "large", "small", "/data/parent"]
    assert [name for name in names for line in body if f">{name}</th>" in line] == names
    assert "0.9375" in body[0] and "0.8125" in body[1] and body[2].count("–") == 3 and "0.9625" in body[3]


def test_evaluations_in_the_run_are_found_and_none_are_no_section(run: Path) -> None:
    assert 'id="evaluations"' not in write_report(run).read_text()
    assert not (run / "report" / "evaluations.csv").exists()
    add(run / "evaluations", "hf/small", 0.625)
    assert "0.6250" in write_report(run).read_text()
    assert (run / "report" / "evaluations.csv").is_file()


def test_a_folder_without_results_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "holds no results_*.json"), ("absent", "is no folder with results_*.json")):
        assert main(["report", str(run), "--evaluations", str(tmp_path / name)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert words in said and "--output_path" in said
    assert not (run / "report").exists()


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tasks", EXAMPLE / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_right_choice_is_what_the_text_goes_on_with(tasks: ModuleType) -> None:
    texts = tasks.documents(None, 40)
    asked = tasks.questions(texts, 100)
    assert len(texts) > 10 and len(asked) == 100 and asked == tasks.questions(texts, 100)
    for question in asked:
        right = question["choices"][question["answer"]]
        assert any(question["context"] + right in text for text in texts)
        wrong = [choice for i, choice in enumerate(question["choices"]) if i != question["answer"]]
        assert len(wrong) == 3 and not any(question["context"] + choice in text for choice in wrong for text in texts)
    assert {question["answer"] for question in asked} == {0, 1, 2, 3}


def test_text_is_read_as_a_run_reads_it(tasks: ModuleType, tmp_path: Path) -> None:
    wanted = [f"document {i} says\n" * 200 for i in range(5)]
    records = "".join(json.dumps({"text": text}) + "\n" for text in ("short", *wanted[:3]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (tmp_path / "b.txt").write_text(wanted[3] * 5)  # longer than what is taken of one
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(wanted[4].encode()))
    (tmp_path / "notes.md").write_text("no text of a run\n" * 200)
    assert tasks.documents(tmp_path, 40) == [text[:8000] for text in (*wanted[:3], wanted[3] * 5, wanted[4])]
    assert tasks.documents(tmp_path / "b.txt", 40) == [(wanted[3] * 5)[:8000]]
    assert tasks.documents(tmp_path, 2) == wanted[:2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "does not exist"),
        ("a.md", b"text\n" * 1000, "must end in .txt, .jsonl or .parquet"),
        (
            "a.txt",
            "Gr\u00f6\u00dfe\n".encode("latin-1") * 1000,
            "a.txt line 1 has the byte 0xf6 where UTF-8 cannot have it",
        ),
        ("a.jsonl", b'{"messages": []}\n', 'a.jsonl line 1 is not an object with "text"'),
        ("a.txt.gz", gzip.compress(b"line\n" * 1000, mtime=0)[:-9], "is damaged or cut off"),
        ("a.txt", b"line\n" * 1000, "of 1 documents that are longer than 1,800 characters, 1 have lines"),
        (
            "a.jsonl",
            b'{"text": "' + b"word " * 1000 + b'"}\n' + b"",
            "1 documents that are longer than 1,800 characters, 0",
        ),
    ],
)
def test_text_that_will_not_do_is_one_error(
    tasks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, content: bytes, words: str
) -> None:
    file = tmp_path / (name or "absent.txt")
    if name:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        tasks.main(["--out", str(tmp_path / "tasks"), "--text", str(file)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.startswith("tasks.py: --text: ")
    assert said.count("\n") == 1 and not (tmp_path / "tasks").exists()


def test_the_example_asks_every_child_and_reports_them(run: Path, tmp_path: Path) -> None:
    """Stand-ins: extraction makes empty folders, the harness writes the recorded scores under the model it is given."""
    harness = f"""#!{sys.executable}
import json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
assert given["--tasks"] == "continuation,heldout_text", given
assert sorted(os.listdir(given["--include_path"]))[0] == "continuation.jsonl"
results = json.load(open({str(ROOT / "tests" / "lm_eval_results.json")!r}))
model = given["--model_args"].split(",")[0].removeprefix("pretrained=")
results["config"]["model_args"] = given["--model_args"]
folder = os.path.join(given["--output_path"], model.replace("/", "__"))
os.makedirs(folder)
json.dump(results, open(os.path.join(folder, "results_2026.json"), "w"))
"""
    verbs = f"""#!/usr/bin/env bash
if [[ $1 == extract ]]; then mkdir -p {run}/hf/{{full,large,small}}; else exec {sys.executable} -m nemo_elastic "$@"; fi
"""
    (run / "nested" / "elastic").mkdir(parents=True)
    (run / "nested" / "elastic" / "manifest.json").touch()
    for name, text in (("lm_eval", harness), ("nemo-elastic", verbs)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "LM_EVAL": str(tmp_path / "lm_eval")}
    words = ["bash", str(EXAMPLE / "run.sh"), str(run), str(tmp_path / "parent")]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (run / "report" / "evaluations.csv").open(newline="") as file:
        assert [(row["budget"], row["model"]) for row in csv.DictReader(file) if row["metric"] == "acc"] == [
            *((name, f"{run}/hf/{name}") for name in ("full", "large", "small")),
            ("", str(tmp_path / "parent")),
        ]
