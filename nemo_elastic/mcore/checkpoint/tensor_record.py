"""One tensor out of a torch.save record inside a larger file, without executing its pickle.

A record is a zip archive: `data.pkl` says dtype, sizes and strides of one storage, `data/0` is that storage, not
compressed. The pickle goes through the allow-list with stand-ins that only note their arguments; a contiguous storage
is then read straight into a new tensor and its CRC-32 checked. What is laid out otherwise goes to torch's weights-only
unpickler.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_elastic.checkpoint.safetensors_reader import read_tensor
from nemo_elastic.mcore.checkpoint.preflight import AllowListUnpickler, Chunk, RefusedPickle


class FileView(io.RawIOBase):
    """Bytes `start .. start + length` of an open file, as a file."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = min(len(buffer), max(0, self._length - self._at))
        count = os.preadv(self._file, [memoryview(buffer)[:room]], self._start + self._at) if room else 0
        self._at += count
        return count


class _StorageType(str):
    """A typed storage class of torch, by name."""


def _rebuild(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> tuple[Any, ...]:
    return storage, offset, tuple(size), tuple(stride)


_TENSOR_PICKLE: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("collections", "OrderedDict"): OrderedDict,
}
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TENSOR_PICKLE |= {("torch", name): _StorageType(name) for name in _STORAGE_DTYPES}


class _TensorUnpickler(AllowListUnpickler):
    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise RefusedPickle(f"refused storage {pid!r}")
        return str(storage_type), str(key), int(numel)


def read_record(file: int, chunk: Chunk, path: Path, into: Tensor | None = None) -> Tensor:
    """The tensor of one torch.save record: straight from its bytes when it is one contiguous storage.

    Args:
        into: where to put it, if it fits (else a new tensor is returned).
    """
    with zipfile.ZipFile(FileView(file, chunk.start, chunk.length)) as archive:
        by_name = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in by_name.values()):
            raise ValueError("it is compressed, which torch.save never does")
        pickled = archive.read(by_name["data.pkl"])  # zipfile checks its CRC
        order = archive.read(by_name["byteorder"]) if "byteorder" in by_name else b"little"
    try:
        (kind, key, numel), offset, size, stride = _TensorUnpickler(pickled, _TENSOR_PICKLE).load()
    except RefusedPickle:
        return _weights_only(file, chunk)
    info = by_name[f"data/{key}"]
    if offset or stride != _contiguous(size) or numel != torch.Size(size).numel() or order != b"little":
        return _weights_only(file, chunk)
    header = os.pread(file, 30, chunk.start + info.header_offset)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    dtype = _STORAGE_DTYPES[kind]
    if header[:4] != b"PK\x03\x04" or info.file_size != numel * dtype.itemsize:
        raise ValueError("its archive is damaged")
    if start + info.file_size > chunk.length:
        raise ValueError("its storage leaves the record")
    tensor = read_tensor(file, chunk.start + start, dtype, size, path, into)
    if info.CRC and zlib.crc32(memoryview(tensor.view(-1).view(torch.uint8).numpy())) != info.CRC:
        raise ValueError("its CRC-32 does not match: a byte has changed")
    return tensor


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(size):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _weights_only(file: int, chunk: Chunk) -> Tensor:
    data = os.pread(file, chunk.length, chunk.start)
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"it holds a {type(tensor).__name__}, no tensor")
    return tensor.detach().contiguous()
