"""A tied parent that stores an output layer as well: it counts where it is told to, or where both are the same matrix.

Megatron's own checkpoints of tied models have none. Hugging Face folders: `huggingface.HuggingFaceReader`.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..problems import Problem, ProblemsError
from .reader import TensorReader

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def tied_reader(reader: TensorReader, source: Path, output_weights: str | None) -> TensorReader:
    """The reader of a tied parent, without the output layer that it stores besides.

    Args:
        output_weights: `parent.output_weights`; `embedding` is the only one with which a parent is read as tied.

    Raises:
        ProblemsError: embedding and output layer differ, and nobody says which one counts.
    """
    if OUTPUT not in reader.names():
        return reader
    if output_weights is None and not torch.equal(reader.read(OUTPUT), reader.read(EMBEDDING)):
        words = (
            f"share_embeddings_and_output_weights is true, but {OUTPUT} is not {EMBEDDING}; say which one counts: "
            "parent.output_weights=embedding (as Megatron does) or parent.output_weights=lm_head (an untied model)"
        )
        raise ProblemsError([Problem(str(source), words)])
    return _WithoutOutput(reader)


class _WithoutOutput:
    """The same `TensorReader`, one tensor less."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def names(self) -> list[str]:
        return [name for name in self._reader.names() if name != OUTPUT]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._reader.read(name)
