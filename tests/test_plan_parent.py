"""`plan PARENT`: one verdict a parent."""

import json
from pathlib import Path

import pytest
from checkpoint_family import random_weights
from family_configs import GRANITE_4_H_MICRO
from safetensors.torch import save_file

from nemo_elastic.cli.main import main

TINY = Path(__file__).parents[1] / "nemo_elastic" / "assets" / "tiny_parent"


def told(capfd: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize("path", ["builtin:tiny_parent", str(TINY)])
def test_a_supported_parent_gets_a_plan_and_its_exact_count(path: str, capfd: pytest.CaptureFixture) -> None:
    code, out, _ = told(capfd, path, "--json")
    plan = json.loads(out)
    assert (code, plan["supported"], plan["problems"]) == (0, True, [])
    assert plan["stored_parameters"] == plan["parent"]["parameters"] == 2_559_696
    assert [b["name"] for b in plan["budgets"]] == ["full", "large", "small"]
    assert "as counted" in plan["notes"][0] and f"config --from {path}" in plan["notes"][0]


def test_a_folder_without_its_weights_or_with_others_says_so(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    code, out, _ = told(capfd, str(tmp_path), "--json")
    assert code == 0 and "stored_parameters" not in json.loads(out)
    save_file(weights := random_weights(), tmp_path / "model.safetensors")
    plan = json.loads(told(capfd, str(tmp_path), "--json")[1])
    assert plan["stored_parameters"] == sum(w.numel() for w in weights.values())
    assert "against the 2,559,696 of the model" in plan["notes"][0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mpt", "hidden_size": 2048, "num_hidden_layers": 16}, "model_type: 'mpt'"),
        ({**GRANITE_4_H_MICRO, "num_local_experts": 64}, "num_experts_per_tok: 0 must be a positive integer"),
        ({"model_type": None}, "model_type: None"),
        (
            json.loads((TINY / "config.json").read_text()) | {"hybrid_override_pattern": "MGM*" * 4},
            "gated delta net",
        ),
    ],
)
def test_one_that_is_not_supported_gets_one_reason(
    config: dict, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = told(capfd, str(tmp_path))
    assert (code, out) == (2, "")
    _, line = err.strip().split("\n")
    assert reason in line


@pytest.mark.parametrize("words", [["--budget", "0.6"], ["--train"], ["--search", "greedy"], ["train.seed=3"]])
def test_what_belongs_to_others_is_refused(words: list[str], capfd: pytest.CaptureFixture) -> None:
    code, out, err = told(capfd, str(TINY), *words)
    assert (code, out) == (2, "") and "config --from PARENT" in err and words[0] in err
