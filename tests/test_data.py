"""Text, tokenizer, token streams and windows, without torch, Megatron or NeMo."""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_elastic.data.corpus import (
    TOPICS,
    CorpusFile,
    CorpusList,
    load_corpus_list,
    read_documents,
    scan_standard_library,
    split_of,
    usable_files,
)
from nemo_elastic.data.text_files import find_text_files
from nemo_elastic.data.tokenizer import BPETokenizer, train_bpe
from nemo_elastic.data.tokens import default_cache_dir, identity_of, load_tokens, tokenize, user_documents
from nemo_elastic.data.windows import Windows

SOURCES = {"a.py": "import os\n", "b/c.py": "x = 1\n" * 40, "heapq.py": "def push(heap): ...\n"}


@pytest.fixture
def library(tmp_path: Path) -> tuple[Path, CorpusList]:
    """A small standard library, and its list; `heapq.py` is held out by its name."""
    for name, text in SOURCES.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lib", scan_standard_library(tmp_path / "lib")


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer()


def test_shipped_list_is_sorted_and_splits_by_file() -> None:
    corpus = load_corpus_list()
    names = [f.path for f in corpus.files]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(f.split == split_of(f.path) for f in corpus.files)
    assert not any({"test", "tests", "idle_test"} & set(Path(n).parts) for n in names)
    assert not {"encodings/cp1252.py", "encodings/iso8859_1.py", "html/entities.py"} & set(names)
    assert not any("_sysconfigdata" in n for n in names)
    share = corpus.bytes_of("heldout") / (corpus.bytes_of("heldout") + corpus.bytes_of("train"))
    assert 0.02 < share < 0.04
    assert {f.path: f.split for f in corpus.files}[TOPICS] == "train"


def test_running_python_gives_text_of_both_splits() -> None:
    corpus = load_corpus_list()
    files = usable_files(corpus)
    assert len(files) > 0.5 * len(corpus.files)
    if platform.python_version() == corpus.python:
        assert files == corpus.files
    heldout = list(read_documents(files, "heldout"))
    assert any("class" in d for d in heldout)
    topics = next(f for f in files if f.path == TOPICS)
    documents = list(read_documents([topics], "train"))
    assert len(documents) > 50 and sum(d.startswith("The ") or "****" in d for d in documents) > 50


def test_scan_hashes_and_reads_what_is_there(library: tuple[Path, CorpusList]) -> None:
    root, corpus = library
    assert [f.path for f in corpus.files] == ["a.py", "b/c.py", "heapq.py"]
    assert [f.sha256 for f in corpus.files] == [hashlib.sha256(t.encode()).hexdigest() for t in SOURCES.values()]
    assert list(read_documents(corpus.files, "heldout", root)) == [SOURCES["heapq.py"]]


def test_list_round_trips(library: tuple[Path, CorpusList], tmp_path: Path) -> None:
    library[1].save(tmp_path / "corpus.json")
    assert load_corpus_list(tmp_path / "corpus.json") == library[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.json", "lib"]


def test_differing_and_lacking_files_are_reported_and_the_rest_is_used(
    library: tuple[Path, CorpusList], caplog: pytest.LogCaptureFixture
) -> None:
    root, corpus = library
    (root / "a.py").write_text("import sys\n")
    gone = CorpusFile(path="gone.py", sha256="0" * 64, size=1, split="train")
    with caplog.at_level(logging.INFO):
        used = usable_files(replace(corpus, files=(*corpus.files, gone)), root)
    assert [f.path for f in used] == ["b/c.py", "heapq.py"]
    assert "lacking ['gone.py']; differing ['a.py']" in caplog.text


def test_another_minor_version_uses_what_has_the_name(library: tuple[Path, CorpusList]) -> None:
    root, corpus = library
    (root / "a.py").write_text("import sys\n")
    used = usable_files(replace(corpus, python="3.0.1"), root)
    assert [f.path for f in used] == ["a.py", "b/c.py", "heapq.py"]
    assert used[0].sha256 == hashlib.sha256(b"import sys\n").hexdigest()


def test_a_python_without_sources_is_an_error(library: tuple[Path, CorpusList], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable source for split train and heldout; .*data\.paths"):
        usable_files(library[1], tmp_path / "nothing")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x  # naïve\n",
        "\t\r\n  \x00\x7f 文字 \U0001f40d",
        "<|endoftext|> is only text",
        "1234567890",
        "",
    ],
)
def test_decode_inverts_encode(bpe: BPETokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eod not in ids and bpe.pad_id not in ids


def test_shipped_tokenizer(bpe: BPETokenizer) -> None:
    assert (bpe.vocab_size, bpe.eod, bpe.pad_id) == (2048, 0, 1)
    assert len(bpe.encode("31415")) == 5
    assert len(bpe.encode("        return self")) <= 4
    assert bpe.encode_batch(["a b", "c"]) == [bpe.encode("a b"), bpe.encode("c")]


def test_tokenizer_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*no such file"):
        BPETokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*bad\.json is not"):
        BPETokenizer(tmp_path / "bad.json")


def test_training_gives_exactly_the_vocabulary_or_says_so() -> None:
    text = [" ".join(f"word{i} other{i * 7}" for i in range(300))]
    assert train_bpe(text, 265).get_vocab_size() == 265
    with pytest.raises(ValueError, match=r"data\.vocab_size=4096 cannot be reached"):
        train_bpe(["a a a"], 4096)


def test_stream_is_documents_and_end_of_text(bpe: BPETokenizer) -> None:
    expected = [*bpe.encode("import os\n"), 0, *bpe.encode("x = 1"), 0]
    (stream,) = tokenize(["import os\n", "x = 1"], bpe)
    assert stream.tolist() == expected and stream.dtype == np.uint16


def test_cache_is_keyed_by_content(bpe: BPETokenizer, tmp_path: Path) -> None:
    text, cache = tmp_path / "t.txt", tmp_path / "cache"
    text.write_text("alpha beta\n" * 2000)
    first = load_tokens("train", bpe, paths=[text], cache_dir=cache)
    (written,) = cache.iterdir()
    stamp = written.stat().st_mtime_ns
    again = load_tokens("train", bpe, paths=[text], cache_dir=cache)
    assert np.array_equal(first, again) and [p.stat().st_mtime_ns for p in cache.iterdir()] == [stamp]
    text.write_text("gamma delta\n" * 2000)
    changed = load_tokens("train", bpe, paths=[text], cache_dir=cache)
    assert len(list(cache.iterdir())) == 2 and not np.array_equal(first, changed)


@pytest.mark.parametrize(("shared", "folder"), [("", "/home/me/.cache"), (None, "/home/me/.cache"), ("/c", "/c")])
def test_the_cache_lies_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, shared: str | None, folder: str
) -> None:
    monkeypatch.delenv("NEMO_ELASTIC_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if shared is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
    assert default_cache_dir() == Path(folder) / "nemo_elastic"


def test_bytes_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By real path, size and time; what was written a moment ago may be written again at the same time."""
    file, link, cache, hashed = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "cache", []
    stock = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *words: hashed.append(words) or stock(*words))
    file.write_text("one")
    link.symlink_to(file)
    new = identity_of(file, cache)
    assert identity_of(file, cache) == new and len(hashed) == 2 and not cache.exists()
    os.utime(file, (1, 1))
    assert [identity_of(f, cache) for f in (file, link, file)] == [new] * 3 and len(hashed) == 3
    file.write_text("two")
    os.utime(file, (2, 2))
    assert identity_of(link, cache) != new and len(hashed) == 4
    next(cache.iterdir()).write_text("{")
    assert identity_of(file, cache) != new and len(hashed) == 5


def test_every_document_is_in_one_split(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    files = find_text_files([tmp_path])
    train, heldout = (list(user_documents(files, s)) for s in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(f"document {i}" for i in range(100))
    assert heldout == ["document 32", "document 65", "document 98"]


def test_text_files_are_cut_at_lines_without_loss(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long file\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    parts = [list(user_documents([tmp_path / "a.txt"], s)) for s in ("train", "heldout")]
    assert sum(map(len, parts[0] + parts[1])) == len(text)
    assert len(parts[1]) == 1 and all(d.endswith("\n") for d in parts[0])


def test_bad_paths_are_all_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / n for n in ("none.txt", "empty.txt", "x.pdf", "folder")]
    with pytest.raises(
        ValueError, match=r"data\.paths: .*none\.txt does not exist; .*empty\.txt is empty; .*x\.pdf must"
    ):
        find_text_files(paths)


@pytest.mark.parametrize("line", ["{", '{"tex": "a"}', '["text"]', '{"text": 3}'])
def test_a_bad_line_is_named(tmp_path: Path, bpe: BPETokenizer, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 "):
        load_tokens("train", bpe, paths=[tmp_path / "a.jsonl"], cache_dir=tmp_path)


def test_too_little_text_for_a_held_out_split(tmp_path: Path, bpe: BPETokenizer) -> None:
    (tmp_path / "a.txt").write_text("one block only\n")
    with pytest.raises(ValueError, match="too little text for a heldout split"):
        load_tokens("heldout", bpe, paths=[tmp_path / "a.txt"], cache_dir=tmp_path)


def test_labels_are_the_next_tokens() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    tokens, labels = Windows(stream, 16, seed=3).batch(0, 200)
    assert tokens.shape == labels.shape == (200, 16) and tokens.dtype == np.int64
    assert np.array_equal(labels, tokens + 1)


def test_an_epoch_reads_every_token_at_most_once_and_nearly_all() -> None:
    windows = Windows(np.arange(1000, dtype=np.uint16), 16, seed=3)
    for epoch in range(3):
        tokens, _ = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert len(np.unique(tokens)) == tokens.size >= 1000 - 3 * 16
    first, second = ([windows.start(e * windows.per_epoch + k) for k in range(windows.per_epoch)] for e in (0, 1))
    assert sorted(first) != first and {s % 16 for s in first} != {s % 16 for s in second}


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    stream = np.arange(5000, dtype=np.uint16)
    one, other = Windows(stream, 32, seed=7), Windows(stream, 32, seed=7)
    indices = [*range(0, 700, 13), 5, 600, 0]
    forward = {i: one.start(i) for i in sorted(indices)}
    assert {i: other.start(i) for i in indices} == forward
    assert {i: Windows(stream, 32, seed=8).start(i) for i in indices} != forward


def test_order_is_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from nemo_elastic.data.windows import Windows;"
        "print([Windows(np.arange(5000), 32, seed=7).start(i) for i in (0, 1, 200)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    windows = Windows(np.arange(5000), 32, seed=7)
    assert json.loads(done.stdout) == [windows.start(i) for i in (0, 1, 200)]


def test_held_out_windows_are_read_in_order_and_again() -> None:
    windows = Windows(np.arange(100), 10, shuffle=False)
    assert [windows.start(i) for i in range(12)] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 0, 10, 20]


def test_a_stream_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"20 tokens of text are too few for data\.seq_length=32"):
        Windows(np.arange(20), 32)
