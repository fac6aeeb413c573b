"""How many rows the embedding of a torch_dist checkpoint has, out of its `.metadata`, without torch.

`.metadata` is a pickle. Every name in it, whatever it is, becomes an inert record here: nothing is imported or called.
The weights themselves are read by `mcore.checkpoint.preflight`, which says what is wrong with a file that is.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

WEIGHT = re.compile(r"(module\.|model\.)*embedding\.word_embeddings\.weight")  # and not the optimizer's states of it


class _Inert(dict):
    """Stands for an object of any class: its constructor's arguments and its state. It may be a key, as some are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __new__(cls, *args: Any, **named: Any) -> _Inert:
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert


def embedding_rows(checkpoint: Path) -> int | None:
    """Rows of the word embedding that a NeMo checkpoint stores; None where that cannot be read."""
    try:
        with open(checkpoint / "weights" / ".metadata", "rb") as file:
            stored = _InertUnpickler(file).load().state["state_dict_metadata"]
        (size,) = (entry.state["size"].args[0] for key, entry in stored.items() if WEIGHT.fullmatch(key))
        rows = size[0]
    except Exception:  # a damaged pickle can raise nearly anything
        return None
    return rows if isinstance(rows, int) and rows > 0 else None
