"""A family against children distilled alone, at equal micro-batches per child, on the parent that ships.

    python benchmarks/family_against_alone.py --out runs/family_against_alone [--seeds 1] [--quick]

Per seed: one run with all budgets (every budget gets a share of the micro-batches), then for every child the same
parent, data and schedule with this one budget, its subnet forced from the first step, for a third of the steps. A run
that has its JSON in OUT/results is not done again. Reported per child: held-out loss (nats per token) before any
training, of the family's child, of the child alone, and family / alone - 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_runs import CONFIG, QUICK, nemo_elastic, ranked

from nemo_elastic.config import load_config
from nemo_elastic.files import write_json
from nemo_elastic.runlog import RunLog


def trained(out: Path, name: str, words: list[str], quick: bool) -> dict[str, Any]:
    """The run `name`: first and last validation, seconds. Its folder is removed, its logs are kept."""
    file, folder = out / "results" / f"{name}.json", out / "work" / name
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    base = ranked(out, quick)
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("importance", "sorted"):
        shutil.copytree(base / part, folder / part)
    started, load = time.monotonic(), os.getloadavg()[0]
    nemo_elastic("train", folder, words)
    validation = RunLog(folder / "logs").read("validation")
    result = {
        "overrides": words,
        "seconds": round(time.monotonic() - started, 1),
        "load_before": round(load, 2),
        "before": validation[0]["losses"],
        "after": validation[-1]["losses"],
        "tokens": validation[-1]["tokens"],
        "subnets": validation[-1]["subnets"],
    }
    write_json(file, result)
    shutil.copytree(folder / "logs", out / "logs" / name, dirs_exist_ok=True)
    shutil.rmtree(folder)
    return result


def compare(out: Path, seed: int, quick: bool) -> list[dict[str, Any]]:
    """A row per child."""
    words = [f"train.seed={seed}", *(QUICK if quick else ())]
    config = load_config(CONFIG, words).config
    family = trained(out, f"family-{seed}", words, quick)
    rows = []
    for name, subnet in family["subnets"].items():
        if name == "full":
            continue
        steps = -(-sum(stage.steps for stage in config.train.stages) // len(config.elastic.budgets))
        sizes = {dim: size for dim, size in subnet.items() if dim != "num_layers"}
        alone = trained(
            out,
            f"alone-{name}-{seed}",
            [
                *words,
                f"train.stages=[{{steps: {steps}, seq_length: 256, global_batch_size: 8, "
                f"budget_probabilities: {{{name}: 1.0}}}}]",
                f"train.val_every_steps={steps}",
                "router.frozen=true",
                f"elastic.subnets.{name}={json.dumps(sizes)}",
            ],
            quick,
        )
        own, others = family["after"][name], alone["after"][name]
        rows.append(
            {
                "seed": seed,
                "budget": name,
                "before": family["before"][name],
                "family": own,
                "alone": others,
                "family_over_alone": own / others - 1,
                "tokens_family": family["tokens"][name],
                "tokens_alone": alone["tokens"][name],
            }
        )
    return rows


def main() -> None:
    """Does what is missing, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the series")
    parser.add_argument("--seeds", default="1", help="comma separated")
    parser.add_argument("--quick", action="store_true", help="12 steps: that it runs, not what it shows")
    args = parser.parse_args()
    rows = [row for seed in args.seeds.split(",") for row in compare(args.out.resolve(), int(seed), args.quick)]
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({"machine": machine, "quick": args.quick, "children": rows}, indent=2))


if __name__ == "__main__":
    main()
