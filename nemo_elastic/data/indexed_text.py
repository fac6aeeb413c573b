"""Megatron's tokenized text: a `.bin` of token ids beside an `.idx` that says where documents begin.

The `.bin` is one stream of ids (documents end with end-of-text when it was made with `--append-eod`), so windows read
it as it lies. Held out is its end, from the first document that begins at or after 97 % of the tokens:

    train = ids[: cut],   heldout = ids[cut :]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELDOUT_FRACTION = 0.03
MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}  # megatron.core's `DType`
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the ids' type, sequences, documents


@dataclass(frozen=True)
class IndexedText:
    """An opened pair.

    Attributes:
        prefix: path without `.bin`.
        ids: token ids `[tokens]`, memory-mapped in their own dtype.
        begins: first token of every document `[documents]`.
    """

    prefix: str
    ids: np.ndarray
    begins: np.ndarray

    @property
    def cut(self) -> int:
        """Where the held-out part begins; inside the last document when no document begins late enough."""
        wanted = int(len(self.ids) * (1 - HELDOUT_FRACTION))
        later = self.begins[np.searchsorted(self.begins, wanted) :]
        return int(later[0]) if len(later) and 0 < later[0] < len(self.ids) else wanted

    def split(self, name: str) -> np.ndarray:
        """The ids of `train` or `heldout`."""
        return self.ids[: self.cut] if name == "train" else self.ids[self.cut :]

    def ends_with(self, token: int) -> bool:
        """Whether documents end with `token` (the first 100 are looked at)."""
        return bool((self.ids[self.begins[1:101] - 1] == token).all()) if len(self.begins) > 1 else True


def open_indexed(prefix: str) -> IndexedText:
    """Open a pair.

    Raises:
        ValueError: the index is none of Megatron's, contradicts itself, or the pair does not fit together.
    """
    lengths, pointers, documents, dtype = _index(Path(prefix + ".idx"))
    if wrong := _contradiction(lengths, pointers, documents, dtype):
        raise ValueError(f"{prefix}.idx {wrong}; make the pair again with Megatron's tools/preprocess_data.py")
    wanted, found = int(lengths.sum(dtype=np.int64)) * dtype.itemsize, Path(prefix + ".bin").stat().st_size
    if wanted != found:
        raise ValueError(f"{prefix}.bin has {found:,} bytes, its index says {wanted:,}; copy both files again")
    begins = np.asarray(pointers)[np.asarray(documents)[:-1]] // dtype.itemsize
    return IndexedText(prefix, np.memmap(prefix + ".bin", dtype=dtype, mode="r"), begins)


def _index(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.dtype]:
    """(lengths, pointers, documents, type of the ids) as the file has them: Megatron's header, then the three arrays.

    Megatron's own reader asserts, and complains once more when what it could not read is thrown away.
    """
    with file.open("rb") as index:
        header = index.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise ValueError(f"{file} is no index that Megatron wrote; make the pair again")
    try:
        _, version, code, sequences, documents = HEADER.unpack(header)
        dtype = np.dtype(TYPES.get(code, "V"))
        if version != 1 or code not in TYPES or HEADER.size + 12 * sequences + 8 * documents > file.stat().st_size:
            raise ValueError(f"version {version}, type {code}, {sequences:,} sequences, {documents:,} documents")
    except (ValueError, struct.error) as error:
        raise ValueError(f"{file} is damaged ({error}); copy or make the pair again") from error
    content, at = np.memmap(file, mode="r"), HEADER.size
    arrays = []
    for kind, count in ((np.int32, sequences), (np.int64, sequences), (np.int64, documents)):
        arrays.append(np.frombuffer(content, dtype=kind, count=count, offset=at))
        at += arrays[-1].nbytes
    return *arrays, dtype


def _contradiction(lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, dtype: np.dtype) -> str | None:
    """What of an index cannot be: a sequence lies behind the one before it, a document is a run of sequences."""
    if not np.issubdtype(dtype, np.integer):
        return f"says that token ids are {dtype}"
    if not len(lengths) or len(documents) < 2:
        return "has no documents"
    if int(lengths.min()) < 0:
        return "has a sequence of negative length"
    begins = np.cumsum(lengths, dtype=np.int64)
    begins = np.concatenate([[0], begins[:-1]]) * dtype.itemsize
    if (pointers != begins).any():
        bad = int(np.flatnonzero(pointers != begins)[0])
        words = (
            f"says that sequence {bad} begins at byte {int(pointers[bad]):,}; by the lengths it is {int(begins[bad]):,}"
        )
        return f"{words} (32-bit pointers that overflowed?)"
    if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        return "has documents that do not follow one another"
    return None
