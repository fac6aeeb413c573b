"""What a family costs to train, against one distillation run per child at equal tokens per child.

    python benchmarks/family_cost.py [--quick] [--steps 36] [--repetitions 2] [--output FILE]

On the parent that ships, every run a `nemo-elastic train` of its own, all in turn:

    alone-B         budget B alone, in the subnet that the family chose for it, for a third of the steps
    family          all budgets, one per micro-batch, with the router
    family_fixed    the same in fixed subnets: no search, sliced from the first step
    family_shared   as `family`, all budgets in every micro-batch from one teacher forward, for a third of the steps

The budgets get equal tokens in all of them: the seed is the first that deals the family's micro-batches out evenly.
`cpu_s` and `wall_s` are those of the training steps: from the log's first record to its last, scaled to all steps;
start-up, validation and saving are left out (`process_*` has them). `flops` is what `nemo-elastic plan` predicts for
the run (`distill/training_cost.py`): teacher forwards, and three forwards of each student. `ratios` are to the sum of
the runs alone, the full budget among them, as a family trains it too; `ratios_to_children` are to those without it.
`cpu_over_flops` is how much more (or less) CPU time a ratio takes than its FLOPs say. Ranking and sorting are done
once, for all, and not counted.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from harness import Seconds, finish, parser, start
from training_runs import CONFIG, nemo_elastic, prepared, rank_words, ranked

from nemo_elastic.config import load_config
from nemo_elastic.distill.training_cost import training_cost
from nemo_elastic.family import family_of
from nemo_elastic.processes.runlog import RunLog
from nemo_elastic.router.sampling import sample_budgets

BUDGETS = ("full", "large", "small")
FAMILIES = ("family", "family_fixed", "family_shared")
BATCH = {"seq_length": 256, "global_batch_size": 8}
MICRO_BATCHES = 2  # of a step: the configuration's micro-batch is 4
Subnets = dict[str, dict[str, Any]]


def even_seed(steps: int) -> int:
    """The first `train.seed` that draws every budget equally often in a family's run."""
    even = dict.fromkeys(BUDGETS, 1 / len(BUDGETS))
    for seed in itertools.count(1):
        draws = (sample_budgets(even, seed, step, m) for step in range(steps) for m in range(MICRO_BATCHES))
        if set(Counter(name for drawn in draws for name in drawn).values()) == {steps * MICRO_BATCHES // len(BUDGETS)}:
            return seed
    raise AssertionError("seeds do not end")


def words_of(name: str, steps: int, subnets: Subnets) -> list[str]:
    """Overrides of a run; `subnets`: what the family chose."""
    seed, alone = even_seed(steps), name.removeprefix("alone-") if name.startswith("alone-") else None
    if name != "family" and name != "family_fixed":
        steps //= len(BUDGETS)
    stage: dict[str, Any] = {"steps": steps, **BATCH}
    if alone:
        stage["budget_probabilities"] = {alone: 1.0}
    words = [f"train.seed={seed}", f"train.stages=[{json.dumps(stage)}]", f"train.val_every_steps={steps}"]
    words.append("train.val_samples=4")
    if name == "family_shared":
        words.append(f"distill.budgets_per_batch={len(BUDGETS)}")
    if name in ("family", "family_shared"):
        words.append("router.shapes=learned")
    if alone or name == "family_fixed":
        words.append("router.frozen=true")
        for budget, subnet in subnets.items():
            if budget != "full":
                sizes = {dim: size for dim, size in subnet.items() if dim != "num_layers"}
                words.append(f"elastic.subnets.{budget}={json.dumps(sizes)}")
    return words


def run_once(base: Path, folder: Path, words: list[str]) -> dict[str, Any]:
    """Seconds, tokens per budget and the subnets of one run."""
    *steps, whole = nemo_elastic("train", prepared(base, folder), words)
    logs = RunLog(folder / "logs")
    last = logs.read("validation")[-1]
    scale = len(steps) / (len(steps) - 1)
    spent = Seconds(*(scale * (b - a) for a, b in zip(steps[0], steps[-1], strict=True)))
    return {"steps": len(steps), "spent": spent, "whole": whole, "tokens": last["tokens"], "subnets": last["subnets"]}


def predicted_flops(words: list[str], subnets: Subnets) -> float:
    """FLOPs of a run's training steps, before it runs."""
    run = load_config(CONFIG, words).config
    family = family_of(run)  # which layers a depth drops changes no count: the subnets name theirs
    chosen = {name: family.space.subnet_from_dict(subnet) for name, subnet in subnets.items()}
    return training_cost(run, family, chosen)["flops"]["total"]


def measure(out: Path, names: list[str], steps: int, repetitions: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Every run, in turn; medians of the repetitions."""
    base, subnets, found = ranked(out, quick), {}, {name: [] for name in names}
    for _ in range(repetitions):
        for name in names:
            done = run_once(base, out / "run", [*words_of(name, steps, subnets), *rank_words(quick)])
            subnets = subnets or done["subnets"]  # of the first run, a family
            found[name].append(done)
    runs = {}
    for name, times in found.items():
        middle = {
            f"{what}_s": round(statistics.median(getattr(t[key], what.removeprefix("process_")) for t in times), 3)
            for key, what in (("spent", "cpu"), ("spent", "wall"), ("whole", "process_cpu"), ("whole", "process_wall"))
        }
        flops = predicted_flops(words_of(name, steps, subnets), subnets)
        runs[name] = {"steps": times[0]["steps"], "tokens": times[0]["tokens"], **middle, "flops": flops}
    return {"subnets": subnets, "runs": runs}


def ratios(runs: dict[str, dict[str, Any]], others: list[str]) -> dict[str, dict[str, float]]:
    """Per family: its cost over the sum of the others'."""
    found = {}
    for name in (n for n in runs if n.startswith("family")):
        keys = {"cpu": "cpu_s", "wall": "wall_s", "process_cpu": "process_cpu_s", "flops": "flops"}
        row = {what: runs[name][key] / sum(runs[other][key] for other in others) for what, key in keys.items()}
        row["cpu_over_flops"] = row["cpu"] / row["flops"]
        found[name] = {what: round(value, 4) for what, value in row.items()}
    return found


def main() -> int:
    """Train, compare."""
    words = parser(__doc__, quick="a shared family and one child, six and two steps: that it runs", repetitions=2)
    words.add_argument("--steps", type=int, default=36, help="of the family, a multiple of 3")
    arguments = start(words)
    if arguments.steps % len(BUDGETS) or arguments.steps < 2 * len(BUDGETS):
        words.error("--steps must be a multiple of 3, and at least 6")
    alone = [f"alone-{name}" for name in (("small",) if arguments.quick else BUDGETS)]
    families = ("family_shared",) if arguments.quick else FAMILIES
    steps = 6 if arguments.quick else arguments.steps
    with tempfile.TemporaryDirectory() as out:
        measured = measure(Path(out), [*families, *alone], steps, arguments.repetitions, arguments.quick)
    runs, children = measured["runs"], [name for name in alone if name != "alone-full"]
    result = {"ratios": ratios(runs, alone), "ratios_to_children": ratios(runs, children), **measured}
    return finish(arguments, result)


if __name__ == "__main__":
    raise SystemExit(main())
