"""The shipped parent with experts through the pipeline, short: verified, its load logged, its bias moved, resumed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expert_features import skip_without_slot
from small_run import records
from test_quickstart import ROOT, SHORT, nemo_elastic

from nemo_elastic.config import load_config
from nemo_elastic.config.model_fields import model_problems
from nemo_elastic.config.rules import rule_problems
from nemo_elastic.cost.counts import active_parameters, parameters
from nemo_elastic.family import family_of

CONFIG = ("--config", "conf/tiny_experts.yaml")
RATE = 0.001
# Rows of the log after steps 3, 6, 9 and 10, checkpoints after 4 and 8: a resume goes on with half of a row's counts.
MOVED = (*SHORT, "train.log_every_steps=3", f"train.moe_router_bias_update_rate={RATE}")
LAYERS = ("1", "4", "6", "8", "11")


def test_the_configuration_is_the_parents_and_its_budgets_differ_in_what_they_count() -> None:
    run = load_config("tiny_experts.yaml").config
    shipped = json.loads((ROOT / "nemo_elastic" / "assets" / "tiny_experts" / "config.json").read_text())
    assert dict(run.model) == shipped
    family = family_of(run)
    full = family.space.full_subnet()
    assert (parameters(family.layout, full), active_parameters(family.layout, full)) == (1_891_684, 1_154_404)
    assert {b.name: b.kind for b in family.budgets} == {
        "full": "fraction", "large": "active_parameters", "small": "fraction",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.moe_router_bias_update_rate=-1",), "train.moe_router_bias_update_rate: -1.0 must be from 0 to 1"),
        (("train.moe_router_bias_update_rate=.inf",), "train.moe_router_bias_update_rate: inf must be finite"),
    ],
)
def test_a_rate_that_is_none_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match="moe_router_bias_update_rate") as refused:
        load_config("tiny_experts.yaml", list(words))
    assert said in str(refused.value)


def test_a_rate_without_a_bias_or_in_the_model_section_is_refused() -> None:
    with pytest.raises(ValueError, match=r"moves a bias that this parent has not"):
        load_config("tiny_parent.yaml", ["train.moe_router_bias_update_rate=0.001"])
    run = load_config("tiny_experts.yaml").config
    assert not rule_problems(run)
    (problem,) = model_problems({**run.model, "moe_router_bias_update_rate": 1e-3})
    assert "give train.moe_router_bias_update_rate" in problem.message


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    skip_without_slot()
    out = tmp_path_factory.mktemp("experts") / "run"
    done = nemo_elastic("quickstart", *CONFIG, "--json", "--out", str(out), *MOVED)
    return out, json.loads(done.stdout)


@pytest.mark.usefixtures("one_rank")
def test_reap_keeps_more_than_frequency_and_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw, half of the experts, a few windows of what `benchmarks/expert_ranking.py` measures."""
    skip_without_slot()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("nemo_elastic.mcore.runtime.process_groups.start", lambda *sizes: None)
    from expert_ranking import Study

    parent = ROOT / "nemo_elastic" / "assets" / "tiny_experts"
    study = Study(SimpleNamespace(parent=parent, counts=[8], windows=8, samples=16, seq_length=128))
    found = {name: study.losses(orders)["8"] for name, orders in study.scores(0).items()}
    assert study.parent_loss < found["reap"] < min(found["frequency"], found["random"])


@pytest.mark.slow
def test_quickstart_verifies_the_family_and_shows_its_load(short_run: tuple[Path, dict[str, Any]]) -> None:
    out, result = short_run
    assert result["verified"] is True and [b["name"] for b in result["budgets"]] == ["full", "large", "small"]
    log = records(out, "train")
    assert [r["step"] for r in log if "expert_load" in r] == [3, 6, 9, 10]
    sums = dict.fromkeys(LAYERS, 0)
    for row in (r["expert_load"].get("full", {"tokens": {}}) for r in log if "expert_load" in r):
        for layer, tokens in row["tokens"].items():
            sums[layer] += sum(tokens)
    assert set(sums.values()) == {4 * log[-1]["tokens"]["full"]} and log[-1]["tokens"]["full"] > 0
    last = next(r["expert_load"]["small"] for r in reversed(log) if "small" in r.get("expert_load", {}))
    small = next(b for b in result["budgets"] if b["name"] == "small")["subnet"]
    for layer, tokens in last["tokens"].items():
        assert int(layer) in small["layers"]
        assert sum(n is not None for n in tokens) == small["num_moe_experts"]
    assert "Load of experts" in Path(result["report"]).read_text() and (out / "report" / "expert_load.png").is_file()


@pytest.mark.slow
def test_the_bias_moved_by_the_rate_a_step_and_a_resume_moves_it_alike(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
    from nemo_elastic.mcore.models.parents import sorted_parent

    out, _ = short_run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    for part in ("checkpoints/step=9", "nested"):
        shutil.rmtree(copy / part)
    nemo_elastic("train", *CONFIG, "--out", str(copy), "--resume", *MOVED)
    parent = sorted_parent(out / "sorted").reader
    with TorchDistReader(out / "nested") as whole, TorchDistReader(copy / "nested") as resumed:
        for name in whole.names():
            assert torch.equal(whole.read(name), resumed.read(name)), name
        for layer in LAYERS:
            name = f"decoder.layers.{layer}.mlp.router.expert_bias"
            steps = (whole.read(name) - parent.read(name).float()) / RATE
            assert (steps - steps.round()).abs().max() < 1e-2 and 0 < steps.abs().max() < 10.5
    one, other = ([r.get("expert_load") for r in records(folder, "train")] for folder in (out, copy))
    assert one == other
