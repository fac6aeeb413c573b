"""What training will read, before it reads it: documents, tokens and their lengths per source, and the first samples.

    tokens of a document  = its ids and the end of text (of a conversation: its ids)
    read of a source      = steps x global_batch_size x weight / sum of weights       samples, over the whole curriculum
    epochs                = read / samples that the source has at that length

At most `limit` documents and 4 M tokens of a source are tokenized; what holds more is counted so far (`whole: false`),
unless its index says it all. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..config.sections import BlendSource, RunConfig
from .blend import Blend, shares
from .chat import encode, template_for
from .conversations import every_conversation
from .corpus import DEFAULT_LIST, SPLITS, load_corpus_list, read_documents, standard_library, usable_files
from .entries import CORPUS, prefix_of, text_files
from .indexed_text import open_indexed
from .sources import hold_conversations, open_windows
from .text_files import find_text_files
from .tokenizer import BPETokenizer
from .tokens import every_document, of_split

LIMIT, TOKENS = 20_000, 1 << 22  # documents and tokens of a source that a preview tokenizes: seconds
TOGETHER = 16  # documents that are tokenized at once


@dataclass
class SourcePreview:
    """One source.

    Attributes:
        lengths: tokens of every document.
        heldout: whether it is held out.
        trained, first: of a conversation, how many of its tokens carry loss and where that begins.
        kind: `corpus`, `text`, `conversations` or `tokenized`.
        whole: all of it was counted.
    """

    path: str
    kind: str
    share: float
    files: int
    bytes: int
    whole: bool = True
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    heldout: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    trained: np.ndarray | None = None
    first: np.ndarray | None = None

    def split(self, name: str) -> np.ndarray:
        """Which documents belong to a split, `[documents]`."""
        return self.heldout if name == "heldout" else ~self.heldout

    def samples(self, seq_length: int, layout: str) -> int:
        """Samples of an epoch of the training split."""
        rows = self.split("train")
        if self.kind == "conversations" and layout == "padded":
            return int(self._usable(seq_length)[rows].sum())
        return max(0, (int(self.lengths[rows].sum()) - 1) // seq_length - 1)

    def _usable(self, seq_length: int) -> np.ndarray:
        first = np.maximum(self.first, 1)
        return (first <= seq_length) & (first < self.lengths) & (self.trained > 0)

    def at(self, seq_length: int, layout: str) -> dict[str, int]:
        """What a sequence length does to documents."""
        longer = int((self.lengths > seq_length + 1).sum())
        if self.kind != "conversations" or layout != "padded":
            return {"seq_length": seq_length, "longer": longer}
        left_out = int((~self._usable(seq_length) & (self.trained > 0)).sum())
        return {"seq_length": seq_length, "cut": longer, "left_out": left_out}

    def described(self, seq_lengths: Sequence[int], layout: str) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {
            "path": self.path, "kind": self.kind, "share": self.share, "files": self.files, "bytes": self.bytes,
            "whole": self.whole, "documents": len(self.lengths), "tokens": int(self.lengths.sum()),
        }  # fmt: skip
        found |= {f"{s}_tokens": int(self.lengths[self.split(s)].sum()) for s in SPLITS}
        found["lengths"] = histogram(self.lengths)
        if self.trained is not None:
            found["tokens_with_loss"] = int(self.trained.sum())
            found["without_loss"] = int((self.trained == 0).sum())  # documents
        found["at"] = [self.at(n, layout) for n in seq_lengths]
        return found


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents by length, bins that double: `{from, to, documents, tokens}`, `to` exclusive."""
    if not len(lengths):
        return []
    edges = [1]
    while edges[-1] <= int(lengths.max()):
        edges.append(2 * edges[-1])
    place = np.digitize(lengths, edges)
    counts = np.bincount(place, minlength=len(edges) + 1)
    tokens = np.bincount(place, weights=lengths, minlength=len(edges) + 1)
    rows = [
        {"from": edges[i - 1] if i else 0, "to": edges[min(i, len(edges) - 1)], "documents": int(c), "tokens": int(t)}
        for i, (c, t) in enumerate(zip(counts, tokens, strict=True))
    ]
    used = [i for i, row in enumerate(rows) if row["documents"]]
    return rows[used[0] : used[-1] + 1]


def preview(run: RunConfig, tokenizer: BPETokenizer, *, limit: int = LIMIT, samples: int = 2) -> dict[str, Any]:
    """Everything about a run's text as plain values.

    Args:
        limit: documents of a source that are tokenized; 0: all, however many tokens they have.
        samples: of the first stage, in the order of training, as spans of text with and without loss.

    Raises:
        ValueError: a source that cannot be read (file and line are named).
    """
    data = run.data
    if data.paths and not data.blend:
        found = [_files("data.paths", 1.0, find_text_files(data.paths), run, tokenizer, limit, chat=False)]
    else:
        blend = data.blend or (BlendSource(path=CORPUS),)
        parts = shares([entry.weight for entry in blend])
        found = [
            _source(e.path, float(n / parts.sum()), run, tokenizer, limit) for e, n in zip(blend, parts, strict=True)
        ]
    lengths = list(dict.fromkeys(stage.seq_length for stage in run.train.stages))
    result: dict[str, Any] = {
        "tokenizer": {"path": str(tokenizer.path), "end_of_text": tokenizer.tokenizer.id_to_token(tokenizer.eod)},
        "sources": [source.described(lengths, data.chat.layout) for source in found],
        "stages": [_stage(stage, found, data.chat.layout) for stage in run.train.stages],
        "samples": [],
        "notes": [],
    }
    if samples and all(source.whole for source in found) and lengths:
        result["samples"] = _samples(run, tokenizer, lengths[0], samples)
    elif samples and lengths:
        partial = ", ".join(source.path for source in found if not source.whole)
        result["notes"].append(
            f"samples are shown when every source was read to its end; {partial} holds more than {limit:,} documents "
            f"or {TOKENS:,} tokens (--documents 0 reads all)"
        )
    return result


def _stage(stage: Any, found: Sequence[SourcePreview], layout: str) -> dict[str, Any]:
    read = stage.steps * stage.global_batch_size
    rows = []
    for source in found:
        have = source.samples(stage.seq_length, layout)
        samples = read * source.share
        rows.append(
            {"path": source.path, "samples": round(samples), "tokens": round(samples * stage.seq_length)}
            | ({"epochs": round(samples / have, 4) if have else None} if source.whole else {})
        )
    sizes = {"steps": stage.steps, "seq_length": stage.seq_length, "global_batch_size": stage.global_batch_size}
    return {**sizes, "samples": read, "tokens": read * stage.seq_length, "sources": rows}


def _source(path: str, share: float, run: RunConfig, tokenizer: BPETokenizer, limit: int) -> SourcePreview:
    if path == CORPUS:
        listed = usable_files(load_corpus_list(DEFAULT_LIST))
        sizes = [(standard_library() / file.path).stat().st_size for file in listed]
        found = SourcePreview(path, "corpus", share, len(listed), sum(sizes))
        counts, held = [], []
        for split in SPLITS:
            rows, whole = _first(_lengths(read_documents(listed, split), tokenizer), limit)
            found.whole = found.whole and whole
            counts += [length for (length,) in rows]
            held += [split == "heldout"] * len(rows)
        found.lengths, found.heldout = np.array(counts, np.int64), np.array(held, bool)
        return found
    prefix = prefix_of(path)
    if prefix is not None:
        text = open_indexed(prefix)
        ends = np.append(text.begins[1:], len(text.ids))
        size = sum(Path(prefix + end).stat().st_size for end in (".bin", ".idx"))
        found = SourcePreview(path, "tokenized", share, 2, size, lengths=(ends - text.begins).astype(np.int64))
        found.heldout = text.begins >= text.cut
        return found
    return _files(path, share, text_files(path), run, tokenizer, limit, chat=True)


def _files(
    path: str, share: float, files: Sequence[Path], run: RunConfig, tokenizer: BPETokenizer, limit: int, *, chat: bool
) -> SourcePreview:
    found = SourcePreview(path, "text", share, len(files), sum(f.stat().st_size for f in files))
    if chat and hold_conversations(path, files):
        found.kind, template = "conversations", template_for(tokenizer, run.data.chat)
        every = every_conversation(files, lambda record: encode(record, tokenizer, run.data.chat, template))
        # (tokens, those with loss, where loss begins) of each
        facts = ((len(mask), sum(mask), mask.index(1) if 1 in mask else 0) for _, mask in every)
        rows, found.whole = _first(facts, limit)
        found.lengths, found.trained, found.first = np.array(rows, np.int64).reshape(-1, 3).T
    else:
        rows, found.whole = _first(_lengths(every_document(files), tokenizer), limit)
        found.lengths = np.array(rows, np.int64).reshape(-1, 1).T[0]
    found.heldout = np.zeros(len(found.lengths), bool)
    found.heldout[list(of_split(range(len(found.lengths)), "heldout"))] = True
    return found


def _lengths(documents: Iterator[str], tokenizer: BPETokenizer) -> Iterator[tuple[int]]:
    """Tokens of each document with its end of text."""
    while some := list(islice(documents, TOGETHER)):
        yield from ((len(ids) + 1,) for ids in tokenizer.encode_batch(some))


def _first(rows: Iterator[tuple[int, ...]], limit: int) -> tuple[list[tuple[int, ...]], bool]:
    """The first rows (tokens, ...), `limit` documents or about `TOKENS` tokens at most, and whether these were all."""
    found: list[tuple[int, ...]] = []
    tokens = 0
    for row in rows:
        if limit and (len(found) == limit or tokens >= TOKENS):
            return found, False
        found.append(row)
        tokens += row[0]
    return found, True


def _samples(run: RunConfig, tokenizer: BPETokenizer, seq_length: int, count: int) -> list[dict[str, Any]]:
    data = run.data
    source = open_windows(
        "train", tokenizer, seq_length, blend=data.blend, chat=data.chat, paths=data.paths,
        vocab_size=int(run.model["vocab_size"]), seed=run.train.seed, cache_dir=data.cache_dir,
    )  # fmt: skip
    found = []
    for i in range(count):
        tokens, labels, *mask = source.sample(i)
        loss = np.asarray(mask[0] if mask else np.ones(len(labels))).astype(bool)
        ids, carries = np.concatenate([tokens[:1], labels]), np.concatenate([[False], loss])
        end = len(ids)
        if mask:  # padding says nothing
            end = int(np.flatnonzero((ids != tokenizer.pad_id) | carries)[-1]) + 1
        from_ = data.blend[source.place(i)[0]].path if isinstance(source, Blend) else None
        shown = spans(ids[:end], carries[:end], tokenizer)
        found.append({"sample": i, **({"source": from_} if from_ else {}), "padding": len(ids) - end, "spans": shown})
    return found


def spans(ids: np.ndarray, loss: np.ndarray, tokenizer: BPETokenizer) -> list[Mapping[str, Any]]:
    """Runs of tokens `[n]` alike in whether they carry loss, as text with its special tokens."""
    edges = [0, *(np.flatnonzero(np.diff(loss)) + 1).tolist(), len(ids)]
    return [
        {"loss": bool(loss[a]), "tokens": b - a, "text": tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False)}
        for a, b in pairwise(edges)
    ]
