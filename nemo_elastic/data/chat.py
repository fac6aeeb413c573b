"""Conversations with a loss on the assistant's tokens only.

A line of a `.jsonl` is `{"messages": [{"role":, "content":}, ...]}` or `{"prompt":, "completion":}`:

    turn         = start(role) content end            mask 0 .. 0, 1 .. 1 for content and end of an assistant
    prompt pair  = prompt completion <eod>             mask 0 .. 0, 1 .. 1, 1

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_elastic.config.sections import ChatConfig
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import default_cache_dir, in_split, write_array
from nemo_elastic.data.windows import Windows

logger = logging.getLogger(__name__)
TRAINED_ROLES = ("assistant",)
_VERSION = 1  # part of every cache's name: raise it when the same input should give other tokens


@dataclass(frozen=True)
class Conversations:
    """Tokenized conversations: `ids` and `mask` `[tokens]` end to end, `ends` `[conversations]`."""

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray


def is_chat(file: Path) -> bool:
    """Whether the first record of a `.jsonl` is a conversation."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except ValueError:
        return False
    return isinstance(record, dict) and ("messages" in record or "prompt" in record)


def encode(record: object, tokenizer: BPETokenizer, chat: ChatConfig) -> tuple[list[int], list[int]]:
    """Ids of a conversation and which of them carry loss (0 or 1).

    Raises:
        ValueError: the record is none, or a role, content, prompt or completion is not a string.
    """
    ids: list[int] = []
    mask: list[int] = []

    def add(some: list[int], trained: bool) -> None:
        ids.extend(some)
        mask.extend([int(trained)] * len(some))

    if isinstance(record, dict) and "messages" in record:
        end = [tokenizer.eod] if chat.end is None else tokenizer.encode_markers(chat.end)
        for role, content in _turns(record["messages"]):
            add(tokenizer.encode_markers(chat.start.replace("{role}", role)), False)
            add(tokenizer.encode(content), role in TRAINED_ROLES)
            add(end, role in TRAINED_ROLES)
        if chat.end is not None:
            add([tokenizer.eod], False)
        return ids, mask
    pair = [record.get(k) if isinstance(record, dict) else None for k in ("prompt", "completion")]
    if not all(isinstance(text, str) for text in pair):
        raise ValueError('has neither "messages" nor "prompt" and "completion" strings')
    add(tokenizer.encode(pair[0]), False)
    add([*tokenizer.encode(pair[1]), tokenizer.eod], True)
    return ids, mask


def _turns(messages: object) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError('has "messages" that are no list of turns')
    for turn in messages:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError('has a turn without a "role" and a "content" that are strings')
        yield role, content


def load_conversations(
    split: str, tokenizer: BPETokenizer, files: Sequence[Path], chat: ChatConfig, cache_dir: str | Path | None = None
) -> Conversations:
    """Conversations of a split (every 33rd is held out), memory-mapped from the cache and made first where missing.

    Raises:
        ValueError: a line that is no conversation (file and line are named), or none with an assistant's token.
    """
    identity = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    key = json.dumps([_VERSION, split, tokenizer.sha256, identity, chat.start, chat.end])
    stem = f"chat-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    parts = [folder / f"{stem}-{name}.npy" for name in ("ids", "mask", "ends")]
    if not all(part.is_file() for part in parts):
        for part, array in zip(parts, _tokenize(split, tokenizer, files, chat), strict=True):
            write_array(part, array)
    return Conversations(*(np.load(part, mmap_mode="r") for part in parts))


def _tokenize(
    split: str, tokenizer: BPETokenizer, files: Sequence[Path], chat: ChatConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    records = [(file, number, line) for file in files for number, line in _lines(file)]
    ids, mask, ends, silent = [], [], [], 0
    for index, (file, number, line) in enumerate(records):
        try:
            some, trained = encode(json.loads(line), tokenizer, chat)
        except ValueError as error:
            reason = "is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"{file} line {number} {reason}") from error
        if not in_split(index, len(records), split):
            continue
        if not any(trained):
            silent += 1
            continue
        ids.append(np.asarray(some, dtype=np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32))
        mask.append(np.asarray(trained, dtype=np.uint8))
        ends.append(len(some))
    if not ids:
        named = ", ".join(map(str, files))
        raise ValueError(f"{named} has no {split} conversation with an assistant's turn; add conversations")
    if silent:
        logger.warning("%s: %d %s conversations have no assistant's token and are left out", files[0], silent, split)
    return np.concatenate(ids), np.concatenate(mask), np.cumsum(ends)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        yield from ((n, line) for n, line in enumerate(lines, start=1) if line.strip())


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
        cut = int((found.ends - starts > seq_length + 1).sum())
        if cut:
            logger.warning("%d of %d conversations are cut at seq_length=%d", cut, len(starts), seq_length)
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
