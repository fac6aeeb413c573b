"""The examples run: real torchrun and real training in small sizes; stand-ins for sbatch, srun, scontrol and docker."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import write_run

from nemo_elastic.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = [*sorted(EXAMPLES.glob("*/*.sh")), EXAMPLES / "slurm" / "job.sbatch"]
STANDINS = {
    "sbatch": """
echo "$@" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
SLURM_JOB_ID=$((100 + $(wc -l < "$CALLS"))) SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 bash "$@" >&2 || exit
echo $((100 + $(wc -l < "$CALLS")))
""",
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$CALLS"; fi\n',
    "docker": 'printf "%s\\n" "$@" > "$CALLS"\n',
    "nemo-elastic": f'exec {sys.executable} -m nemo_elastic "$@"\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which the commands of the examples are found."""
    return stand_in(tmp_path, {})


def stand_in(tmp_path: Path, other: dict[str, str]) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in {**STANDINS, **other}.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + body)
        (folder / name).chmod(0o755)
    own = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return os.environ | own | {"CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "run"), "GPUS": "2"}


def done(environment: dict[str, str], script: Path, *words: str, code: int = 0) -> str:
    run = subprocess.run(["bash", str(script), *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code, (run.stdout + run.stderr)[-5000:]
    return run.stdout


def check_family(out: Path, children: int) -> None:
    assert len([p for p in (out / "children").iterdir() if (p / "weights").is_dir()]) == children
    assert (out / "report" / "report.html").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, "-s", "bash", str(script)], check=True)
    assert not any(word in script.read_text() for word in ("curl ", "wget ", "pip install", "huggingface-cli"))


def test_the_container_job_has_no_network_and_runs_the_pipeline(environment: dict[str, str], tmp_path: Path) -> None:
    more = {"CONFIG": "conf/tiny_parent.yaml", "DATA": str(tmp_path)}
    done(environment | more, EXAMPLES / "ngc" / "run.sh", "train.tensor_model_parallel_size=8")
    words = Path(environment["CALLS"]).read_text().splitlines()
    assert words[words.index("--network") + 1] == "none" and words[words.index("--gpus") + 1] == "all"
    command = words[words.index("nemo_elastic:latest") + 1 :]
    assert command == ["bash", "examples/torchrun/run.sh", "train.tensor_model_parallel_size=8"]
    assert (ROOT / command[1]).is_file()


WORKER = """
trap 'sleep 0.5; touch "$CALLS.saved"; exit 143' TERM
touch "$CALLS.up"
for _ in {1..100}; do sleep 0.1; done
"""


@pytest.mark.parametrize("script", ["node.sh", "job.sbatch"])
def test_a_preempted_job_lets_its_workers_save_and_is_queued_again(tmp_path: Path, script: str) -> None:
    """torchrun is a stand-in that fails with its worker, as the real one does, and kills it on SIGTERM."""
    torchrun = 'echo "$@" > "$CALLS.words"\nworker &\ntrap "kill -9 $!" TERM\nwait $! || exit 1\n'
    own = {"HERE": str(EXAMPLES / "slurm"), "CONFIG": "x.yaml", "RDZV_ID": "7", "RDZV_ENDPOINT": "localhost:1"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    environment = stand_in(tmp_path, {"torchrun": torchrun, "worker": WORKER}) | own | slurm
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    job = subprocess.Popen(["bash", str(EXAMPLES / "slurm" / script), "train"], env=environment, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls.up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)  # as Slurm does: the whole process group of the task
    assert job.wait(30) == 143
    assert (tmp_path / "calls.saved").exists()
    assert "--resume" in (tmp_path / "calls.words").read_text().split()
    if script == "job.sbatch":
        assert (tmp_path / "calls").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    config = write_run(tmp_path / "parent", 4)
    words = ("train.tensor_model_parallel_size=2", "elastic.dims.mamba_num_heads.per_layer=false")
    done(environment | {"CONFIG": str(config), "NPROC": "2"}, EXAMPLES / "torchrun" / "run.sh", *words)
    check_family(tmp_path / "run", 3)


@pytest.mark.slow
def test_slurm(environment: dict[str, str], tmp_path: Path) -> None:
    config = write_run(tmp_path / "parent", 4)
    words = ("train.pipeline_model_parallel_size=2", "elastic.dims.mamba_num_heads.per_layer=false",
             "elastic.dims.num_layers.choices=[8,6]")  # fmt: skip
    more = {"CONFIG": str(config), "SBATCH_ARGS": "--partition=x --time=1:00:00"}
    said = done(environment | more, EXAMPLES / "slurm" / "submit.sh", *words)
    assert said == "submitted: rank 101, train 102, extract 103\n"
    calls = Path(environment["CALLS"]).read_text().splitlines()
    assert [("--dependency" in call, "--partition=x" in call) for call in calls] == [(n > 0, True) for n in range(3)]
    assert "afterok:101" in calls[1] and "afterok:102" in calls[2]
    check_family(tmp_path / "run", 3)


@pytest.mark.slow
def test_bring_your_own_parent(environment: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from nemo_elastic.family import family_of

    small = write_run(tmp_path / "parent", 4)
    layout = family_of(load_config(EXAMPLES / "bring_your_own_parent" / "parent.yaml").config).layout
    generator = torch.Generator().manual_seed(0)
    shapes = {name: spec.shape({}) for name, spec in layout.table.items()}
    weights = {n: torch.randn(s, generator=generator) / math.sqrt(s[-1]) for n, s in shapes.items()}
    weights |= {n: torch.rand(w.shape, generator=generator) + 0.5 for n, w in weights.items() if "norm" in n}
    save_file(weights, tmp_path / "parent" / "parent.safetensors")
    data = load_config(small).values["data"]
    words = [
        f"data.tokenizer={data['tokenizer']}", f"data.paths={data['paths']}", f"data.cache_dir={data['cache_dir']}",
        "rank.samples=4", "rank.depth_samples=1", "rank.seq_length=32", "rank.min_layers=21", "rank.depth=one_shot",
        "train.stages=[{steps: 3, seq_length: 32, global_batch_size: 2}]", "train.val_samples=2",
    ]  # fmt: skip
    more = {"PARENT": str(tmp_path / "parent" / "parent.safetensors")}
    done(environment | more, EXAMPLES / "bring_your_own_parent" / "run.sh", *words)
    check_family(tmp_path / "run", 2)
    assert sorted(p.name for p in (tmp_path / "run" / "hf").iterdir()) == ["full", "two_thirds"]
    assert (tmp_path / "run" / "hf" / "two_thirds" / "config.json").is_file()


@pytest.mark.slow
def test_resume_at_another_layout(environment: dict[str, str], tmp_path: Path) -> None:
    config = write_run(tmp_path / "parent", 12)
    words = ("train.save_every_steps=4", "elastic.dims.mamba_num_heads.per_layer=false",
             "elastic.dims.num_layers.choices=[8,6]")  # fmt: skip
    said = done(environment | {"CONFIG": str(config)}, EXAMPLES / "resume_other_layout" / "run.sh", *words)
    assert "first layout ended with exit code 1" in said  # torchrun's, of workers that left with 143
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "logs" / "train.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in range(1, 13)]
    assert len(list((tmp_path / "run" / "children").iterdir())) == 3


def test_the_curriculum_is_the_papers() -> None:
    config = load_config(EXAMPLES / "reasoning_curriculum" / "curriculum.yaml").config
    assert [s.tokens for s in config.train.stages] == [65_000_000_000, 45_000_000_000]
    assert all(0 <= s.steps * s.seq_length * s.global_batch_size - s.tokens < 3e7 for s in config.train.stages)
    assert [s.weight for s in config.data.blend] == [70, 30]


@pytest.mark.slow
def test_the_curriculum_in_small(environment: dict[str, str], tmp_path: Path) -> None:
    config = write_run(tmp_path / "parent", 4)
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(f'{{"prompt": "what is {i}?", "completion": "it is {i * i}"}}\n' for i in range(400)))
    shares = "{full: 0.5, large: 0.3, small: 0.2}"
    words = [
        "data.paths=[]", f"data.blend=[{{path: {chat}, weight: 70}}, {{path: {tmp_path}/parent/text.txt, weight: 30}}]",
        "train.stages=[{tokens: 512, seq_length: 32, global_batch_size: 8}, "
        f"{{tokens: 256, seq_length: 64, global_batch_size: 4, micro_batch_size: 1, budget_probabilities: {shares}}}]",
    ]  # fmt: skip
    command = [sys.executable, "-m", "nemo_elastic", "train", "--config", str(config), "--out", environment["OUT"]]
    run = subprocess.run([*command, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert len((tmp_path / "run" / "logs" / "train.jsonl").read_text().splitlines()) == 3
