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
from megatron.core.datasets.indexed_dataset import IndexedDataset

HELDOUT_FRACTION = 0.03
MAGIC = b"MMIDIDX\x00\x00"


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
        ValueError: the index is none of Megatron's, or the pair does not fit together.
    """
    with Path(prefix + ".idx").open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{prefix}.idx is no index that Megatron wrote; make the pair again")
    try:
        index = IndexedDataset(prefix, mmap=True).index
        lengths, pointers, documents = index.sequence_lengths, index.sequence_pointers, index.document_indices
        dtype = np.dtype(index.dtype)
    except (AssertionError, OSError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"{prefix}.idx is damaged; copy or make the pair again") from error
    wanted, found = int(lengths.sum(dtype=np.int64)) * dtype.itemsize, Path(prefix + ".bin").stat().st_size
    if wanted != found:
        raise ValueError(f"{prefix}.bin has {found:,} bytes, its index says {wanted:,}; copy both files again")
    begins = np.asarray(pointers)[np.asarray(documents)[:-1]] // dtype.itemsize
    return IndexedText(prefix, np.memmap(prefix + ".bin", dtype=dtype, mode="r"), begins)
