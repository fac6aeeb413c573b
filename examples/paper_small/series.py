"""What a series of runs shares: folders, commands, parents made once, a file per run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from problems import blend
from runs import BASES, BUDGETS, FOUR, OTHER_SHAPES, PARENTS, Run, parent_of
from shapes import random_subnets

from nemo_elastic.config import load_config
from nemo_elastic.cost.counts import parameters
from nemo_elastic.family import family_of
from nemo_elastic.files import write_json
from nemo_elastic.processes.runlog import RunLog

HERE = Path(__file__).resolve().parent
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

    def verb(self, verb: str, folder: Path, seed: int, words: Iterable[str], *flags: str) -> None:
        """`nemo-elastic VERB` in the folder of a run with this seed."""
        self.command("nemo_elastic", verb, "--config", str(config_of(seed)), "--out", str(folder), *flags, *words)

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
                self.verb(verb, folder, seed, words)
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
            found = {
                "random": lambda: self.random(int(number), seed),
                "greedy": lambda: self.proposed(kind, seed),
                "explored": lambda: self.explored(seed),
            }[kind]()
        else:
            found = json.loads(self.file(source, seed).read_text(encoding="utf-8"))["subnets"]
        return {name: without_depth(subnet) for name, subnet in found.items()}

    def configured(self, base: str, seed: int, budgets: Mapping[str, float] = BUDGETS) -> list[str]:
        """Overrides of a whole configuration that nothing trains with."""
        words = [f"elastic.budgets={json.dumps(dict(budgets))}", "train.stages=[{steps: 1}]"]
        return [*self.common(self.weights(base, seed)), *words]

    def random(self, number: int, seed: int) -> dict[str, Any]:
        """Random shapes that meet the family's budgets."""
        run = load_config(config_of(seed), self.configured("parent", seed)).config
        return random_subnets(family_of(run, depth_ranking(self.base("parent", seed))), number)

    def explored(self, seed: int) -> dict[str, Any]:
        """The shapes that exploring has found best (`exploring.py`)."""
        folder = self.results / "exploring"
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*-{seed}.json"))]
        if not found:
            refuse(f"{folder} has no shapes of seed {seed}: exploring.py --seeds {seed} finds them")
        return {one["budget"]: one["best"] for one in found}

    def proposed(self, how: str, seed: int) -> dict[str, Any]:
        """Shapes that `nemo-elastic plan --search` proposes from the ranking's scores."""
        words = ("--search", how, "--ranking", str(self.base("parent", seed)), "--json")
        words = ("--config", str(config_of(seed)), *words, *self.configured("parent", seed, FOUR))
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
        self.verb("train", folder, seed, words, *(["--resume"] if started else []))
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
        family = family_of(load_config(config_of(seed), words).config, depth_ranking(folder))
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


def config_of(seed: int) -> Path:
    """The YAML of the parent that runs with this seed start from."""
    return HERE / PARENTS[parent_of(seed)].config


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


def refuse(message: str) -> NoReturn:
    """Bad input."""
    print(message, file=sys.stderr)
    raise SystemExit(2)
