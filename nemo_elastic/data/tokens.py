"""Token streams: documents joined with end-of-text, cached on disk, one `uint16` or `uint32` array per split.

    stream = ids(document 0) <eod> ids(document 1) <eod> ...

The cache's name is a hash of what the stream is a function of (files with their hashes and kinds, tokenizer file,
split), so a changed file or tokenizer never meets an old cache; it is written to a temporary name and
renamed, so ranks that race write the same bytes twice instead of reading half a file. Documents pass through: memory
holds a few of them, however long the text is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from nemo_elastic.data.corpus import DEFAULT_LIST, SPLITS, load_corpus_list, read_documents, usable_files
from nemo_elastic.data.records import blocks, texts
from nemo_elastic.data.text_files import find_text_files, kind_and_packing, kind_of
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.files import read_json, write_json

logger = logging.getLogger(__name__)

HELDOUT_EVERY = 33  # of a user's documents, every 33rd block of text is held out: 3 %
_TOGETHER = 1 << 22  # characters that are tokenized at once
_VERSION = 1  # part of every cache's name: raise it when the same input should give other tokens
SETTLED_NS = 5_000_000_000  # a file this long untouched keeps its time's meaning, also on file systems of whole seconds
T = TypeVar("T")


def default_cache_dir() -> Path:
    """`$NEMO_ELASTIC_CACHE`, else `nemo_elastic` in the user's cache folder."""
    own = os.environ.get("NEMO_ELASTIC_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")  # empty is as good as unset, or the cache would lie where one stands
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "nemo_elastic"


def id_type(tokenizer: BPETokenizer) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def tokenize(documents: Iterable[str], tokenizer: BPETokenizer) -> Iterator[np.ndarray]:
    """The stream of some documents in pieces `[tokens]`, each document followed by end-of-text."""
    end = [tokenizer.eod]

    def stream(texts: list[str]) -> np.ndarray:
        ids = (i for document in tokenizer.encode_batch(texts) for i in (*document, *end))
        return np.fromiter(ids, dtype=id_type(tokenizer))

    together: list[str] = []
    size = 0
    for document in documents:
        together.append(document)
        size += len(document)
        if size >= _TOGETHER:
            yield stream(together)
            together, size = [], 0
    if together:
        yield stream(together)


def load_tokens(
    split: str,
    tokenizer: BPETokenizer,
    *,
    paths: Sequence[str | Path] = (),
    corpus_list: str | Path = DEFAULT_LIST,
    cache_dir: str | Path | None = None,
) -> np.ndarray:
    """The token stream of a split, memory-mapped from the cache and made first where it is missing.

    Args:
        split: `train` or `heldout`.
        tokenizer: the tokenizer.
        paths: a user's text files, or folders of them (`data.paths`); empty means the standard-library corpus.
        corpus_list: the files of that corpus.
        cache_dir: folder of the cached arrays (`data.cache_dir`).

    Raises:
        ValueError: unknown split, or `paths` names something missing, unreadable or without text.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if paths:
        files = find_text_files(paths)
        identity: list[object] = [identity_of(f, cache_dir) for f in files]
        documents = user_documents(files, split)
    else:
        listed = usable_files(load_corpus_list(Path(corpus_list)))
        identity = [f.sha256 for f in listed if f.split == split]
        documents = read_documents(listed, split)
    key = json.dumps([_VERSION, split, tokenizer.sha256, identity])
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    cache = folder / f"tokens-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not cache.is_file():
        try:
            (count,) = write_arrays(
                [cache], ((piece,) for piece in tokenize(documents, tokenizer)), [id_type(tokenizer)]
            )
        except ValueError as error:
            raise ValueError(f"data.paths: {error}") from error
        if not count:
            raise ValueError(f"data.paths={[str(p) for p in paths]} has too little text for a {split} split; add text")
        logger.info("tokens: %d of split %s written to %s", count, split, cache)
    return np.load(cache, mmap_mode="r")


def identity_of(file: Path, cache_dir: str | Path | None = None) -> list[object]:
    """What a file's tokens depend on: how it is read, and its bytes.

    Bytes are hashed once: the cache notes a file's hash by its real path, size and time. A file that was written in the
    last seconds is not noted, as it may be written again within the same tick of its clock.
    """
    real, state = os.path.realpath(file), file.stat()
    seen = {"path": real, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    note = (Path(cache_dir) if cache_dir else default_cache_dir()) / f"hash-{name}.json"
    with suppress(OSError, ValueError, KeyError, AttributeError):
        noted = read_json(note)
        if {key: noted.get(key) for key in seen} == seen:
            return [kind_and_packing(file), str(noted["sha256"])]
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if time.time_ns() - state.st_mtime_ns > SETTLED_NS:
        with suppress(OSError):  # a cache that cannot be written is said elsewhere
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, seen | {"sha256": digest})
    return [kind_and_packing(file), digest]


def user_documents(files: Iterable[Path], split: str) -> Iterator[str]:
    """Documents of a user's files: `text` of every record, blocks of lines of a `.txt`.

    Every 33rd document, counted over all files, is held out; of less than 33, the last one.
    """
    yield from of_split(every_document(files), split)


def every_document(files: Iterable[Path]) -> Iterator[str]:
    """Documents of a user's files, of both splits."""
    for file in files:
        yield from blocks(file) if kind_of(file) == ".txt" else texts(file)


def of_split(every: Iterable[T], split: str) -> Iterator[T]:
    """Those of `every` that belong to `split`."""
    count, before = 0, []  # one is held back: whether it is the last one decides
    for count, one in enumerate(every, start=1):
        if before and _heldout(count - 2) == (split == "heldout"):
            yield from before
        before = [one]
    if (_heldout(count - 1) or 1 < count < HELDOUT_EVERY) == (split == "heldout"):
        yield from before


def _heldout(index: int) -> bool:
    return index % HELDOUT_EVERY == HELDOUT_EVERY - 1


def write_arrays(paths: Sequence[Path], pieces: Iterable[Sequence[np.ndarray]], types: Sequence[type]) -> list[int]:
    """Write pieces `[n]` end to end into one `.npy` a path, by a temporary name; nothing when there is no piece.

    Returns:
        Elements of every array.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks of several hosts write into one cache, and process numbers of two hosts may be the same.
    own = uuid.uuid4().hex
    raw = [path.with_name(f"{path.name}.{own}.raw") for path in paths]
    done = [path.with_name(f"{path.name}.{own}.tmp") for path in paths]
    counts = [0] * len(paths)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in raw]
            for piece in pieces:
                for k, (file, part) in enumerate(zip(files, piece, strict=True)):
                    np.asarray(part, dtype=types[k]).tofile(file)
                    counts[k] += len(part)
        if all(counts):
            for source, target, kind in zip(raw, done, types, strict=True):
                with target.open("wb") as file:  # a header needs the length; the content is copied from disk to disk
                    np.save(file, np.memmap(source, dtype=kind, mode="r"))
            for target, path in zip(done, paths, strict=True):
                target.replace(path)
    finally:
        for path in (*raw, *done):
            path.unlink(missing_ok=True)
    return counts
