"""`train.recipe: last_percent` is the keys that it stands for: the same configuration as with these written out."""

from pathlib import Path

import pytest
import yaml

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.load import load_values, plain
from nemo_elastic.config.recipe import probabilities

RECIPE = "train.recipe=last_percent"
STAGES = "train.stages=[{steps: 4}, {steps: 2, lr: 2.0e-4, budget_probabilities: {full: 1.0, small: 1.0}}]"


def test_it_is_what_it_stands_for() -> None:
    found = load_config("tiny_parent.yaml", [RECIPE, STAGES])
    drawn = "{full: 0.55, large: 0.15, small: 0.3}"
    other = "{steps: 2, lr: 6.0e-5, budget_probabilities: {full: 1.0, small: 1.0}}"
    written = load_config("tiny_parent.yaml", [
        f"train.stages=[{{steps: 4, budget_probabilities: {drawn}}}, {other}]",
        "train.optimizer.lr=3.0e-4", "distill.budgets_per_batch=3",
    ])  # fmt: skip
    ours, theirs = plain(found.config), plain(written.config)
    assert ours["train"].pop("recipe") == "written_out" and theirs["train"].pop("recipe") == "default"
    for one in (ours, theirs):  # a product of two floats, and the same number written
        one["train"]["optimizer"]["lr"] = pytest.approx(one["train"]["optimizer"]["lr"], rel=1e-12)
        one["train"]["stages"][1]["lr"] = round(one["train"]["stages"][1]["lr"], 12)
    assert ours == theirs
    assert found.origins["train.optimizer.lr"] == f"{RECIPE}: 0.3 x 0.001"
    assert found.origins["distill.budgets_per_batch"] == RECIPE


def test_what_is_given_stays_and_no_floor_lies_above_the_rate() -> None:
    given = ["distill.budgets_per_batch=2", "train.optimizer={lr: 1.0e-4, min_lr: 5.0e-5}"]
    config = load_config("tiny_parent.yaml", [RECIPE, *given]).config
    assert config.distill.budgets_per_batch == 2
    assert config.train.optimizer.lr == pytest.approx(3e-5) and config.train.optimizer.min_lr == pytest.approx(3e-5)
    written = load_config("tiny_parent.yaml", [RECIPE, "distill={budgets_per_batch: 1}"]).config
    assert written.distill.budgets_per_batch == 1


def test_what_a_run_has_written_down_is_not_slowed_again(tmp_path: Path) -> None:
    resolved = load_config("tiny_parent.yaml", [RECIPE])
    assert load_values(resolved.values) == resolved.config
    assert load_config(None, [], base=resolved.values).config == resolved.config
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(resolved.values))
    assert load_config(file).config.train == resolved.config.train


def test_no_rate_falls_below_its_floor() -> None:
    """What is written out keeps the rules: a stage's rate is slowed as well."""
    given = ["train.optimizer={lr: 1.0e-3, min_lr: 5.0e-5}", "train.stages=[{steps: 4}, {steps: 2, lr: 1.0e-4}]"]
    found = load_config("tiny_parent.yaml", [RECIPE, *given])
    assert found.config.train.optimizer.min_lr == found.config.train.stages[1].lr == pytest.approx(3e-5)
    assert load_config(None, [], base=found.values).config == found.config


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ({"full": 1.0, "small": 0.5, "large": 0.75}, {"full": 0.55, "small": 0.3, "large": 0.15}),
        ({"full": 1.0, "half": 0.5}, {"full": 0.55, "half": 0.45}),
        ({"full": {"kind": "fraction", "value": 1.0}, "half": "0.5"}, {"full": 0.55, "half": 0.45}),
        ({"full": 1.0, "a": 9e9, "b": 6e9, "c": 3e9}, {"full": 0.55, "a": 0.075, "b": 0.15, "c": 0.225}),
        ({"full": 1.0, "b": {"kind": "memory_gb", "value": 8}, "a": 0.5}, {"full": 0.55, "b": 0.15, "a": 0.3}),
        ({"half": 0.5, "third": 0.3}, {}),
        ({"full": 1.0}, {}),
    ],
    ids=["by size", "two", "as plan writes them", "parameters", "as written", "without the full member", "alone"],
)
def test_who_is_drawn_how_often(budgets: dict, expected: dict) -> None:
    found = probabilities(budgets)
    assert found == pytest.approx(expected) and list(found) == list(expected)


def test_plan_says_it(capsys) -> None:
    assert main(["plan", "--config", "tiny_parent.yaml", RECIPE]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"note: {RECIPE} is written out: learning rate 0.0003, 0.3 of the one given; distill.budgets" in told


def test_no_other_name_and_no_other_fault_is_hidden(capsys, tmp_path: Path) -> None:
    assert main(["plan", "--config", "tiny_parent.yaml", "train.recipe=gentle"]) == 2
    assert "train.recipe: 'gentle' must be one of default, last_percent, written_out" in capsys.readouterr().err
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({"base": ["tiny_parent.yaml"], "elastic": {"budgets": {"full": 1.0, "odd": "x"}}}))
    assert main(["plan", "--config", str(file), RECIPE]) == 2
    assert "elastic.budgets.odd" in capsys.readouterr().out


def test_a_budget_of_a_file_below_can_be_left_out(tmp_path: Path) -> None:
    """As for a child that is mended alone: the others are null."""
    file = tmp_path / "alone.yaml"
    stages = [{"steps": 4}]
    subnet = {"half": {"hidden_size": 96}, "small": None}
    given = {"elastic": {"budgets": {"large": None, "small": None, "half": 0.5}, "subnets": subnet}}
    file.write_text(yaml.safe_dump({"base": ["tiny_parent.yaml"], **given, "train": {"stages": stages}}))
    found = load_config(file, ["elastic.budgets.full=null"])
    assert dict(found.config.elastic.budgets) == {"half": 0.5} and list(found.config.elastic.subnets) == ["half"]
    assert not [key for key in found.origins if key.endswith((".large", ".full", "subnets.small"))]
    assert load_values(found.values) == found.config
