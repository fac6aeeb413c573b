"""The plain parent is the same model in every parallel layout: losses, gradients, gradient norm, trained weights.

The cheap cases run one step of Megatron's own schedule in the worker pools. The slow ones are NeMo training as
torchrun starts it on a cluster, 10 steps from one checkpoint, fp32.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pool_plain
import pytest
import torch
from worker_pool import WorkerPool

STEPS = 10
LAYOUTS: dict[str, list[str]] = {
    "tp2": ["--tp", "2"],
    "pp2": ["--pp", "2"],
    "tp2_sp": ["--tp", "2", "--sp"],
    "tp2_pp2_sp": ["--tp", "2", "--pp", "2", "--sp"],
}


@pytest.fixture(scope="module")
def one_process(pool2: WorkerPool) -> dict[str, Any]:
    """The step of the single-process layout (both ranks of the pool run it, as data-parallel twins)."""
    first, second = pool2.run(pool_plain.plain_step)
    assert first["losses"] == second["losses"]
    return first | {"gradients": pool_plain.assemble([first["parts"], second["parts"]])}


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, {"tp": 2}), (2, {"pp": 2}), (2, {"tp": 2, "sp": True}), (4, {"tp": 2, "pp": 2, "sp": True}), (4, {"tp": 4})],
    ids=["tp2", "pp2", "tp2_sp", "tp2_pp2_sp", "tp4"],
)
def test_one_step_is_the_same(
    request: pytest.FixtureRequest, one_process: Mapping[str, Any], size: int, layout: dict[str, Any]
) -> None:
    ranks = request.getfixturevalue(f"pool{size}").run(pool_plain.plain_step, **layout)
    assert ranks[-1]["losses"] == pytest.approx(one_process["losses"], rel=1e-6)
    for rank in ranks:
        assert rank["grad_norm"] == pytest.approx(one_process["grad_norm"], rel=1e-6)
    gradients = pool_plain.assemble([rank["parts"] for rank in ranks])
    assert gradients.keys() == one_process["gradients"].keys()
    for key, expected in one_process["gradients"].items():
        # 1e-5 but for the sums that cancel most: A_log's gradient at TP4 is 1.1e-5 away in fp32
        assert relative_l2(gradients[key], expected) < 2e-5, key


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


def train(out: Path, processes: int, *arguments: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of a torchrun of train_plain.py."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(here / "train_plain.py"), str(out), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    (checkpoint,) = (out / "checkpoints").iterdir()
    return json.loads((out / "losses.json").read_text()), read_weights(checkpoint / "weights")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's global tensors of a torch_dist checkpoint, by key."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith("module.")
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from in every layout: initial weights depend on TP (a step with no learning rate)."""
    out = tmp_path_factory.mktemp("start")
    train(out, 1, "--steps", "1", "--lr", "0")
    return next((out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def single(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses, weights = train(tmp_path_factory.mktemp("single"), 1, "--steps", str(STEPS), "--restore", str(start))
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1.0, "the run must learn, or sameness says nothing"
    return losses, weights


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nemo_training_is_the_same(
    layout: str, start: Path, single: tuple[list[float], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    arguments = LAYOUTS[layout]
    processes = 4 if "--tp" in arguments and "--pp" in arguments else 2
    losses, weights = train(tmp_path, processes, *arguments, "--steps", str(STEPS), "--restore", str(start))
    assert losses == pytest.approx(single[0], rel=1e-4)
    assert weights.keys() == single[1].keys()
    for key, expected in single[1].items():
        assert relative_l2(weights[key].double(), expected.double()) < 1e-3, key
