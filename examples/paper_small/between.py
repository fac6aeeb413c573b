"""Budgets that nobody trained: children between those of a family, and how many steps mend them.

    python examples/paper_small/between.py --out runs/paper_small [--seeds 4,5,6] [--jobs 2]

Per seed, from the family of two children whose candidates raced (`race-family`, its nested checkpoint in OUT/nested):

    between     `plan NESTED --budget` for 0.9, 0.7 and 0.6: sizes between those of the trained neighbours
    touched     such a child alone for a few steps, from the family's weights (`train.start_from`), the parent teaches
    trained     a family with these three shapes as its children, as many tokens each as the two children have

A file per seed in results/between; one that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from run import numbers, series_of
from runs import BUDGETS, EVEN, SECOND, STEPS, stages
from series import Series, digest, machine, refuse, without_depth

from nemo_elastic.checkpoint.manifest import load_manifest
from nemo_elastic.files import write_json
from nemo_elastic.plan.of_nested import plan_nested
from nemo_elastic.processes.runlog import RunLog

FAMILY = "race-family"
WANTED = {"b90": 0.9, "b70": 0.7, "b60": 0.6}
TOUCHES = (10, 40)  # steps
RATE, WARMUP = 3e-4, 4  # of a touch: the weights are trained
WEIGHTS = {"full": 0.4, "b90": 0.25, "b70": 0.2, "b60": 0.15}  # of the second stage
GROWN = tuple(round(n * (len(WANTED) + 1) / len(BUDGETS)) for n in STEPS)


def trained(series: Series, folder: Path, seed: int, words: Sequence[str]) -> list[Mapping[str, Any]]:
    """The validations of a run in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("importance", "sorted"):
        shutil.copytree(series.prepared("parent", seed) / part, folder / part)
    common = series.common(series.weights("parent", seed))
    series.verb("train", folder, seed, [*common, f"train.seed={seed}", EVEN, *words])
    found = RunLog(folder / "logs").read("validation")
    shutil.rmtree(folder)
    return found


def of_seed(series: Series, seed: int, jobs: int) -> None:
    """The file of a seed."""
    file, nested = series.results / "between" / f"{seed}.json", series.out / "nested" / f"{FAMILY}-{seed}"
    if file.is_file():
        return
    if not nested.is_dir():
        refuse(f"{nested} is missing: run.py --out {series.out} --only {FAMILY} --seeds {seed} makes it")
    plans = {name: plan_nested(load_manifest(nested), str(value))["budgets"][0] for name, value in WANTED.items()}
    forced = {name: json.dumps(without_depth(plan["subnet"])) for name, plan in plans.items()}

    def touched(name: str, steps: int) -> list[Mapping[str, Any]]:
        return trained(series, series.out / "work" / f"touch-{name}-{steps}-{seed}", seed, [
            f"elastic.budgets={json.dumps({name: WANTED[name]})}", f"elastic.subnets.{name}={forced[name]}",
            f"train.start_from={nested}", f"train.stages={json.dumps(stages(0, steps))}",
            f"train.optimizer={{lr: {RATE}, min_lr: 1.0e-5, warmup_steps: {WARMUP}}}",
            f"train.val_every_steps={steps}",
        ])  # fmt: skip

    def many(name: str, steps: int) -> bool:
        return not series.quick or (name == "b60" and steps == TOUCHES[0])

    def family() -> list[Mapping[str, Any]]:
        return trained(series, series.out / "work" / f"between-{seed}", seed, [
            f"elastic.budgets={json.dumps({'full': 1.0, **WANTED})}",
            *(f"elastic.subnets.{name}={subnet}" for name, subnet in forced.items()),
            f"train.stages={json.dumps(stages(2, 2, WEIGHTS) if series.quick else stages(*GROWN, WEIGHTS))}",
        ])  # fmt: skip

    with ThreadPoolExecutor(jobs) as pool:
        whole = pool.submit(family)
        touches = {(n, steps): pool.submit(touched, n, steps) for n in WANTED for steps in TOUCHES if many(n, steps)}
        last = whole.result()[-1]
        runs = {key: future.result() for key, future in touches.items()}
    rows = {}
    for name in dict.fromkeys(name for name, _ in runs):
        mine, plan = {steps: found for (n, steps), found in runs.items() if n == name}, plans[name]
        rows[name] = {
            "fraction": WANTED[name],
            "subnet": plan["subnet"],
            "parameters": plan["parameters"],
            "between": next(iter(mine.values()))[0]["losses"][name],
            "touched": {str(steps): found[-1]["losses"][name] for steps, found in mine.items()},
            "trained": last["losses"][name],
            "tokens": last["tokens"][name],
        }
    facts = {"parent_sha256": digest(series.weights("parent", seed)), "machine": machine()}
    write_json(file, {"seed": seed, **facts, "full": last["losses"]["full"], "children": rows})
    print(f"{file.name}: {({n: [row['between'], row['touched'], row['trained']] for n, row in rows.items()})}",
          file=sys.stderr, flush=True)  # fmt: skip


def main() -> None:
    """What is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of `run.py`, with its parents")
    parser.add_argument("--seeds", type=numbers, default=list(SECOND), help="comma separated, of the second parent's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="two steps of each run: that it runs")
    args = parser.parse_args()
    if unknown := [seed for seed in args.seeds if seed not in SECOND]:
        parser.error(f"--seeds {','.join(map(str, unknown))}: must be of {', '.join(map(str, SECOND))}")
    series = series_of(args.out, args.quick)
    for seed in args.seeds:
        of_seed(series, seed, args.jobs)


if __name__ == "__main__":
    main()
