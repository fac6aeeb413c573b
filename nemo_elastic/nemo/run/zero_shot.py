"""What children lose before training: the final shapes, cut from what the run started with -> `OUT/zero_shot.json`.

That is the sorted parent, or the family of `train.start_from`. Measured when a run has ended, at its own layout and
precision, in the model that it trained: the first weights take the place of the trained ones, which are saved by then.
A budget that is there already, cut alike from the same weights and measured on the same text, is not measured again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nemo_elastic.checkpoint.manifest import MANIFEST_FILE, file_sha256
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.family import Family
from nemo_elastic.files import write_json
from nemo_elastic.mcore.models.build import load_weights
from nemo_elastic.mcore.models.parents import sorted_parent
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.nemo.run.heldout import Heldout, Measured
from nemo_elastic.nemo.run.start_weights import start_reader
from nemo_elastic.processes.zero_shot import FILE, FORMAT, read_zero_shot
from nemo_elastic.space.subnet import Subnet


def measure_zero_shot(
    out: Path,
    run: RunConfig,
    family: Family,
    model: nn.Module,
    sorted_folder: Path,
    subnets: Mapping[str, Subnet],
    heldout: Heldout,
    measure: Callable[[Mapping[str, Subnet]], Mapping[str, Measured]],
) -> dict[str, float]:
    """Held-out loss per budget before any training; every process calls it, the first one writes.

    Args:
        model: of this run; its weights are replaced where something is to be measured.
        measure: losses of subnets with the weights as they stand.
    """
    began, parent = time.monotonic(), sorted_parent(sorted_folder)
    identity = {
        "sorted": dict(parent.description["sha256"]),
        "text": fingerprint(heldout),
        "precision": run.train.precision,
    }
    if run.train.start_from:
        identity["start"] = file_sha256(Path(run.train.start_from) / MANIFEST_FILE)
    wanted = {name: subnet.to_dict() for name, subnet in subnets.items()}
    known = process_groups.on_first_rank(lambda: _known(out, identity, wanted))
    missing = {name: subnet for name, subnet in subnets.items() if name not in known}
    if missing:
        load_weights(_bare(model), start_reader(run, parent), family.architecture, ffn_groups=family.space.groups)
        process_groups.barrier()  # ranks read a large parent at their own pace
        found = {
            name: {"subnet": wanted[name], "loss": one.loss, "sources": one.sources}
            for name, one in measure(missing).items()
        }
        known = {name: found.get(name) or known[name] for name in subnets}
        if process_groups.rank() == 0:
            record = {"format": FORMAT, "identity": identity, "budgets": known}
            write_json(out / FILE, record | {"seconds": round(time.monotonic() - began, 3)})
        process_groups.barrier()
    return {name: entry["loss"] for name, entry in known.items()}


def fingerprint(heldout: Heldout) -> str:
    """Of the held-out text: tokens, labels and masks of every batch."""
    found = hashlib.sha256()
    for batch in heldout.batches:
        for part in batch:
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def _bare(model: nn.Module) -> nn.Module:
    """Without wrappers, whose parameters have other names; NeMo's pass on what they are asked for."""
    while "module" in model._modules:
        model = model._modules["module"]
    return model


def _known(out: Path, identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    found = read_zero_shot(out)
    if found.get("identity") != identity:
        return {}
    return {n: entry for n, entry in found["budgets"].items() if entry["subnet"] == wanted.get(n)}
