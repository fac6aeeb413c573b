"""The whole pipeline as a user runs it, short: real processes, real NeMo, the shipped parent; then its parts again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    # The stages change length, batch and rate between two checkpoints.
    "train.stages=[{steps: 5, seq_length: 128, global_batch_size: 8}, "
    "{tokens: 5120, seq_length: 256, global_batch_size: 4, micro_batch_size: 2, lr: 5.0e-4}]",
    "distill.budgets_per_batch=2",
    "train.val_samples=8",
    "train.val_every_steps=5",
    "train.save_every_steps=4",
    "rank.samples=8",
    "rank.depth_samples=2",
)


def nemo_elastic(*words: str, code: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "nemo_elastic", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=1500,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    done = nemo_elastic("quickstart", "--json", "--out", str(out), *SHORT)
    return out, json.loads(done.stdout)


def test_quickstart_ends_with_a_verified_family_and_a_report(short_run):
    out, result = short_run
    assert result["verified"] is True
    assert [b["name"] for b in result["budgets"]] == ["full", "large", "small"]
    for budget in result["budgets"]:
        assert abs(budget["heldout_nested"] - budget["heldout_child"]) < 1e-5
        assert budget["check"]["numel"] == budget["parameters"]
        assert abs(budget["parameters"] / (budget["target"]["value"] * result["parent"]["parameters"]) - 1) < 0.01
    page = Path(result["report"]).read_text()
    assert "<svg" in page or "data:image/png;base64," in page
    assert (out / "nested" / "elastic" / "manifest.json").is_file()
    assert (out / "config.json").is_file()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step=3", "step=7", "step=9"]
    last = json.loads((out / "logs" / "validation.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 10  # what is nested is the end of the run, not the last round number of steps
    for budget in result["budgets"]:
        assert abs(budget["heldout_nested"] - last["losses"][budget["name"]]) < 1e-5
    phases = [json.loads(line)["phase"] for line in (out / "logs" / "train.jsonl").read_text().splitlines()]
    assert phases == ["race"] * 3 + ["frozen"] * 7


def test_a_child_can_be_read_out_again_and_verified(short_run, tmp_path):
    out, _ = short_run
    target = tmp_path / "small"
    nemo_elastic("extract", str(out / "nested"), "--budget", "small", "--out", str(target))
    done = nemo_elastic("verify", str(out / "nested"), str(target), "--json")
    assert json.loads(done.stdout)["verified"] is True
    refused = nemo_elastic("extract", str(out / "nested"), "--budget", "small", "--out", str(target), code=2)
    assert "--force" in refused.stderr


def test_a_child_that_is_not_the_nested_subnet_fails_verification(short_run, tmp_path):
    out, _ = short_run
    target = tmp_path / "small"
    nemo_elastic("extract", str(out / "nested"), "--budget", "large", "--out", str(target))
    # The weights of another child under this one's name: sizes do not fit, so it is refused as bad input.
    refused = nemo_elastic("verify", str(out / "nested"), str(target), "--budget", "small", code=2)
    assert "shape" in refused.stderr


def test_resume_goes_on_where_the_run_stopped_and_ends_with_the_same_weights(short_run, tmp_path):
    import shutil

    import torch

    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    out, _ = short_run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints" / "step=9")
    shutil.rmtree(copy / "nested")
    nemo_elastic("train", "--config", "conf/tiny_parent.yaml", "--out", str(copy), "--resume", *SHORT)
    with TorchDistReader(out / "nested") as whole, TorchDistReader(copy / "nested") as resumed:
        assert whole.names() == resumed.names()
        for name in whole.names():
            assert torch.equal(whole.read(name), resumed.read(name)), name


def test_two_by_two_processes_give_the_single_process_table(short_run, tmp_path):
    _, single = short_run
    done = nemo_elastic(
        "quickstart", "--json", "--nproc", "4", "--out", str(tmp_path / "run"),
        "train.tensor_model_parallel_size=2", "train.pipeline_model_parallel_size=2", *SHORT,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["verified"] is True
    for ours, theirs in zip(result["budgets"], single["budgets"], strict=True):
        assert ours["subnet"] == theirs["subnet"]
        assert abs(ours["heldout_nested"] - theirs["heldout_nested"]) < 1e-3
        assert abs(ours["heldout_before"] - theirs["heldout_before"]) < 1e-3
