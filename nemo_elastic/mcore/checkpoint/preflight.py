"""Reading a torch_dist checkpoint's pickles without executing anything in them.

A torch_dist folder has pickles in three places: `.metadata` (which tensor chunk lies where), `common.pt`, and byte
objects inside the `.distcp` files. Stock loaders unpickle the first and the last with no restriction, so a hostile
file runs code. Here `.metadata` goes through an unpickler that knows an exact list of (module, name) pairs and gives
an inert record for each: not even the listed classes are imported. `held_checkpoint.py` checks all three places, for
the cases where a stock loader (NeMo's resume) must read the folder afterwards, and hands it what was checked.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.checkpoint.held_files import HeldFolder
from nemo_elastic.problems import Problem, ProblemsError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
CONFIG_FILE = "metadata.json"


class Record:
    """Stands for an object of a listed class: its class name, constructor arguments and state, and no behaviour."""

    kind = ""

    def __new__(cls, *args: Any) -> Record:
        self = object.__new__(cls)
        self.args = args
        self.state = {}
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


def _record(name: str) -> type[Record]:
    return type(name, (Record,), {"kind": name})


_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name): _record(name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
}
_RECORDS |= {
    ("torch.distributed.checkpoint.planner", name): _record(name)
    for name in ("WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData", "SavePlan")
}
_RECORDS |= {
    ("megatron.core.dist_checkpointing.strategies.torch", name): _record(name)
    for name in ("MCoreMetadata", "MCoreSavePlan")
}
_RECORDS[("torch.distributed.checkpoint.filesystem", "_StorageInfo")] = _record("_StorageInfo")
_RECORDS[("numpy", "dtype")] = _record("dtype")


def _numpy_integer(dtype: Any, data: Any) -> int:
    """A numpy integer, as the distributed optimizer writes the bounds of its pieces."""
    kind = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    if kind not in ("i4", "i8", "u4", "u8") or not isinstance(data, bytes) or len(data) != int(kind[1]):
        raise pickle.UnpicklingError(f"refused numpy scalar of {kind!r}")
    return int.from_bytes(data, "little", signed=kind[0] == "i")


_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_ALLOWED: dict[tuple[str, str], Any] = {
    **_RECORDS,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("numpy.core.multiarray", "scalar"): _numpy_integer,
    ("numpy._core.multiarray", "scalar"): _numpy_integer,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(map(str, parts)),
}


class RefusedPickle(pickle.UnpicklingError):
    """A pickle names something that no checkpoint needs."""


class AllowListUnpickler(pickle.Unpickler):
    """Unpickler that resolves only the names given to it, each to a harmless stand-in."""

    def __init__(self, data: bytes, allowed: dict[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of (module, name).

        Raises:
            RefusedPickle: when the pair is not listed; nothing was imported or called.
        """
        try:
            return self._allowed[module, name]
        except KeyError:
            raise RefusedPickle(f"refused global {module}.{name}") from None


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: where in the tensor, and where its torch.save record lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a torch_dist checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredObject:
    """A pickled object of a torch_dist checkpoint; never read here."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class DistMetadata:
    """What `.metadata` says, by the checkpoint's own keys."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]


def parse_metadata(data: bytes, path: Path) -> DistMetadata:
    """`.metadata` as plain data.

    Raises:
        ProblemsError: it names something that is not on the list (a hostile file), or is damaged.
    """
    try:
        root = AllowListUnpickler(data, _ALLOWED).load()
        where: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in root["storage_data"].items():
            offset = index.state.get("offset")
            where[index["fqn"], None if offset is None else tuple(offset)] = info
        tensors, objects = {}, {}
        for key, item in root["state_dict_metadata"].items():
            if item.kind == "TensorStorageMetadata":
                tensors[key] = _tensor(key, item, where)
            elif item.kind == "BytesStorageMetadata":
                info = where[key, None]
                objects[key] = StoredObject(*_place(info))
            else:
                raise ValueError(f"{key} is a {item.kind}")
        return DistMetadata(tensors, objects)
    except RefusedPickle as error:
        words = f"{error}: not a plain checkpoint, and it could run code where it is loaded; nothing of it was executed"
        raise ProblemsError([Problem(str(path), words)]) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ProblemsError([Problem(str(path), f"is damaged ({error!r}); copy the checkpoint again")]) from error


def _tensor(key: str, item: Record, where: dict[tuple[str, tuple[int, ...] | None], Any]) -> StoredTensor:
    state = item["properties"].state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has dtype {dtype!r}")
    shape = _extents(item["size"])
    chunks = []
    for chunk in item["chunks"]:
        offsets, sizes = _extents(chunk["offsets"]), _extents(chunk["sizes"])
        inside = len(offsets) == len(sizes) == len(shape)
        if not inside or any(o + n > full for o, n, full in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a chunk of {key} lies outside its shape {list(shape)}")
        chunks.append(Chunk(offsets, sizes, *_place(where[key, offsets])))
    return StoredTensor(dtype, shape, tuple(chunks))


def _extents(values: Any) -> tuple[int, ...]:
    extents = tuple(values)
    if any(not isinstance(n, int) or n < 0 for n in extents):
        raise ValueError(f"sizes {extents!r}")
    return extents


def _place(info: Record) -> tuple[str, int, int]:
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"it points to {file!r}, outside the folder")
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{file} is stored through an extension")
    if not isinstance(start, int) or not isinstance(length, int) or start < 0 or length < 0:
        raise ValueError(f"bytes {start!r}+{length!r} of {file}")
    return file, start, length


def read_metadata(weights: Path | HeldFolder) -> DistMetadata:
    """Parse `.metadata` of a folder.

    Raises:
        ProblemsError: no torch_dist checkpoint, or from `parse_metadata`.
    """
    held = weights if isinstance(weights, HeldFolder) else HeldFolder(weights)
    if not (held.folder / METADATA_FILE).is_file():
        words = f"has no {METADATA_FILE}: no torch_dist checkpoint (a NeMo checkpoint has one in weights/)"
        raise ProblemsError([Problem(str(held.folder), words)])
    return parse_metadata(held.read(METADATA_FILE), held.folder / METADATA_FILE)
