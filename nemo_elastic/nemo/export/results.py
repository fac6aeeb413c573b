"""`results.json`: what was verified of a run, a row per budget, with the versions, seed and configuration behind it.

Rows are of one nested checkpoint, by the hash of its manifest; rows of another one are dropped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_elastic import __version__
from nemo_elastic.checkpoint.comparison import ChildCheck
from nemo_elastic.checkpoint.manifest import MANIFEST_FILE, Manifest, load_manifest
from nemo_elastic.config.load import plain
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.cost.counts import memory, parameters
from nemo_elastic.files import read_json, write_json
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.processes.zero_shot import losses_before

RESULTS = "results.json"


def results_of(
    config: RunConfig,
    nested: Path,
    checks: Sequence[ChildCheck],
    *,
    before: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The table of a run as plain values.

    Args:
        before: held-out loss per budget before any training, where it was measured.
    """
    manifest, before = load_manifest(nested), before or {}
    full = next((name for name, budget in manifest.budgets.items() if budget.is_full), None)
    return {
        "name": config.name,
        "parent": {
            "parameters": parameters(manifest.layout, manifest.space.full_subnet()),
            "heldout_loss": before.get(full),
        },
        "budgets": [_row(config, manifest, check, before) for check in checks],
        "verified": all(check.ok for check in checks),
        "seconds": dict(seconds or {}),
        "nested": hashlib.sha256((nested / MANIFEST_FILE).read_bytes()).hexdigest(),
        "provenance": provenance(config),
    }


def note_verified(out: Path, config: RunConfig, nested: Path, checks: Sequence[ChildCheck]) -> Path:
    """Write `OUT/results.json` after `verify`: the rows of `checks`, and what the file knew of the same checkpoint."""
    subnets = {name: subnet.to_dict() for name, subnet in load_manifest(nested).subnets.items()}
    result, earlier = results_of(config, nested, checks, before=losses_before(out, subnets)), _read(out / RESULTS)
    rows, names = {row["name"]: row for row in result["budgets"]}, tuple(load_manifest(nested).subnets)
    if earlier.get("nested") == result["nested"]:
        known = {row["name"]: row for row in earlier["budgets"]}
        for name, row in rows.items():
            if row["heldout_before"] is None:
                row["heldout_before"] = known.get(name, row)["heldout_before"]
        rows = {name: rows.get(name) or known[name] for name in names if name in rows | known}
        result |= {"budgets": list(rows.values())} | {name: earlier[name] for name in ("parent", "seconds")}
    passed = all(row["verified"] for row in rows.values())
    result["verified"] = None if passed and set(rows) != set(names) else passed  # None: not all of them yet
    return write_json(out / RESULTS, result)


def _read(path: Path) -> dict[str, Any]:
    """What is there; nothing of a file that another version or a person wrote."""
    try:
        found = read_json(path)
        whole = {"budgets", "parent", "seconds", "nested"} <= set(found)
        whole = whole and all({"name", "heldout_before", "verified"} <= set(row) for row in found["budgets"])
        return found if whole else {}
    except (OSError, ValueError, TypeError):
        return {}


def _row(config: RunConfig, manifest: Manifest, check: ChildCheck, before: Mapping[str, float]) -> dict[str, Any]:
    subnet, layout = manifest.subnet(check.budget), manifest.layout
    budget = manifest.budgets[check.budget]
    return {
        "name": check.budget,
        "target": {"kind": budget.kind, "value": budget.value},
        "subnet": subnet.to_dict(),
        "parameters": check.parameters,
        "percent_of_parent": 100 * check.parameters / parameters(layout, manifest.space.full_subnet()),
        "memory_bytes": memory(layout, subnet, **serving_of(config.report).memory_conditions).to_dict(),
        "heldout_nested": check.loss_nested,
        "heldout_child": check.loss_child,
        "heldout_before": before.get(check.budget),
        "verified": check.ok,
        "max_abs_difference": check.comparison.max_abs,
        "check": check.to_dict(),
    }


def provenance(config: RunConfig) -> dict[str, Any]:
    """Versions, seeds and the configuration: what a result needs to be understood alone."""
    packages = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformers")
    return {
        "nemo_elastic": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "seed": config.train.seed,
        "processes": process_groups.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "config": plain(config),
    }
