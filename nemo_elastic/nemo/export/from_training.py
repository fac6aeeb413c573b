"""A nested checkpoint out of a training checkpoint: weights without padding, the router, what the run noted of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.checkpoint.unpadded import UnpaddedReader
from nemo_elastic.data.of_run import end_of_text_name, tokenizer_source
from nemo_elastic.family import Configured
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.models.parents import sorted_parent
from nemo_elastic.nemo.export.nested import write_nested
from nemo_elastic.nemo.export.results import provenance
from nemo_elastic.plan.proposals import with_subnets_of
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.processes.runlog import RunLog

ROUTER_PREFIX = "module.router.net."


def nest_checkpoint(
    run: Configured,
    out: Path,
    checkpoint: Path,
    *,
    force: bool = False,
    heard: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `out/nested` from a training checkpoint of the run in `out`, tensor by tensor (`heard`). One process.

    Raises:
        ProblemsError: the run's log does not know the checkpoint's children.
    """
    folder, parent = out / "nested", sorted_parent(out / "sorted")
    family = run.family(parent.depth_ranking)
    record = record_of(out, checkpoint)
    config = run.config
    if config.router.searches:
        config = with_subnets_of(config, family, record["subnets"])
    with TorchDistReader(checkpoint) as reader:
        router = {k.removeprefix(ROUTER_PREFIX): k for k in reader.other_keys() if k.startswith(ROUTER_PREFIX)}
        write_nested(
            folder,
            UnpaddedReader(reader, family.layout, checkpoint),
            Manifest(
                model=dict(run.config.model),
                space=family.space,
                budgets={b.name: b for b in family.budgets},
                subnets={n: family.space.subnet_from_dict(s) for n, s in record["subnets"].items()},
                rankings={"depth_ranking": list(parent.depth_ranking or ())},
                provenance=provenance(config) | {"step": record["step"], "tokens": record["tokens"]},
            ),
            tokenizer=tokenizer_source(run.config),
            end_of_text=end_of_text_name(run.config),
            permutations=dict(parent.permutations),
            router={name: reader.read_key(key) for name, key in router.items()},
            force=force,
            heard=heard,
        )
    return folder


def record_of(out: Path, checkpoint: Path) -> dict[str, Any]:
    """What the run noted when it wrote `checkpoint` (`step=N` is the checkpoint after N + 1 steps)."""
    found = re.match(r"step=(\d+)", checkpoint.name)
    records = {r["step"]: r for r in RunLog(out / "logs").read("checkpoints")}
    step = int(found.group(1)) + 1 if found else -1
    if step not in records:
        words = f"is no training checkpoint of the run in {out} (its log knows steps {sorted(records)})"
        raise ProblemsError([Problem(str(checkpoint), words)])
    return records[step]
