"""Where parents come from, and the sorted parent that training starts from.

`OUT/sorted/`: `model.safetensors` (or shards) in canonical names, `permutations.safetensors` (so that sorting can be
undone) and `sorted.json` (depth ranking, source, hashes). Writing streams: a tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint.atomic_folder import atomic_folder
from ...checkpoint.reader import LazyTensor, TensorReader, check_against_layout, lazy_tensors, told
from ...checkpoint.safetensors_reader import SafetensorsReader
from ...checkpoint.tied import tied_reader
from ...checkpoint.writer import tensor_bytes, write_safetensors, write_safetensors_file
from ...config.parent_files import folder_of, is_hugging_face, read_json
from ...config.sections import ParentConfig
from ...importance.sorting import SortedReader, orders_to_tensors
from ...importance.store import Importance
from ...problems import Problem, ProblemsError
from ...space.architecture import Architecture
from ...space.layout import ParamLayout

SAMPLED = 1 << 16  # elements of a tensor that count for a parent's digest
DESCRIPTION, PERMUTATIONS = "sorted.json", "permutations.safetensors"


def open_parent(parent: ParentConfig | str | None, layout: ParamLayout) -> TensorReader:
    """A reader over the parent's weights, checked against the parameter table.

    Args:
        parent: the configuration's section, or a path alone: `builtin:NAME`, a NeMo checkpoint, a Hugging Face folder,
            or a safetensors file or folder in canonical names.

    Raises:
        ProblemsError: nothing there, or other tensors than the `model` section describes.
    """
    key = "parent.path"
    parent = parent if isinstance(parent, ParentConfig) else ParentConfig(path=parent)
    if (path := parent.path) is None:
        words = "is not set; give the folder of a NeMo checkpoint or Hugging Face model, or builtin:tiny_parent"
        raise ProblemsError([Problem(key, words)])
    reader = _reader(folder_of(path), layout.architecture, parent.output_weights)
    check_against_layout(reader, layout, f"{key}={path}")
    return reader


def weights_digest(reader: TensorReader, layout: ParamLayout) -> str:
    """SHA-256 over the parent's tensors, of a large one every n-th element: tells one parent from another.

    Every tensor is read, so it takes as long as the disk does; what is hashed of it takes no time.
    """
    digest = hashlib.sha256()
    for name, spec in layout.table.items():
        values = reader.read(name).reshape(-1)
        digest.update(name.encode() + tensor_bytes(values[:: max(1, spec.numel({}) // SAMPLED)]))
    return digest.hexdigest()


def _reader(folder: Path, architecture: Architecture, output_weights: str | None) -> TensorReader:
    if (folder / "config.json").is_file() and is_hugging_face(read_json(folder / "config.json")):
        from ...checkpoint.huggingface import HuggingFaceReader

        return HuggingFaceReader(folder, architecture, output_weights)
    reader: TensorReader
    if (folder / "weights").is_dir() or (folder / ".metadata").is_file():
        from ..checkpoint.dist_checkpoint import TorchDistReader

        reader = TorchDistReader(folder)
    else:
        reader = SafetensorsReader(folder)
    return tied_reader(reader, folder, output_weights) if architecture.share_embeddings_and_output_weights else reader


@dataclass(frozen=True)
class SortedParent:
    """What `sort` wrote."""

    reader: TensorReader
    depth_ranking: tuple[int, ...] | None
    permutations: Mapping[str, Tensor]
    description: Mapping[str, Any]


def write_sorted(
    out: Path,
    reader: TensorReader,
    layout: ParamLayout,
    importance: Importance,
    *,
    source: str,
    force: bool = False,
    heard: Callable[[int, int], None] | None = None,
) -> Path:
    """Sort a parent into `out`, tensor by tensor (`heard`: how many, of how many); its function does not change."""
    orders = importance.orders(layout)
    sorted_reader = SortedReader(reader, layout, orders)
    tensors = [
        LazyTensor(n, reader.dtype(n), reader.shape(n), lambda n=n: sorted_reader.read(n).contiguous())
        for n in layout.table
    ]
    with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in tensors)) as folder:
        hashes = write_safetensors(folder, told(tensors, heard))
        flat = orders_to_tensors(orders)
        order_tensors = [LazyTensor(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in flat.items()]
        hashes[PERMUTATIONS] = write_safetensors_file(folder / PERMUTATIONS, order_tensors)
        description = {
            "format": "nemo_elastic.sorted",
            "version": 1,
            "source": source,
            "architecture": asdict(layout.architecture),
            "ffn_groups": layout.groups.ffn,
            "expert_groups": layout.groups.experts,
            "depth_ranking": list(importance.depth_ranking) or None,
            "sha256": hashes,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))
    return out


def is_sorted_by(parent: SortedParent, importance: Importance, layout: ParamLayout) -> bool:
    """Whether a sorted parent's order is the one that these scores give, of widths and of layers."""
    orders = orders_to_tensors(importance.orders(layout))
    same = orders.keys() == parent.permutations.keys() and all(
        torch.equal(orders[n], parent.permutations[n]) for n in orders
    )
    return same and tuple(importance.depth_ranking) == (parent.depth_ranking or ())


def sorted_parent(folder: str | Path) -> SortedParent:
    """Open what `write_sorted` wrote.

    Raises:
        ProblemsError: no such folder, or not one of ours.
    """
    folder = Path(folder)
    try:
        description = read_json(folder / DESCRIPTION)
        ranking = description["depth_ranking"]
        permutations = load_file(folder / PERMUTATIONS)
    except (OSError, ValueError, KeyError) as error:
        words = f"is no sorted parent ({error}); run `nemo-elastic sort` (or `train`, which does it) again"
        raise ProblemsError([Problem(str(folder), words)]) from error
    return SortedParent(SafetensorsReader(folder), tuple(ranking) if ranking else None, permutations, description)


def whole_state(reader: TensorReader, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Everything a reader has, in memory; for small models."""
    return {tensor.name: tensor.read() for tensor in lazy_tensors(reader, dtype)}
