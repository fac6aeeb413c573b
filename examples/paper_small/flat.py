"""Mamba heads trimmed the wrong way, to measure what it costs: the best heads of the whole layer, whatever their group.

    python examples/paper_small/flat.py runs/paper_small/bases/mamba_flat

Rewrites a sorted parent so that the first heads of every group, which a child keeps, are the flat ranking cut in order:
slot i of group g holds head g k/G + i of the ranking over all heads. Such a child reads another group's B and C, as it
does wherever a flat prefix is taken. Only children with KEPT heads mean anything; the full network of it does not.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_elastic.checkpoint.reader import lazy_tensors
from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.checkpoint.writer import write_safetensors_file
from nemo_elastic.files import write_json
from nemo_elastic.mcore.models.parents import DESCRIPTION, PERMUTATIONS
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.slicing import permute

KEPT = 8
DIM = "mamba_num_heads"


def flat_order(scores: Tensor, order: Tensor, groups: int, kept: int) -> Tensor:
    """Heads of a sorted layer by their new place, `[heads]`.

    Args:
        scores: `[heads]`, in the parent's order.
        order: `[heads]`, the parent's head in each place of the sorted layer.
        groups: Mamba groups.
        kept: heads of the child.
    """
    ranked = torch.argsort(scores[order], descending=True, stable=True)
    first = ranked[:kept].view(groups, -1)
    rest = ranked[kept:].view(groups, -1)
    return torch.cat([first, rest], dim=1).flatten()


def main(base: Path) -> None:
    """Rewrite `base/sorted`."""
    description = json.loads((base / "sorted" / DESCRIPTION).read_text(encoding="utf-8"))
    architecture = Architecture(**description["architecture"])
    layout = ParamLayout(architecture, ffn_groups=description["ffn_groups"])
    scores = load_file(base / "importance" / "importance.safetensors")
    orders = load_file(base / "sorted" / PERMUTATIONS)
    tensors = []
    for lazy in lazy_tensors(SafetensorsReader(base / "sorted"), None):
        spec, key = layout.spec(lazy.name), f"{layout.spec(lazy.name).layer}.{DIM}"
        value = lazy.read()
        if key in orders:
            name = f"{DIM}.{spec.layer}"
            moved = flat_order(scores[name], orders[key], architecture.mamba_num_groups, KEPT)
            value = permute(value, spec, {DIM: moved}).contiguous()
        tensors.append((lazy, value))
    made = [type(lazy)(lazy.name, value.dtype, tuple(value.shape), lambda v=value: v) for lazy, value in tensors]
    temporary = base / "sorted" / "model.tmp"
    digest = write_safetensors_file(temporary, made)
    os.replace(temporary, base / "sorted" / "model.safetensors")
    description["sha256"]["model.safetensors"] = digest
    write_json(base / "sorted" / DESCRIPTION, description)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
