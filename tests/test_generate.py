"""`nemo-elastic generate`: what it prints is what the two budgets write; bad input is one message, in flags."""

import io
import json
from pathlib import Path

import pytest
import torch
from checkpoint_family import TOKENIZER, manifest, random_weights

from nemo_elastic.cli.main import main
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.nemo.export.nested import write_nested
from nemo_elastic.serving import ElasticFamily

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random family with the shipped tokenizer."""
    return write_nested(tmp_path_factory.mktemp("g") / "nested", random_weights(), manifest(), tokenizer=TOKENIZER)


def by_hand(nested: Path, think: str, thought: int, answer: str, answered: int) -> list[int]:
    """Greedy, every token from a whole forward of the active budget."""
    family, tokens = ElasticFamily.load(nested), BPETokenizer(TOKENIZER).encode(PROMPT)
    start = len(tokens)
    for budget, count in ((think, thought), (answer, answered)):
        family.switch(budget)
        for _ in range(count):
            tokens.append(int(family.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[start:]


def test_think_small_answer_full(nested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(nested), "--prompt", PROMPT, "--think", "small", "--answer", "full"]
    words += ["--think-tokens", "6", "--max-new-tokens", "10"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == by_hand(nested, "small", 6, "full", 4) != by_hand(nested, "full", 6, "full", 4)
    assert found["parts"] == [
        {"budget": "small", "tokens": 6, "ended": "max_tokens"},
        {"budget": "full", "tokens": 4, "ended": "max_new_tokens"},
    ]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == found["text"] + "\n"
    assert "small: 6 tokens (max_tokens)\nfull: 4 tokens (max_new_tokens)" in printed.err
    assert main([*words, "--stream"]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"


def test_one_budget_a_prompt_from_stdin_and_a_stop(
    nested: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(nested), "--budget", "large", "--max-new-tokens", "12", "--json", "--prompt"]
    assert main([*words, PROMPT]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["tokens"] == by_hand(nested, "large", 12, "full", 0)
    stop = whole["text"][5:8]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main([*words, "-", "--stop", "never there", "--stop", stop]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == whole["text"][: whole["text"].index(stop)] and found["parts"][0]["ended"] == "stop"
    drawn = []
    for seed in ("1", "1", "2"):
        assert main([*words, PROMPT, "--temperature", "1.5", "--top-k", "99", "--seed", seed]) == 0
        drawn.append(json.loads(capsys.readouterr().out)["tokens"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_special_tokens_are_spelt_and_the_end_of_a_text_ends(
    nested: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = ElasticFamily.logits

    def logits(self: ElasticFamily, tokens: torch.Tensor, cache: object, *, last_only: bool) -> torch.Tensor:
        seen.append(tokens)
        found = real(self, tokens, cache, last_only=last_only).clone()
        found[..., 0] = 100.0 if len(seen) == 3 else -100.0
        return found

    monkeypatch.setattr(ElasticFamily, "logits", logits)
    words = ["generate", str(nested), "--budget", "small", "--json", "--prompt", f"<|endoftext|>{PROMPT}"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert seen[0][0].tolist() == [0, *BPETokenizer(TOKENIZER).encode(PROMPT)]
    assert len(found["tokens"]) == 3 and found["tokens"][-1] == 0 and found["parts"][0]["ended"] == "stop"
    assert "endoftext" not in found["text"]


TWO = ["--think", "small", "--answer", "full"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--budget: give one budget by --budget NAME, or two"),
        (["--budget", "small", *TWO], "--budget: give one budget by --budget NAME, or two"),
        (["--think", "small"], "--answer: give both"),
        (["--answer", "small"], "--think: give both"),
        (["--budget", "smal"], "--budget: 'smal' is not in this family; did you mean 'small'?"),
        (["--think", "smal", "--answer", "ful"], "--answer: 'ful' is not in this family; did you mean 'full'?"),
        (["--budget", "small", "--until", "x"], "--until: says where thinking ends"),
        (["--budget", "small", "--think-tokens", "3"], "--think-tokens: says where thinking ends"),
        ([*TWO, "--think-tokens", "0"], "--think-tokens: 0 must be at least 1"),
        ([*TWO, "--max-new-tokens", "-1"], "--max-new-tokens: -1 must be at least 1"),
        ([*TWO, "--until", ""], "--until: '' is in every text"),
        ([*TWO, "--stop", ""], "--stop: '' is in every text"),
        ([*TWO, "--temperature", "nan"], "--temperature: nan must be at least 0"),
        ([*TWO, "--top-k", "0"], "--top-k: 0 must be at least 1"),
        ([*TWO, "--seed", str(2**70)], "--seed: 1180591620717411303424 must be a number of 64 bits"),
        ([*TWO, "--json", "--stream"], "--stream: prints text as it comes"),
        ([*TWO, "model.hidden_size=3"], "model.hidden_size=3: cannot be set for a nested checkpoint"),
        ([*TWO, "--device", "cuda"], "--device: cuda: torch sees no GPU here"),
    ],
)
def test_bad_input_names_the_flag(
    nested: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", str(nested), "--prompt", PROMPT, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_a_prompt_without_text_is_refused(nested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(nested), "--budget", "small"]) == 2
    assert "--prompt: give the text to continue" in capsys.readouterr().err
    assert main(["generate", str(nested / "weights"), "--budget", "small", "--prompt", "x"]) == 2
    assert "not a nested checkpoint" in capsys.readouterr().err
