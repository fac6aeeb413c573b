"""What the benchmarks that train share: verbs as processes of their own, and one ranking for a series of runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "tiny_parent.yaml"
QUICK = (
    "train.stages=[{steps: 12, global_batch_size: 8}]",
    "train.val_samples=8",
    "train.val_every_steps=12",
    "rank.samples=8",
    "rank.depth_samples=2",
)


def nemo_elastic(verb: str, out: Path, words: Iterable[str]) -> None:
    """One verb in a process of its own; its log goes to OUT/VERB.log."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-m", "nemo_elastic", verb, "--config", CONFIG, "--out", str(out), *words]
    with (out / f"{verb}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        tail = (out / f"{verb}.log").read_text(encoding="utf-8").splitlines()[-8:]
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(tail))


def ranked(out: Path, quick: bool) -> Path:
    """Importance and the sorted parent that all runs start from."""
    base = out / "base"
    if not (base / "sorted").is_dir():
        shutil.rmtree(base, ignore_errors=True)
        words = list(QUICK if quick else ())
        nemo_elastic("rank", base, words)
        nemo_elastic("sort", base, words)
    return base
