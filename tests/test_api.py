"""`nemo_elastic.nemo.api` before a run: the verbs' names, questions and answers are those of the command line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_elastic.cli.main import VERBS, build_parser, main
from nemo_elastic.nemo import api
from nemo_elastic.nemo.api.environment import on_first
from nemo_elastic.problems import ProblemsError

ROOT = Path(__file__).resolve().parent.parent
TINY = "tiny_parent.yaml"
# Flags that say how a command line is started or answered, and what a function takes, or is, instead.
HOW = {"help", "words", "json", "verbose", "nproc"}
INSTEAD = {
    ("extract", "all"): None,  # what is extracted where no budget is named
    ("extract", "nested"): "whole",
    ("generate", "answer_by"): "answer",
    ("config", "parent"): None,  # `starting_config`
    ("verify", "parent"): None,  # `verify_parent`
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_function_that_takes_what_its_flags_say(verb: str) -> None:
    function = getattr(api, verb)
    (subparsers,) = [a for a in build_parser()._actions if hasattr(a, "choices") and a.choices and verb in a.choices]
    flags = {action.dest for action in subparsers.choices[verb]._actions} - HOW
    wanted = {INSTEAD.get((verb, flag), flag) for flag in flags} - {None}
    assert wanted <= set(inspect.signature(function).parameters)
    assert "Raises:" in function.__doc__ and verb in api.__all__


def shown(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_plan_is_the_command_lines_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = api.plan(TINY, overrides=["train.micro_batch_size=2"], gpus=1, train=True)
    words = ("plan", "--config", TINY, "train.micro_batch_size=2", "--gpus", "1", "--train")
    assert json.loads(json.dumps(found.values)) == shown(capsys, *words)
    assert found.ok and found.gpu_hours > 0 and found.parent_parameters == 2559696
    small = found.budget("small")
    assert small.parameters == 1278868 and small.subnet["hidden_size"] == 96 and small.origin == "proposed"
    with pytest.raises(KeyError, match="did you mean 'small'"):
        found.budget("smal")
    searched = api.plan(TINY, search="uniform")
    assert json.loads(json.dumps(searched.values)) == shown(capsys, "plan", "--config", TINY, "--search", "uniform")


def test_a_plan_with_problems_is_returned_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    word = "train.tensor_model_parallel_size=3"
    found = api.plan(TINY, overrides=[word])
    assert not found.ok
    values = shown(capsys, "plan", "--config", TINY, word, code=2)
    assert [(p.key, p.message) for p in found.problems] == [(p["key"], p["message"]) for p in values["problems"]]


def test_a_parent_is_planned_and_its_configuration_begun(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = api.plan(folder="builtin:tiny_parent")
    assert json.loads(json.dumps(found.values)) == shown(capsys, "plan", "builtin:tiny_parent")
    file = tmp_path / "mine.yaml"
    file.write_text(api.starting_config("builtin:tiny_parent"))
    assert [b.parameters for b in api.plan(file).budgets] == [b.parameters for b in found.budgets]


def test_configuration_and_text_are_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    word = "train.micro_batch_size=2"
    found = api.config(TINY, overrides=[word])
    assert found.config.train.micro_batch_size == 2
    assert shown(capsys, "config", "--config", TINY, word) == {
        "values": json.loads(json.dumps(found.values)),
        "origins": found.origins,
    }
    read = api.data(TINY, samples=1, documents=20)
    words = ("data", "--config", TINY, "--samples", "1", "--documents", "20")
    assert json.loads(json.dumps(read.values)) == shown(capsys, *words)
    (source,) = read.sources
    assert source.kind == "corpus" and not source.whole and source.tokens > source.documents > 0
    assert read.notes and not read.samples


WRONG = {
    "unknown key": (("train", "--config", TINY, "train.lr=1"), lambda: api.train(TINY, overrides=["train.lr=1"])),
    "no file": (("rank", "--config", "tiny_parnt.yaml"), lambda: api.rank("tiny_parnt.yaml")),
    "no configuration": (("plan",), lambda: api.plan()),
    "gpus": (("plan", "--config", TINY, "--gpus", "0"), lambda: api.plan(TINY, gpus=0)),
    "two questions": (
        ("plan", "--config", TINY, "--budget", "0.6", "--output", "x.yaml"),
        lambda: api.plan(TINY, budget=0.6, output="x.yaml"),
    ),
    "counts": (("data", "--config", TINY, "--samples", "-1"), lambda: api.data(TINY, samples=-1)),
    "no checkpoint": (("extract", "nowhere", "--all"), lambda: api.extract("nowhere")),
    "format": (
        ("extract", "nowhere", "--all", "--hf-schema", "list"),
        lambda: api.extract("nowhere", hf_schema="list"),
    ),
    "python": (
        ("verify", "nowhere", "--hf-python", "python"),
        lambda: api.verify("nowhere", hf_python="python"),
    ),
    "nothing verified": (("verify", "nowhere"), lambda: api.verify("nowhere")),
    "phases": (
        ("generate", "nowhere", "--prompt", "a", "--think", "small"),
        lambda: api.generate("nowhere", "a", think="small"),
    ),
    "timings": (
        ("profile", "--config", TINY, "--output", "x.yaml", "--points", "1"),
        lambda: api.profile(TINY, "x.yaml", points=1),
    ),
    "no run": (("report", "nowhere"), lambda: api.report("nowhere")),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_said_in_the_command_lines_words(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, call = WRONG[what]
    assert main(list(words)) == 2
    said = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    with pytest.raises(ProblemsError) as stopped:
        call()
    problems = [" ".join(str(problem).split()) for problem in stopped.value.problems]
    assert problems and said[-len(problems) :] == problems


def test_overrides_that_would_be_lost_are_refused() -> None:
    resolved = api.config(TINY)
    with pytest.raises(ProblemsError, match=r"overrides: train\.seed=3 cannot change"):
        api.plan(resolved, overrides=["train.seed=3"])
    with pytest.raises(ProblemsError, match=r"overrides: 'train\.seed=3' must be a list of words"):
        api.plan(TINY, overrides="train.seed=3")
    with pytest.raises(ProblemsError, match="is planned by itself"):
        api.plan(TINY, "builtin:tiny_parent")
    assert api.plan(resolved).values == api.plan(TINY).values


def test_half_of_a_launchers_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    for call in (api.rank, api.sort, api.train, api.nest, api.quickstart):
        with pytest.raises(ProblemsError, match="unset LOCAL_RANK"):
            call(TINY)


def test_what_needs_no_megatron_loads_none() -> None:
    code = (
        "from nemo_elastic.nemo import api; import sys; api.plan('tiny_parent.yaml'); api.config('tiny_parent.yaml');"
        "print({'megatron', 'nemo', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "set()", done.stderr


def test_only_the_first_process_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    on_first(lambda *what: heard.append(what))("train", 1, 2)
    monkeypatch.setenv("RANK", "1")
    on_first(lambda *what: heard.append(what))("train", 2, 2)
    on_first(None)("train", 2, 2)
    assert heard == [("train", 1, 2)]
