"""The weights of a training checkpoint without the rows that tensor parallelism added to its vocabulary.

rows stored = ceil(v / TP) TP at the TP of the run that wrote it; rows v.. are zeros (`mcore.kernels.padded_vocabulary`)
"""

from pathlib import Path

import torch
from torch import Tensor

from ..problems import Problem, ProblemsError
from ..space.layout import ParamLayout
from .reader import TensorReader

LARGEST_TP = 1024


class UnpaddedReader:
    """A `TensorReader` over another one, of whole tensors without padding.

    Args:
        layout: the table of the whole model (`tp_size` 1).
        source: for messages.
    """

    def __init__(self, reader: TensorReader, layout: ParamLayout, source: Path) -> None:
        self._reader, self._source = reader, source
        self._vocabulary = {
            n: spec.shape({}) for n, spec in layout.table.items() if spec.axes[0] is layout.axes["vocab"]
        }

    def names(self) -> list[str]:
        """Names as they are stored."""
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without padding; as stored where there can be none, for the check against the table."""
        stored, wanted = self._reader.shape(name), self._vocabulary.get(name)
        padded = wanted is not None and stored[1:] == wanted[1:] and 0 < stored[0] - wanted[0] < LARGEST_TP
        return wanted if padded else stored

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self._reader.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor without its padding.

        Raises:
            ProblemsError: the rows that would be cut are not zeros: they are no padding.
        """
        tensor, (rows, *_) = self._reader.read(name), self.shape(name) or (None,)
        if rows is None or rows == len(tensor):
            return tensor
        if torch.any(tensor[rows:]):
            words = (
                f"has {len(tensor)} rows in {name} that are not zeros, model.vocab_size is {rows}; give its own model"
            )
            raise ProblemsError([Problem(str(self._source), words)])
        return tensor[:rows].clone()
