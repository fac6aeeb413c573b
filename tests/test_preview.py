"""`data`: what it says of a run's text is what training reads.

Identities: tokens == len(load_tokens), samples of an epoch == open_windows(...).per_epoch, spans == the sample's mask.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_sources import mixed

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.data import preview as module
from nemo_elastic.data.of_run import text_tokenizer
from nemo_elastic.data.preview import SourcePreview, histogram, preview, spans
from nemo_elastic.data.sources import open_windows
from nemo_elastic.data.tokens import load_tokens

STAGES = (
    "train.stages=[{steps: 7, seq_length: 16, global_batch_size: 10}, {steps: 2, seq_length: 48, global_batch_size: 5}]"
)


def blended(folder: Path, *more: str):
    blend = [{"path": path, "weight": weight} for path, weight in mixed(folder)]
    words = [
        "train.micro_batch_size=1",
        f"data.blend={json.dumps(blend)}",
        f"data.cache_dir={folder}/cache",
        STAGES,
        *more,
    ]
    return load_config("tiny_parent.yaml", words).config


def reading(run, seq_length: int):
    """What training reads at a length."""
    return open_windows(
        "train", text_tokenizer(run), seq_length, blend=run.data.blend, chat=run.data.chat, vocab_size=2048,
        seed=run.train.seed, cache_dir=run.data.cache_dir,
    )  # fmt: skip


def test_counts_are_those_of_the_streams_that_training_reads(tmp_path: Path) -> None:
    run = blended(tmp_path)
    tokenizer = text_tokenizer(run)
    found = preview(run, tokenizer)
    pair, text, chat = found["sources"]
    assert [s["kind"] for s in found["sources"]] == ["tokenized", "text", "conversations"]
    assert [s["share"] for s in found["sources"]] == [0.5, 0.3, 0.2]
    for split in ("train", "heldout"):
        assert text[f"{split}_tokens"] == len(
            load_tokens(split, tokenizer, paths=[text["path"]], cache_dir=tmp_path / "c")
        )
    assert pair["tokens"] == (tmp_path / "pair.bin").stat().st_size // 2
    assert chat["documents"] == 80 and chat["without_loss"] == 0
    for stage, (steps, length, batch) in zip(found["stages"], ((7, 16, 10), (2, 48, 5)), strict=True):
        assert stage["samples"] == steps * batch and stage["tokens"] == steps * batch * length
        windows = reading(run, length)
        for row, source, share in zip(stage["sources"], windows.sources, (0.5, 0.3, 0.2), strict=True):
            assert row["samples"] == round(steps * batch * share)
            assert row["epochs"] == pytest.approx(steps * batch * share / source.per_epoch, abs=1e-4)


def test_samples_are_the_first_ones_with_their_loss_visible(tmp_path: Path) -> None:
    run = blended(tmp_path)
    tokenizer = text_tokenizer(run)
    found = preview(run, tokenizer, samples=12)
    windows = reading(run, 16)
    kinds = set()
    for sample in found["samples"]:
        tokens, labels, *mask = windows.sample(sample["sample"])
        ids = np.concatenate([tokens[:1], labels])
        if mask:
            ids = ids[: int(np.flatnonzero(mask[0])[-1]) + 2]
            said = [tokenizer.encode_markers(s["text"]) for s in sample["spans"] if s["loss"]]
            assert sum(map(len, said)) == int(mask[0].sum())
        assert "".join(s["text"] for s in sample["spans"]) == tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        kinds.add((Path(sample["source"]).name, len(mask)))
    assert kinds == {("pair.idx", 0), ("text", 0), ("chat.jsonl", 1)}


def test_a_length_cuts_and_leaves_out_what_training_cuts_and_leaves_out(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": "a " * (5 * i)}, {"role": "assistant", "content": "b " * 20}] for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    words = [f"data.blend=[{{path: {tmp_path}/chat.jsonl}}]", f"data.cache_dir={tmp_path}/cache"]
    run = load_config("tiny_parent.yaml", [*words, "train.stages=[{steps: 1, seq_length: 64}]"]).config
    (source,) = preview(run, text_tokenizer(run))["sources"]
    (at,) = source["at"]
    assert 0 < at["left_out"] < 40 and at["cut"] > at["left_out"]
    windows = reading(run, 64)
    (source,) = windows.sources  # the one held-out conversation is among those that are left out
    assert source.per_epoch == 40 - at["left_out"]


def test_what_is_not_read_to_its_end_is_not_given_as_whole(tmp_path: Path) -> None:
    run = blended(tmp_path)
    found = preview(run, text_tokenizer(run), limit=5)
    pair, text, chat = found["sources"]
    assert (pair["whole"], text["whole"], chat["whole"]) == (True, False, False)
    assert text["documents"] == chat["documents"] == 5
    assert found["samples"] == [] and "--documents 0" in found["notes"][0]
    assert ["epochs" in row for row in found["stages"][0]["sources"]] == [True, False, False]
    assert preview(run, text_tokenizer(run), limit=0)["sources"][1]["whole"]


def test_a_large_source_is_looked_at_for_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = blended(tmp_path)
    tokenizer = text_tokenizer(run)
    monkeypatch.setattr(module, "TOKENS", 3000)
    _, text, chat = preview(run, tokenizer)["sources"]
    longest = text["lengths"][-1]["to"]
    assert not text["whole"] and 3000 <= text["tokens"] < 3000 + longest
    assert chat["whole"] and preview(run, tokenizer, limit=0)["sources"][1]["whole"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [{"role": "user"}]}', "chat.jsonl line 81 turn 1"),
        ('{"text": "plain"}', "chat.jsonl line 81 has neither"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, capfd, line: str, words: str) -> None:
    mixed(tmp_path)
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("\n" + line)
    assert main(["data", "--config", "tiny_parent.yaml", f"data.blend=[{{path: {tmp_path}/chat.jsonl}}]"]) == 2
    assert words in capfd.readouterr().err
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.txt").write_text("text")
    (tmp_path / "chat.jsonl").rename(tmp_path / "both" / "chat.jsonl")
    assert main(["data", "--config", "tiny_parent.yaml", f"data.blend=[{{path: {tmp_path}/both}}]"]) == 2
    assert "mixes conversations (chat.jsonl) and text (a.txt)" in capfd.readouterr().err


def test_documents_are_counted_in_bins_that_double() -> None:
    rows = histogram(np.array([1, 2, 3, 4, 7, 8, 100]))
    assert [(r["from"], r["to"], r["documents"]) for r in rows if r["documents"]] == [
        (1, 2, 1), (2, 4, 2), (4, 8, 2), (8, 16, 1), (64, 128, 1),
    ]  # fmt: skip
    assert sum(r["tokens"] for r in rows) == 125 and len(rows) == 7
    assert histogram(np.zeros(0, np.int64)) == []
    assert SourcePreview("a", "text", 1.0, 1, 1).samples(16, "padded") == 0


def test_spans_part_where_the_loss_does() -> None:
    tokenizer = text_tokenizer(load_config("tiny_parent.yaml", []).config)
    ids = np.array(tokenizer.encode("one two three four"))
    loss = np.arange(len(ids)) >= 2
    first, second = spans(ids, loss, tokenizer)
    assert (first["loss"], second["loss"]) == (False, True) and first["tokens"] == 2
    assert first["text"] + second["text"] == "one two three four"


def test_the_verb_needs_no_torch_and_shows_it(tmp_path: Path, capfd) -> None:
    (tmp_path / "text").mkdir()
    mixed_paths = [f"data.paths=[{tmp_path}/a.txt]", f"data.cache_dir={tmp_path}/cache"]
    (tmp_path / "a.txt").write_text("".join(f"line {i} says {i * i % 97}\n" for i in range(3000)))
    words = ["data", "--config", "tiny_parent.yaml", *mixed_paths]
    code = (
        "import sys; from nemo_elastic.cli.main import main; code = main(sys.argv[1:]);"
        "loaded = {'torch', 'megatron', 'nemo', 'lightning'} & set(sys.modules); sys.exit(code or (3 if loaded else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout and "sample 1" in done.stdout and "epochs" in done.stdout
    assert main([*words, "--json", "--samples", "0"]) == 0
    assert json.loads(capfd.readouterr().out)["samples"] == []
