"""NeMo-Run: `nemo elastic` lists the verbs, a recipe resolves without running (`--dryrun`), wrong words are named."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
VERBS = ("extract", "profile", "quickstart", "rank", "sort", "train", "verify")


def nemo(tmp_path: Path, *words: str, code: int = 0) -> str:
    """`nemo elastic WORDS` as its console script runs it; the text it shows, without colour."""
    program = "import sys; from nemo_run.__main__ import app; sys.argv[0] = 'nemo'; app()"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path), "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, "elastic", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def read(verb: str, *words: str, factory: str | None = None) -> Any:
    """The `run.Partial` that NeMo-Run makes of the words behind `nemo elastic VERB`."""
    from nemo_elastic.nemo import recipes

    context = recipes.Checked(name=verb, factory=factory)
    context.executor = None
    return context.parse_fn(getattr(recipes, verb), list(words))


def test_help_lists_the_verbs_and_their_recipes(tmp_path: Path) -> None:
    shown = nemo(tmp_path, "--help")
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", shown), verb
    shown = nemo(tmp_path, "train", "--help")
    for words in ("tiny_parent", "tiny_experts", "nemotron_nano_12b_v2", "config", "overrides", "resume", "force"):
        assert words in shown, words


def test_a_recipe_resolves_without_running(tmp_path: Path) -> None:
    shown = nemo(tmp_path, "train", "--factory", "tiny_parent", "--dryrun", "--yes", "out=runs/mine")
    assert "Dry run" in shown or "dryrun" in shown.lower()
    assert "tiny_parent.yaml" in shown and "runs/mine" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dryrun_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: [tiny_parent.yaml]\nelastic: {budgets: {full: 1.0, tiny: 0.01}}\n")
    words = ("train", "config=mine.yaml", 'overrides=["train.lr=1", "rank.sample=8"]', "--dryrun", "--yes")
    shown = nemo(tmp_path, *words, code=1)
    assert "2 to mend" in shown and "train.lr: unknown key" in shown and "did you mean 'samples'" in shown
    assert "Dry run" not in shown


@pytest.mark.parametrize("verb", ["train", "rank", "sort"])
@pytest.mark.parametrize("recipe", ["tiny_parent", "tiny_experts", "nemotron_nano_12b_v2"])
def test_every_recipe_is_a_partial_of_its_verb(verb: str, recipe: str) -> None:
    from nemo_elastic.nemo import recipes

    found = read(verb, "out=runs/mine", factory=recipe)
    assert found.__fn_or_cls__ is getattr(recipes, verb)
    assert (found.config, found.out) == (f"{recipe}.yaml", "runs/mine")


WRONG = {
    "no file": (("train", "config=tiny_parnt.yaml"), "no file 'tiny_parnt.yaml'; did you mean 'tiny_parent.yaml'"),
    "no configuration": (("rank", "out=runs/mine"), "--config: is required"),
    "a budget too small": (
        ("sort", "config=tiny_parent.yaml", 'overrides=["elastic.dims.hidden_size={choices: [3.0]}"]'),
        "elastic.dims.hidden_size",
    ),
    "the default's override": (("quickstart", 'overrides=["rank.sample=3"]'), "did you mean 'samples'"),
    "profile": (("profile", "config=tiny_parent.yaml", "output=x.yaml", 'overrides=["report.x=1"]'), "report.x"),
    "no checkpoint": (("extract", "format=hf"), "nested: is missing"),
    "a checkpoint to come": (("extract", "nested=runs/mine/nested", 'overrides=["export.dtyp=x"]'), "export.dtyp"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words_are_named_before_anything_is_launched(what: str) -> None:
    from nemo_run.cli.api import RunContextError

    words, said = WRONG[what]
    with pytest.raises(RunContextError, match=re.escape(said)):
        read(*words)


def test_the_documented_commands_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parent.yaml").write_text("base: [tiny_parent.yaml]\n")
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/python.md"))
    lines = [shlex.split(line)[2:] for line in re.findall(r"^nemo elastic .*=.*$", text, flags=re.MULTILINE)]
    assert len(lines) == 4
    for verb, *words in lines:
        read(verb, *(word for word in words if not word.startswith("--")))
