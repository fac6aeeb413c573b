"""The paper's experiment at the size of two CPU cores: one command, resumable at any point, a file per run.

    python examples/paper_small/run.py --out runs/paper_small                     # everything: about 10 core-hours
    python examples/paper_small/run.py --out runs/paper_small --groups headline --seeds 1 --jobs 2
    python examples/paper_small/run.py --out runs/paper_small --quick              # a few steps of each: that it runs

Makes the parent (`parent.py`), ranks and sorts it, does every run of `runs.py` that has no file in RESULTS yet (an
interrupted one goes on from its newest checkpoint), and writes docs/results.md from the files (`results.py`).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from problems import blend
from runs import BASES, GROUPS, OTHER_SHAPES, REPEATED, RUNS, Run
from shapes import random_subnets

from nemo_elastic.config import load_config
from nemo_elastic.cost import parameters
from nemo_elastic.family import family_of
from nemo_elastic.files import write_json
from nemo_elastic.runlog import RunLog

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "parent.yaml"
RESULTS = HERE / "results"
QUICK = ("train.val_samples=4", "rank.samples=8", "rank.depth_samples=2", "train.val_every_steps=2")


@dataclass(frozen=True)
class Series:
    """Where everything goes."""

    out: Path
    results: Path
    quick: bool

    def command(self, script: str, *words: str) -> str:
        """What one of the scripts here, or `nemo_elastic`, prints; a process of its own with one thread."""
        start = ["-m", "nemo_elastic"] if script == "nemo_elastic" else [str(HERE / f"{script}.py")]
        own = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment = os.environ | own
        command = [sys.executable, *start, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join(done.stderr.splitlines()[-12:])
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
        return done.stdout

    def common(self, parent: str) -> list[str]:
        """Overrides of every run."""
        data = self.out / "data"
        words = [f"parent.path={self.out / parent}", f"data.tokenizer={data / 'tokenizer.json'}"]
        return [*words, f"data.blend={json.dumps(blend(data))}", *(QUICK if self.quick else ())]

    def verb(self, verb: str, folder: Path, words: Iterable[str], *flags: str) -> None:
        """`nemo-elastic VERB` in the folder of a run."""
        self.command("nemo_elastic", verb, "--config", str(CONFIG), "--out", str(folder), *flags, *words)

    def prepared(self, base: str) -> Path:
        """A ranked and sorted parent; made at first use."""
        folder, made = self.out / "bases" / base, BASES[base]
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            # Ranking needs a whole configuration; budgets and stages play no part in it.
            words = [*self.common(made.parent), "elastic.budgets={full: 1.0}", "train.stages=[{steps: 1}]", *made.words]
            for verb in ("rank", "sort"):
                self.verb(verb, folder, words)
            if base == "mamba_flat":
                self.command("flat", str(folder))
            (folder / "done").touch()
        return folder

    def subnets(self, source: str | None, seed: int) -> dict[str, Any]:
        """Final subnets of another run, as the configuration takes them; or those of `OTHER_SHAPES`."""
        if source is None:
            return {}
        kind, _, number = source.partition(":")
        if kind in OTHER_SHAPES:
            found = self.random(int(number)) if kind == "random" else self.proposed(kind)
        else:
            found = json.loads(self.file(source, seed).read_text(encoding="utf-8"))["subnets"]
        return {name: without_depth(subnet) for name, subnet in found.items()}

    def of_family(self) -> list[str]:
        """Overrides that make the family of three budgets."""
        budgets = json.dumps(dict(RUNS["family"].budgets))
        return [*self.common("parent"), f"elastic.budgets={budgets}", "train.stages=[{steps: 1}]"]

    def random(self, number: int) -> dict[str, Any]:
        """Random shapes that meet the family's budgets."""
        description = json.loads((self.out / "bases/parent/importance/importance.json").read_text(encoding="utf-8"))
        run = load_config(CONFIG, self.of_family()).config
        return random_subnets(family_of(run, tuple(description["depth_ranking"])), number)

    def proposed(self, how: str) -> dict[str, Any]:
        """Shapes that `nemo-elastic plan --search` proposes from the ranking's scores."""
        words = ("--search", how, "--ranking", str(self.out / "bases/parent"), "--json")
        plan = json.loads(self.command("nemo_elastic", "plan", "--config", str(CONFIG), *words, *self.of_family()))
        return {b["name"]: b["subnet"] for b in plan["budgets"] if b["origin"] != "parent"}

    def file(self, name: str, seed: int) -> Path:
        """The result of a run."""
        return self.results / f"{name}-{seed}.json"

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Nobody else does this run meanwhile: a second process would resume in the folder that the first writes to.

        Raises:
            SystemExit: somebody does.
        """
        path = self.out / "work" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{name}: another process does it in {self.out}; wait for that one", file=sys.stderr)
                raise SystemExit(2) from None
            yield

    def do(self, run: Run, seed: int) -> None:
        """A run, its score and its file; the nested checkpoint is kept, checkpoints of the training are not."""
        with self.alone(f"{run.name}-{seed}"):
            if not self.file(run.name, seed).is_file():
                self.do_alone(run, seed)

    def do_alone(self, run: Run, seed: int) -> None:
        """`do`, with the run's folder to itself."""
        name = f"{run.name}-{seed}"
        folder, words = self.out / "work" / name, run.overrides(seed, self.subnets(run.shapes_of, seed))
        started = any((folder / "checkpoints").glob("step=*"))
        if not started:
            shutil.rmtree(folder, ignore_errors=True)
            for part in ("importance", "sorted"):
                shutil.copytree(self.prepared(run.base) / part, folder / part)
        parent = BASES[run.base].parent
        begin, load = time.monotonic(), os.getloadavg()[0]
        self.verb("train", folder, [*self.common(parent), *words], *(["--resume"] if started else []))
        few = ["--windows", "4", "--each", "1"] if self.quick else []
        score = folder / "score.json"
        self.command("score", "--out", str(self.out), "--weights", str(folder / "nested"), "--output", str(score), *few)
        facts = {"seconds": round(time.monotonic() - begin, 1), "load_before": round(load, 2), "resumed": started}
        found = self.collected(run, seed, words, folder)
        write_json(self.file(run.name, seed), {**found, "machine": machine(), **facts})
        shutil.rmtree(self.out / "nested" / name, ignore_errors=True)
        shutil.copytree(folder / "nested", self.out / "nested" / name)
        shutil.rmtree(folder)

    def collected(self, run: Run, seed: int, words: list[str], folder: Path) -> dict[str, Any]:
        """What is kept of a run."""
        logs = RunLog(folder / "logs")
        steps = {r["step"]: r for r in logs.read("train")}
        cpu, curve = 0.0, []
        records = {r["step"]: r for r in logs.read("validation")}
        for step in range(max(records) + 1):
            cpu += steps[step]["cpu_seconds"] if step in steps else 0.0
            if step in records:
                row = records[step]
                curve.append({"step": step, "tokens": row["tokens"], "losses": row["losses"], "cpu": round(cpu, 2)})
        subnets = records[max(records)]["subnets"]
        config = load_config(CONFIG, [*self.common(BASES[run.base].parent), *words]).config
        description = json.loads((folder / "importance" / "importance.json").read_text(encoding="utf-8"))
        family = family_of(config, tuple(description["depth_ranking"]))
        counts = {n: parameters(family.layout, family.space.subnet_from_dict(s)) for n, s in subnets.items()}
        return {
            "name": run.name,
            "group": run.group,
            "what": run.what,
            "seed": seed,
            "quick": self.quick,
            "stages": [dict(s) for s in run.stages],
            "words": list(run.words),
            "shapes_of": run.shapes_of,
            "parameters": counts,
            "subnets": subnets,
            "curve": curve,
            "score": json.loads((folder / "score.json").read_text(encoding="utf-8")),
        }


def without_depth(subnet: dict[str, Any]) -> dict[str, Any]:
    """Kept layers by their numbers; how many they are would be a second word for it."""
    return {dim: size for dim, size in subnet.items() if dim != "num_layers"}


def machine() -> dict[str, Any]:
    """Of the processor, as the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "threads": 1}


def quick(run: Run) -> Run:
    """Two steps of every stage."""
    return replace(run, stages=tuple({**stage, "steps": 2, "global_batch_size": 8} for stage in run.stages))


def score_parent(series: Series) -> None:
    """The parent's own score."""
    if not (series.results / "parent.json").is_file():
        few = ["--windows", "4", "--each", "1"] if series.quick else []
        weights, output = series.out / "parent", series.results / "parent.json"
        series.command("score", "--out", str(series.out), "--weights", str(weights), "--output", str(output), *few)


def all_runs(series: Series, missing: list[tuple[Run, int]], jobs: int) -> None:
    """These, `jobs` at a time; a run begins when the one whose shapes it takes has its file."""
    futures: dict[tuple[str, int], Future[None]] = {}

    def one(run: Run, seed: int) -> None:
        needed = futures.get((run.shapes_of or "", seed))
        if needed is not None:
            needed.result()
        begin = time.monotonic()
        series.do(quick(run) if series.quick else run, seed)
        done = json.loads(series.file(run.name, seed).read_text(encoding="utf-8"))["score"]
        losses = {name: round(row["heldout_loss"], 4) for name, row in done.items()}
        print(f"{run.name}-{seed}: {time.monotonic() - begin:.0f} s {losses}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for run, seed in missing:
            futures[run.name, seed] = pool.submit(one, run, seed)
        for future in futures.values():
            future.result()


def numbers(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(word) for word in text.split(",")]


def selected(args: argparse.Namespace, words: argparse.ArgumentParser) -> list[tuple[Run, int]]:
    """Runs by name or group; what is not repeated with the first seed only, unless named."""
    seeds = args.seeds
    groups = args.groups.split(",") if args.groups else GROUPS
    names = args.only.split(",") if args.only else [r.name for r in RUNS.values() if r.group in groups]
    unknown = [n for n in names if n not in RUNS] + [g for g in groups if g not in GROUPS]
    if unknown:
        known = f"runs: {', '.join(RUNS)}; groups: {', '.join(GROUPS)}"
        words.error(f"no run or group {', '.join(unknown)}; {known}")
    every = REPEATED if not args.only else GROUPS
    return [(RUNS[n], s) for s in seeds for n in names if s == seeds[0] or RUNS[n].group in every]


def prepare(series: Series, bases: list[str]) -> None:
    """The parents that these need, as they are, ranked and sorted, and the trained one's score."""
    only_initial = bases == ["initial"]
    short = ["--steps", "4"] if series.quick else []
    series.command("parent", "--out", str(series.out), *(["--initial"] if only_initial else short))
    if not only_initial:
        score_parent(series)
    for base in bases:
        series.prepared(base)


def main() -> None:
    """Everything that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="parent, checkpoints and work in progress")
    parser.add_argument("--results", type=Path, help="where the runs' files go; default: results/ here")
    parser.add_argument("--seeds", type=numbers, default="1,2,3", help="comma separated")
    parser.add_argument("--groups", help=f"comma separated, of {', '.join(GROUPS)}")
    parser.add_argument("--only", help="names of runs, comma separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="two steps a stage: that it runs, not what it shows")
    args = parser.parse_args()
    out = args.out.resolve()
    series = Series(out, args.results or (out / "results" if args.quick else RESULTS), args.quick)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    missing = [(run, seed) for run, seed in selected(args, parser) if not series.file(run.name, seed).is_file()]
    if missing:
        prepare(series, list(dict.fromkeys(run.base for run, _ in missing)))
        all_runs(series, missing, args.jobs)
    if not args.quick and not args.only:
        series.command("results", "--results", str(series.results))


if __name__ == "__main__":
    main()
