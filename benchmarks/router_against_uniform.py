"""The learned router against fixed shapes on the parent that ships: runs of quickstart length, several seeds.

    python benchmarks/router_against_uniform.py --out runs/router_against_uniform [--seeds 1,2,3] [--quick]
    python benchmarks/router_against_uniform.py --out runs/router_against_uniform --table

Per seed and kind of budget the same run is done with the router, with a race of candidates (the default; and so by
the recipe `last_percent`), and twice with one shape per budget from the first step to the last: its even shrink, and
what greedy search over the ranking's scores proposes. Everything else is alike. Ranking and sorting are done once. A
run that has its JSON in OUT/results is not done again, so that an interrupted series goes on, and seeds may be added.
Reported per budget:

    before   cost of the router's noise-free argmax when the soft phase ends / budget - 1
    after    cost of the subnet that is trained on and extracted / budget - 1
    loss     held-out loss at the end, in nats per token

Runs of mode `earlier` are kept from before learned runs took scores to start by: a price from 0, warm-up on even
shapes, no comparison when shapes are pinned. Nothing makes them any more.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import finish, listed, parser, start
from training_runs import CONFIG, QUICK, nemo_elastic, prepared, ranked

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.cost.counts import parameters
from nemo_elastic.family import family_of
from nemo_elastic.files import write_json, write_text
from nemo_elastic.plan.of_run import plan
from nemo_elastic.processes.runlog import RunLog

CONDITIONS = ("report.batch_size=4", "report.sequence_length=512")
SHARES = {"large": 0.75, "small": 0.55}  # of the parent's memory; the parameter budgets are those of the configuration
KINDS = ("parameters", "memory", "per_layer")  # the last: parameters, every layer with widths of its own
LAYERED = ("ffn_hidden_size", "mamba_num_heads", "num_attention_heads")
FROZEN = "router.frozen=true"
LEARNED = ("router", "earlier")
MODES = {
    "router": ("router.shapes=learned",),
    "uniform": (FROZEN,),
    "greedy": ("router.shapes=greedy",),
    "race": ("router.shapes=race",),
    "last_percent": ("router.shapes=race", "train.recipe=last_percent"),
}
BESIDE = ("uniform", "greedy", "race")  # what the router is compared with


def overrides(kind: str, mode: str, seed: int, quick: bool) -> list[str]:
    """What makes a run of `CONFIG` this one."""
    words = [*CONDITIONS, f"train.seed={seed}", *MODES[mode], *(QUICK if quick else ())]
    if kind == "per_layer":
        words += [f"elastic.dims.{name}.per_layer=true" for name in LAYERED]
    if kind == "memory":
        parent = plan(load_config(CONFIG, CONDITIONS).config)["parent"]["memory_bytes"]["total"] / 1e9
        for name, share in SHARES.items():
            words.append(f"elastic.budgets.{name}={{kind: memory_gb, value: {share * parent:.6f}}}")
    return words


def run_one(out: Path, kind: str, mode: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train and collect; the run folder is removed, its logs are kept."""
    name, words = f"{kind}-{mode}-{seed}", overrides(kind, mode, seed, quick)
    folder = prepared(ranked(out, quick), out / "work" / name)
    started, load = time.monotonic(), os.getloadavg()[0]
    nemo_elastic("train", folder, words)
    run = load_config(CONFIG, words).config
    result = {
        "kind": kind,
        "mode": mode,
        "seed": seed,
        "quick": quick,
        "overrides": words,
        "seconds": round(time.monotonic() - started, 1),
        "load_before": round(load, 2),
        "budgets": collected(run, folder),
    }
    write_json(out / "results" / f"{name}.json", result)
    shutil.copytree(folder / "logs", out / "logs" / name, dirs_exist_ok=True)
    shutil.rmtree(folder)
    return result


def collected(run: RunConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """Per budget: errors before and after, loss, size. Costs are counted again from the subnets, not read."""
    importance = json.loads((folder / "importance" / "importance.json").read_text(encoding="utf-8"))
    family = family_of(run, tuple(importance["depth_ranking"]))
    conditions = serving_of(run.report, family.architecture).conditions
    logs = RunLog(folder / "logs")
    last, first_choice = logs.read("validation")[-1], {}
    for record in logs.read("train"):
        if record["phase"] in ("hard", "frozen") and "router" in record:
            first_choice = record["router"]
            break
    found = {}
    for budget in family.budgets:
        subnet = family.space.subnet_from_dict(last["subnets"][budget.name])
        cost = BudgetCost(family.space, family.layout, budget, **conditions)
        found[budget.name] = {
            "before": first_choice.get(budget.name, {}).get("argmax_error"),
            "after": cost.error(cost.of(subnet)),
            "loss": last["losses"][budget.name],
            "parameters": parameters(family.layout, subnet),
            "subnet": subnet.to_dict(),
        }
    return found


def table(results: list[Mapping[str, Any]]) -> str:
    """Markdown: a row per kind, seed and budget, the router beside fixed shapes; then what was asked of it."""
    by_key = {(r["kind"], r["seed"], r["mode"]): r["budgets"] for r in results}
    lines = [
        "| router | budgets | seed | budget | before | after | loss |"
        + "".join(f" {m} loss | difference |" for m in BESIDE),
        "|---" * (7 + 2 * len(BESIDE)) + "|",
    ]
    misses, wins = {"before": 0, "after": 0}, {mode: [0, 0] for mode in BESIDE}
    rows = sorted((LEARNED.index(k[2]), *k[:2]) for k in by_key if k[2] in LEARNED)
    for ours, kind, seed in ((LEARNED[i], kind, seed) for i, kind, seed in rows):
        for name, row in by_key[kind, seed, ours].items():
            misses["before"] += row["before"] is not None and abs(row["before"]) > 0.02
            misses["after"] += abs(row["after"]) > 0.01
            before = "" if row["before"] is None else f"{row['before']:+.1%}"
            cells = [
                "now" if ours == "router" else ours,
                kind,
                str(seed),
                name,
                before,
                f"{row['after']:+.1%}",
                f"{row['loss']:.4f}",
            ]
            for mode in BESIDE:
                other = by_key.get((kind, seed, mode), {}).get(name)
                cells += [f"{other['loss']:.4f}", f"{row['loss'] / other['loss'] - 1:+.2%}"] if other else ["", ""]
                wins[mode][0] += bool(other) and row["loss"] < other["loss"]
                wins[mode][1] += bool(other)
            lines.append("| " + " | ".join(cells) + " |")
    lower = ", ".join(f"{won} of {compared} {mode}" for mode, (won, compared) in wins.items())
    lines += [
        "",
        f"missed by more than 2 % before repair: {misses['before']}, by more than 1 % after: {misses['after']}; "
        f"the router's loss is lower than that of {lower} runs",
    ]
    return "\n".join(lines)


def against(results: list[Mapping[str, Any]], mode: str, beside: str) -> str:
    """Markdown: a row per kind, seed and budget, one mode beside another one."""
    by_key = {(r["kind"], r["seed"], r["mode"]): r["budgets"] for r in results}
    lines = [
        f"| budgets | seed | budget | off, {beside} | off, {mode} | loss, {beside} | loss, {mode} | difference |",
        "|---" * 8 + "|",
    ]
    for kind, seed, _ in sorted(k for k in by_key if k[2] == mode and (k[0], k[1], beside) in by_key):
        for name, row in by_key[kind, seed, mode].items():
            other = by_key[kind, seed, beside][name]
            cells = [kind, str(seed), name, f"{other['after']:+.1%}", f"{row['after']:+.1%}"]
            cells += [f"{other['loss']:.4f}", f"{row['loss']:.4f}", f"{row['loss'] / other['loss'] - 1:+.2%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def done_runs(out: Path) -> list[dict[str, Any]]:
    """What is in OUT/results."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted((out / "results").glob("*.json"))]


def main() -> int:
    """Does what is missing; JSON, and the table on standard error and in OUT/table.md."""
    words = parser(__doc__, quick="6 steps of one kind and seed: that it runs, not what it shows")
    words.add_argument("--out", type=Path, help="folder of the series; may be left out with --quick")
    words.add_argument("--seeds", type=listed(int), default="1,2,3", help="comma separated")
    words.add_argument("--kinds", type=listed(str), default=",".join(KINDS))
    words.add_argument("--modes", type=listed(str), default=",".join(MODES), help="of these, where shapes come from")
    words.add_argument("--table", action="store_true", help="only the table of what is there")
    args = start(words)
    if not args.out and not args.quick:
        words.error("--out is needed for a series that can go on")
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        words.error(f"--kinds {','.join(unknown)}: must be of {', '.join(KINDS)}")
    if unknown := [mode for mode in args.modes if mode not in MODES]:
        words.error(f"--modes {','.join(unknown)}: must be of {', '.join(MODES)}")
    if args.quick:
        args.seeds, args.kinds = [1], ["memory"]
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out or Path(scratch)).resolve()
        out = out / "quick" if args.quick else out  # a quick run is no part of a series
        for seed in args.seeds:
            for kind in args.kinds:
                for mode in args.modes:
                    path = out / "results" / f"{kind}-{mode}-{seed}.json"
                    if not args.table and not path.is_file():
                        done = run_one(out, kind, mode, seed, args.quick)
                        losses = {name: round(b["loss"], 4) for name, b in done["budgets"].items()}
                        print(f"{path.stem}: {done['seconds']} s, {losses}", file=sys.stderr, flush=True)
        runs = done_runs(out)
        pairs = (("race", "greedy"), ("last_percent", "race"))
        text = "\n\n".join([table(runs), *(against(runs, *pair) for pair in pairs)])
        write_text(out / "table.md", text + "\n")
    print(text, file=sys.stderr)
    return finish(args, {"runs": runs})


if __name__ == "__main__":
    raise SystemExit(main())
