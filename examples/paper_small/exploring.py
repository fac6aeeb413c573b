"""What finding a child's shape costs those who make children one by one: candidates, each distilled shortly.

    python examples/paper_small/exploring.py --out runs/paper_small [--seeds 4,5,6] [--jobs 2]

Per budget, as pruning tools do it:

    enumerate   every shape from BELOW under the budget to ABOVE over it, one size for all layers
    measure     each cut from the sorted parent, held-out loss without any training
    distil      the KEPT that lose least, each alone for STEPS steps of 2,048 tokens with a schedule of its own
    choose      the one whose held-out loss is least then; `run.py` distils it on (`explored-*`)

A file per budget and seed in results/exploring; one that is there is not made again. Shapes further from the best go
into the first seed's files of the family's own budgets as well (`spare`): a reading of how well estimates predict.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from run import numbers, series_of
from runs import CHILDREN, EVEN, FOUR, FOUR_CHILDREN, SECOND, THERE, parent_of, stages
from series import Series, config_of, depth_ranking, digest, machine, without_depth

from nemo_elastic.config import load_config
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.cost.counts import parameters
from nemo_elastic.family import Configured, family_of
from nemo_elastic.files import read_json, write_json
from nemo_elastic.processes.runlog import RunLog
from nemo_elastic.shapes.damage import Damage, read_scores
from nemo_elastic.space.choices import choice_shapes, subnet_of

BELOW, ABOVE = 0.05, 0.01  # of the budget; a family's children are at most as much above it
KEPT = 6  # as many as `router.candidates`
SPARE = 8  # further ones, evenly over the rest of the measured order
STEPS = 24  # a tenth of the family's
WARMUP = 4


def shapes_near(series: Series, seed: int) -> dict[str, Any]:
    """Per budget every shape near it, with its estimated damage and its loss before training; the least loss first.

    And the CPU seconds that measuring one took, the model's start included.
    """
    file = series.out / "bases" / f"measured-{parent_of(seed)}.json"
    if file.is_file():
        return read_json(file)
    base = series.prepared("parent", seed)
    resolved = load_config(config_of(seed), series.configured("parent", seed, FOUR))
    family = family_of(resolved.config, depth_ranking(base))
    damage = Damage(family.space, read_scores(base, family.architecture))
    ways = {name: range(choices) for name, (_, choices) in choice_shapes(family.space).items()}
    found, every = {}, {}
    for budget in family.budgets:
        if budget.is_full:
            continue
        cost, rows = BudgetCost(family.space, family.layout, budget), []
        for picked in product(*ways.values()):
            selection = {name: (i,) for name, i in zip(ways, picked, strict=True)}
            error = cost.error(cost.tables.cost(selection))
            if -BELOW <= error <= ABOVE:
                subnet = subnet_of(family.space, selection)
                every[f"{budget.name}/{len(rows)}"] = subnet
                row = {"subnet": subnet.to_dict(), "parameters": parameters(family.layout, subnet), "error": error}
                rows.append({**row, "damage": damage.of(selection)})
        found[budget.name] = rows
    from nemo_elastic.nemo.api.scores import heldout_losses  # Megatron

    few = 2 if series.quick else len(every)
    begin = time.process_time()
    losses = heldout_losses(Configured(resolved), base, dict(list(every.items())[:few]))
    spent = time.process_time() - begin
    for name, rows in found.items():
        for number, row in enumerate(rows):
            row["before"] = losses.get(f"{name}/{number}", math.inf)
        rows.sort(key=lambda row: row["before"])
    write_json(file, {"cpu_of_each": round(spent / few, 3), "budgets": found})
    return read_json(file)


def distilled(series: Series, budget: str, seed: int, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A candidate after its steps: held-out loss, tokens, CPU seconds."""
    folder = series.out / "work" / f"exploring-{budget}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("importance", "sorted"):
        shutil.copytree(series.prepared("parent", seed) / part, folder / part)
    words = [*series.common(series.weights("parent", seed)), f"train.seed={seed}", EVEN]
    words += [f"elastic.budgets={json.dumps({budget: FOUR[budget]})}"]
    words += [f"elastic.subnets.{budget}={json.dumps(without_depth(row['subnet']))}"]
    steps = 2 if series.quick else STEPS
    words += [f"train.stages={json.dumps(stages(steps, 0))}", f"train.optimizer.warmup_steps={WARMUP}"]
    series.verb("train", folder, seed, [*words, f"train.val_every_steps={steps}"])
    logs = RunLog(folder / "logs")
    last = logs.read("validation")[-1]
    spent = {"tokens": last["tokens"][budget], "cpu": round(sum(r["cpu_seconds"] for r in logs.read("train")), 2)}
    shutil.rmtree(folder)
    return {**row, "after": last["losses"][budget], **spent}


def explore(series: Series, budget: str, seed: int, jobs: int) -> None:
    """The file of a budget and a seed."""
    file = series.results / "exploring" / f"{budget}-{seed}.json"
    if file.is_file():
        return
    measured = shapes_near(series, seed)
    near = measured["budgets"][budget]
    picked = [{**row, "spare": False} for row in near[: 1 if series.quick else KEPT]]
    if seed in THERE and budget in CHILDREN and not series.quick:
        rest = near[KEPT:]
        picked += [{**rest[round(i * (len(rest) - 1) / (SPARE - 1))], "spare": True} for i in range(SPARE)]
    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(lambda at: distilled(series, budget, seed, *at), enumerate(picked)))
    best = min((row for row in rows if not row["spare"]), key=lambda row: row["after"])
    facts = {"parent_sha256": digest(series.weights("parent", seed)), "machine": machine()}
    facts |= {"near": len(near), "measuring_cpu": round(measured["cpu_of_each"] * len(near), 2)}
    write_json(file, {"budget": budget, "seed": seed, **facts, "best": best["subnet"], "candidates": rows})
    print(f"{file.name}: {[round(row['after'], 4) for row in rows]}", file=sys.stderr, flush=True)


def main() -> None:
    """What is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of `run.py`, with its parents")
    parser.add_argument("--seeds", type=numbers, default=list(SECOND), help="comma separated, of the second parent's")
    parser.add_argument("--budgets", default=",".join(FOUR_CHILDREN), help="comma separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="two steps of one candidate: that it runs")
    args = parser.parse_args()
    if unknown := [seed for seed in args.seeds if seed not in SECOND]:
        parser.error(f"--seeds {','.join(map(str, unknown))}: must be of {', '.join(map(str, SECOND))}")
    if unknown := [name for name in args.budgets.split(",") if name not in FOUR_CHILDREN]:
        parser.error(f"--budgets {','.join(unknown)}: must be of {', '.join(FOUR_CHILDREN)}")
    series = series_of(args.out, args.quick)
    for seed in args.seeds:
        for budget in args.budgets.split(","):
            explore(series, budget, seed, args.jobs)


if __name__ == "__main__":
    main()
