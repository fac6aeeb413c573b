"""Text as published data sets and other systems carry it: read as it is, or refused with file and line."""

import bz2
import gzip
import json
import logging
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_elastic.config.sections import ChatConfig
from nemo_elastic.data import tokens, unpack
from nemo_elastic.data.conversations import is_chat, load_conversations
from nemo_elastic.data.text_files import find_text_files
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import load_tokens, of_split, user_documents

TEXTS = [f"Document {i}: naïve 文字 \U0001f40d.\nSecond line {i * i}." for i in range(70)]
LINES = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
FORK = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(range(128, 256))


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst,
}  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer()


def read(bpe: BPETokenizer, file: Path, split: str = "train") -> np.ndarray:
    return load_tokens(split, bpe, paths=[file], cache_dir=file.parent / f"cache-{file.name}")


def documents_of(*files: Path) -> list[str]:
    return [*user_documents(files, "train"), *user_documents(files, "heldout")]


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_records_give_the_plain_ones_tokens(bpe: BPETokenizer, tmp_path: Path, packing: str) -> None:
    packed, pack = tmp_path / f"a.jsonl{packing}", PACKERS[packing]
    packed.write_bytes(pack(LINES[:1000]) + pack(LINES[1000:]))  # two members, as `cat a.gz b.gz` and pzstd make them
    expected = [i for k, t in enumerate(TEXTS) if k % 33 != 32 for i in (*bpe.encode(t), bpe.eod)]
    assert read(bpe, packed).tolist() == expected
    text = tmp_path / f"a.txt{packing}"
    text.write_bytes(pack(LINES))
    assert "".join(documents_of(text)) == LINES.decode()


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet_gives_the_plain_records_tokens(bpe: BPETokenizer, tmp_path: Path, compression: str) -> None:
    table = pa.table({"url": ["x"] * len(TEXTS), "text": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", compression=compression, row_group_size=9)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for split in ("train", "heldout"):
        found = read(bpe, tmp_path / "a.parquet", split)
        assert np.array_equal(found, read(bpe, tmp_path / "a.jsonl", split)) and len(found)


def test_the_cache_knows_content_and_kind(bpe: BPETokenizer, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    streams = [load_tokens("train", bpe, paths=[tmp_path / n], cache_dir=tmp_path / "c") for n in ("a.jsonl", "a.txt")]
    assert not np.array_equal(*streams)
    load_tokens("train", bpe, paths=[tmp_path / "b.jsonl"], cache_dir=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("packing", [p for p in PACKERS if p])
def test_a_file_that_is_cut_off_is_an_error(bpe: BPETokenizer, tmp_path: Path, packing: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 30_000).tolist()
    whole = PACKERS[packing]("".join(json.dumps({"text": str(n)}) + "\n" for n in noise).encode())
    for cut in (len(whole) // 2, len(whole) - 3):
        (tmp_path / f"a.jsonl{packing}").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"a\.jsonl\{packing} line \d+ is damaged or cut off"):
            read(bpe, tmp_path / f"a.jsonl{packing}")
    (tmp_path / f"b.jsonl{packing}").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"line 1 is damaged or cut off"):
        read(bpe, tmp_path / f"b.jsonl{packing}")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "jsonl" not in p.name]


def test_damaged_parquet_and_one_without_text_are_named(bpe: BPETokenizer, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    for spoilt in (whole[:-30], whole[: len(whole) // 2], LINES):
        (tmp_path / "a.parquet").write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"a\.parquet is damaged behind row 0"):
            read(bpe, tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has the columns body; one must be text"):
        read(bpe, tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r'c\.parquet row 2 is not an object with "text"'):
        read(bpe, tmp_path / "c.parquet")


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_a_bomb_is_stopped_in_little_memory(
    bpe: BPETokenizer, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "ALLOWED_ANYWAY", 1 << 20)
    (tmp_path / f"a.txt{packing}").write_bytes(PACKERS[packing](b"a" * (48 << 20)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"a\.txt\{packing} line \d+ unpacks to more than 500 times its size"):
        documents_of(tmp_path / f"a.txt{packing}")
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def test_a_bomb_in_parquet_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "ALLOWED_ANYWAY", 1 << 20)
    pq.write_table(pa.table({"text": ["a" * 5000] * 4_000}), tmp_path / "a.parquet")  # one string, 4,000 references
    with pytest.raises(ValueError, match=r"a\.parquet unpacks to more than 500 times its size"):
        documents_of(tmp_path / "a.parquet")


def test_marks_of_byte_order_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES[:1] + LINES[1:] + b"\xef\xbb\xbf" + LINES)  # `cat a b`
    assert sorted(documents_of(tmp_path / "a.jsonl")) == sorted(TEXTS * 2)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert documents_of(tmp_path / "a.txt") == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LINES.decode().encode("utf-16"), "line 1 is UTF-16 or UTF-32, not UTF-8; convert it"),
        (LINES.decode().encode("utf-32"), "line 1 is UTF-16 or UTF-32"),
        (LINES.decode().encode("utf-16-le"), r"line 1 has (zero bytes|the byte 0x)"),
        (LINES + b'{"text": "caf\xe9 and more"}\n', "line 71 has the byte 0xe9 where UTF-8 cannot have it; convert"),
        (LINES + b'{"text": "\xed\xa0\xbd"}\n', "line 71 has the byte 0xed"),
        (LINES + b'{"text": "a\0b"}\n', "line 71 has zero bytes: it is no text"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, ending: str, content: bytes, words: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\{ending} {words}"):
        documents_of(tmp_path / f"a{ending}")


def test_half_a_surrogate_pair_becomes_a_replacement_character(bpe: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d here"}\n{"text": "\\ud83d\\udc0d"}\n{"text": "end"}\n')
    assert bpe.decode(read(bpe, tmp_path / "a.jsonl")) == "cut \ufffd here\U0001f40d"
    turns = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \\udc0d"}]}\n'
    (tmp_path / "b.jsonl").write_text(turns * 3)
    found = load_conversations("train", bpe, [tmp_path / "b.jsonl"], ChatConfig(), tmp_path / "c")
    assert "b \ufffd" in bpe.decode(found.ids)
    assert bpe.encode_markers("x\ud83d") == bpe.encode("x\ufffd")


def test_deep_and_huge_values_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "x", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl line 71 is nested too deeply"):
        documents_of(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x", "meta": ' + b"1" * 10_000 + b"}\n")
    with pytest.raises(ValueError, match=r"b\.jsonl line 1 is not JSON"):
        documents_of(tmp_path / "b.jsonl")


def test_a_line_without_end_is_an_error_and_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_elastic.data import records

    (tmp_path / "a.txt").write_text("word " * 1000)
    monkeypatch.setattr(records, "_LONGEST_PIECE", 600)
    monkeypatch.setattr(records, "_BLOCK_CHARACTERS", 500)
    found = documents_of(tmp_path / "a.txt")
    assert len(found) == 9 and sorted(map(len, found)) == [200] + [600] * 8
    (tmp_path / "a.jsonl").write_text('\n{"text": "' + "word " * 1000)
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 is longer than 3,000 characters; is a record a line"):
        list(unpack.lines(tmp_path / "a.jsonl", 3000))


def test_what_macos_leaves_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        (tmp_path / name).write_bytes(LINES)
        (tmp_path / f"._{name}").write_bytes(FORK)
    (tmp_path / "._own.txt").write_text("a name is no proof\n")
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in find_text_files([tmp_path])] == ["._own.txt", "a.jsonl", "b.txt", "c.parquet"]
    assert "3 files that macOS left beside its own" in caplog.text
    with pytest.raises(ValueError, match=r"\._a\.jsonl is what macOS keeps beside a file, not the file; give a\.jsonl"):
        find_text_files([tmp_path / "._a.jsonl"])
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "._a.txt").write_bytes(FORK)
    with pytest.raises(ValueError, match="only has no file with text"):
        find_text_files([tmp_path / "only"])


def test_names_of_all_kinds(tmp_path: Path) -> None:
    names = ["a.JSONL", "a.jsonl.gz", "a.txt.ZST", "a.parquet", "b.txt.xz", "c.jsonl.bz2"]
    others = ["a.json", "a.parquet.gz", "jsonl", "a.gz", "a.jsonl.zip", "a.csv"]
    for name in names + others:
        (tmp_path / name).write_text("x")
    assert {p.name for p in find_text_files([tmp_path])} == set(names)
    with pytest.raises(ValueError, match=r"must end in \.txt, \.jsonl or \.parquet \(the first two also with \.gz"):
        find_text_files([tmp_path / "a.json"])


@pytest.mark.parametrize("count", [0, 1, 2, 32, 33, 34, 66, 100])
def test_the_split_of_a_stream_is_the_split_of_a_list(count: int) -> None:
    def heldout(index: int) -> bool:
        return index % 33 == 32 or (0 < index == count - 1 < 33)

    for split in ("train", "heldout"):
        expected = [i for i in range(count) if heldout(i) == (split == "heldout")]
        assert list(of_split(iter(range(count)), split)) == expected


def test_tokenizing_holds_little(bpe: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_TOGETHER", 1 << 14)
    line = json.dumps({"text": "some words and more words. " * 40}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 1500)  # 1.6 MB
    tracemalloc.start()
    stream = read(bpe, tmp_path / "a.jsonl")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(stream) == (1500 - 1500 // 33) * (len(bpe.encode(json.loads(line)["text"])) + 1)


def test_packed_conversations_are_read(bpe: BPETokenizer, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.table({"messages": [turns] * 3, "source": ["x"] * 3}), tmp_path / "a.parquet")
    found = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert is_chat(tmp_path / name)
        found.append(load_conversations("train", bpe, [tmp_path / name], ChatConfig(), tmp_path / name[2:]))
    for other in found[1:]:
        assert np.array_equal(other.ids, found[0].ids) and np.array_equal(other.mask, found[0].mask)
        assert np.array_equal(other.ends, found[0].ends)


def test_without_pyarrow_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.jsonl.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=rf"{name} needs pyarrow, which is not installed here"):
            documents_of(tmp_path / name)
