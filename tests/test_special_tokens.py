"""End of text, ids with holes, and what travels beside a tokenizer: the parent's own files decide.

eod == the id of the first that is said: data.end_of_text, tokenizer_config.json, special_tokens_map.json, config.json,
generation_config.json, `<|endoftext|>`
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_elastic.checkpoint.tokenizer_files import write_tokenizer
from nemo_elastic.config.special_tokens import row_problems, token_ids
from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER, BPETokenizer
from nemo_elastic.data.tokens import tokenize
from nemo_elastic.problems import ProblemsError


def tokenizer_folder(folder: Path, *, end: str = "</s>", added: dict[str, int] | None = None, **files: dict) -> Path:
    """The shipped tokenizer with its end of text renamed, added tokens, and JSON files beside it."""
    folder.mkdir()
    words = json.loads(DEFAULT_TOKENIZER.read_text())
    words["added_tokens"][0]["content"] = end
    words["model"]["vocab"][end] = words["model"]["vocab"].pop("<|endoftext|>")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    words["added_tokens"] += [{"id": i, "content": token, **flags} for token, i in (added or {}).items()]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


ADDED = {"<SPECIAL_12>": 2048, "<|im_end|>": 2049, "<fill>": 2050}
CONFIG, MAP = {"eos_token": "<SPECIAL_12>", "pad_token": "<fill>"}, {"eos_token": {"content": "<|im_end|>"}}


ZERO = {"eos_token_id": 0}


@pytest.mark.parametrize(
    ("files", "given", "end"),
    [
        ({"tokenizer_config": CONFIG, "special_tokens_map": MAP, "config": {"eos_token_id": 0}}, None, 2048),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": MAP, "config": ZERO}, None, 2049),
        ({"tokenizer_config": {}, "config": {"eos_token_id": 2050}, "generation_config": ZERO}, None, 2050),
        ({"config": {"eos_token_id": [2049, 2048]}, "generation_config": {"eos_token_id": 0}}, None, 2049),
        ({"generation_config": {"eos_token_id": [2048, 2049]}}, None, 2048),
        ({"tokenizer_config": CONFIG}, "</s>", 0),
    ],
)  # fmt: skip
def test_end_of_text_is_what_the_files_say(tmp_path: Path, files: dict, given: str | None, end: int) -> None:
    tokenizer = BPETokenizer(tokenizer_folder(tmp_path / "t", added=ADDED, **files), given)
    assert tokenizer.eod == end
    (stream,) = tokenize(["a"], tokenizer)
    assert list(stream) == [*tokenizer.encode("a"), end]
    says_pad = files.get("tokenizer_config", {}).get("pad_token")
    assert tokenizer.pad_id == (2050 if says_pad else 1)


def test_end_of_text_that_nobody_says(tmp_path: Path) -> None:
    file = tokenizer_folder(tmp_path / "t")
    with pytest.raises(ProblemsError, match=r"data\.end_of_text: is not set, no file beside") as error:
        BPETokenizer(file)
    assert "add" not in str(error.value)  # no advice that changes a parent's vocabulary
    assert BPETokenizer(file, "</s>").eod == 0
    with pytest.raises(ProblemsError, match=r"data\.end_of_text: '<end>' is no token of"):
        BPETokenizer(file, "<end>")


def test_end_of_text_that_is_no_token(tmp_path: Path) -> None:
    file = tokenizer_folder(tmp_path / "t", tokenizer_config={"eos_token": "<end>"})
    with pytest.raises(ProblemsError, match=r"tokenizer_config\.json names '<end>' as end of text, which is no token"):
        BPETokenizer(file)
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ProblemsError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        BPETokenizer(file)


def test_another_end_of_text_is_another_identity(tmp_path: Path) -> None:
    """Caches of tokens are named by it."""
    file = tokenizer_folder(tmp_path / "t", added=ADDED)
    assert BPETokenizer(file, "</s>").sha256 != BPETokenizer(file, "<|im_end|>").sha256
    usual = BPETokenizer(DEFAULT_TOKENIZER)
    assert BPETokenizer(DEFAULT_TOKENIZER, usual.eod).sha256 == usual.sha256


def test_largest_id_counts_not_how_many(tmp_path: Path) -> None:
    file = tokenizer_folder(tmp_path / "t", end="<|endoftext|>")
    words = json.loads(file.read_text())
    words["model"]["vocab"]["<hole>"] = 2100
    file.write_text(json.dumps(words))
    tokenizer = BPETokenizer(file)
    assert tokenizer.vocab_size == 2101 and tokenizer.tokenizer.get_vocab_size() == 2049
    assert not row_problems(file, 2101)
    (problem,) = row_problems(file, 2100)
    assert problem.key == "data.tokenizer"
    assert "'<hole>' has id 2100, but model.vocab_size=2100 rows end at 2099" in problem.message


def test_ids_that_the_library_would_change_are_refused(tmp_path: Path) -> None:
    """The library numbers added tokens on from the vocabulary, whatever the file says."""
    file = tokenizer_folder(tmp_path / "t", end="<|endoftext|>", added={"<late>": 3000})
    with pytest.raises(ValueError, match="'<late>' has id 3000 in the file, but `tokenizers` gives it 2048"):
        BPETokenizer(file)
    assert token_ids(file)["<late>"] == 3000


def test_everything_beside_a_parents_tokenizer_travels(tmp_path: Path) -> None:
    """Parent -> nested/context -> child, byte by byte, with the ids that the parent's config.json says."""
    files = {
        "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": "</s>", "chat_template": "{{ messages }}"},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
        "config": {"eos_token_id": [2049, 2048], "bos_token_id": 2048, "pad_token_id": 2050, "hidden_size": 3},
    }
    parent = tokenizer_folder(tmp_path / "parent", added=ADDED, **files).parent
    (parent / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ids = write_tokenizer(tmp_path / "nested", parent)
    assert (ids["eos_token_id"], ids["bos_token_id"], ids["pad_token_id"]) == ([2049, 2048], 2048, 2050)
    again = write_tokenizer(tmp_path / "child", tmp_path / "nested")
    assert (again["eos_token_id"], again["bos_token_id"], again["pad_token_id"]) == (2049, 0, 2050)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in names:
        assert (tmp_path / "child" / name).read_bytes() == (parent / name).read_bytes()
    generation = json.loads((tmp_path / "child" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, **{k: v for k, v in files["config"].items() if "token" in k}}
    assert not (tmp_path / "child" / "config.json").exists()
    (parent / "generation_config.json").write_text('{"eos_token_id": [7], "temperature": 0.6}')
    write_tokenizer(tmp_path / "own", parent)
    assert (tmp_path / "own" / "generation_config.json").read_bytes() == (
        parent / "generation_config.json"
    ).read_bytes()


def test_end_of_text_of_the_run_is_the_childs(tmp_path: Path) -> None:
    """A tokenizer.json alone says nothing; what the run was told does."""
    file = tokenizer_folder(tmp_path / "t", end="<stop>")
    assert write_tokenizer(tmp_path / "out", file, "<stop>")["eos_token_id"] == 0
    assert BPETokenizer(tmp_path / "out" / "tokenizer.json").eod == 0


def test_what_transformers_5_writes_is_read_by_transformers_4_and_nemo(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|im_end|>"],
        **CONFIG,
        "chat_template": "x",
    }
    parent = tokenizer_folder(tmp_path / "parent", added=ADDED, tokenizer_config=config).parent
    write_tokenizer(tmp_path / "out", parent)
    found = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (found.eos_token_id, found.pad_token_id, found.chat_template) == (2048, 2050, "x")
    assert "<|im_end|>" in found.all_special_tokens
    assert write_tokenizer(tmp_path / "again", tmp_path / "out")["eos_token_id"] == 2048
    here = (tmp_path / "again" / "tokenizer_config.json").read_bytes()
    assert here == (tmp_path / "out" / "tokenizer_config.json").read_bytes()
