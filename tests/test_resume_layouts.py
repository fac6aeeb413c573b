"""A run with the distributed optimizer goes on in any layout, and its router is restored exactly.

The router is replicated over tensor-parallel ranks and stages but its optimizer state lies in every stage's
distributed buffers: what is saved must be one state, and what is loaded the same one everywhere.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "train.stages=[{steps: 5, seq_length: 64, global_batch_size: 8}, "
    "{steps: 3, seq_length: 128, global_batch_size: 4}]",
    "train.micro_batch_size=2", "train.use_distributed_optimizer=true", "train.save_every_steps=4",
    "train.val_every_steps=100", "train.val_samples=4", "rank.samples=4", "rank.depth_samples=2", "rank.seq_length=64",
    "router.shapes=learned", "router.warmup_fraction=0.125", "router.soft_fraction=0.5", "router.freeze_fraction=0.25",
)  # fmt: skip


def train(out: Path, processes: int, tp: int, pp: int, cp: int, *words: str) -> None:
    sizes = {"tensor_model": tp, "pipeline_model": pp, "context": cp}
    layout = [f"train.{name}_parallel_size={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", "nemo_elastic", "train", "--config", "conf/tiny_parent.yaml", "--out", str(out)]
    done = subprocess.run(
        [*command, "--nproc", str(processes), *words, *layout, *RUN],
        capture_output=True, text=True, cwd=ROOT, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def records(out: Path) -> dict[int, dict]:
    return {r["step"]: r for r in map(json.loads, (out / "logs" / "train.jsonl").read_text().splitlines())}


def heldout(out: Path) -> dict[str, float]:
    """Of every budget, at the end."""
    return json.loads((out / "logs" / "validation.jsonl").read_text().splitlines()[-1])["losses"]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, router, optimizer."""
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    with TorchDistReader(folder) as reader:
        return {n: reader.read(n) for n in reader.names()} | {k: reader.read_key(k) for k in reader.other_keys()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages by two replicas, to the end."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, 4, 1, 2, 1)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step=3", "step=7"]
    return out


def test_a_self_taught_family_resumes_to_the_bit(tmp_path: Path) -> None:
    """Two stages; what teaches is in the checkpoint."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    train(whole, 2, 1, 2, 1, "distill.teacher=self")
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step=7")
    shutil.rmtree(copy / "nested")
    train(copy, 2, 1, 2, 1, "distill.teacher=self", "--resume")
    assert heldout(copy) == heldout(whole)
    ours, theirs = (state(out / "checkpoints" / "step=7") for out in (copy, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


LAYOUTS = {"same": (4, 1, 2, 1), "tp2": (2, 2, 1, 1), "single": (1, 1, 1, 1), "cp2": (2, 1, 1, 2)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_resume_in_any_layout(whole: Path, tmp_path: Path, layout: tuple[int, ...]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step=7")
    shutil.rmtree(copy / "nested")
    (copy / "logs" / "train.jsonl").unlink()
    train(copy, *layout, "--resume")
    again, before = records(copy), records(whole)
    assert sorted(again) == [5, 6, 7, 8]
    for step, record in again.items():
        assert record["phase"] == before[step]["phase"]
        for name, budget in record["budgets"].items():
            assert budget["kd"] == pytest.approx(before[step]["budgets"][name]["kd"], rel=1e-5, abs=1e-6)
        for name, router in record.get("router", {}).items():
            assert router["price"] == pytest.approx(before[step]["router"][name]["price"], rel=1e-5)
    for name, loss in heldout(copy).items():
        assert loss == pytest.approx(heldout(whole)[name], rel=1e-5)
    ours, theirs = state(copy / "checkpoints" / "step=7"), state(whole / "checkpoints" / "step=7")
    assert {"optimizer", "router"} <= {part for name in theirs for part in name.split(".")}
    for name, expected in theirs.items():
        if layout == LAYOUTS["same"]:
            assert torch.equal(ours[name], expected), name
        elif not name.startswith("optimizer"):
            error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-6)
            assert error < 1e-3, f"{name}: {error:.1e}"
