"""Folders that appear whole or not at all, and safetensors shards written one tensor at a time.

`atomic_folder` gives a temporary sibling of the target; only when its block ends without an error is everything synced
and renamed to the target. An existing target is never touched without `force`, and with it is replaced by that one
rename. What is written through `HashingFile` is hashed on its way, so a hash costs no second pass over the bytes; a
second core hashes while the first writes, and `read_ahead` cuts the next tensor meanwhile.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .reader import LazyTensor
from .safetensors_reader import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE

SHARD_BYTES = 4 * 2**30
WORTH_A_THREAD = 1 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class HashingFile:
    """A new file, opened for writing; `sha256` and `size` are those of what was written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        self._hasher = ThreadPoolExecutor(1)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; it may be freed afterwards."""
        view = memoryview(data).cast("B")
        hashed = self._hasher.submit(self._hash.update, view) if len(view) > WORTH_A_THREAD else None
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        finally:
            if hashed is not None:
                hashed.result()
        if hashed is None:
            self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered here."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                os.fsync(self._file.fileno())
        finally:
            self._hasher.shutdown()
            self._file.close()


def read_ahead(tensors: Iterable[LazyTensor]) -> Iterator[tuple[LazyTensor, Tensor]]:
    """Each tensor with its value; the next one is read while the caller works on this one."""
    with ThreadPoolExecutor(1) as reader:
        coming: tuple[LazyTensor, Future[Tensor]] | None = None
        for tensor in tensors:
            following = tensor, reader.submit(tensor.read)
            if coming is not None:
                yield coming[0], _checked(*coming)
            coming = following
        if coming is not None:
            yield coming[0], _checked(*coming)


def _checked(tensor: LazyTensor, value: Future[Tensor]) -> Tensor:
    found = value.result()
    assert found.dtype == tensor.dtype and tuple(found.shape) == tensor.shape, tensor.name
    return found


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def plan_shards(tensors: Iterable[LazyTensor], shard_bytes: int = SHARD_BYTES) -> list[list[LazyTensor]]:
    """Consecutive runs of tensors of at most `shard_bytes` each (a larger tensor gets a shard of its own)."""
    shards: list[list[LazyTensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_safetensors(
    folder: Path,
    tensors: Sequence[LazyTensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> dict[str, str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and their index, into an existing folder.

    Returns:
        file name -> SHA-256.
    """
    shards = plan_shards(tensors, shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: write_safetensors_file(folder / SINGLE_FILE, shards[0], metadata)}
    hashes, where = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes[name] = write_safetensors_file(folder / name, shard, metadata)
        where |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": where}
    with HashingFile(folder / INDEX_FILE) as file:
        file.write(json.dumps(index, indent=2).encode())
    return {**hashes, INDEX_FILE: file.sha256}


def write_safetensors_file(path: Path, tensors: Sequence[LazyTensor], metadata: dict[str, str] | None = None) -> str:
    """One file: the header first, then one tensor after the other; its SHA-256."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        assert tensor.name not in header, tensor.name
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, value in read_ahead(tensors):
            file.write(tensor_bytes(value))
    return file.sha256
