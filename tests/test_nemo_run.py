"""NeMo-Run: `nemo elastic` lists the verbs, and a recipe resolves without running (`--dryrun`)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def nemo(tmp_path: Path, *words: str) -> str:
    """`nemo elastic WORDS` as its console script runs it; the text it shows, without colour."""
    code = "import sys; from nemo_run.__main__ import app; sys.argv[0] = 'nemo'; app()"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path), "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "elastic", *words], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def test_help_lists_the_verbs_and_their_recipes(tmp_path: Path) -> None:
    shown = nemo(tmp_path, "--help")
    assert re.search(r"\btrain\b", shown) and re.search(r"\brank\b", shown)
    shown = nemo(tmp_path, "train", "--help")
    for words in ("tiny_parent", "nemotron_nano_12b_v2", "config", "overrides", "resume"):
        assert words in shown, words


@pytest.mark.parametrize("recipe", ["tiny_parent", "nemotron_nano_12b_v2"])
def test_a_recipe_resolves_without_running(recipe: str, tmp_path: Path) -> None:
    shown = nemo(tmp_path, "train", "--factory", recipe, "--dryrun", "--yes", "out=runs/mine")
    assert "Dry run" in shown or "dryrun" in shown.lower()
    assert f"{recipe}.yaml" in shown and "runs/mine" in shown
    assert not (tmp_path / "runs").exists()
