"""Megatron's `.bin/.idx`, and blends of every kind of source, opened as a run opens them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import BlendSource, ChatConfig
from nemo_elastic.data.conversations import load_conversations
from nemo_elastic.data.indexed_text import open_indexed
from nemo_elastic.data.of_run import check_text, text_tokenizer
from nemo_elastic.data.sources import open_windows
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.nemo.plain.data import collate
from nemo_elastic.problems import ProblemsError


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents(count: int = 100, low: int = 2, high: int = 2048, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[*generator.integers(low, high, generator.integers(20, 60)).tolist(), 0] for _ in range(count)]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_pair_is_one_stream_cut_at_a_document(tmp_path: Path, dtype: type) -> None:
    made = documents()
    text = open_indexed(write_pair(tmp_path / "p", made, dtype))
    assert text.ids.tolist() == [i for d in made for i in d] and text.ids.dtype == dtype
    ends = np.cumsum([len(d) for d in made])
    assert text.cut in ends and 0.02 < 1 - text.cut / ends[-1] <= 0.03
    assert len(text.split("train")) + len(text.split("heldout")) == ends[-1]
    assert text.ends_with(0) and not text.ends_with(1)


def test_a_parent_is_ranked_on_conversations_without_padding(tmp_path: Path) -> None:
    from nemo_elastic.nemo.run.ranking import calibration

    _, _, (chat, _) = mixed(tmp_path)
    words = [f"data.blend=[{{path: {chat}}}]", f"data.cache_dir={tmp_path}/cache", "rank.seq_length=64"]
    run = load_config("tiny_parent.yaml", words).config
    assert run.data.chat.layout == "padded"  # what training reads
    sample, _ = calibration(run)
    every = load_conversations("train", text_tokenizer(run), [Path(chat)], run.data.chat, tmp_path / "cache").ids
    whole = every.astype("<i8").tobytes()
    for i in range(6):
        found = sample(i).numpy()
        assert len(found) == 64 and found.astype("<i8").tobytes() in whole
    check_text(run, trains=False)


def test_a_pair_of_one_document_is_cut_inside_it(tmp_path: Path) -> None:
    text = open_indexed(write_pair(tmp_path / "p", [list(range(1000))]))
    assert (len(text.split("train")), len(text.split("heldout"))) == (970, 30)


def test_a_pair_that_does_not_fit_together_is_an_error(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", documents(5))
    whole = (tmp_path / "p.bin").read_bytes()
    (tmp_path / "p.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"p\.bin has .* bytes, its index says .*; copy both files again"):
        open_indexed(prefix)
    (tmp_path / "p.bin").write_bytes(whole)
    (tmp_path / "p.idx").write_bytes(b"not an index at all, not at all")
    with pytest.raises(ValueError, match=r"p\.idx is no index that Megatron wrote"):
        open_indexed(prefix)


INDEX = 9 + 8 + 1 + 8 + 8  # bytes of the header: lengths (int32), pointers (int64) and documents (int64) follow


@pytest.mark.parametrize(
    ("at", "dtype", "value", "words"),
    [
        (INDEX + 4 * 5 + 8 * 3, "<i8", -4, r"says that sequence 3 begins at byte -4; by the lengths .* overflowed\?"),
        (INDEX, "<i4", -7, "has a sequence of negative length"),
        (INDEX + 12 * 5, "<i8", 1, "has documents that do not follow one another"),
        (INDEX + 12 * 5 + 8, "<i8", 77, "has documents that do not follow one another"),
        (INDEX - 8, "<i8", 1, "has no documents"),
        (INDEX - 8, "<i8", 0, "has no documents"),
        (INDEX - 16, "<i8", 0, "has no documents"),
        (INDEX - 16, "<i8", -1, "is damaged"),
        (INDEX - 16, "<i8", 1 << 60, "is damaged"),
        (INDEX - 17, "<u1", 6, "says that token ids are float64"),
        (INDEX - 17, "<u1", 99, "is damaged"),
    ],
)
def test_an_index_that_contradicts_itself_is_named(tmp_path: Path, at: int, dtype: str, value: int, words: str) -> None:
    prefix = write_pair(tmp_path / "p", documents(5))
    content = bytearray((tmp_path / "p.idx").read_bytes())
    number = np.array([value], dtype=dtype).tobytes()
    content[at : at + len(number)] = number
    (tmp_path / "p.idx").write_bytes(content)
    with pytest.raises(ValueError, match=rf"p\.idx.*{words}"):
        open_indexed(prefix)


def test_an_index_with_any_other_byte_is_read_or_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", documents(5))
    whole = (tmp_path / "p.idx").read_bytes()
    generator = np.random.default_rng(3)
    for _ in range(150):
        content = bytearray(whole)
        content[int(generator.integers(len(whole)))] = int(generator.integers(256))
        content = content[: len(whole) - int(generator.integers(3)) * int(generator.integers(20))]
        (tmp_path / "p.idx").write_bytes(content)
        try:
            text = open_indexed(prefix)
        except ValueError as error:
            assert "p.idx" in str(error) or "p.bin" in str(error)
        else:
            assert 0 < text.cut < len(text.ids) and len(text.begins)


def opened(blend: list[tuple[str, float]], bpe: BPETokenizer, cache: Path, split: str = "train", **how):
    entries = [BlendSource(path=path, weight=weight) for path, weight in blend]
    how = {"vocab_size": 2048, "seed": 5, "shuffle": split == "train"} | how
    return open_windows(split, bpe, 16, blend=entries, chat=ChatConfig(), cache_dir=str(cache), **how)


def mixed(folder: Path) -> list[tuple[str, float]]:
    """A pair, a text folder and conversations, 50 : 30 : 20."""
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("".join(f"line {i} says {i * i % 97}\n" for i in range(3000)))
    lines = [json.dumps({"prompt": f"{i} squared is ", "completion": str(i * i)}) for i in range(80)]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    pair = write_pair(folder / "pair", documents(low=1500))
    return [(pair + ".idx", 50.0), (str(folder / "text"), 30.0), (str(folder / "chat.jsonl"), 20.0)]


def test_a_blend_of_every_kind_keeps_its_weights_and_masks(tmp_path: Path, bpe: BPETokenizer) -> None:
    blend = opened(mixed(tmp_path), bpe, tmp_path / "cache")
    samples = [blend.sample(i) for i in range(200)]
    assert sum(len(s) == 3 for s in samples) == 40
    assert sum(bool((s[0] >= 1500).sum() > 8) for s in samples if len(s) == 2) == 100
    for tokens, labels, mask in (s for s in samples if len(s) == 3):
        assert "squared is" in bpe.decode(tokens)
        first = int(np.flatnonzero(mask)[0])
        number = int(bpe.decode(tokens).split()[0])
        assert bpe.decode(labels[mask > 0]) == str(number**2) and labels[mask > 0][-1] == bpe.eod
        assert bpe.decode(tokens[: first + 1]).endswith("is ")
    again = opened(mixed_again(tmp_path), bpe, tmp_path / "cache")
    for i in (199, 3, 77):
        assert all(np.array_equal(a, b) for a, b in zip(again.sample(i), samples[i], strict=True))
    heldout = opened(mixed_again(tmp_path), bpe, tmp_path / "cache", "heldout")
    assert len(collate([heldout.sample(i) for i in range(10)])) == 3
    assert len(collate([s for s in samples if len(s) == 2][:4])) == 2


def mixed_again(folder: Path) -> list[tuple[str, float]]:
    return [(str(folder / "pair.bin"), 50.0), (str(folder / "text"), 30.0), (str(folder / "chat.jsonl"), 20.0)]


def test_a_token_outside_the_vocabulary_names_file_and_remedy(
    tmp_path: Path, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = documents(high=300)
    made[70][5] = 300
    prefix = write_pair(tmp_path / "p", made)
    with pytest.raises(
        ProblemsError, match=r"data\.blend\.0: .*p\.bin has the token id 300, and model\.vocab_size=300"
    ):
        opened([(prefix, 1.0)], bpe, tmp_path, vocab_size=300)
    from nemo_elastic.data import sources

    monkeypatch.setattr(sources, "CHECKED_AT_START", 100)  # as in a file too long to look at whole
    blend = opened([(prefix, 1.0)], bpe, tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"tokenize the text with the parent's own tokenizer"):
        for i in range(blend.per_epoch):
            blend.sample(i)
    opened([(prefix, 1.0)], bpe, tmp_path, vocab_size=301)


def test_all_bad_sources_are_reported_at_once(tmp_path: Path, bpe: BPETokenizer) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "folder" / "b.txt").write_text("text\n")
    short = write_pair(tmp_path / "short", [[5, 6, 7, 0]])
    with pytest.raises(ProblemsError) as error:
        opened([(str(tmp_path / "folder"), 1.0), (short, 1.0), (str(tmp_path / "gone"), 1.0)], bpe, tmp_path)
    words = [str(p) for p in error.value.problems]
    assert "mixes conversations (a.jsonl) and text (b.txt); make two sources" in words[0]
    assert words[1].startswith("data.blend.1: ") and "too few" in words[1]
    assert "gone does not exist" in words[2]
