"""Whole tensors by canonical name, one at a time: what every source of weights looks like to the rest of the package.

Canonical names are those of `ParamLayout.table`. A reader knows names, shapes and dtypes without reading a tensor,
holds no tensor itself, and never maps a file into memory (mapped pages count as the process's own). `LazyTensor` is
one entry of what a writer is given: it is read when its turn comes.

`SafetensorsReader` reads the format with plain JSON and offsets, through handles that it keeps: nothing in a file is
executed, and a file that is exchanged meanwhile is not read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from ..problems import Problem, raise_if_any
from ..space.layout import ParamLayout


class TensorReader(Protocol):
    """A source of weights. `read` returns a new, whole, contiguous tensor."""

    def names(self) -> list[str]:
        """Canonical names, in the order of the source."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is to be written: everything about it is known before `read` is called."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


def told(tensors: Iterable[LazyTensor], heard: Callable[[int, int], None] | None) -> list[LazyTensor]:
    """The same tensors; `heard` is told (how many were read, of how many) behind each, in the thread that reads it."""
    every = list(tensors)
    if heard is None:
        return every
    seen: set[str] = set()
    one_by_one = Lock()

    def read(tensor: LazyTensor) -> Tensor:
        value = tensor.read()
        with one_by_one:
            seen.add(tensor.name)
            heard(len(seen), len(every))
        return value

    return [replace(tensor, read=partial(read, tensor)) for tensor in every]


def lazy_tensors(reader: TensorReader, dtype: torch.dtype | None = None) -> Iterator[LazyTensor]:
    """Everything in `reader`, optionally cast to `dtype`."""
    for name in reader.names():
        target = dtype or reader.dtype(name)
        yield LazyTensor(
            name, target, reader.shape(name), lambda name=name, target=target: reader.read(name).to(target)
        )


def check_against_layout(reader: TensorReader, layout: ParamLayout, source: str) -> None:
    """Every row of the table is there, in its shape, and nothing else is.

    Raises:
        ProblemsError: naming each missing, unexpected or misshapen tensor (the first 8 of each).
    """
    have, found = set(reader.names()), []
    missing = [name for name in layout.table if name not in have]
    extra = sorted(have - set(layout.table))
    wrong = [
        f"{name} is {list(reader.shape(name))}, model says {list(spec.shape({}))}"
        for name, spec in layout.table.items()
        if name in have and tuple(reader.shape(name)) != tuple(spec.shape({}))
    ]
    for what, names in (("lacks", missing), ("has no row of the model for", extra), ("has another shape:", wrong)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            words = f"{what} {'; '.join(names[:8])}{more}; the model section and the weights must be of the same parent"
            found.append(Problem(source, words))
    raise_if_any(found)


class MemoryReader:
    """A `TensorReader` over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """All names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A copy of one."""
        return self._tensors[name].detach().to("cpu", copy=True).contiguous()
