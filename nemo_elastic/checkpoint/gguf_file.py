"""GGUF files through the `gguf` package: written one tensor at a time, and read back for the proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..problems import Problem, ProblemsError
from .gguf_model import ARCHITECTURE
from .reader import LazyTensor
from .writer import read_ahead, tensor_bytes

GGUF_FILE = "model.gguf"
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
OF_THE_FORMAT = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # what the reader calls the head of a file


def write_gguf(path: Path, keys: Mapping[str, Any], tensors: Sequence[LazyTensor]) -> None:
    """A new file `path`; integers become uint32, floats float32, lists arrays."""
    import gguf

    with closing(gguf.GGUFWriter(path, ARCHITECTURE)) as writer:
        for key, value in keys.items():
            getattr(writer, f"add_{_kinds(value)[0].lower()}")(key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[TYPE_NAMES[tensor.dtype]]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, value in read_ahead(tensors):
            writer.write_tensor_data(np.frombuffer(tensor_bytes(value), dtype=np.uint8))


def _kinds(value: Any) -> tuple[str, ...]:
    """The types that GGUF has for a key's value: one, or `ARRAY` and that of its items."""
    if isinstance(value, list):
        return ("ARRAY", {int: "INT32", str: "STRING"}[type(value[0])])
    return ({bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)],)


class GgufFile:
    """A written file: its `keys` as Python values, their types in GGUF (`kinds`), and its tensors.

    Raises:
        ProblemsError: no such file, or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field for name, field in reader.fields.items() if name not in OF_THE_FORMAT}
            self.keys: dict[str, Any] = {name: field.contents() for name, field in fields.items()}
            self.kinds = {name: tuple(kind.name for kind in field.types) for name, field in fields.items()}
        except (OSError, ValueError, IndexError, KeyError) as error:
            words = f"cannot be read as GGUF ({str(error)[:160]}); run `nemo-elastic extract --format gguf` again"
            raise ProblemsError([Problem(str(path), words)]) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def names(self) -> list[str]:
        """Of its tensors, in the order of the file."""
        return list(self._tensors)

    def type_name(self, name: str) -> str:
        """The type of a tensor as GGUF calls it: `F32`, `Q8_0`."""
        return str(self._tensors[name].tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as it was given to the writer."""
        return tuple(int(extent) for extent in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor; one that we do not write raises KeyError."""
        return {name: dtype for dtype, name in TYPE_NAMES.items()}[self.type_name(name)]

    def numel(self) -> int:
        """Values of all tensors."""
        return sum(int(tensor.n_elements) for tensor in self._tensors.values())

    def read(self, name: str) -> Tensor:
        """A copy of a tensor, in the shape that was given to the writer."""
        tensor = self._tensors[name]
        flat = torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1)).view(self.dtype(name))
        return flat.reshape(self.shape(name))


def first_difference(file: GgufFile, keys: Mapping[str, Any], tensors: Sequence[LazyTensor]) -> Iterator[str]:
    """What a file has that it should not: keys by type and value, then tensors by type, shape and bits, in order."""
    wanted_keys = {"general.architecture": ARCHITECTURE, **keys}
    for key, wanted in wanted_keys.items():
        if key not in file.keys:
            yield f"key {key} is missing, the nested subnet has {_few(wanted)}"
        elif file.kinds[key] != _kinds(wanted):
            yield f"key {key} is of type {' of '.join(file.kinds[key])}, wanted {' of '.join(_kinds(wanted))}"
        elif file.keys[key] != (float(np.float32(wanted)) if type(wanted) is float else wanted):
            yield f"key {key} is {_few(file.keys[key])}, the nested subnet has {_few(wanted)}"
    for key in (key for key in file.keys if key not in wanted_keys):
        yield f"key {key} is {_few(file.keys[key])}, which no child is written with"
    here = set(file.names())
    for tensor in tensors:
        if tensor.name not in here:
            yield f"{tensor.name} is missing"
            continue
        got, wanted = (file.type_name(tensor.name), file.shape(tensor.name)), (TYPE_NAMES[tensor.dtype], tensor.shape)
        if got != wanted:
            yield f"{tensor.name} is {got[0]} {list(got[1])}, wanted {wanted[0]} {list(wanted[1])}"
        elif difference := _values_differ(file.read(tensor.name), tensor.read()):
            yield f"{tensor.name}: {difference}"
    for name in sorted(here - {tensor.name for tensor in tensors}):
        yield f"{name} is no tensor of this child"


def _values_differ(got: Tensor, wanted: Tensor) -> str:
    """How, in words; nothing where every bit is the same."""
    if torch.equal(got.view(-1).view(torch.uint8), wanted.contiguous().view(-1).view(torch.uint8)):
        return ""
    gap = (got.double() - wanted.double()).abs()
    return f"{int((gap != 0).sum()) or 'some'} of {got.numel()} values differ, by up to {float(gap.max()):.3g}"


def _few(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
