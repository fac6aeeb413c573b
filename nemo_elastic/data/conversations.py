"""Conversations of files, tokenized once and cached, and the samples made of them.

Two ways to fill samples of `seq_length` (`data.chat.layout`):

- `padded`: one conversation a sample, cut at its end or filled up with padding of mask 0. Both kinds of layers only
  look back, so padding behind a conversation changes nothing and no state crosses conversations.
- `packed`: conversations end to end, cut into windows as plain text is. Nothing is wasted, but the state of Mamba
  layers and attention run on across conversations in a window, and a window may begin inside one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_elastic.config.sections import ChatConfig
from nemo_elastic.data.chat import encode, template_for
from nemo_elastic.data.records import CHAT_COLUMNS, records
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import default_cache_dir, id_type, identity_of, of_split, write_arrays
from nemo_elastic.data.turns import is_dialogue
from nemo_elastic.data.windows import Windows

logger = logging.getLogger(__name__)
_VERSION = 1  # part of every cache's name: raise it when the same input should give other tokens

Encoder = Callable[[object], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Conversations:
    """Tokenized conversations: `ids` and `mask` `[tokens]` end to end, `ends` `[conversations]`."""

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray


def is_chat(file: Path) -> bool:
    """Whether the first record of a `.jsonl` or Parquet file is a conversation."""
    try:
        _, first = next(records(file, (*CHAT_COLUMNS, "text")), (None, None))
    except ValueError:
        return False  # whoever reads it says what is wrong
    return is_dialogue(first)


def load_conversations(
    split: str, tokenizer: BPETokenizer, files: Sequence[Path], chat: ChatConfig, cache_dir: str | Path | None = None
) -> Conversations:
    """Conversations of a split (every 33rd is held out), memory-mapped from the cache and made first where missing.

    Raises:
        ValueError: a record that is no conversation (file and line are named), or none with an assistant's token.
    """
    template = template_for(tokenizer, chat)
    form = template.identity if template else [chat.start, chat.end]
    key = json.dumps([_VERSION, split, tokenizer.sha256, [identity_of(f, cache_dir) for f in files], form])
    stem = f"chat-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    parts = [folder / f"{stem}-{name}.npy" for name in ("ids", "mask", "ends")]
    if not all(part.is_file() for part in parts):
        made = _tokenize(split, files, lambda record: encode(record, tokenizer, chat, template))
        if not all(write_arrays(parts, made, (id_type(tokenizer), np.uint8, np.int64))):
            named = ", ".join(map(str, files))
            raise ValueError(f"{named} has no {split} conversation with an assistant's turn; add conversations")
    return Conversations(*(np.load(part, mmap_mode="r") for part in parts))


def _tokenize(split: str, files: Sequence[Path], encoded: Encoder) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(ids, mask, [where it ends in the stream]) of every conversation of a split."""
    silent = end = 0
    for ids, mask in of_split(every_conversation(files, encoded), split):
        if not any(mask):
            silent += 1
            continue
        end += len(ids)
        yield ids, mask, [end]
    if silent:
        logger.warning("%s: %d %s conversations have no assistant's token and are left out", files[0], silent, split)


def every_conversation(files: Sequence[Path], encoded: Encoder) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, mask) of every conversation of some files, one after the other.

    Raises:
        ValueError: a record that is none; file and line are named.
    """
    for file in files:
        for (_, place), record in records(file, CHAT_COLUMNS):
            try:
                yield encoded(record)
            except ValueError as error:
                raise ValueError(f"{file} {place} {error}") from error


class PackedChat(Windows):
    """Windows over conversations end to end, with their mask."""

    def __init__(self, found: Conversations, seq_length: int, *, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__(found.ids, seq_length, seed=seed, shuffle=shuffle)
        self.mask = found.mask

    def sample(self, index: int) -> tuple[np.ndarray, ...]:
        """Tokens, labels and the labels' mask of sample `index`, `[seq_length]`."""
        start = self.start(index)
        mask = np.asarray(self.mask[start + 1 : start + self.seq_length + 1], dtype=np.float32)
        return (*super().sample(index), mask)


class PaddedChat:
    """One conversation a sample, shuffled anew every epoch; those whose loss begins behind `seq_length` are left out.

    Raises:
        ValueError: none is left.
    """

    def __init__(
        self, found: Conversations, seq_length: int, *, pad_id: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.found, self.seq_length, self.pad_id, self.seed, self.shuffle = found, seq_length, pad_id, seed, shuffle
        starts = np.concatenate([[0], found.ends[:-1]])
        trained = np.flatnonzero(found.mask)
        first = trained[np.searchsorted(trained, starts)] - starts  # every conversation has one
        first = np.maximum(first, 1)  # a conversation's first token is no label
        self.usable = np.flatnonzero((first <= seq_length) & (first < found.ends - starts))
        self.starts, self.per_epoch = starts, len(self.usable)
        if not self.per_epoch:
            raise ValueError(f"no conversation has an assistant's token within seq_length={seq_length}")
        self.cut = int((found.ends - starts > seq_length + 1).sum())  # conversations that a sample does not hold whole
        self._epoch, self._order = -1, self.usable

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and the labels' mask of sample `index`, `[seq_length]`."""
        epoch, rank = divmod(int(index), self.per_epoch)
        if self.shuffle and epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.usable)
        which = int(self._order[rank])
        rows = slice(
            int(self.starts[which]), int(min(self.found.ends[which], self.starts[which] + self.seq_length + 1))
        )
        ids = np.full(self.seq_length + 1, self.pad_id, dtype=np.int64)
        mask = np.zeros(self.seq_length + 1, dtype=np.float32)
        ids[: rows.stop - rows.start], mask[: rows.stop - rows.start] = self.found.ids[rows], self.found.mask[rows]
        return ids[:-1], ids[1:], mask[1:]
