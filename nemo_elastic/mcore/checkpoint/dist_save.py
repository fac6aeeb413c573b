"""Writing the `weights/` of a NeMo checkpoint, one tensor at a time and without a model or a process group.

The files are those of `megatron.core.dist_checkpointing` (torch_dist): one `.distcp` of torch.save records, a
`.metadata` that says where each lies, `common.pt` and `metadata.json`. Keys are exactly those that stock NeMo writes
for the Transformer Engine spec, so plain NeMo loads the folder at any TP x PP. Each linear also has an empty
`_extra_state` object there (Transformer Engine's FP8 state), which a stock load asks for.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_elastic.checkpoint.reader import LazyTensor
from nemo_elastic.checkpoint.writer import SHARD_BYTES, HashingFile, read_ahead
from nemo_elastic.kinds import kind_of
from nemo_elastic.mcore.checkpoint.preflight import COMMON_FILE, CONFIG_FILE, METADATA_FILE
from nemo_elastic.mcore.checkpoint.stored_names import PARTS
from nemo_elastic.space.layout import ParamLayout, fused_name

PREFIX = "module."
# Modules outside the layers with a Transformer Engine state of their own. Those of attention's core and the final norm
# depend on the version of Transformer Engine; a load that does not ask for them ignores them.
OUTER_EXTRA_STATES = ("decoder.final_norm", "output_layer")
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What MegatronStrategy and Lightning read of a checkpoint that holds weights only.
COMMON = {
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": "2.4.0",
    "state_dict": {},
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


def stock_parts(tensor: LazyTensor, layout: ParamLayout) -> list[tuple[str, int, int]]:
    """(stock key, first row, rows) of the tensors that stock NeMo stores for a canonical one."""
    spec = layout.table[tensor.name]
    name = PREFIX + fused_name(tensor.name, spec.kind)
    for suffix, parts in PARTS.items():
        if tensor.name.endswith(suffix):
            rows = {segment.name: segment.length({}) for segment in spec.axes[0]}
            found, row = [], 0
            for part in parts:
                found.append((f"{name}.{part}", row, rows[part]))
                row += rows[part]
            return found
    return [(name, 0, tensor.shape[0])]


def extra_state_keys(layout: ParamLayout) -> list[str]:
    """Keys of the empty state objects."""
    keys = [
        f"decoder.layers.{layer}.{module}"
        for layer, kind in enumerate(layout.architecture.hybrid_override_pattern)
        for module in kind_of(kind).extra_states
    ]
    return [f"{PREFIX}{key}._extra_state/shard_0_1" for key in (*keys, *OUTER_EXTRA_STATES)]


def write_torch_dist(
    weights: Path,
    tensors: Iterable[LazyTensor],
    layout: ParamLayout,
    *,
    extra: Iterable[LazyTensor] = (),
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Fill the empty or missing folder `weights`.

    Args:
        tensors: every row of `layout.table`, by canonical name.
        layout: the table that the tensors are of: the parent's, or a uniform child's own.
        extra: further tensors, stored under their own names as they are.

    Returns:
        file name -> SHA-256.
    """
    weights.mkdir(parents=True, exist_ok=True)
    writer = _Writer(weights, shard_bytes)
    try:
        for key in extra_state_keys(layout):
            writer.add_object(key)
        for tensor, value in read_ahead(tensors):
            writer.add_parts(value, stock_parts(tensor, layout))
        for tensor, value in read_ahead(extra):
            writer.add_parts(value, [(tensor.name, 0, tensor.shape[0])])
    finally:
        writer.close()
    return writer.finish()


class _Writer:
    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._state: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._hashes: dict[str, str] = {}
        self._file: HashingFile | None = None
        self._none = _saved([None])

    def add_object(self, key: str) -> None:
        file = self._current(0)
        self._storage[MetadataIndex(key)] = _StorageInfo(file.path.name, file.size, len(self._none))
        self._state[key] = BytesStorageMetadata()
        file.write(self._none)

    def add_parts(self, value: Tensor, parts: list[tuple[str, int, int]]) -> None:
        for key, row, rows in parts:
            self._add(key, value if rows == value.shape[0] else value.narrow(0, row, rows))

    def _add(self, key: str, value: Tensor) -> None:
        value = value.detach().contiguous()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # torch.save writes the whole storage under a view
        file, offset = self._current(value.nbytes), torch.Size([0] * value.dim())
        start = file.size
        torch.save(value, file)
        self._storage[MetadataIndex(key, offset)] = _StorageInfo(file.path.name, start, file.size - start)
        self._state[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=value.dtype),
            size=value.size(),
            chunks=[ChunkStorageMetadata(offsets=offset, sizes=value.size())],
        )

    def _current(self, nbytes: int) -> HashingFile:
        if self._file is not None and self._file.size and self._file.size + nbytes > self._shard_bytes:
            self.close()
        if self._file is None:
            self._file = HashingFile(self._folder / f"__0_{len(self._hashes)}.distcp")
            self._hashes[self._file.path.name] = ""
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._hashes[self._file.path.name] = self._file.sha256
            self._file = None

    def finish(self) -> dict[str, str]:
        metadata = Metadata(
            state_dict_metadata=self._state,
            storage_data=self._storage,
            storage_meta=StorageMeta(checkpoint_id=os.curdir, save_id=str(uuid.uuid4())),
            version=CURRENT_DCP_VERSION,
        )
        small = {
            COMMON_FILE: _saved(COMMON),
            CONFIG_FILE: json.dumps(CONFIG).encode(),
            METADATA_FILE: pickle.dumps(metadata),
        }
        for name, data in small.items():  # .metadata last: without it the folder is no checkpoint
            with HashingFile(self._folder / name) as file:
                file.write(data)
            self._hashes[name] = file.sha256
        return self._hashes


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
