"""`auto` is decided once, when a run starts, and kept by what goes on; files and `config` show `auto`."""

import json
from pathlib import Path

import pytest
import torch

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import DistillConfig
from nemo_elastic.distill.fused import fused_chunk_length
from nemo_elastic.family import Configured
from nemo_elastic.mcore.runtime.automatic import settled, settled_run
from nemo_elastic.nemo.pipeline import Run
from nemo_elastic.problems import ProblemsError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def decided(run: object) -> tuple[str, int | str]:
    return run.train.precision, run.distill.chunk_tokens


def test_the_machine_decides(request: pytest.FixtureRequest) -> None:
    config = load_config("tiny_parent.yaml").config
    assert decided(config) == ("auto", "auto")
    assert decided(settled(config)) == ("32", 256)
    request.getfixturevalue("gpu")
    assert decided(settled(config)) == ("bf16-mixed", 2048)
    given = load_config("tiny_parent.yaml", ["train.precision='32'", "distill.chunk_tokens=7"]).config
    assert settled(given) == given


def test_what_goes_on_takes_what_the_run_began_with(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    resolved = load_config("tiny_parent.yaml")
    begun = Run(Configured(resolved), tmp_path, begins=True)
    begun.write_config()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["values"]["train"]["precision"] == "32"
    assert written["origins"]["train.precision"] == "auto, without a GPU"
    request.getfixturevalue("gpu")
    on = settled_run(resolved, tmp_path, begins=False)
    assert decided(on.config) == ("32", 256) and on.values["distill"]["chunk_tokens"] == 256
    assert decided(settled_run(resolved, tmp_path, begins=True).config) == ("bf16-mixed", 2048)
    assert decided(settled_run(resolved, tmp_path / "elsewhere", begins=False).config) == ("bf16-mixed", 2048)


def test_a_loss_without_a_run_goes_by_its_device() -> None:
    assert fused_chunk_length(DistillConfig(), 100, torch.device("meta")) == 2048
    assert fused_chunk_length(DistillConfig(), 100, torch.device("cpu")) == 256
    assert fused_chunk_length(DistillConfig(chunk_tokens=9), 100, torch.device("meta")) == 9


@pytest.mark.parametrize("word", ["distill.chunk_tokens=many", "distill.chunk_tokens=0", "train.precision=fp8"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ProblemsError, match=word.partition("=")[0]):
        load_config("tiny_parent.yaml", [word])
