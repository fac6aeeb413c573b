"""`verify --parent`: loss of a Hugging Face parent here == its loss in transformers, within 1e-4 nats, trained weights.

The shipped parent has steps of the scan below 1e-3, which transformers would clamp: random parents have none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_family import write_hf_parent
from safetensors.torch import load_file

from nemo_elastic.cli.main import main
from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER
from nemo_elastic.huggingface import NEMOTRON_H

pytest.importorskip("nemo.collections.llm")  # here: within a test that captures stderr, Megatron cannot be imported
HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
ASSETS = DEFAULT_TOKENIZER.parent
QUICK = ["train.val_samples=2", "train.stages=[{steps: 1, seq_length: 96, global_batch_size: 2}]"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped parent as a Hugging Face folder, with a silu MLP in its config.json and the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("parent") / "hf"
    write_hf_parent(folder, load_file(ASSETS / "model.safetensors"), json.loads((ASSETS / "config.json").read_text()))
    shutil.copyfile(DEFAULT_TOKENIZER, folder / "tokenizer.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_hidden_act": "silu", "time_step_min": 0.001}))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5")
def test_a_parent_has_the_loss_that_transformers_gives_it(
    parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["verify", "--parent", str(parent), "--hf-python", str(HF_PYTHON), "--json", *QUICK]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verified"] is True and answer["tokens"] == 2 * 96
    assert answer["parameters"] == answer["parameters_transformers"] == 2_559_696
    assert answer["loss"] == pytest.approx(answer["loss_transformers"], abs=1e-5)
    monkeypatch.setitem(NEMOTRON_H.unclamped, "time_step_min", 0.001)  # as the folder says it
    assert main(words) == 1
    clamped = json.loads(capsys.readouterr().out)
    assert clamped["loss"] == answer["loss"] and abs(clamped["loss_transformers"] - clamped["loss"]) > 1e-4


@pytest.mark.usefixtures("one_rank")
def test_what_transformers_cannot_be_asked(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--parent", "builtin:tiny_parent", *QUICK]) == 2
    assert "is no Hugging Face folder" in capsys.readouterr().err
    assert main(["verify", "--parent", str(parent), "--budget", "small"]) == 2
    assert "--budget: is for children" in capsys.readouterr().err
    assert main(["verify", "--parent", str(tmp_path / "gone")]) == 2
    assert "parent.path: nothing at" in capsys.readouterr().err


@pytest.mark.usefixtures("one_rank")
def test_ranking_and_every_build_follow_the_model_section(parent: Path) -> None:
    """The plain model, and the elastic one, compute what the section says: its activation, epsilon and scale."""
    from nemo_elastic.config.load import load_values
    from nemo_elastic.config.parent_files import parent_files
    from nemo_elastic.family import family_of
    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
    from nemo_elastic.mcore.models.evaluate import whole_logits
    from nemo_elastic.mcore.models.parents import open_parent

    said = parent_files(str(parent)).model
    tokens = torch.randint(0, 2048, (1, 24), generator=torch.Generator().manual_seed(3))
    family = family_of(load_values({"model": dict(said)}))
    reader, seen = open_parent(str(parent), family.layout), []
    changes = ({}, {"activation_func": "squared_relu"}, {"layernorm_epsilon": 1e-2}, {"softmax_scale": 2.0})
    for change in changes:
        section = {**said, **change}
        plain, elastic = build_plain_model(section), build_elastic_model(section)
        for model in (plain, elastic):
            load_weights(model, reader, family.architecture)
        logits = whole_logits(plain, tokens)
        masked = whole_logits(elastic, tokens, hard_plan(elastic.layout, family.space.full_subnet(), "masked"))
        torch.testing.assert_close(masked, logits, rtol=1e-5, atol=1e-5)
        assert all((logits - other).abs().max() > 1e-3 for other in seen)
        seen.append(logits)
