"""What a parent's files store, without torch: rows of the embedding out of `.metadata`, elements out of headers.

`.metadata` is a pickle. Every name in it, whatever it is, becomes an inert record here: nothing is imported or called.
The weights themselves are read by `mcore.checkpoint.preflight`, which says what is wrong with a file that is.
"""

from __future__ import annotations

import json
import pickle
import re
from math import prod
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError

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


def stored_parameters(folder: Path) -> int | None:
    """Elements of all floating-point tensors in the safetensors files of a folder; None: there is no such file.

    Raises:
        ProblemsError: a header that cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    total = 0
    for file in files:
        try:
            with file.open("rb") as content:
                length = int.from_bytes(content.read(8), "little")
                if not 2 <= length <= file.stat().st_size - 8:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(content.read(length))
            tensors = [row for name, row in header.items() if name != "__metadata__"]
            total += sum(prod(row["shape"]) for row in tensors if str(row["dtype"]).startswith(("F", "BF")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            words = f"is no safetensors file that can be read ({str(error)[:80]}); copy it again"
            raise ProblemsError([Problem(str(file), words)]) from error
    return total
