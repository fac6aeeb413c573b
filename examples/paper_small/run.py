"""The paper's experiment at the size of two CPU cores: one command, resumable at any point, a file per run.

    python examples/paper_small/run.py --out runs/paper_small                     # everything: 10 to 15 core-hours
    python examples/paper_small/run.py --out runs/paper_small --groups headline --seeds 4 --jobs 2
    python examples/paper_small/run.py --out runs/paper_small --quick              # a few steps of each: that it runs

Makes the parents (`parent.py`), ranks and sorts them, does every run of `runs.py` that has no file in RESULTS yet (an
interrupted one goes on from its newest checkpoint), and writes docs/results.md from the files (`results.py`). Runs on
another parent than the one whose files are in RESULTS are refused: --results names a folder for a set of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from problems import blend
from runs import BASES, BUDGETS, FOUR, GROUPS, OTHER_SHAPES, PARENTS, RUNS, Run, parent_of
from shapes import random_subnets

from nemo_elastic.config import load_config
from nemo_elastic.cost.counts import parameters
from nemo_elastic.family import family_of
from nemo_elastic.files import write_json
from nemo_elastic.processes.runlog import RunLog

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

    def weights(self, base: str, seed: int) -> Path:
        """Folder of the unsorted weights that runs on this base and with this seed start from."""
        return self.out / "parents" / str(parent_of(seed)) if BASES[base].trained else self.out / "initial"

    def common(self, weights: Path) -> list[str]:
        """Overrides of every run that starts from these weights."""
        data = self.out / "data"
        words = [f"parent.path={weights}", f"data.tokenizer={data / 'tokenizer.json'}"]
        return [*words, f"data.blend={json.dumps(blend(data))}", *(QUICK if self.quick else ())]

    def verb(self, verb: str, folder: Path, words: Iterable[str], *flags: str) -> None:
        """`nemo-elastic VERB` in the folder of a run."""
        self.command("nemo_elastic", verb, "--config", str(CONFIG), "--out", str(folder), *flags, *words)

    def base(self, base: str, seed: int) -> Path:
        """Where `prepared` puts it."""
        return self.out / "bases" / (f"{base}-{parent_of(seed)}" if BASES[base].trained else base)

    def prepared(self, base: str, seed: int) -> Path:
        """A ranked and sorted parent, for the runs with this seed; made at first use."""
        folder, made = self.base(base, seed), BASES[base]
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            # Ranking needs a whole configuration; budgets and stages play no part in it.
            words = [*self.configured(base, seed, {"full": 1.0}), *made.words]
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
            found = self.random(int(number), seed) if kind == "random" else self.proposed(kind, seed)
        else:
            found = json.loads(self.file(source, seed).read_text(encoding="utf-8"))["subnets"]
        return {name: without_depth(subnet) for name, subnet in found.items()}

    def configured(self, base: str, seed: int, budgets: Mapping[str, float] = BUDGETS) -> list[str]:
        """Overrides of a whole configuration that nothing trains with."""
        words = [f"elastic.budgets={json.dumps(dict(budgets))}", "train.stages=[{steps: 1}]"]
        return [*self.common(self.weights(base, seed)), *words]

    def random(self, number: int, seed: int) -> dict[str, Any]:
        """Random shapes that meet the family's budgets."""
        run = load_config(CONFIG, self.configured("parent", seed)).config
        return random_subnets(family_of(run, depth_ranking(self.base("parent", seed))), number)

    def proposed(self, how: str, seed: int) -> dict[str, Any]:
        """Shapes that `nemo-elastic plan --search` proposes from the ranking's scores."""
        words = ("--search", how, "--ranking", str(self.base("parent", seed)), "--json")
        words = ("--config", str(CONFIG), *words, *self.configured("parent", seed, FOUR))
        plan = json.loads(self.command("nemo_elastic", "plan", *words))
        return {b["name"]: b["subnet"] for b in plan["budgets"] if b["origin"] != "parent"}

    def file(self, name: str, seed: int) -> Path:
        """The result of a run."""
        return self.results / f"{name}-{seed}.json"

    @contextmanager
    def alone(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Nobody else does this meanwhile: a second process would resume in the folder that the first writes to.

        Raises:
            SystemExit: somebody does, and it is not to be waited for.
        """
        path = self.out / "work" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                refuse(f"{name}: another process does it in {self.out}; wait for that one")
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
                shutil.copytree(self.prepared(run.base, seed) / part, folder / part)
        # A run says what its scores were measured with, or `train` refuses them.
        words = [*self.common(self.weights(run.base, seed)), *BASES[run.base].words, *words]
        begin, load = time.monotonic(), os.getloadavg()[0]
        self.verb("train", folder, words, *(["--resume"] if started else []))
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
        family = family_of(load_config(CONFIG, words).config, depth_ranking(folder))
        counts = {n: parameters(family.layout, family.space.subnet_from_dict(s)) for n, s in subnets.items()}
        return {
            "name": run.name,
            "group": run.group,
            "what": run.what,
            "seed": seed,
            "parent_sha256": digest(self.weights(run.base, seed)),
            "quick": self.quick,
            "stages": [dict(s) for s in run.stages],
            "words": list(run.words),
            "shapes_of": run.shapes_of,
            "parameters": counts,
            "subnets": subnets,
            "curve": curve,
            "score": json.loads((folder / "score.json").read_text(encoding="utf-8")),
        }


def depth_ranking(folder: Path) -> tuple[int, ...]:
    """Of a ranked run or base."""
    path = folder / "importance" / "importance.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))["depth_ranking"])


def digest(weights: Path) -> str:
    """SHA-256 of a parent's weights."""
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()


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


def score_parent(series: Series, parent: int) -> None:
    """The file of a parent: the hash of its weights, and its score.

    Raises:
        SystemExit: there is one already, of another parent.
    """
    file, weights = series.results / f"parent-{parent}.json", series.out / "parents" / str(parent)
    if not file.is_file():
        few = ["--windows", "4", "--each", "1"] if series.quick else []
        score = series.out / "parents" / f"{parent}.score.json"
        series.command("score", "--out", str(series.out), "--weights", str(weights), "--output", str(score), *few)
        found = json.loads(score.read_text(encoding="utf-8"))["parent"]
        write_json(file, {"seed": parent, "sha256": digest(weights), "machine": machine(), "score": found})


def known_parent(series: Series, parent: int) -> str | None:
    """SHA-256 of the parent that the results are of; None: there are none yet.

    Raises:
        SystemExit: there are, and their parent was not kept.
    """
    file = series.results / f"parent-{parent}.json"
    if not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))["sha256"]
    if known is None:
        seeds = ",".join(map(str, PARENTS[parent]))
        refuse(
            f"--seeds {seeds}: the files in {series.results} are of a parent whose weights were not kept, and runs on "
            "another one do not compare with them; --seeds leaves these out, --results FOLDER makes a set of its own"
        )
    return known


def refuse(message: str) -> NoReturn:
    """Bad input."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


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
    """Runs by name or group, in the order of `runs.py`, each with those of its seeds that were asked for."""
    groups = args.groups.split(",") if args.groups else GROUPS
    only = args.only.split(",") if args.only else [r.name for r in RUNS.values() if r.group in groups]
    unknown = [n for n in only if n not in RUNS] + [g for g in groups if g not in GROUPS]
    if unknown:
        known = f"runs: {', '.join(RUNS)}; groups: {', '.join(GROUPS)}"
        words.error(f"no run or group {', '.join(unknown)}; {known}")
    seeds = [seed for own in PARENTS.values() for seed in own]
    if args.seeds and not set(args.seeds) <= set(seeds):
        words.error(f"--seeds {','.join(map(str, args.seeds))}: must be of {', '.join(map(str, seeds))}")
    found = [
        (run, seed) for seed in args.seeds or seeds for run in RUNS.values() if run.name in only and seed in run.seeds
    ]
    if not found:
        done_with = "; ".join(f"{name}: {', '.join(map(str, RUNS[name].seeds))}" for name in only)
        words.error(f"--seeds {','.join(map(str, args.seeds))}: none of these runs is done with that ({done_with})")
    return found


def prepare(series: Series, missing: list[tuple[Run, int]]) -> None:
    """What these start from: the trained parents with their scores, the untrained one, ranked and sorted."""
    parents = dict.fromkeys(parent_of(seed) for run, seed in missing if BASES[run.base].trained)
    known = {parent: known_parent(series, parent) for parent in parents}
    for run, seed in missing:
        source = RUNS.get(run.shapes_of or "")
        if source and (source, seed) not in missing and not series.file(source.name, seed).is_file():
            refuse(
                f"{run.name}-{seed} takes the shapes of {source.name}-{seed}, which has no file in {series.results}: "
                f"name {source.name} as well"
            )
    with series.alone("parents", wait=True):
        make(series, missing, known)


def make(series: Series, missing: list[tuple[Run, int]], known: Mapping[int, str | None]) -> None:
    """`prepare`, where nothing forbids it.

    Raises:
        SystemExit: a parent is there that is not the known one.
    """
    series.command("parent", "--out", str(series.out), "--initial")
    for parent in known:
        short = ["--steps", "4"] if series.quick else []
        series.command("parent", "--out", str(series.out), "--seed", str(parent), *short)
        found = digest(series.out / "parents" / str(parent))
        if known[parent] not in (None, found):
            refuse(
                f"--out {series.out}: its parent {parent} (SHA-256 {found[:12]}) is not the one of the files in "
                f"{series.results} ({known[parent][:12]}); give another --out, or another --results"
            )
        score_parent(series, parent)
    for run, seed in missing:
        series.prepared(run.base, seed)


def main() -> None:
    """Everything that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="parent, checkpoints and work in progress")
    parser.add_argument("--results", type=Path, help="where the runs' files go; default: results/ here")
    parser.add_argument("--seeds", type=numbers, help="comma separated; default: all that a run is done with")
    parser.add_argument("--groups", help=f"comma separated, of {', '.join(GROUPS)}")
    parser.add_argument("--only", help="names of runs, comma separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="two steps a stage: that it runs, not what it shows")
    args = parser.parse_args()
    out = args.out.resolve() / "quick" if args.quick else args.out.resolve()  # a quick parent is no parent for the rest
    series = Series(out, args.results or (out / "results" if args.quick else RESULTS), args.quick)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    missing = [(run, seed) for run, seed in selected(args, parser) if not series.file(run.name, seed).is_file()]
    if missing:
        prepare(series, missing)
        all_runs(series, missing, args.jobs)
    if not args.quick and not args.only:
        docs = ["--docs", str(out / "docs")] if args.results else []
        series.command("results", "--results", str(series.results), *docs)


if __name__ == "__main__":
    main()
