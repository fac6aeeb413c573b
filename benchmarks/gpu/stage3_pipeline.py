"""Stage 3: the quickstart cut to 12 steps, in fp32 and bf16, then one more step from what it saved."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from registry import ROOT, Found, Machine, check

STEPS = 12
STAGE = "train.stages=[{{steps: {steps}, seq_length: {length}, global_batch_size: {batch}}}]"


def nemo_elastic(machine: Machine, *words: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own.

    Raises:
        AssertionError: it left with another code than 0, with the end of what it said.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    if not machine.is_cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nemo_elastic", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words[:1])}: {(done.stderr or done.stdout)[-2500:]}"
    return done


def overrides(machine: Machine, precision: str, steps: int) -> list[str]:
    length, batch = (32, 2) if machine.tiny else (256, 8)
    words = [STAGE.format(steps=steps, length=length, batch=batch), f"train.precision={precision}"]
    if machine.tiny:
        words += ["rank.samples=2", "rank.depth_samples=1", "rank.seq_length=32", "train.micro_batch_size=2"]
        words += ["train.val_samples=2", "rank.micro_batch_size=2", "rank.min_layers=14"]
        words += ["elastic.dims.num_layers={choices: [16, 15, 14]}", "elastic.budgets.small=0.7"]
        words += ["router.tolerance=0.5"]
    return [*words, "train.optimizer.warmup_steps=1", "train.save_every_steps=1000"]


def cut_run(machine: Machine, folder: Path, precision: str) -> Found:
    """Rank to verify, then `train --resume` with a step more.

    Raises:
        AssertionError: a command failed, or a child is not its nested subnet.
    """
    steps, out = 1 if machine.tiny else STEPS, folder / "run"
    done = nemo_elastic(machine, "quickstart", "--json", "--out", str(out), *overrides(machine, precision, steps))
    result = json.loads(done.stdout)
    assert result["verified"], result["budgets"]
    worst = max(budget["max_abs_difference"] for budget in result["budgets"])
    return Found({"verified": True, "max_abs_difference": worst, "seconds": round(sum_of(result["seconds"]), 1)})


def sum_of(seconds: float | dict[str, float]) -> float:
    return sum(seconds.values()) if isinstance(seconds, dict) else seconds


@check(stage=3, seconds=60)
def pipeline_fp32(machine: Machine) -> Found:
    """Rank, sort, train, nest, extract, verify in fp32"""
    with tempfile.TemporaryDirectory() as folder:
        return cut_run(machine, Path(folder), "32")


@check(stage=3, seconds=60)
def pipeline_bf16(machine: Machine) -> Found:
    """Rank, sort, train in bf16-mixed, stopped, then resumed for a step"""
    with tempfile.TemporaryDirectory() as folder:
        out, steps = Path(folder) / "run", 1 if machine.tiny else STEPS
        for count, more in ((steps, []), (steps + 1, ["--resume"])):
            words = ["train", "--config", "tiny_parent.yaml", "--out", str(out), *more]
            nemo_elastic(machine, *words, *overrides(machine, "bf16-mixed", count))
        lines = [json.loads(line) for line in (out / "logs" / "train.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 2)), lines
        return Found({"steps": len(lines), "last_kd": max(b["kd"] for b in lines[-1]["budgets"].values())})
