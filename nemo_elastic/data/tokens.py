"""Token streams: documents joined with end-of-text, cached on disk, one `uint16` or `uint32` array per split.

    stream = ids(document 0) <eod> ids(document 1) <eod> ...

The cache's name is a hash of what the stream is a function of (files with their hashes, tokenizer file,
split), so a changed file or tokenizer never meets an old cache; it is written to a temporary name and
renamed, so ranks that race write the same bytes twice instead of reading half a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nemo_elastic.data.corpus import DEFAULT_LIST, SPLITS, load_corpus_list, read_documents, usable_files
from nemo_elastic.data.tokenizer import BPETokenizer

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl")
HELDOUT_EVERY = 33  # of a user's documents, every 33rd block of text is held out: 3 %
_BLOCK_CHARACTERS = 4096
_VERSION = 1  # part of every cache's name: raise it when the same input should give other tokens


def default_cache_dir() -> Path:
    """`$NEMO_ELASTIC_CACHE`, else `nemo_elastic` in the user's cache folder."""
    own = os.environ.get("NEMO_ELASTIC_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo_elastic"


def tokenize(documents: Iterable[str], tokenizer: BPETokenizer) -> np.ndarray:
    """The stream of some documents, `[tokens]`, each document followed by end-of-text."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.array([tokenizer.eod], dtype=dtype)
    pieces: list[np.ndarray] = []
    for ids in tokenizer.encode_batch(list(documents)):
        pieces += [np.asarray(ids, dtype=dtype), end]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)


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
        paths: a user's `.txt` and `.jsonl` files, or folders of them (`data.paths`); empty means the
            standard-library corpus.
        corpus_list: the files of that corpus.
        cache_dir: folder of the cached arrays (`data.cache_dir`).

    Raises:
        ValueError: unknown split, or `paths` names something missing, unreadable or without text.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if paths:
        files = find_text_files(paths)
        identity: list[object] = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
        documents = user_documents(files, split)
    else:
        listed = usable_files(load_corpus_list(Path(corpus_list)))
        identity = [f.sha256 for f in listed if f.split == split]
        documents = read_documents(listed, split)
    key = json.dumps([_VERSION, split, tokenizer.sha256, identity])
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    cache = folder / f"tokens-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not cache.is_file():
        stream = tokenize(documents, tokenizer)
        if not len(stream):
            raise ValueError(f"data.paths={[str(p) for p in paths]} has too little text for a {split} split; add text")
        write_array(cache, stream)
        logger.info("tokens: %d of split %s written to %s", len(stream), split, cache)
    return np.load(cache, mmap_mode="r")


def find_text_files(paths: Sequence[str | Path]) -> list[Path]:
    """The `.txt` and `.jsonl` files among and under `paths`, sorted inside each folder.

    Raises:
        ValueError: a path is missing, a file has another ending or is empty, a folder has no such file.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.stat().st_size)
            files += inside
            if not inside:
                problems.append(f"{path} has no {' or '.join(SUFFIXES)} file with text in it")
        elif not path.is_file():
            problems.append(f"{path} does not exist")
        elif path.suffix not in SUFFIXES:
            problems.append(f"{path} must end in {' or '.join(SUFFIXES)}")
        elif not path.stat().st_size:
            problems.append(f"{path} is empty")
        else:
            files.append(path)
    if problems:
        raise ValueError(f"data.paths: {'; '.join(problems)}; give text files, or leave data.paths empty")
    return files


def user_documents(files: Iterable[Path], split: str) -> Iterator[str]:
    """Documents of a user's files: one per line of a `.jsonl` (key `text`), blocks of lines of a `.txt`.

    Every 33rd document, counted over all files, is held out; of less than 33, the last one.
    """
    documents = [d for file in files for d in (_jsonl(file) if file.suffix == ".jsonl" else _blocks(file))]
    yield from (d for index, d in enumerate(documents) if in_split(index, len(documents), split))


def in_split(index: int, count: int, split: str) -> bool:
    """Whether document `index` of `count` belongs to `split`."""
    last = count - 1
    heldout = index % HELDOUT_EVERY == HELDOUT_EVERY - 1 or (0 < index == last < HELDOUT_EVERY)
    return heldout == (split == "heldout")


def _jsonl(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'data.paths: {file} line {number} is not a JSON object with "text"') from error
            if not isinstance(text, str):
                raise ValueError(f'data.paths: {file} line {number} has a "text" that is not a string')
            if text:
                yield text


def _blocks(file: Path) -> Iterator[str]:
    """A text file in blocks of whole lines, about 4,096 characters each."""
    block: list[str] = []
    size = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            block.append(line)
            size += len(line)
            if size >= _BLOCK_CHARACTERS:
                yield "".join(block)
                block, size = [], 0
    if "".join(block).strip():
        yield "".join(block)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an `.npy` file to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
