"""Blends and conversations, without torch: exact frequencies, pure functions of (seed, i), masks on exact tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import BlendSource, ChatConfig, DataConfig
from nemo_elastic.data.blend import LONGEST_PERIOD, Blend, shares, spread
from nemo_elastic.data.chat import encode
from nemo_elastic.data.conversations import PackedChat, PaddedChat, is_chat, load_conversations
from nemo_elastic.data.entries import entry_problems
from nemo_elastic.data.tokenizer import END_OF_TEXT, BPETokenizer
from nemo_elastic.data.windows import Windows
from nemo_elastic.problems import ProblemsError

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 2 + 4?"},
    {"role": "assistant", "content": "It is 6."},
]


class Numbers:
    """A source whose sample i is the number i of source k."""

    def __init__(self, k: int, per_epoch: int = 100) -> None:
        self.k, self.per_epoch = k, per_epoch

    def sample(self, index: int) -> tuple[np.ndarray, ...]:
        return np.array([self.k]), np.array([index])


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((70, 30), (7, 3)), ((0.7, 0.3), (7, 3)), ((1, 1, 1), (1, 1, 1)), ((0.125, 3), (1, 24)), ((2,), (1,))],
)
def test_weights_become_whole_shares_as_they_are_written(weights: tuple, expected: tuple) -> None:
    assert tuple(shares(weights)) == expected


def test_weights_of_many_digits_are_rounded_to_a_millionth() -> None:
    found = shares((0.1234567891234, 0.8765432108766))
    assert found.sum() == LONGEST_PERIOD
    assert found[0] / found.sum() == pytest.approx(0.1234567891234, abs=1e-6)
    with pytest.raises(ValueError, match="above 0"):
        shares((0.5, 0.0))


@pytest.mark.parametrize("weights", [(70, 30), (5, 3, 2), (0.97, 0.01, 0.02)])
def test_frequencies_are_exact_in_every_period_and_near_everywhere(weights: tuple) -> None:
    blend = Blend([Numbers(k) for k in range(len(weights))], weights, seed=9)
    share = np.array(weights) / sum(weights)
    drawn = np.array([blend.place(i)[0] for i in range(40 * blend.period)])
    for begin in (0, 3, 17 * blend.period + 1):
        counts = np.bincount(drawn[begin : begin + blend.period], minlength=len(weights))
        assert np.array_equal(counts, blend.counts)
    for seed, most in ((None, 0.75), (9, 1.5)):  # of samples; a beginning inside the pattern at most doubles it
        blend = Blend(blend.sources, weights, seed=seed)
        drawn = np.array([blend.place(i)[0] for i in range(3 * blend.period)])
        running = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
        ideal = np.arange(1, len(drawn) + 1)[:, None] * share
        assert np.abs(running - ideal).max() < most


def test_every_source_is_read_in_order_without_gaps() -> None:
    blend = Blend([Numbers(k) for k in range(3)], (5, 3, 2), seed=4)
    places = [blend.place(i) for i in range(1000)]
    for k in range(3):
        assert [p for s, p in places if s == k] == list(range(sum(s == k for s, _ in places)))


def test_a_place_depends_on_seed_and_index_alone() -> None:
    def places(seed: int, order: list[int]) -> dict[int, tuple[int, int]]:
        blend = Blend([Numbers(0), Numbers(1)], (0.613, 0.387), seed=seed)
        return {i: blend.place(i) for i in order}

    order = [*range(0, 3000, 17), 2**33, 5]
    expected = places(7, sorted(order))
    assert places(7, order) == expected
    assert places(8, order) != expected
    code = (
        "import json; from nemo_elastic.data.blend import Blend; from test_blend import Numbers;"
        "b = Blend([Numbers(0), Numbers(1)], (0.613, 0.387), seed=7);"
        "print(json.dumps([b.place(i) for i in (0, 1700, 2**33)]))"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [tuple(p) for p in json.loads(done.stdout)] == [expected[i] for i in (0, 1700, 2**33)]


def test_a_spread_covers_each_source_evenly_in_its_weight() -> None:
    blend = Blend([Numbers(0, per_epoch=1000), Numbers(1, per_epoch=90)], (70, 30))
    found = [(int(k[0]), int(i[0])) for k, i in spread(blend, 20)]
    assert [i for k, i in found if k == 0] == [1000 * j // 14 for j in range(14)]
    assert [i for k, i in found if k == 1] == [90 * j // 6 for j in range(6)]
    assert [int(i[0]) for _, i in spread(Numbers(0, per_epoch=7), 5)] == [0, 2, 4]  # the others are left to choose by
    assert [int(i[0]) for _, i in spread(Numbers(0, per_epoch=7), 5, between=True)] == [1, 3, 5]


def test_loss_is_on_the_assistants_tokens_and_their_end_only(bpe: BPETokenizer) -> None:
    ids, mask = encode({"messages": CHAT}, bpe, ChatConfig())
    trained = [[i for i, m in zip(ids, mask, strict=True) if m]]
    assert trained[0] == [*bpe.encode("It is 5."), bpe.eod, *bpe.encode("It is 6."), bpe.eod]
    text = "".join(f"<|{t['role']}|>\n{t['content']}{END_OF_TEXT}" for t in CHAT)
    assert bpe.decode(ids, skip_special_tokens=False) == text
    ids, mask = encode({"prompt": "2 + 3 = ", "completion": "5"}, bpe, ChatConfig())
    assert ids == [*bpe.encode("2 + 3 = "), *bpe.encode("5"), bpe.eod]
    assert mask == [0] * len(bpe.encode("2 + 3 = ")) + [1] * (len(bpe.encode("5")) + 1)


def test_markers_are_special_tokens_and_content_never_is(bpe: BPETokenizer) -> None:
    chat = ChatConfig(start="<pad>{role}:", end="<pad>")
    ids, mask = encode({"messages": [{"role": "assistant", "content": "<pad><|endoftext|>"}]}, bpe, chat)
    content = bpe.encode("<pad><|endoftext|>")
    assert bpe.pad_id not in content and bpe.eod not in content
    assert ids == [bpe.pad_id, *bpe.encode("assistant:"), *content, bpe.pad_id, bpe.eod]
    assert mask == [0] * (1 + len(bpe.encode("assistant:"))) + [1] * (len(content) + 1) + [0]


def chat_file(folder: Path, count: int = 70) -> Path:
    lines = []
    for i in range(count):
        turns = [{"role": "user", "content": f"Question {i}? " * (1 + i % 5)}, {"role": "assistant", "content": f"{i}"}]
        lines.append(json.dumps({"messages": turns} if i % 2 else {"prompt": f"q{i} ", "completion": f"a{i}"}))
    folder.mkdir(exist_ok=True)
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chat.jsonl"


def test_a_padded_sample_is_one_conversation(bpe: BPETokenizer, tmp_path: Path) -> None:
    file = chat_file(tmp_path / "chat")
    assert is_chat(file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found = {split: load_conversations(split, bpe, [file], ChatConfig(), tmp_path) for split in ("train", "heldout")}
    assert [len(f.ends) for f in found.values()] == [68, 2]
    samples = PaddedChat(found["heldout"], 64, pad_id=bpe.pad_id, shuffle=False)
    for place, record in enumerate((records[32], records[65])):
        ids, mask = (np.array(x) for x in encode(record, bpe, ChatConfig()))
        tokens, labels, weights = samples.sample(place)
        n = len(ids) - 1
        assert tokens.shape == labels.shape == weights.shape == (64,) and n < 64
        assert np.array_equal(tokens[: n + 1], ids) and np.array_equal(labels[:n], ids[1:])
        assert np.array_equal(weights[:n], mask[1:]) and not weights[n:].any()
        assert (tokens[n + 1 :] == bpe.pad_id).all() and weights.dtype == np.float32
    train = PaddedChat(found["train"], 64, pad_id=bpe.pad_id, seed=3)
    epochs = [{bytes(train.sample(68 * e + i)[0]) for i in range(68)} for e in (0, 1)]
    assert len(epochs[0]) == 68 and epochs[0] == epochs[1]
    assert [bytes(train.sample(i)[0]) for i in range(68)] != [bytes(train.sample(68 + i)[0]) for i in range(68)]


def test_what_is_too_long_is_cut_and_what_then_has_no_loss_is_left_out(bpe: BPETokenizer, tmp_path: Path) -> None:
    records = [
        {"prompt": "word " * 100, "completion": "late"},
        {"prompt": "a ", "completion": "word " * 100},
        {"prompt": "b ", "completion": "c"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records + records[2:]))
    found = load_conversations("train", bpe, [tmp_path / "c.jsonl"], ChatConfig(), tmp_path)
    samples = PaddedChat(found, 16, pad_id=bpe.pad_id, shuffle=False)
    assert samples.per_epoch == 2
    tokens, labels, mask = samples.sample(0)
    assert tokens.tolist() == encode(records[1], bpe, ChatConfig())[0][:16]
    assert mask.sum() == 16 - len(bpe.encode("a ")) + 1 and labels[-1] != bpe.pad_id
    with pytest.raises(ValueError, match="no conversation has an assistant's token within seq_length=1"):
        PaddedChat(load_conversations("heldout", bpe, [tmp_path / "c.jsonl"], ChatConfig(), tmp_path), 1, pad_id=1)


def test_packed_windows_carry_the_mask_of_their_labels(bpe: BPETokenizer, tmp_path: Path) -> None:
    found = load_conversations("train", bpe, [chat_file(tmp_path)], ChatConfig(), tmp_path)
    packed = PackedChat(found, 16, seed=2)
    plain = Windows(found.ids, 16, seed=2)
    for i in range(0, 2 * packed.per_epoch, 3):
        tokens, labels, mask = packed.sample(i)
        start = plain.start(i)
        assert np.array_equal(tokens, plain.sample(i)[0]) and np.array_equal(labels, plain.sample(i)[1])
        assert np.array_equal(mask, np.asarray(found.mask)[start + 1 : start + 17])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": []}', "no list of turns"),
        ('{"messages": [{"role": "user"}]}', 'turn 1 has no "content"'),
        ('{"prompt": "x"}', '"prompt" and "completion", both text'),
        ("{", "is not JSON"),
    ],
)
def test_a_bad_conversation_is_named(bpe: BPETokenizer, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl line 2 .*{words}"):
        load_conversations("train", bpe, [tmp_path / "a.jsonl"], ChatConfig(), tmp_path)


def test_a_file_without_an_assistant_is_an_error(bpe: BPETokenizer, tmp_path: Path) -> None:
    record = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    (tmp_path / "a.jsonl").write_text(f"{record}\n" * 3)
    with pytest.raises(ValueError, match=r"a\.jsonl has no train conversation with an assistant's turn"):
        load_conversations("train", bpe, [tmp_path / "a.jsonl"], ChatConfig(), tmp_path)


def test_entries_that_are_not_there_are_all_reported(tmp_path: Path) -> None:
    (tmp_path / "half.bin").write_bytes(b"123")
    (tmp_path / "void.bin").touch()
    (tmp_path / "void.idx").write_bytes(b"123")
    names = ("half", "void.bin", "gone", "builtin:corpus")
    blend = tuple(BlendSource(path=n if ":" in n else str(tmp_path / n)) for n in names)
    found = entry_problems(DataConfig(blend=blend))
    assert [p.key for p in found] == ["data.blend.0.path", "data.blend.1.path", "data.blend.2.path"]
    assert "half.idx is missing beside half.bin; copy both" in found[0].message
    assert "void.bin is empty; make the pair again" in found[1].message
    assert "gone does not exist; give files that end in .txt, .jsonl or .parquet" in found[2].message


def test_the_configuration_names_what_is_wrong(tmp_path: Path) -> None:
    words = ["data.blend=[{path: a, weight: 0}, {path: b, weigth: 1}]"]
    with pytest.raises(ProblemsError, match=r"data\.blend\.1\.weigth: unknown key; did you mean 'weight'"):
        load_config("tiny_parent.yaml", words)
    with pytest.raises(ProblemsError) as error:
        load_config(
            "tiny_parent.yaml", ["data.blend=[{path: a, weight: 0}]", "data.paths=[b]", "data.chat.layout=loose"]
        )
    assert [p.key for p in error.value.problems] == ["data.chat.layout", "data.blend", "data.blend.0.weight"]
    config = load_config("tiny_parent.yaml", ["data.blend=[{path: a, weight: 70}, {path: b, weight: 30}]"]).config
    assert config.data.blend == (BlendSource(path="a", weight=70.0), BlendSource(path="b", weight=30.0))
