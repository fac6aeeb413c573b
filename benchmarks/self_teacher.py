"""A family without a second model: `distill.teacher: self` against the frozen parent on the parent that ships.

    python benchmarks/self_teacher.py --out runs/self_teacher [--seeds 1,2,3] [--recipes shipped] [--quick]
    python benchmarks/self_teacher.py --out runs/self_teacher --table

Per seed and recipe the same run three times, shapes by greedy search from the first step (`router.frozen=true
router.shapes=greedy`):

    parent   the frozen parent teaches all members
    text     the full member as it stands teaches the others, and learns from the text
    cached   the same, but it learns from the parent, of which a cache has the final hidden states

Recipes: `shipped`, the configuration as it is (one budget a micro-batch), and `last_percent`, that of docs/training.md
(a lower rate, all budgets learn from every micro-batch, so that the full member's forward always teaches for nothing).
Ranking and sorting are done once. A run that has its JSON in OUT/results is not done again, so that an interrupted
series goes on, and seeds may be added. Reported: held-out loss per budget at the end, in nats per token; median CPU
seconds of a step (without the first five, and without the forwards that fill a cache); bytes of the teacher that the
process holds. `limits`: what each member may lose for the self-taught family to become the default.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness import finish, listed, parser, start
from training_runs import CONFIG, QUICK, nemo_elastic, prepared, ranked

from nemo_elastic.config import load_config
from nemo_elastic.cost.gpu_layout import GpuLayout
from nemo_elastic.cost.held_memory import held_bytes
from nemo_elastic.family import family_of
from nemo_elastic.files import write_json, write_text
from nemo_elastic.processes.runlog import RunLog

FIXED = ("router.frozen=true", "router.shapes=greedy")
SELF = "distill.teacher=self"
TEACHERS = ("parent", "text", "cached")
RECIPES = {"shipped": (), "last_percent": ("distill.budgets_per_batch=3", "train.optimizer.lr=7.0e-5")}
LIMITS = {"loss_over_parent": 1.001}  # of every member, in every run
LEFT_OUT = 5  # first steps, of which some set things up
ELEMENT = 4  # bytes of a weight: these runs are in fp32


def overrides(teacher: str, recipe: str, seed: int, quick: bool, folder: Path) -> list[str]:
    """What makes a run of `CONFIG` this one."""
    words = [*FIXED, f"train.seed={seed}", *RECIPES[recipe], *(QUICK if quick else ())]
    words += [] if teacher == "parent" else [SELF]
    return [*words, f"distill.teacher_cache={folder / 'states'}"] if teacher == "cached" else words


def run_one(out: Path, teacher: str, recipe: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train and collect; the run folder is removed, its logs are kept."""
    name, load = f"{recipe}-{teacher}-{seed}", os.getloadavg()[0]
    folder = prepared(ranked(out, quick), out / "work" / name)
    words = overrides(teacher, recipe, seed, quick, folder)
    nemo_elastic("train", folder, words)
    logs = RunLog(folder / "logs")
    first, last, steps = logs.read("validation")[0], logs.read("validation")[-1], logs.read("train")
    timed = steps[LEFT_OUT:] if len(steps) > LEFT_OUT else steps
    result = {
        "recipe": recipe,
        "teacher": teacher,
        "seed": seed,
        "quick": quick,
        "overrides": [word for word in words if not word.startswith("distill.teacher_cache")],
        "load_before": round(load, 2),
        "steps": len(steps),
        "step_cpu_s": statistics.median(step["cpu_seconds"] for step in timed),
        "step_s": statistics.median(step["seconds"] for step in timed),
        "teacher_bytes": teacher_bytes(words),
        "parent_loss": first["losses"]["full"],
        "losses": last["losses"],
    }
    write_json(out / "results" / f"{name}.json", result)
    shutil.copytree(folder / "logs", out / "logs" / name, dirs_exist_ok=True)
    shutil.rmtree(folder)
    return result


def teacher_bytes(words: Iterable[str]) -> float:
    """What the process of such a run holds of the parent, as `plan --gpus` counts it (tests hold that to measured)."""
    run = load_config(CONFIG, words).config
    layout = family_of(run).layout
    teacher, cached = run.distill.builds_parent, bool(run.distill.teacher_cache)
    return held_bytes(layout, GpuLayout(element=ELEMENT), 0, teacher=teacher, cached=cached)["teacher"]


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Per recipe and teacher: loss over the parent-taught run of the same seed, and its CPU time a step."""
    by_key = keyed(runs)
    found: dict[str, Any] = {}
    for (recipe, seed, teacher), run in by_key.items():
        base = by_key.get((recipe, seed, "parent"))
        if teacher == "parent" or base is None:
            continue
        row = found.setdefault(recipe, {}).setdefault(teacher, {"loss_over_parent": {}, "cpu_over_parent": []})
        for name, loss in run["losses"].items():
            row["loss_over_parent"].setdefault(name, []).append(loss / base["losses"][name])
        row["cpu_over_parent"].append(run["step_cpu_s"] / base["step_cpu_s"])
        row["bytes_saved"] = base["teacher_bytes"] - run["teacher_bytes"]
    for row in (row for rows in found.values() for row in rows.values()):
        worst = max(ratio for ratios in row["loss_over_parent"].values() for ratio in ratios)
        row["within_limit"] = worst <= LIMITS["loss_over_parent"]
    return found


def keyed(runs: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, str], Mapping[str, Any]]:
    """By recipe, seed and teacher, in the order of the table."""
    found = {(run["recipe"], run["seed"], run["teacher"]): run for run in runs}
    places = list(RECIPES)
    return dict(sorted(found.items(), key=lambda i: (places.index(i[0][0]), i[0][1], TEACHERS.index(i[0][2]))))


def table(runs: list[Mapping[str, Any]]) -> str:
    """Markdown: a row per recipe, seed and teacher."""
    names = list(dict.fromkeys(name for run in runs for name in run["losses"]))
    by_key = keyed(runs)
    heads = ["recipe", "seed", "teacher", *(f"{n} loss | difference" for n in names)]
    heads += ["CPU s a step", "of the parent's", "teacher, MB"]
    columns = 6 + 2 * len(names)
    lines = ["| " + " | ".join(heads) + " |", "|---" * columns + "|"]
    for (recipe, seed, teacher), run in by_key.items():
        base = by_key.get((recipe, seed, "parent"))
        cells = [recipe, str(seed), teacher]
        for name in names:
            loss = run["losses"][name]
            cells += [f"{loss:.4f}", f"{loss / base['losses'][name] - 1:+.2%}" if base and base is not run else ""]
        share = f"{run['step_cpu_s'] / base['step_cpu_s']:.2f}" if base and base is not run else ""
        cells += [f"{run['step_cpu_s']:.3f}", share, f"{run['teacher_bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Does what is missing; JSON, and the table on standard error and in OUT/table.md."""
    words = parser(__doc__, quick="6 steps of one seed, last_percent: that it runs, not what it shows")
    words.add_argument("--out", type=Path, help="folder of the series; may be left out with --quick")
    words.add_argument("--seeds", type=listed(int), default="1,2,3", help="comma separated")
    words.add_argument("--recipes", type=listed(str), default=",".join(RECIPES))
    words.add_argument("--table", action="store_true", help="only the table of what is there")
    args = start(words)
    if not args.out and not args.quick:
        words.error("--out is needed for a series that can go on")
    if unknown := [recipe for recipe in args.recipes if recipe not in RECIPES]:
        words.error(f"--recipes {','.join(unknown)}: must be of {', '.join(RECIPES)}")
    if args.quick:
        args.seeds, args.recipes = [1], ["last_percent"]
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out or Path(scratch)).resolve()
        out = out / "quick" if args.quick else out  # a quick run is no part of a series
        for recipe in args.recipes:
            for seed in args.seeds:
                for teacher in TEACHERS:
                    path = out / "results" / f"{recipe}-{teacher}-{seed}.json"
                    if not args.table and not path.is_file():
                        done = run_one(out, teacher, recipe, seed, args.quick)
                        losses = {name: round(loss, 4) for name, loss in done["losses"].items()}
                        print(f"{path.stem}: {done['step_cpu_s']:.3f} s, {losses}", file=sys.stderr, flush=True)
        paths = sorted((out / "results").glob("*.json"))
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        text = table(runs)
        write_text(out / "table.md", text + "\n")
    print(text, file=sys.stderr)
    return finish(args, {"limits": LIMITS, "summary": summary(runs), "runs": runs})


if __name__ == "__main__":
    raise SystemExit(main())
