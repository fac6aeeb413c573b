"""docs/cli.md and docs/config.md say what `--help` and config/sections.py say, docs/scale.md what its script writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nemo_elastic.cli.main import VERBS
from nemo_elastic.config import sections

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("reference")


@pytest.mark.parametrize("page", ["cli.md", "config.md"])
def test_the_page_is_current(reference: ModuleType, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")  # whatever the terminal
    wanted = {path.name: text for path, text in reference.pages().items()}
    assert (ROOT / "docs" / page).read_text() == wanted[page], "run `python scripts/reference.py`"


def test_the_page_of_scale_is_what_its_command_writes() -> None:
    scale = script("scale")
    assert scale.PAGE.read_text() == scale.page(), "run `python scripts/scale.py`"


@pytest.mark.parametrize("verb", ["", "plan"])
def test_the_cli_page_has_the_help_that_a_user_sees(verb: str) -> None:
    command = [sys.executable, "-m", "nemo_elastic", *verb.split(), "--help"]
    shown = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "100"}, check=True
    )
    page = (ROOT / "docs" / "cli.md").read_text()
    assert f"```text\n{shown.stdout.strip()}\n```" in page
    assert all(f"## nemo-elastic {name}\n" in page for name in VERBS)


def test_every_key_of_every_section_is_on_the_config_page() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    for section in dataclasses.fields(sections.RunConfig):
        kind = section.default_factory
        if dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                assert f"`{section.name}.{field.name}`" in page
    for key in ("elastic.dims.NAME.choices", "data.blend.N.weight", "train.optimizer.betas", "train.stages.N.tokens"):
        assert f"`{key}`" in page
    assert r"`str \| None`" in page  # a bar inside a table
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert {line.replace(r"\|", "").count("|") for line in rows} == {5}


def test_every_message_in_troubleshooting_is_one_of_the_code() -> None:
    """Between values (`...`), each piece of a quoted message stands in the source as it is."""
    source = "\n".join(path.read_text() for path in (ROOT / "nemo_elastic").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals over several lines
    tables = (ROOT / "docs" / "troubleshooting.md").read_text().split("## While training")[0]
    quoted = [row.split(" | ")[0][2:].strip("`") for row in tables.splitlines() if row.startswith("| `")]
    assert len(quoted) > 15
    spoken = [message.removeprefix("--config: ") for message in quoted]
    pieces = [piece for message in spoken for piece in re.split(r"\.\.\.", message) if len(piece.strip(" ;=")) > 3]
    assert [piece for piece in pieces if piece.strip(" ;=") not in source] == []
