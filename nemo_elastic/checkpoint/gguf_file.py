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


def write_gguf(path: Path, keys: Mapping[str, Any], tensors: Sequence[LazyTensor]) -> None:
    """A new file `path`; integers become uint32, floats float32, lists arrays."""
    import gguf

    with closing(gguf.GGUFWriter(path, ARCHITECTURE)) as writer:
        for key, value in keys.items():
            _add(writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[TYPE_NAMES[tensor.dtype]]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, value in read_ahead(tensors):
            writer.write_tensor_data(np.frombuffer(tensor_bytes(value), dtype=np.uint8))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


class GgufFile:
    """A written file: its `keys` as Python values, and its tensors.

    Raises:
        ProblemsError: no such file, or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError) as error:
            words = f"cannot be read as GGUF ({str(error)[:160]}); run `nemo-elastic extract --format gguf` again"
            raise ProblemsError([Problem(str(path), words)]) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def names(self) -> list[str]:
        """Of its tensors, in the order of the file."""
        return list(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor; one that we do not write raises KeyError."""
        return {name: dtype for dtype, name in TYPE_NAMES.items()}[self._tensors[name].tensor_type.name]

    def numel(self) -> int:
        """Values of all tensors."""
        return sum(int(tensor.n_elements) for tensor in self._tensors.values())

    def read(self, name: str) -> Tensor:
        """A copy of a tensor, in the shape that was given to the writer."""
        tensor = self._tensors[name]
        flat = torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1)).view(self.dtype(name))
        return flat.reshape([int(extent) for extent in reversed(tensor.shape)])


def first_difference(file: GgufFile, keys: Mapping[str, Any], tensors: Sequence[LazyTensor]) -> Iterator[str]:
    """What a file has that it should not, in the order of the forward: keys, then tensors by their bits."""
    for key, wanted in keys.items():
        got = file.keys.get(key)
        same = got is not None and (abs(got - wanted) <= 1e-6 * abs(wanted) if type(wanted) is float else got == wanted)
        if not same:
            yield f"key {key} is {_few(got)}, the nested subnet has {_few(wanted)}"
    here = set(file.names())
    for tensor in tensors:
        if tensor.name not in here:
            yield f"{tensor.name} is missing"
            continue
        got, wanted = file.read(tensor.name), tensor.read()
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            yield f"{tensor.name} is {got.dtype} {list(got.shape)}, wanted {wanted.dtype} {list(wanted.shape)}"
        elif not torch.equal(got.view(-1).view(torch.uint8), wanted.contiguous().view(-1).view(torch.uint8)):
            gap = (got.double() - wanted.double()).abs()
            wrong = int((gap != 0).sum()) or "some"
            yield f"{tensor.name}: {wrong} of {got.numel()} values differ, by up to {float(gap.max()):.3g}"
    extra = sorted(here - {tensor.name for tensor in tensors})
    if extra:
        yield f"{extra[0]} is no tensor of this child"


def _few(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
