"""NeMo-Run's executors: one really runs a recipe in two processes; what would be submitted to Slurm is shown whole.

The script is the one of docs/python.md, with its arguments changed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def documented(partial: str, executor: str) -> str:
    """The script of the page, of another recipe and executor."""
    (script,) = re.findall(r"```python\n(import nemo_run as run\n.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    script = re.sub(r"run\.Partial\(.*\)", f"run.Partial({partial})", script)
    return re.sub(r"executor=run\.LocalExecutor\(.*?\)", f"executor={executor}", script)


def run_script(folder: Path, script: str) -> str:
    """What it shows, run in `folder` with the environment's programs on the PATH."""
    (folder / "launch.py").write_text(script)
    own = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment = own | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "NEMORUN_HOME": str(folder / "home"), "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "launch.py"], capture_output=True, text=True, cwd=folder, env=environment, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def test_a_local_executor_runs_a_recipe_once_in_its_processes(tmp_path: Path) -> None:
    write_run(tmp_path)
    recipe = 'recipes.rank, config="run.yaml", out="ranked", overrides=["rank.depth=one_shot"]'
    shown = run_script(tmp_path, documented(recipe, 'run.LocalExecutor(ntasks_per_node=2, launcher="torchrun")'))
    assert "SUCCEEDED" in shown
    (experiment,) = (tmp_path / "home" / "experiments").glob("*/*")  # the guard: no process launched another one
    assert (experiment / "_DONE").is_file()
    about = json.loads((tmp_path / "ranked" / "importance" / "importance.json").read_text())["provenance"]
    assert about["config"]["depth"] == "one_shot" and about["parallel"] == {"tp": 1, "pp": 1, "dp": 2}


def test_a_slurm_executor_shows_what_it_would_submit(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("base: [tiny_parent.yaml]\n")
    recipe = f'recipes.train, config="{tmp_path}/run.yaml", out="{tmp_path}/out", resume=True'
    executor = (
        'run.SlurmExecutor(account="us", partition="gpu", nodes=2, ntasks_per_node=8, gpus_per_node=8, '
        f'time="04:00:00", launcher="torchrun", tunnel=run.LocalTunnel(job_dir="{tmp_path}/jobs"), '
        "packager=run.Packager()), dryrun=True"
    )
    shown = run_script(tmp_path, documented(recipe, executor))
    for words in (
        "#SBATCH --account=us", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --time=04:00:00",
        "torchrun --rdzv-backend c10d", "--nnodes 2 --nproc-per-node 8",
        "nemo_run.core.runners.fdl_runner -n nemo_elastic.nemo.recipes.train",
    ):  # fmt: skip
        assert words in shown, words
    assert not (tmp_path / "out").exists()
