"""From `data.paths` or `data.blend` to samples: what each entry is, and its windows.

builtin:corpus               the standard library's text
PREFIX (.bin + .idx)         Megatron's tokenized text
.txt, records with "text"    plain text, tokenized and cached; records: lines of .jsonl, rows of .parquet
records with "messages", "conversations", or "prompt" and "completion"      conversations with a loss mask
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_elastic.config.sections import BlendSource, ChatConfig
from nemo_elastic.data.blend import Blend, Source
from nemo_elastic.data.conversations import PackedChat, PaddedChat, is_chat, load_conversations
from nemo_elastic.data.corpus import DEFAULT_LIST
from nemo_elastic.data.entries import CORPUS, prefix_of, text_files
from nemo_elastic.data.indexed_text import open_indexed
from nemo_elastic.data.text_files import kind_of
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import load_tokens
from nemo_elastic.data.windows import Windows
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any

logger = logging.getLogger(__name__)
CHECKED_AT_START = 1 << 24  # token ids of each split whose range is checked before a run begins


class IndexedWindows(Windows):
    """Windows over ids that somebody else's tokenizer made: each is checked against the vocabulary.

    Raises:
        ValueError: an id outside the vocabulary, at the start (in the first 16 M ids) or when its window is read.
    """

    def __init__(self, prefix: str, stream: np.ndarray, vocab_size: int, seq_length: int, **how: Any) -> None:
        super().__init__(stream, seq_length, **how)
        self.prefix, self.vocab_size = prefix, vocab_size
        self._check(np.asarray(stream[:CHECKED_AT_START]))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of sample `index`, two `int64` arrays `[seq_length]`."""
        tokens, labels = super().sample(index)
        self._check(tokens)
        self._check(labels[-1:])
        return tokens, labels

    def _check(self, ids: np.ndarray) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{self.prefix}.bin has the token id {high if high >= self.vocab_size else low}, and model.vocab_size="
                f"{self.vocab_size}; tokenize the text with the parent's own tokenizer"
            )


def open_windows(
    split: str,
    tokenizer: BPETokenizer,
    seq_length: int,
    *,
    blend: Sequence[BlendSource],
    chat: ChatConfig,
    vocab_size: int,
    paths: Sequence[str] = (),
    seed: int = 0,
    shuffle: bool = True,
    corpus_list: str | None = None,
    cache_dir: str | None = None,
) -> Source:
    """Samples of a run's text. `sample(i)` depends on (seed, i, seq_length) and files alone.

    Args:
        split: `train` or `heldout`.
        blend: weighted sources; without any, the text of `paths`, without that the standard library's.
        vocab_size: rows of the model's embedding.

    Raises:
        ProblemsError: everything that is wrong with the entries, keyed `data.blend.N`, or with `data.paths`.
    """
    if not blend:
        how = {"corpus_list": corpus_list or DEFAULT_LIST, "cache_dir": cache_dir}
        try:
            return Windows(load_tokens(split, tokenizer, paths=paths, **how), seq_length, seed=seed, shuffle=shuffle)
        except ValueError as error:
            words = str(error).removeprefix("data: ").removeprefix("data.paths: ")
            raise ProblemsError([Problem("data.paths", words)]) from error
    found, problems = [], []
    for i, entry in enumerate(blend):
        try:
            how = {"seed": seed, "shuffle": shuffle}
            found.append(_open(entry.path, split, tokenizer, seq_length, chat, vocab_size, corpus_list, cache_dir, how))
        except (ValueError, OSError) as error:
            problems.append(Problem(f"data.blend.{i}", str(error).removeprefix("data.paths: ")))
    raise_if_any(problems)
    return Blend(found, [entry.weight for entry in blend], seed=seed if shuffle else None)


def without_padding(chat: ChatConfig) -> ChatConfig:
    """How conversations are read to rank a parent: end to end, as scores are means over all positions of a sample."""
    return replace(chat, layout="packed")


def hold_conversations(path: str, files: Sequence[Path]) -> bool:
    """Whether the files of an entry are conversations, or text.

    Raises:
        ValueError: they are both.
    """
    chats = [f for f in files if kind_of(f) != ".txt" and is_chat(f)]
    if chats and len(chats) < len(files):
        plain = next(f for f in files if f not in chats)
        raise ValueError(f"{path} mixes conversations ({chats[0].name}) and text ({plain.name}); make two sources")
    return bool(chats)


def _open(
    path: str,
    split: str,
    tokenizer: BPETokenizer,
    seq_length: int,
    chat: ChatConfig,
    vocab_size: int,
    corpus_list: str | None,
    cache_dir: str | None,
    how: Mapping[str, Any],
) -> Source:
    if path == CORPUS:
        stream = load_tokens(split, tokenizer, corpus_list=corpus_list or DEFAULT_LIST, cache_dir=cache_dir)
        return Windows(stream, seq_length, **how)
    prefix = prefix_of(path)
    if prefix is not None:
        text = open_indexed(prefix)
        if split == "train" and not text.ends_with(tokenizer.eod):
            logger.warning("%s.bin: documents do not end with end-of-text (id %d)", prefix, tokenizer.eod)
        return IndexedWindows(prefix, text.split(split), vocab_size, seq_length, **how)
    files = text_files(path)
    if not hold_conversations(path, files):
        return Windows(load_tokens(split, tokenizer, paths=[path], cache_dir=cache_dir), seq_length, **how)
    conversations = load_conversations(split, tokenizer, files, chat, cache_dir)
    if chat.layout == "packed":
        return PackedChat(conversations, seq_length, **how)
    padded = PaddedChat(conversations, seq_length, pad_id=tokenizer.pad_id, **how)
    if padded.cut:
        _say_cut(path, split, padded.cut, len(padded.starts), seq_length)
    return padded


@cache
def _say_cut(path: str, split: str, cut: int, count: int, seq_length: int) -> None:
    """Once in a run's first process, however often its steps open the source."""
    if os.environ.get("RANK", "0") != "0":
        return
    which = "to train on" if split == "train" else "held out"
    logger.warning("%s: %d of %d conversations %s are cut at seq_length=%d", path, cut, count, which, seq_length)
