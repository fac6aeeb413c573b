"""`data` on text, chat, a Megatron pair and a blend of all three, against counts made here without the package.

Text: ids of the `tokenizers` library, one more a document. Chat: the template rendered by Jinja; which tokens carry
loss by the characters that they come from. Pair: the lengths that its index was written of, by struct.
"""

import json
import struct
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemo_elastic.cli.main import main

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ["the", "model", "reads", "a", "token", "and", "writes", "café", "über", "naïve", "数据", "🙂", "Ελλάδα"]
STEPS, BATCH, LENGTH = 5, 8, 64


def say(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.integers(low, high)))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A byte-level tokenizer of its own with a chat template beside it."""
    folder, made = tmp_path_factory.mktemp("tokenizer"), Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return made, folder


def preview(capfd: pytest.CaptureFixture, folder: Path, bpe: tuple[Tokenizer, Path], *words: str) -> dict[str, Any]:
    """What `nemo-elastic data --json` says."""
    how = [
        f"data.tokenizer={bpe[1]}", f"data.cache_dir={folder}/cache", "train.micro_batch_size=1",
        f"train.stages=[{{steps: {STEPS}, seq_length: {LENGTH}, global_batch_size: {BATCH}}}]",
    ]  # fmt: skip
    assert main(["data", "--config", "tiny_parent.yaml", "--json", "--samples", "6", *how, *words]) == 0
    return json.loads(capfd.readouterr().out)


def text(folder: Path, bpe: Tokenizer) -> tuple[Path, list[int]]:
    """(a file of records, tokens of each)."""
    rng = np.random.default_rng(3)
    said = [say(rng, 5, 60) for _ in range(70)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in said))
    return folder / "text.jsonl", [len(bpe.encode(t).ids) + 1 for t in said]


def pair(folder: Path) -> tuple[Path, list[int]]:
    """(the prefix of a pair, tokens of each document)."""
    rng = np.random.default_rng(4)
    lengths = [int(n) for n in rng.integers(20, 90, 50)]
    rng.integers(3, 300, sum(lengths)).astype("<u2").tofile(folder / "pair.bin")
    with (folder / "pair.idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
        index.write(np.array(lengths, "<i4").tobytes())
        index.write((2 * np.concatenate([[0], np.cumsum(lengths)[:-1]])).astype("<i8").tobytes())
        index.write(np.arange(len(lengths) + 1).astype("<i8").tobytes())
    return folder / "pair", lengths


def chat(folder: Path, bpe: Tokenizer) -> tuple[Path, list[list[bool]], list[list[str]]]:
    """(a file of conversations, per token of each whether it carries loss, per conversation what is answered)."""
    rng, masks, answers = np.random.default_rng(5), [], []
    with (folder / "chat.jsonl").open("w") as file:
        for i in range(70):
            turns = [{"role": "system", "content": "Be short. " + say(rng, 1, 70 if i % 7 == 0 else 4)}] * (i % 3 == 0)
            for _ in range(rng.integers(1, 4)):
                turns.append({"role": "user", "content": say(rng, 2, 8)})
                turns.append({"role": "assistant", "content": say(rng, 2, 30)})
            file.write(json.dumps({"messages": turns}, ensure_ascii=i % 2 == 0) + "\n")
            whole = jinja2.Template(TEMPLATE).render(messages=turns)
            loss = np.zeros(len(whole), bool)
            answers.append([turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"])
            place = 0
            for answer in answers[-1]:
                place = whole.index("assistant\n" + answer, place) + len("assistant\n")
                loss[place : place + len(answer)] = True
            masks.append([bool(loss[start]) for start, _ in bpe.encode(whole).offsets])
    return folder / "chat.jsonl", masks, answers


def every_33rd(counts: list[int]) -> int:
    """Tokens held out: those of documents 33, 66, ..."""
    return sum(counts[32::33])


def usable(masks: list[list[bool]]) -> list[bool]:
    """Whether a conversation's loss begins within the first LENGTH labels; its first token is no label."""
    return [any(mask[1 : LENGTH + 1]) for mask in masks]


@pytest.mark.parametrize("key", ["data.paths=[{}]", "data.blend=[{{path: {}}}]"])
def test_text(tmp_path: Path, bpe, key: str, capfd) -> None:
    file, counts = text(tmp_path, bpe[0])
    found = preview(capfd, tmp_path, bpe, key.format(file))
    (source,) = found["sources"]
    assert (source["kind"], source["share"], source["documents"], source["tokens"]) == ("text", 1.0, 70, sum(counts))
    assert source["heldout_tokens"] == every_33rd(counts) and source["bytes"] == file.stat().st_size
    assert source["at"] == [{"seq_length": LENGTH, "longer": sum(n > LENGTH + 1 for n in counts)}]
    assert sum(row["documents"] for row in source["lengths"]) == 70
    for row in source["lengths"]:
        inside = [n for n in counts if row["from"] <= n < row["to"]]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    (stage,) = found["stages"]
    assert (stage["samples"], stage["tokens"]) == (STEPS * BATCH, STEPS * BATCH * LENGTH)
    (row,) = stage["sources"]
    assert row["epochs"] == pytest.approx(STEPS * BATCH * LENGTH / (sum(counts) - every_33rd(counts)), rel=0.1)
    for sample in found["samples"]:  # all of it carries loss; the first token is no label
        assert [span["loss"] for span in sample["spans"]] == [False, True] and sample["padding"] == 0
        assert [span["tokens"] for span in sample["spans"]] == [1, LENGTH]


def test_a_megatron_pair(tmp_path: Path, bpe, capfd) -> None:
    prefix, lengths = pair(tmp_path)
    found = preview(capfd, tmp_path, bpe, f"data.blend=[{{path: {prefix}}}]")
    (source,) = found["sources"]
    assert (source["kind"], source["documents"], source["tokens"]) == ("tokenized", 50, sum(lengths))
    assert source["bytes"] == sum((tmp_path / f"pair.{end}").stat().st_size for end in ("bin", "idx"))
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    first = begins[begins >= int(0.97 * sum(lengths))][0]
    assert source["heldout_tokens"] == sum(lengths) - first
    assert source["at"] == [{"seq_length": LENGTH, "longer": sum(n > LENGTH + 1 for n in lengths)}]
    (row,) = found["stages"][0]["sources"]
    assert row["epochs"] == pytest.approx(STEPS * BATCH * LENGTH / first, rel=0.1)


def test_chat(tmp_path: Path, bpe, capfd) -> None:
    file, masks, answers = chat(tmp_path, bpe[0])
    counts, kept = [len(mask) for mask in masks], usable(masks)
    found = preview(capfd, tmp_path, bpe, f"data.blend=[{{path: {file}}}]")
    (source,) = found["sources"]
    assert (source["kind"], source["documents"], source["tokens"]) == ("conversations", 70, sum(counts))
    assert source["tokens_with_loss"] == sum(map(sum, masks)) and source["without_loss"] == 0
    assert source["heldout_tokens"] == every_33rd(counts)
    cut, left_out = sum(n > LENGTH + 1 for n in counts), kept.count(False)
    assert source["at"] == [{"seq_length": LENGTH, "cut": cut, "left_out": left_out}] and cut > left_out > 0
    (row,) = found["stages"][0]["sources"]
    trained = sum(keep for i, keep in enumerate(kept) if i % 33 != 32)
    assert row["epochs"] == pytest.approx(STEPS * BATCH / trained, abs=1e-4)
    padded = 0
    for sample in found["samples"]:
        said = [span["text"] for span in sample["spans"] if span["loss"]]
        tokens = sum(span["tokens"] for span in sample["spans"])
        assert tokens + sample["padding"] == LENGTH + 1
        (own,) = (
            i for i, turns in enumerate(answers) if turns[0] == said[0] or turns[0].startswith(said[0].rstrip("\ufffd"))
        )
        assert said[:-1] == answers[own][: len(said) - 1]  # whole answers, the last one may be cut
        assert answers[own][len(said) - 1].startswith(said[-1].rstrip("\ufffd"))
        assert tokens == min(LENGTH + 1, counts[own]) and kept[own]
        assert sum(s["tokens"] for s in sample["spans"] if s["loss"]) == sum(masks[own][:tokens])
        padded += sample["padding"] > 0
    assert padded


def test_a_blend_of_all_three(tmp_path: Path, bpe, capfd) -> None:
    (file, counts), (prefix, lengths), (talk, masks, _) = text(tmp_path, bpe[0]), pair(tmp_path), chat(tmp_path, bpe[0])
    blend = f"data.blend=[{{path: {file}, weight: 20}}, {{path: {prefix}, weight: 10}}, {{path: {talk}, weight: 10}}]"
    found = preview(capfd, tmp_path, bpe, blend)
    assert [s["kind"] for s in found["sources"]] == ["text", "tokenized", "conversations"]
    assert [s["share"] for s in found["sources"]] == [0.5, 0.25, 0.25]
    assert [s["tokens"] for s in found["sources"]] == [sum(counts), sum(lengths), sum(map(len, masks))]
    assert [s["documents"] for s in found["sources"]] == [70, 50, 70]
    (stage,) = found["stages"]
    assert [row["samples"] for row in stage["sources"]] == [20, 10, 10]
    assert [row["tokens"] for row in stage["sources"]] == [20 * LENGTH, 10 * LENGTH, 10 * LENGTH]
    first = [sample["source"] for sample in found["samples"][:4]]  # a period of the weights 2, 1, 1
    assert sorted(first) == sorted([str(file)] * 2 + [str(prefix), str(talk)])
    assert all(
        ("padding" in sample) and (sample["padding"] == 0 or sample["source"] == str(talk))
        for sample in found["samples"]
    )


def test_the_page_shows_padding_as_a_number_and_long_samples_in_part(tmp_path: Path, bpe, capfd) -> None:
    file, _, _ = chat(tmp_path, bpe[0])
    words = ["data", "--config", "tiny_parent.yaml", f"data.tokenizer={bpe[1]}", f"data.cache_dir={tmp_path}/cache"]
    stages = "train.stages=[{steps: 1, seq_length: 1024, global_batch_size: 4}]"
    assert main([*words, f"data.blend=[{{path: {file}}}]", stages]) == 0
    shown = capfd.readouterr().out
    assert "of padding" in shown and "<|endoftext|>" not in shown and "of all 70 are cut" in shown
    (tmp_path / "long.txt").write_text("".join(f"line {i}\n" for i in range(9000)))
    assert main([*words, f"data.paths=[{tmp_path}/long.txt]", stages]) == 0
    shown = capfd.readouterr().out
    assert shown.count("characters; --json has them") == 2


def test_chat_that_is_named_as_text_is_told_where_it_goes(tmp_path: Path, bpe, capfd) -> None:
    file, _, _ = chat(tmp_path, bpe[0])
    assert main(["data", "--config", "tiny_parent.yaml", f"data.paths=[{file}]"]) == 2
    assert f"data.blend=[{{path: {file}}}]" in capfd.readouterr().err
