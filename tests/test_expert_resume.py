"""A run whose ranks share out experts goes on in one process, at TP 2 and back, and its family comes out of it.

One budget alone is drawn, and no router learns: other expert-parallel sizes draw otherwise, which is no fault.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_features import FEATURES, SIZES, skip_without_slot
from small_run import write_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "train.stages=[{steps: 8, seq_length: 32, global_batch_size: 8, "
    "budget_probabilities: {full: 0.0, large: 0.0, small: 1.0}}]",
    "router.shapes=even", "train.use_distributed_optimizer=true", "train.save_every_steps=2",
    "train.val_every_steps=100", "rank.samples=4", "elastic.dims.num_moe_experts={choices: [8, 4]}",
    "elastic.expert_groups=4",
)  # fmt: skip


def nemo_elastic(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nemo_elastic", *words], capture_output=True, text=True, cwd=ROOT, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def train(config: Path, out: Path, processes: int, *words: str) -> dict[int, dict]:
    """Records by step."""
    start = ("train", "--config", str(config), "--out", str(out), "--nproc", str(processes))
    done = nemo_elastic(*start, *WORDS, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return {r["step"]: r for r in map(json.loads, (out / "logs" / "train.jsonl").read_text().splitlines())}


def go_on(config: Path, before: Path, out: Path, last: int, processes: int, *words: str) -> dict[int, dict]:
    """The run of `before` again from its checkpoint `step=LAST`."""
    shutil.copytree(before, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step=")) > last:
            shutil.rmtree(folder)
    shutil.rmtree(out / "nested")
    (out / "logs" / "train.jsonl").unlink()
    return train(config, out, processes, "--resume", *words)


def weights(out: Path) -> dict[str, torch.Tensor]:
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    with TorchDistReader(out / "checkpoints" / "step=7") as reader:
        return {n: reader.read(n).float() for n in reader.names() if not n.startswith("optimizer")}


def test_resume_at_other_expert_parallel_sizes(tmp_path: Path) -> None:
    """EP 2, then one process, then EP 2 again; EP 2, then EP 2 x TP 2: the numbers of the run that was left alone."""
    skip_without_slot()
    model = SIZES | FEATURES["nemotron"]
    config = write_run(tmp_path / "parent", steps=8, hybrid_override_pattern="ME*-MEM*", **model)
    shared = "train.expert_model_parallel_size=2"
    whole = train(config, tmp_path / "whole", 2, shared)
    wanted = weights(tmp_path / "whole")
    assert (tmp_path / "whole" / "nested" / "elastic" / "manifest.json").is_file()
    ways = [
        ("alone", tmp_path / "whole", 3, 1, ()),
        ("back", tmp_path / "alone", 5, 2, (shared,)),
        ("tensor", tmp_path / "whole", 3, 4, (shared, "train.tensor_model_parallel_size=2")),
    ]
    for name, before, last, processes, words in ways:
        out = tmp_path / name
        records = go_on(config, before, out, last, processes, *words)
        assert sorted(records) == list(range(last + 2, 9)), name
        for step, record in records.items():
            kd = record["budgets"]["small"]["kd"]
            assert kd == pytest.approx(whole[step]["budgets"]["small"]["kd"], rel=1e-4, abs=1e-6), (name, step)
        for parameter, found in weights(out).items():
            error = (found - wanted[parameter]).norm() / wanted[parameter].norm().clamp_min(1e-6)
            assert error < 1e-3, f"{name} {parameter}: {error:.1e}"
    done = nemo_elastic(
        "extract", str(tmp_path / "whole" / "nested"), "--budget", "small", "--out", str(tmp_path / "x")
    )
    assert done.returncode == 0, done.stderr[-2000:]
