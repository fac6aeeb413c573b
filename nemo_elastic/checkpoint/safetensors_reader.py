"""Tensors of safetensors files, read with plain JSON and offsets through handles that are kept.

Nothing in a file is executed, none is mapped into memory (mapped pages count as the process's own), and a file that is
exchanged meanwhile is not read.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import parse_json, read_json
from ..problems import Problem, ProblemsError
from .held_files import HeldFolder

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
QUANTIZED = ("F8_", "F6_", "F4", "E8M0", "U4", "I4")  # starts of dtypes that nothing here computes with


@dataclass(frozen=True)
class _Entry:
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsReader:
    """Tensors of one `.safetensors` file, or of a folder (single file, or shards with an index).

    Raises:
        ProblemsError: a file is missing, truncated, or its header does not describe it; the message says which.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._entries: dict[str, _Entry] = {}
        self._held = HeldFolder(self.path.parent if self.path.is_file() else self.path)
        self.metadata: dict[str, str] = {}
        for file, wanted in self._files():
            found = self._header(file)
            lost = sorted(set(wanted or ()) - set(found))
            if lost:
                raise _problem(
                    self.path / INDEX_FILE, f"says {lost[0]} is in {file.name}, which lacks it; copy it again"
                )
            self._entries |= found

    def _files(self) -> list[tuple[Path, list[str] | None]]:
        if self.path.is_file():
            return [(self.path, None)]
        index = self.path / INDEX_FILE
        if index.is_file():
            try:
                where = read_json(index)["weight_map"]
                by_file: dict[str, list[str]] = {}
                for name, file in where.items():
                    by_file.setdefault(file, []).append(name)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _problem(index, f"is no safetensors index ({error!r}); copy it again") from error
            outside = [f for f in by_file if not isinstance(f, str) or Path(f).name != f or f in ("", ".", "..")]
            if outside:
                raise _problem(index, f"names {outside[0]!r}, which is not a file of the same folder")
            return [(self.path / f, names) for f, names in sorted(by_file.items())]
        if (self.path / SINGLE_FILE).is_file():
            return [(self.path / SINGLE_FILE, None)]
        raise _problem(self.path, f"has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder or file of safetensors")

    def _header(self, file: Path) -> dict[str, _Entry]:
        if not file.is_file():
            raise _problem(file, "does not exist; the folder is incomplete, copy it again")
        total = self._held.size(file.name)
        length = int.from_bytes(self._held.read(file.name, 0, 8), "little")
        if total < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, total - 8):
            raise _problem(file, f"has {total} bytes and a header of {length}: truncated or no safetensors file")
        raw = self._held.read(file.name, 8, length)
        try:
            header = parse_json(raw)
            self.metadata |= header.pop("__metadata__", {})
            for name, item in header.items():
                if str(item["dtype"]).startswith(QUANTIZED):
                    words = f"has {name} ({item['dtype']}): quantized weights cannot be trained; give the bf16 folder"
                    raise _problem(file, words)
            entries = {name: self._entry(file, 8 + length, item) for name, item in header.items()}
        except ProblemsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _problem(file, f"has a damaged header ({error}); copy it again") from error
        end = max((e.offset + e.nbytes for e in entries.values()), default=8 + length)
        if end != total:
            raise _problem(file, f"has {total} bytes, its header describes {end}: truncated or damaged; copy it again")
        return entries

    @staticmethod
    def _entry(file: Path, start: int, item: dict) -> _Entry:
        shape = tuple(item["shape"])
        if item["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"dtype {item['dtype']} is not supported")
        dtype = SAFETENSORS_DTYPES[item["dtype"]]
        begin, end = item["data_offsets"]
        elements = 1
        for extent in shape:
            if not isinstance(extent, int) or extent < 0:
                raise ValueError(f"shape {list(shape)}")
            elements *= extent
        if not 0 <= begin <= end or end - begin != elements * dtype.itemsize:
            raise ValueError(f"offsets {begin}..{end} do not fit shape {list(shape)}")
        return _Entry(file, start + begin, end - begin, dtype, shape)

    def names(self) -> list[str]:
        """Names as they stand in the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype from the header."""
        return self._entries[name].dtype

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read one tensor from its file, new or `into` a contiguous one that fits."""
        entry = self._entries[name]
        return read_tensor(self._held.open(entry.path.name), entry.offset, entry.dtype, entry.shape, entry.path, into)


def read_tensor(
    file: int, offset: int, dtype: torch.dtype, shape: tuple[int, ...], path: Path, into: Tensor | None = None
) -> Tensor:
    """A contiguous tensor from `offset` of an open file descriptor, new or `into` a contiguous one that fits.

    Raises:
        ProblemsError: when the file ends before the tensor does.
    """
    fits = into is not None and into.is_contiguous() and into.dtype == dtype and tuple(into.shape) == tuple(shape)
    tensor = into if fits else torch.empty(shape, dtype=dtype)
    if tensor.numel() == 0:
        return tensor
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise _problem(
                path, f"ends at byte {offset + done}, {len(view) - done} bytes early: truncated; copy it again"
            )
        done += count
    return tensor


def _problem(path: Path, message: str) -> ProblemsError:
    return ProblemsError([Problem(str(path), message)])
