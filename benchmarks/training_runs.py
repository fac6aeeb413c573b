"""What the benchmarks that train share: verbs as processes of their own, watched step by step, and one ranking."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import ROOT, Seconds

CONFIG = "tiny_parent.yaml"
QUICK_RANK = ("rank.samples=8", "rank.depth_samples=2")
QUICK = (
    "train.stages=[{steps: 6, global_batch_size: 8}]",
    "train.val_samples=4",
    "train.val_every_steps=6",
    *QUICK_RANK,
)
TICKS = os.sysconf("SC_CLK_TCK")


def nemo_elastic(verb: str, out: Path, words: Iterable[str]) -> list[Seconds]:
    """One verb in a process of its own; its log goes to OUT/VERB.log. What `watched` says of its training steps."""
    command = [sys.executable, "-m", "nemo_elastic", verb, "--config", CONFIG, "--out", str(out), *words]
    return watched(command, out / f"{verb}.log", out / "logs" / "train.jsonl")


def watched(command: Sequence[str], log: Path, marks: Path) -> list[Seconds]:
    """Run a command; wall and CPU seconds since its start when each line of `marks` was there, then in all.

    It is looked at every 20 ms; CPU seconds are those of /proc, which counts in 1/100 s, all threads together.

    Raises:
        SystemExit: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    marks.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    found: list[Seconds] = []
    with log.open("w", encoding="utf-8") as file:
        begin = time.perf_counter()
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            while not (waited := os.wait4(running.pid, os.WNOHANG))[0]:
                new = lines(marks) - len(found)
                found += [Seconds(time.perf_counter() - begin, cpu_seconds(running.pid))] * new
                time.sleep(0.02)
        except BaseException:
            running.kill()
            raise
        _, status, usage = waited
        whole = Seconds(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        tail = log.read_text(encoding="utf-8").splitlines()[-8:]
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(tail))
    return [*found, whole]


def lines(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def cpu_seconds(pid: int) -> float:
    """User and system time of a running process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rank_words(quick: bool) -> tuple[str, ...]:
    """How the parent is ranked; `train` is told the same, or it refuses the scores."""
    return QUICK_RANK if quick else ()


def ranked(out: Path, quick: bool) -> Path:
    """Importance and the sorted parent that all runs start from."""
    base = out / "base"
    if not (base / "sorted").is_dir():
        shutil.rmtree(base, ignore_errors=True)
        nemo_elastic("rank", base, rank_words(quick))
        nemo_elastic("sort", base, rank_words(quick))
    return base


def prepared(base: Path, folder: Path) -> Path:
    """A new run folder that begins with what `ranked` made."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("importance", "sorted"):
        shutil.copytree(base / part, folder / part)
    return folder
